"""A GGUF file as base model: imported once into an ordinary folder of safetensors.

The adapter then names a folder that PEFT and transformers load directly, and the next start takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.model.gguf_config import gguf_config
from loratune.run.cache_folder import cache_dir
from loratune.run.digest import file_sha256
from loratune.run.errors import RecipeError, RunError

if TYPE_CHECKING:
    from collections.abc import Callable

    from loratune.run.progress import Progress

_MAGIC = b"GGUF"
_HEADER_BYTES = 64 * 2**20  # larger than any header with its vocabulary
_VERSION = "2"  # of what is made of a file; folders of other versions are not used


def imported_folder(file: Path) -> Path:
    """Return the folder of a GGUF file's import, whether or not it exists; its name depends on the file's content."""
    return cache_dir() / "models" / f"{file.stem}-{file_sha256(file)[:16]}-{_VERSION}"


def check_gguf(file: Path) -> None:
    """Check that a file is GGUF.

    Raises:
        RecipeError: It is not.
    """
    with file.open("rb") as stream:
        magic = stream.read(4)
    if magic != _MAGIC:
        raise RecipeError(f"not a GGUF file: it begins with {magic!r}", file=file, fix="give the path of a GGUF model")


def describe_gguf(file: Path, progress: Progress) -> Path:
    """Return a folder with config, tokenizer and chat template of a GGUF file; create it from its header if needed.

    Raises:
        RunError: transformers cannot read this GGUF file.
    """
    with file.open("rb") as stream:
        start = hashlib.sha256(stream.read(_HEADER_BYTES))
    folder = cache_dir() / "descriptions" / f"{file.stem}-{start.hexdigest()[:16]}-{_VERSION}"
    if (folder / "config.json").is_file():
        return folder
    progress.line(f"reading the header of {file.name}: only once, takes some seconds")
    _make(folder, file, progress, _describe)
    return folder


def import_gguf(file: Path, progress: Progress) -> Path:
    """Return the folder with a GGUF file's model in float32, its tokenizer and chat template; create it if needed.

    float32 holds every value of the quantized weights exactly.

    Raises:
        RunError: transformers cannot read this GGUF file.
    """
    folder = imported_folder(file)
    if (folder / "config.json").is_file():
        return folder
    progress.line(f"importing {file.name} into {folder}: only once, takes about half a minute for 135 M parameters")
    _make(folder, file, progress, _expand)
    return folder


def _make(folder: Path, file: Path, progress: Progress, fill: Callable[[Path, Any, Path], None]) -> None:
    """Create a folder atomically, filled by a function of file, its configuration, and folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        try:
            config = gguf_config(file, progress)
            with redirect_stderr(StringIO()):  # the libraries' progress bars
                fill(file, config, Path(temporary))
        except (ValueError, KeyError, NotImplementedError) as error:
            raise RunError(
                f"transformers cannot read it: {error}", file=file, fix="use the model's safetensors folder instead"
            ) from error
        try:
            Path(temporary).rename(folder)
        except OSError:  # another process was faster, with the same result
            if not (folder / "config.json").is_file():
                raise
        else:
            Path(temporary).mkdir()  # TemporaryDirectory removes it, and fails if it is missing


def _describe(file: Path, config: Any, folder: Path) -> None:
    from transformers import AutoTokenizer

    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def _expand(file: Path, config: Any, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, config=config, dtype=torch.float32
    )
    # The weights are expanded now, and the saved config must not claim that they are quantized.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    (folder / "source.json").write_text(json.dumps({"gguf": str(file), "sha256": file_sha256(file)}))
