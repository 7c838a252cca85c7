"""The `model` section of a recipe."""

from __future__ import annotations

from typing import Literal

from loratune.recipe.sections.base import Section
from loratune.recipe.tasks import TaskName


class ModelSection(Section):
    """The base model."""

    name: str = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    """A Hugging Face Hub id, a local folder, a `.gguf` file, or `package:NAME/FILE.gguf` for a file inside an installed
    Python package."""

    revision: str | None = None
    """The branch, tag or commit of a Hub model. A branch is resolved to its commit, which `lock.json` records."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The precision of the frozen base weights. `auto`: bfloat16 if this machine computes it faster, otherwise
    float32.
    The adapter itself is always trained in float32."""

    quantization: Literal[
        "none", "fp8", "nf4", "int8", "int8_weight_only", "int4_weight_only", "float8_weight_only"
    ] = "none"
    """Quantizes the frozen linear layers; the adapter stays in float32. By bitsandbytes: `nf4` (4-bit QLoRA) and `int8`
    (8-bit weights and activations, LLM.int8). By torchao, weights only: `int8_weight_only`, `int4_weight_only` and
    `float8_weight_only`. `fp8`: matrix products in 8-bit floats on NVIDIA Hopper GPUs and later, meant for speed;
    experimental, since it has never run on one. It keeps each weight in two layouts, so it needs as much memory as
    bfloat16."""

    trust_remote_code: bool = False
    """Whether Python files that come with the model may run on this machine, with your rights."""

    task: TaskName = "causal_lm"
    """What the model learns: `causal_lm`, to generate text (supervised fine-tuning, SFT); `sequence_classification`, to
    assign a class to a text; `preference`, to prefer the better of two answers (DPO and related losses). A top-level
    `task:` outside the sections sets the same field."""
