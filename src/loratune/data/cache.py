"""A cache of prepared examples on disk, keyed by a fingerprint of everything that decides them.

An entry is one safetensors file, `KEY.safetensors`: tensors, and the SHA-256 of their bytes, which is checked on
reading. It is written under another name and renamed, so other processes see all of it or nothing. The cache never
stops a run: an unreadable entry is made again, one that cannot be written is not kept, and both are reported.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import importlib.metadata
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from loratune.recipe import roles

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loratune.run.progress import Progress

Arrays = dict[str, npt.NDArray[Any]]

LIMIT_BYTES = 8 * 2**30
"""Maximum size of all entries; the least recently used are deleted first."""

_ABANDONED_SECONDS = 24 * 3600  # age of a temporary file that a crashed process left
_PACKAGES = ("tokenizers", "transformers", "jinja2", "numpy")


def cache_key(tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]) -> str:
    """Return a fingerprint of the tokenizer with its template, the code that prepares data, and `settings`.

    Args:
        tokenizer: The tokenizer of the base model.
        settings: The policy and the fingerprints of the data, as JSON.
    """
    parts = {
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "kind": [type(tokenizer).__name__, tokenizer.special_tokens_map],
        "template": tokenizer.chat_template,
        "today": dt.datetime.now().astimezone().date().isoformat() if _writes_date(tokenizer) else None,
        "code": _code(),
        "versions": [platform.python_version(), *map(importlib.metadata.version, _PACKAGES)],
        "settings": settings,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    return "strftime_now" in str(tokenizer.chat_template)


def code_files() -> list[Path]:
    """Return all source files that decide an example's tokens and mask."""
    # `roles` turns the recipe's `train_on` into roles; every other setting is part of the key by its value.
    return [*sorted(Path(__file__).parent.rglob("*.py")), Path(roles.__file__)]


def _code() -> str:
    digest = hashlib.sha256()
    for path in code_files():
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Cache:
    """A cache in one folder.

    Args:
        folder: The folder; created when first written to.
        progress: Receives warnings.
    """

    def __init__(self, folder: Path, progress: Progress) -> None:
        self._folder = folder
        self._progress = progress

    def path(self, key: str) -> Path:
        """Return where an entry is, or would be."""
        return self._folder / f"{key}.safetensors"

    def load(self, key: str) -> Arrays | None:
        """Return the arrays stored under this key; None if there are none, or they are damaged."""
        path = self.path(key)
        try:
            with safe_open(path, framework="np") as stream:
                arrays = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a dictionary
                expected = (stream.metadata() or {}).get("sha256")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            self._warn_damaged(path, str(error))
            return None
        if _digest(arrays) != expected:
            self._warn_damaged(path, "its checksum is wrong")
            return None
        with contextlib.suppress(OSError):  # it may be read-only
            os.utime(path)  # marks it as recently used
        return arrays

    def store(self, key: str, arrays: Arrays) -> None:
        """Store arrays under a key, and delete the least recently used entries above the size limit."""
        temporary: Path | None = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._folder, prefix=f".{key}-")
            os.close(handle)
            temporary = Path(name)
            save_file(arrays, temporary, metadata={"sha256": _digest(arrays)})
            temporary.replace(self.path(key))
            self._shrink()
        except (OSError, SafetensorError) as error:
            self._progress.warn(f"the prepared examples could not be cached in {self._folder}: {error}")
            if temporary is not None:
                temporary.unlink(missing_ok=True)

    def _warn_damaged(self, path: Path, reason: str) -> None:
        self._progress.warn(f"cached examples are damaged and will be prepared again: {path}: {reason}")

    def _shrink(self) -> None:
        now = time.time()
        entries = []
        for path in self._folder.iterdir():
            try:
                status = path.stat()
            except FileNotFoundError:  # another process deleted it
                continue
            if path.suffix == ".safetensors":
                entries.append((status.st_mtime, status.st_size, path))
            elif path.name.startswith(".") and now - status.st_mtime > _ABANDONED_SECONDS:
                path.unlink(missing_ok=True)
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries)[:-1]:  # never the newest
            if total <= LIMIT_BYTES:
                return
            path.unlink(missing_ok=True)
            total -= size


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()
