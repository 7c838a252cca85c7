"""What the settings of the adapter do to the user's own model, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from loratune.model.adapter.modules_to_save import fully_trained_in_words
from loratune.model.adapter.patterns import rank_of
from loratune.model.adapter.target_parameters import target_parameters_in_words
from loratune.model.adapter.variants import num_trainable, saved_rank, scale_in_words, scale_of
from loratune.planning.memory.optimizer import state_bytes
from loratune.planning.parameters import ParameterCount, count_parameters
from loratune.planning.presets import count_presets
from loratune.recipe.recipe import VARIANTS, LoraSection, Optimizer
from loratune.workflows.guidance.facts import AlternativeRow, Facts, nearby_powers, size

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def rank_row(count: ParameterCount, lora: LoraSection, optimizer: Optimizer) -> AlternativeRow:
    """One rank: parameters, sizes, and the scale that this alpha gives it. While training there are weight and gradient in
    float32, and the optimizer's state."""
    state = state_bytes(optimizer, [item.matrix for item in count.per_module], lora, count.whole_shapes)
    return {
        "r": str(lora.r),
        "trainable": f"{count.trainable:,}",
        "share": f"{count.trainable / count.total:.3%}",
        "adapter file": size(count.adapter_bytes),
        "while training": size(8 * count.trainable + state),
        f"{scale_in_words(lora)} at alpha {lora.alpha:g}": f"{scale_of(lora):.4g}",
    }


def _rank(facts: Facts) -> str:
    r, now = facts.prepared.recipe.lora.r, facts.prepared.adapter.parameters
    lora = facts.prepared.recipe.lora
    verb = "double" if lora.variant != "dora" and not lora.rank_pattern and not now.whole else "raise"
    return f"{now.trainable:,} trainable ({now.trainable / now.total:.2%}); r {2 * r} would {verb} it to {facts.count(2 * r).trainable:,}"


def _rank_table(facts: Facts) -> list[AlternativeRow]:
    lora, optimizer = facts.prepared.recipe.lora, facts.prepared.recipe.train.optimizer
    return [rank_row(facts.count(r), lora.model_copy(update={"r": r}), optimizer) for r in nearby_powers(lora.r)]


def _alpha(facts: Facts) -> str:
    lora = facts.prepared.recipe.lora
    return f"the update B·A·x is multiplied by {scale_in_words(lora)} = {scale_of(lora):.4g}"


def _alpha_table(facts: Facts) -> list[AlternativeRow]:
    lora = facts.prepared.recipe.lora
    name = f"scale {scale_in_words(lora)} at r {lora.r}"
    alphas = sorted({*nearby_powers(lora.r), lora.alpha})
    return [
        {"alpha": f"{alpha:g}", name: f"{scale_of(lora.model_copy(update={'alpha': alpha})):.4g}"} for alpha in alphas
    ]


def _dropout(facts: Facts) -> str:
    widest = max((item.matrix for item in facts.prepared.adapter.parameters.per_module), key=lambda matrix: matrix.d_in)
    dropout = facts.prepared.recipe.lora.dropout
    leaf = widest.name.rpartition(".")[2]
    return f"of the {widest.d_in:,} inputs of {leaf}, {dropout * widest.d_in:,.0f} are zero on average for a token"


def _targets(facts: Facts) -> str:
    return f"{len(facts.prepared.adapter.targets)} matrices: {facts.prepared.adapter.targets_in_words}"


def _targets_table(facts: Facts) -> list[AlternativeRow]:
    return preset_rows(facts.model, facts.prepared.recipe.lora, facts.head)


def preset_rows(model: PreTrainedModel, lora: LoraSection, head: Sequence[str] = ()) -> list[AlternativeRow]:
    """One row a preset: its matrices, and what they train at this rank, by this variant."""
    rows = []
    for preset in count_presets(model, lora, head):
        count = preset.parameters
        if count is None:  # the model has no such matrix, or it is trained whole
            continue
        rows.append(
            {
                "targets": preset.name,
                "matrices": preset.targets_in_words,
                "trainable": f"{count.trainable:,}",
                "share": f"{count.trainable / count.total:.3%}",
                "adapter file": size(count.adapter_bytes),
            }
        )
    return rows


def _layers(facts: Facts) -> str:
    total = facts.model.config.get_text_config().num_hidden_layers
    return f"{facts.prepared.adapter.targets_in_words} (the model has {total})"


def _start_from(facts: Facts) -> str:
    start, count = facts.prepared.adapter.start, len(facts.prepared.adapter.targets)
    return (
        f"{count} matrices begin as in {start}"
        if start
        else f"{count} matrices begin fresh, and change nothing at first"
    )


def _rank_pattern(facts: Facts) -> str:
    lora = facts.prepared.recipe.lora
    return _counted(rank_of(lora, name) for name in facts.prepared.adapter.targets) + " by rank"


def _alpha_pattern(facts: Facts) -> str:
    lora = facts.prepared.recipe.lora
    return (
        _counted(f"{scale_of(lora, name):.4g}" for name in facts.prepared.adapter.targets)
        + f" by {scale_in_words(lora)}"
    )


def _modules_to_save(facts: Facts) -> str:
    whole = facts.prepared.adapter.parameters.whole
    if not whole:
        return "nothing is trained beside the adapter"
    trainable = sum(item.trainable for item in whole)
    return f"{trainable:,} parameters of {fully_trained_in_words(whole)}, beside {facts.prepared.adapter.parameters.in_adapter:,} of the adapter"


def _new_tokens(facts: Facts) -> str:
    ids = facts.prepared.model.new_tokens
    if not ids:
        return "the tokenizer stays as it is"
    seen = sum(int((example.input_ids >= ids[0]).sum()) for example in facts.prepared.data.train)
    return f"{len(ids)} tokens, numbers {ids[0]} to {ids[-1]}, {seen:,} of them in the training examples"


def _target_parameters(facts: Facts) -> str:
    stacks = facts.prepared.adapter.parameters.stacks
    if not stacks:
        return "linear modules alone are adapted"
    trainable = sum(num_trainable(facts.prepared.recipe.lora, stack) for stack in stacks)
    return f"{trainable:,} parameters for {target_parameters_in_words(stacks)}"


def _counted(values: Iterable[object]) -> str:
    """`48 of 16, 8 of 4 matrices`, the most first."""
    found = Counter(values).most_common()
    return f"matrices: {', '.join(f'{count} of {value}' for value, count in found)}"


def _variant(facts: Facts) -> str:
    lora, now = facts.prepared.recipe.lora, facts.prepared.adapter.parameters
    return f"{now.trainable:,} trainable, scaled by {scale_of(lora):.4g}; saved with rank {saved_rank(lora)}"


def _variant_table(facts: Facts) -> list[AlternativeRow]:
    return variant_rows(facts.model, facts.prepared.adapter.targets, facts.prepared.recipe.lora, facts.head)


def variant_rows(
    model: PreTrainedModel, targets: Sequence[str], lora: LoraSection, head: Sequence[str] = ()
) -> list[AlternativeRow]:
    """One row a variant: what it trains and saves of these matrices."""
    rows = []
    for variant in VARIANTS:
        other = lora.model_copy(update={"variant": variant})
        count = count_parameters(model, targets, other, head)
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
    "lora.rank_pattern": _rank_pattern,
    "lora.alpha_pattern": _alpha_pattern,
    "lora.modules_to_save": _modules_to_save,
    "lora.new_tokens": _new_tokens,
    "lora.target_parameters": _target_parameters,
}

TABLES: dict[str, Callable[[Facts], list[AlternativeRow]]] = {
    "lora.r": _rank_table,
    "lora.alpha": _alpha_table,
    "lora.targets": _targets_table,
    "lora.variant": _variant_table,
}
