"""Quantize a GGUF file with llama.cpp's own quantizer, through llama-cpp-python."""

from __future__ import annotations

import ctypes
import logging
from collections import Counter
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from gguf import GGUFReader, LlamaFileType

from loratune.run.errors import MachineError, RecipeError, RunError
from loratune.run.extras import pip_install

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

QUANTIZED_HERE = ("q8_0",)
"""Quantized types that loratune writes itself."""
QUANTIZER_TYPES = (
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "iq4_xs", "q4_0", "q4_k_s", "q4_k_m", "q4_1", "q5_0", "q5_k_s", "q5_k_m",
    "q5_1", "q6_k",
)  # fmt: skip
"""Types that llama.cpp's quantizer writes without an importance matrix."""
TYPES_BY_SIZE = (*QUANTIZER_TYPES, *QUANTIZED_HERE, "f16", "bf16", "f32")
"""All types of a merged model, the smallest files first."""


def check_types(outtypes: Iterable[str]) -> None:
    """Check that these types can be written here.

    Raises:
        RecipeError: There is no such type.
        MachineError: It needs llama-cpp-python, which is not installed.
    """
    for outtype in outtypes:
        if outtype not in TYPES_BY_SIZE:
            raise RecipeError(f"--outtype {outtype} is not a type", fix=f"one of {', '.join(TYPES_BY_SIZE)}")
        if outtype in QUANTIZER_TYPES and find_spec("llama_cpp") is None:
            raise MachineError(
                f"llama.cpp's quantizer writes {outtype}, but llama-cpp-python is not installed",
                fix=f"{pip_install('gguf')}, or --outtype q8_0",
            )


def types_in(file: Path) -> str:
    """Return which types the matrices of a file have, such as `Q5_0 (120), Q4_K (30)`."""
    kinds = Counter(tensor.tensor_type.name for tensor in GGUFReader(file).tensors if len(tensor.shape) > 1)
    return ", ".join(f"{name} ({count})" for name, count in kinds.most_common())


def quantize_file(source: Path, file: Path, outtype: str) -> None:
    """Quantize a GGUF file.

    Matrices whose row length is not a multiple of 256 get a type with shorter blocks, which llama.cpp chooses.

    Args:
        source: A GGUF file in float32, float16 or bfloat16.
        file: The file to write.
        outtype: One of `QUANTIZER_TYPES`.

    Raises:
        RunError: llama.cpp could not quantize it.
    """
    import llama_cpp

    # It warns of each matrix; `types_in` says the same in a line. CRITICAL, since its names of levels are one off.
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = int(LlamaFileType[f"MOSTLY_{outtype.upper()}"])
    settings.nthread = torch.get_num_threads()
    if llama_cpp.llama_model_quantize(str(source).encode(), str(file).encode(), ctypes.byref(settings)):
        raise RunError(f"llama.cpp could not quantize the model to {outtype}", file=source, fix="another --outtype")
