"""What the advice on a run is given on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loratune.data.batch import num_supervised
from loratune.data.prepare import PreparedData
from loratune.data.prompts import stop_token_ids
from loratune.model.load import BaseModel
from loratune.model.stops import generation_stops
from loratune.planning.advice import Facts
from loratune.planning.compatibility import unknown_to_gguf
from loratune.planning.presets import PresetCount, adapts_feed_forward
from loratune.recipe import Recipe
from loratune.recipe_tasks import is_classification

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def advice_facts(
    recipe: Recipe,
    base: BaseModel,
    tokenizer: PreTrainedTokenizerBase,
    model: Any,
    targets: tuple[str, ...],
    data: PreparedData,
    *,
    presets: Sequence[PresetCount],
    trainable: int,
    steps: int,
) -> Facts:
    """What advice is given on; the arguments are parts of the `Preparation`."""
    writes = not is_classification(recipe)
    return Facts(
        recipe=recipe,
        num_examples=data.num_examples,
        num_steps=steps,
        num_supervised_tokens=round(data.scale * sum(num_supervised(example) for example in data.train)),
        num_cut=sum(finding["kind"] == "cut" for finding in data.report["train"]["findings"]),
        trainable=trainable,
        feed_forward=adapts_feed_forward(targets, presets),
        architecture=type(model).__name__,
        unknown_to_gguf=unknown_to_gguf(targets) if writes else (),
        stop_token=_stop_token(tokenizer, data) if writes else "",
        generation_stops=generation_stops(base, model.config.get_text_config(), tokenizer) if writes else (),
        prompt_check=data.report["prompts"],
    )


def _stop_token(tokenizer: PreTrainedTokenizerBase, data: PreparedData) -> str:
    if data.report["train"]["format"] == "text":
        return ""
    return str(tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer)[0]))
