"""The `lora` section of a recipe."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator

from loratune.recipe.checks import check_once, check_regular_expressions
from loratune.recipe.sections.base import Contradiction, Float, Int, Section

Variant = Literal["plain", "rslora", "dora", "pissa", "olora", "eva", "loftq"]
TargetPreset = Literal["minimal", "balanced", "attention", "complete"]

VARIANTS: tuple[str, ...] = get_args(Variant)
TARGET_PRESETS: tuple[str, ...] = get_args(TargetPreset)
BEGINS_AS_BASE = ("plain", "rslora", "dora")
"""Values of `lora.variant` whose fresh adapter leaves base and model as they are."""


class LoraSection(Section):
    """The adapter: h = Wx + (alpha/r)·B·A·dropout(x), with W frozen."""

    r: Int = Field(default=16, ge=1)
    """The LoRA rank: the inner dimension of B·A. A d×k matrix gets r·(d+k) trainable parameters."""

    alpha: Float = Field(default=32, gt=0)
    """The LoRA scaling: the update B·A is multiplied by alpha/r. Often twice the rank."""

    dropout: Float = Field(default=0.05, ge=0, lt=1)
    """The probability with which each input of the adapter is zeroed during training."""

    targets: TargetPreset | tuple[str, ...] = Field(default="balanced", union_mode="left_to_right")
    """The adapted matrices (PEFT's `target_modules`): `minimal` (query), `balanced` (query, value), `attention` (query,
    key, value, output), `complete` (all linear layers of attention and feed-forward), or a list of module names."""

    layers: str | tuple[Int, ...] = Field(default="all", union_mode="left_to_right")
    """The decoder layers to adapt: `all`, `first N`, `last N`, or a list of layer numbers, counted from 0."""

    variant: Variant = "plain"
    """How the adapter is scaled and initialized. `plain`: LoRA; `rslora`: scaled by alpha/√r; `dora`: adds a trained
    magnitude for each output. Initializations: `pissa`, from the largest singular values of W; `olora`, from its QR
    decomposition (both are saved as a plain adapter of rank 2r); `eva`, A from the activations of the training data;
    `loftq`, from the quantization error of nf4."""

    start_from: str | None = None
    """A saved adapter to continue from (warm start): a folder in PEFT format, or a Hub id. Its rank, alpha, variant and
    target modules must match the recipe."""

    rank_pattern: dict[str, Annotated[Int, Field(ge=1)]] = Field(default={})
    """Ranks of single modules, overriding `r`. Each key is a regular expression that matches the last parts or the full
    name of a module: `{o_proj: 4, 'layers.0.mlp.*': 64}`. The first match counts."""

    alpha_pattern: dict[str, Annotated[Float, Field(gt=0)]] = Field(default={})
    """Like `rank_pattern`, overriding `alpha`. A module with its own rank but without its own alpha is scaled by
    `alpha` / its rank."""

    modules_to_save: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Modules that are fully trained in addition to the adapter and saved with it, such as `embed_tokens`, `lm_head` or
    `norm`, named by their last dotted parts. A head that is tied to the embedding is trained as one tensor with it."""

    new_tokens: tuple[Annotated[str, Field(min_length=1, pattern=r"^\S+$")], ...] = ()
    """Tokens to add to the vocabulary, such as `<|tool|>`. Only their rows of the embedding and the output head are
    trained, and they are saved with the adapter."""

    target_parameters: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Parameters to adapt that belong to no linear module, such as `mlp.experts.gate_up_proj`, the weights of all
    experts of a mixture-of-experts (MoE) layer; each expert gets its own A and B. Requires `dropout: 0`."""

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, value: str | tuple[int, ...]) -> str | tuple[int, ...]:
        if isinstance(value, str) and not re.fullmatch(r"all|(first|last) [1-9][0-9]*", value):
            raise Contradiction(
                f"lora.layers is {value}", fix="use all, first N, last N, or a list of layer numbers from 0"
            )
        return value

    @field_validator("targets", "layers", "modules_to_save", "new_tokens", "target_parameters")
    @classmethod
    def _check_once(cls, value: Any, info: ValidationInfo) -> Any:
        return check_once(f"lora.{info.field_name}", value)

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _check_patterns(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return check_regular_expressions(f"lora.{info.field_name}", value)
