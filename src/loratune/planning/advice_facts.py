"""The facts that advice on a run is based on, from its recipe, model, data and plan."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loratune.data.batch import num_supervised
from loratune.data.prompts import stop_token_ids
from loratune.model.load import generation_stops
from loratune.planning.task import planned_task

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from loratune.data.prepared import PreparedData
    from loratune.planning.parts import RunParts
    from loratune.planning.presets import PresetCount
    from loratune.recipe.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class AdviceFacts:
    """The facts that advice on a run is based on.

    Attributes:
        recipe: The recipe with every `auto` resolved.
        num_examples: Training examples of an epoch.
        num_steps: Optimizer steps of the run.
        num_devices: Devices that the plan is for.
        num_supervised_tokens: Supervised tokens of one epoch.
        num_cut: Examples whose answers `data.max_length` truncates.
        trainable: Trained parameters.
        feed_forward: Whether a feed-forward matrix is adapted; None if the model has none that could be.
        architecture: Class of the base model.
        unknown_to_gguf: Adapted modules that no architecture of llama.cpp has.
        stop_token: The token with which the chat template ends an answer; empty for plain text.
        generation_stops: The tokens at which the model's generation settings stop.
        prompt_check: `PromptCheck.as_record()`; empty for plain text.
    """

    recipe: Recipe
    num_examples: int
    num_steps: int
    num_supervised_tokens: int
    num_cut: int
    trainable: int
    feed_forward: bool | None
    architecture: str
    num_devices: int = 1
    unknown_to_gguf: Sequence[str] = ()
    stop_token: str = ""
    generation_stops: Sequence[str] = ()
    prompt_check: dict[str, Any] = field(default_factory=dict)


def advice_facts(recipe: Recipe, parts: RunParts, presets: Sequence[PresetCount], *, num_steps: int) -> AdviceFacts:
    """Collect the facts that advice on a run is based on.

    Args:
        recipe: The recipe with every `auto` resolved.
        parts: Model, adapter and data.
        presets: The target presets, counted on this model.
        num_steps: Optimizer steps of the run.
    """
    model, adapter, data = parts.model, parts.adapter, parts.data
    writes = planned_task(recipe).writes_text
    return AdviceFacts(
        recipe=recipe,
        num_examples=data.num_examples,
        num_steps=num_steps,
        num_supervised_tokens=round(data.scale * sum(num_supervised(example) for example in data.train)),
        num_cut=sum(finding["kind"] == "cut" for finding in data.report["train"]["findings"]),
        trainable=adapter.parameters.trainable,
        feed_forward=_adapts_feed_forward(adapter.targets, presets),
        architecture=type(model.skeleton).__name__,
        unknown_to_gguf=unknown_to_gguf(adapter.targets) if writes else (),
        stop_token=_stop_token(model.tokenizer, data) if writes else "",
        generation_stops=generation_stops(model.base, model.text_config, model.tokenizer) if writes else (),
        prompt_check=data.report["prompts"],
    )


def _stop_token(tokenizer: PreTrainedTokenizerBase, data: PreparedData) -> str:
    if data.report["train"]["format"] == "text":
        return ""
    return str(tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer)[0]))


_EXPERT = re.compile(r"\.experts\.\d+\.")


_LAYER = re.compile(r"\.\d+\.")


def unknown_to_gguf(targets: Sequence[str]) -> tuple[str, ...]:
    """Return the adapted modules that no architecture of llama.cpp has, as `model.layers.{bid}.odd`.

    llama.cpp's converter of adapters looks each module up by name in the tables of the `gguf` package.

    Args:
        targets: Full module names.
    """
    known = set(_names_in_gguf())
    return tuple(name for name in dict.fromkeys(map(_template, targets)) if name not in known)


def _names_in_gguf() -> Iterator[str]:
    from gguf.tensor_mapping import TensorNameMap

    # Read the class's tables: constructing a TensorNameMap for one architecture changes those of all others for good.
    for table in (TensorNameMap.block_mappings_cfg, *TensorNameMap.arch_block_mappings_cfg.values()):
        for names in table.values():
            yield from names


def _template(name: str) -> str:
    """Return the name as the tables spell it: layers by number, experts as one, no towers of other modalities."""
    name = _EXPERT.sub(".experts.", name.replace("language_model.", ""))
    return _LAYER.sub(".{bid}.", name, count=1)


def _adapts_feed_forward(targets: tuple[str, ...], presets: Sequence[PresetCount]) -> bool | None:
    """Return whether feed-forward matrices are adapted; None if the model has none that is recognized."""
    by_name = {preset.name: set(preset.targets) for preset in presets}
    feed_forward = by_name["complete"] - by_name["attention"]
    return bool(feed_forward & set(targets)) if feed_forward else None
