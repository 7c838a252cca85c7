"""Have llama.cpp's own scripts write GGUF files, from a checkout of llama.cpp that the user names.

Its scripts know more families than `architectures`. They run as separate programs, with this Python.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from loratune.run.errors import MachineError, RecipeError, RunError
from loratune.run.extras import pip_install

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MODEL_SCRIPT, ADAPTER_SCRIPT = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
_SHOWN_LINES = 6


def check_checkout(checkout: Path, *, merged: bool) -> None:
    """Check that a folder has llama.cpp's converter.

    Raises:
        RecipeError: It has not.
    """
    script = checkout / (MODEL_SCRIPT if merged else ADAPTER_SCRIPT)
    if not script.is_file():
        raise RecipeError(
            f"--llama-cpp {checkout}: no {script.name} in it",
            file=checkout,
            fix="git clone https://github.com/ggml-org/llama.cpp, and name that folder",
        )


def check_readable(config: Any, *, merged: bool) -> None:
    """Check that a file of a family that only llama.cpp's converter knows can be read back here.

    Raises:
        MachineError: It cannot.
    """
    if find_spec("llama_cpp") is not None or (merged and config.model_type in GGUF_SUPPORTED_ARCHITECTURES):
        return
    raise MachineError(
        f"only llama.cpp can read a GGUF {'model' if merged else 'adapter'} of {config.model_type} back to compare it, "
        "and llama-cpp-python is not installed",
        fix=pip_install("gguf"),
    )


def convert_model(checkout: Path, folder: Path, file: Path, outtype: str) -> None:
    """Have a folder of safetensors written as a GGUF file.

    Args:
        checkout: A checkout of llama.cpp.
        folder: The model, its tokenizer and its configuration.
        file: The file to write.
        outtype: `f32`, `f16`, `bf16` or `q8_0`.

    Raises:
        RunError: The script fails, or writes nothing.
    """
    _run(checkout / MODEL_SCRIPT, [str(folder), "--outtype", outtype], file)


def convert_lora(checkout: Path, adapter: Path, base: Path, file: Path) -> None:
    """Have an adapter in PEFT's format written as a GGUF file, in float32.

    The script reads one rank and `lora_alpha` alone: no rsLoRA, no patterns.

    Args:
        checkout: A checkout of llama.cpp.
        adapter: The adapter's folder.
        base: The folder with the base's configuration.
        file: The file to write.

    Raises:
        RunError: The script fails, or writes nothing.
    """
    _run(checkout / ADAPTER_SCRIPT, [str(adapter), "--base", str(base), "--outtype", "f32"], file)


def _run(script: Path, arguments: Sequence[str], file: Path) -> None:
    words = [sys.executable, str(script.resolve()), *arguments, "--outfile", str(file)]
    done = subprocess.run(  # noqa: S603 - the script that the user named
        words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, errors="replace"
    )
    said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    shown = "\n".join(said[-_SHOWN_LINES:]) or "it says nothing"
    if done.returncode:
        needs = script.parent / "requirements" / f"requirements-{script.stem}.txt"
        raise RunError(
            f"llama.cpp's {script.name} ended with {done.returncode}:\n{shown}",
            file=script,
            fix=f"a newer checkout, if it does not know this model; pip install -r {needs}, if a package is missing",
        )
    if not file.is_file() or not file.stat().st_size:
        raise RunError(
            f"llama.cpp's {script.name} wrote no {file.name}:\n{shown}",
            file=script,
            fix="another checkout of llama.cpp",
        )
