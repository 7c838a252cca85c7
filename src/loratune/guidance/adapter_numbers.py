"""What the settings of the adapter do to the user's own model, in numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from loratune.guidance.facts import Facts, Row, around, size
from loratune.model.targets import describe_targets, resolve_targets
from loratune.model.variants import saved_rank, scale_in_words, scale_of
from loratune.planning.optimizer_memory import state_bytes
from loratune.planning.parameters import ParameterCount, count_parameters
from loratune.recipe import TARGET_PRESETS, VARIANTS, LoraSection, Optimizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def rank_row(count: ParameterCount, lora: LoraSection, optimizer: Optimizer) -> Row:
    """One rank: parameters, sizes, and the scale that this alpha gives it. While training there are weight and gradient in
    float32, and the optimizer's state."""
    state = state_bytes(optimizer, [item.matrix for item in count.per_module], lora, count.whole.values())
    return {
        "r": str(lora.r),
        "trainable": f"{count.trainable:,}",
        "share": f"{count.trainable / count.total:.3%}",
        "adapter file": size(count.adapter_bytes),
        "while training": size(8 * count.trainable + state),
        f"{scale_in_words(lora)} at alpha {lora.alpha:g}": f"{scale_of(lora):.4g}",
    }


def _rank(facts: Facts) -> str:
    r, now = facts.prepared.recipe.lora.r, facts.prepared.parameters
    exact = facts.prepared.recipe.lora.variant != "dora" and not now.whole
    verb = "double" if exact else "raise"
    return f"{now.trainable:,} trainable ({now.trainable / now.total:.2%}); r {2 * r} would {verb} it to {facts.count(2 * r).trainable:,}"


def _rank_table(facts: Facts) -> list[Row]:
    lora, optimizer = facts.prepared.recipe.lora, facts.prepared.recipe.train.optimizer
    return [rank_row(facts.count(r), lora.model_copy(update={"r": r}), optimizer) for r in around(lora.r)]


def _alpha(facts: Facts) -> str:
    lora = facts.prepared.recipe.lora
    return f"the update B·A·x is multiplied by {scale_in_words(lora)} = {scale_of(lora):.4g}"


def _alpha_table(facts: Facts) -> list[Row]:
    lora = facts.prepared.recipe.lora
    name = f"scale {scale_in_words(lora)} at r {lora.r}"
    alphas = sorted({*around(lora.r), lora.alpha})
    return [
        {"alpha": f"{alpha:g}", name: f"{scale_of(lora.model_copy(update={'alpha': alpha})):.4g}"} for alpha in alphas
    ]


def _dropout(facts: Facts) -> str:
    widest = max((item.matrix for item in facts.prepared.parameters.per_module), key=lambda matrix: matrix.d_in)
    dropout = facts.prepared.recipe.lora.dropout
    leaf = widest.name.rpartition(".")[2]
    return f"of the {widest.d_in:,} inputs of {leaf}, {dropout * widest.d_in:,.0f} are zero on average for a token"


def _targets(facts: Facts) -> str:
    return f"{len(facts.prepared.targets)} matrices: {facts.prepared.targets_in_words}"


def _targets_table(facts: Facts) -> list[Row]:
    return preset_rows(facts.model, facts.prepared.recipe.lora, facts.whole)


def preset_rows(model: PreTrainedModel, lora: LoraSection, whole: Sequence[str] = ()) -> list[Row]:
    """One row a preset: its matrices, and what they train at this rank, by this variant."""
    rows = []
    for preset in TARGET_PRESETS:
        count = count_parameters(model, resolve_targets(model, preset, lora.layers), lora, whole)
        rows.append(
            {
                "targets": preset,
                "matrices": describe_targets(model, preset, lora.layers),
                "trainable": f"{count.trainable:,}",
                "share": f"{count.trainable / count.total:.3%}",
                "adapter file": size(count.adapter_bytes),
            }
        )
    return rows


def _layers(facts: Facts) -> str:
    total = facts.model.config.get_text_config().num_hidden_layers
    return f"{facts.prepared.targets_in_words} of a model of {total}"


def _start_from(facts: Facts) -> str:
    start, count = facts.prepared.start, len(facts.prepared.targets)
    return (
        f"{count} matrices begin as in {start}"
        if start
        else f"{count} matrices begin fresh, and change nothing at first"
    )


def _variant(facts: Facts) -> str:
    lora, now = facts.prepared.recipe.lora, facts.prepared.parameters
    return f"{now.trainable:,} trainable, scaled by {scale_of(lora):.4g}; saved with rank {saved_rank(lora)}"


def _variant_table(facts: Facts) -> list[Row]:
    return variant_rows(facts.model, facts.prepared.targets, facts.prepared.recipe.lora, facts.whole)


def variant_rows(
    model: PreTrainedModel, targets: Sequence[str], lora: LoraSection, whole: Sequence[str] = ()
) -> list[Row]:
    """One row a variant: what it trains and saves of these matrices."""
    rows = []
    for variant in VARIANTS:
        other = lora.model_copy(update={"variant": variant})
        count = count_parameters(model, targets, other, whole)
        rows.append(
            {
                "variant": variant,
                "trainable": f"{count.trainable:,}",
                f"scale at alpha {lora.alpha:g}": f"{scale_of(other):.4g}",
                "saved rank": str(saved_rank(other)),
                "adapter file": size(count.adapter_bytes),
            }
        )
    return rows


SUMMARIES: dict[str, Callable[[Facts], str]] = {
    "lora.r": _rank,
    "lora.alpha": _alpha,
    "lora.dropout": _dropout,
    "lora.targets": _targets,
    "lora.layers": _layers,
    "lora.variant": _variant,
    "lora.start_from": _start_from,
}

TABLES: dict[str, Callable[[Facts], list[Row]]] = {
    "lora.r": _rank_table,
    "lora.alpha": _alpha_table,
    "lora.targets": _targets_table,
    "lora.variant": _variant_table,
}
