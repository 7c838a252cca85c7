"""Prepared examples on disk, found again by a fingerprint of everything that decides them.

An entry is one safetensors file, `KEY.safetensors`: tensors, and the SHA-256 of their bytes, which is checked on reading.
It is written under another name and renamed, so other processes see it whole or not at all. Nothing here may stop a run:
what cannot be read is made again, what cannot be written is not kept, and both are said aloud.
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
from loratune.run.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Arrays = dict[str, npt.NDArray[Any]]

LIMIT_BYTES = 8 * 2**30
"""The entries that were not used for the longest time are deleted when all together are larger."""

_ABANDONED_SECONDS = 24 * 3600  # a file that a crashed process never finished
_PACKAGES = ("tokenizers", "transformers", "jinja2", "numpy")


def cache_key(tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]) -> str:
    """A fingerprint of the tokenizer with its template, of the code that prepares, and of `settings`.

    Args:
        tokenizer: Of the base model.
        settings: As JSON: the policy, and the fingerprints of the data.
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


def _code() -> str:
    """Return the SHA-256 of all source files that decide what an example's tokens and mask are."""
    digest = hashlib.sha256()
    for path in [*sorted(Path(__file__).parent.rglob("*.py")), Path(roles.__file__)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Cache:
    """The entries in one folder.

    Args:
        folder: Made when first written to.
        progress: Who is told of what went wrong.
    """

    def __init__(self, folder: Path, progress: Progress) -> None:
        self._folder = folder
        self._progress = progress

    def path(self, key: str) -> Path:
        """Where an entry is, or would be."""
        return self._folder / f"{key}.safetensors"

    def load(self, key: str) -> Arrays | None:
        """The arrays that were stored under this key; None where there are none, or they are damaged."""
        path = self.path(key)
        try:
            with safe_open(path, framework="np") as stream:
                arrays = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - no dictionary
                expected = (stream.metadata() or {}).get("sha256")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            self._tell_damage(path, str(error))
            return None
        if _digest(arrays) != expected:
            self._tell_damage(path, "its checksum is wrong")
            return None
        with contextlib.suppress(OSError):  # it may be read-only
            os.utime(path)  # used now
        return arrays

    def store(self, key: str, arrays: Arrays) -> None:
        """Keep arrays under a key, and delete what was not used for long where there is too much."""
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
            self._progress.warn(f"the prepared examples are not kept in {self._folder}: {error}")
            if temporary is not None:
                temporary.unlink(missing_ok=True)

    def _tell_damage(self, path: Path, reason: str) -> None:
        self._progress.warn(f"cached examples are damaged and made again: {path}: {reason}")

    def _shrink(self) -> None:
        now = time.time()
        entries = []
        for path in self._folder.iterdir():
            try:
                status = path.stat()
            except FileNotFoundError:  # another process was first
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
