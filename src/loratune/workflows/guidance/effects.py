"""Effects of the settings that matter most on the user's own model and data, computed, never typed in.

The other settings are explained by their docstring alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import numpy as np

from loratune.data.batch import num_supervised
from loratune.data.steps import EpochPlan, count_occurrences, num_steps, num_steps_per_epoch
from loratune.model.adapter.variants import scale_in_words, scale_of
from loratune.model.device import torch_dtype
from loratune.model.load import positions_of
from loratune.model.quantization.kinds import GROUP, PACKED
from loratune.model.quantization.quantize import base_bytes, quantized_matrices
from loratune.planning.auto import NO_LIMIT
from loratune.planning.memory.optimizer import state_bytes
from loratune.planning.presets import count_presets
from loratune.recipe.recipe import LoraSection, Optimizer
from loratune.recipe.roles import TrainOn, as_written
from loratune.run.errors import DataError
from loratune.workflows.guidance.facts import AlternativeRow, Facts, bytes_in_words, nearby_powers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

    from loratune.data.examples import Example
    from loratune.planning.parameters import ParameterCount

# ---- model and data


def _quantization(facts: Facts) -> str:
    section, memory = facts.prepared.recipe.model, facts.prepared.estimate.memory
    unquantized = facts.base_parameters * torch_dtype(section.dtype).itemsize
    share = memory.weights_bytes / unquantized
    return f"frozen weights take {bytes_in_words(memory.weights_bytes)}, {share:.0%} of their size in {section.dtype}"


def _quantization_table(facts: Facts) -> list[AlternativeRow]:
    dtype_bytes = torch_dtype(facts.prepared.recipe.model.dtype).itemsize
    fills_groups = all(matrix.in_features % GROUP == 0 for _, matrix in quantized_matrices(facts.model))
    kinds = [name for name in PACKED if name != "int4_weight_only" or fills_groups]
    sizes = {"none": facts.base_parameters * dtype_bytes}
    sizes |= {name: base_bytes(facts.model, name, dtype_bytes) for name in kinds}
    return [{"quantization": name, "frozen weights": bytes_in_words(num_bytes)} for name, num_bytes in sizes.items()]


def _train_on(facts: Facts) -> str:
    counts = facts.prepared.data.report["train"].get("trained_messages")
    if counts is None:
        return "the label of each text is trained, not its tokens"
    messages = " and ".join(f"{number:,} {role}" for role, number in counts.items())
    return _trained_share(facts.prepared.data.train) + (f" in {messages} messages" if messages else "")


def _train_on_table(facts: Facts) -> list[AlternativeRow]:
    is_text = facts.prepared.data.report["train"]["format"] == "text"
    chosen = facts.prepared.recipe.data.train_on
    choices: list[TrainOn] = ["all"] if is_text else ["assistant", "last", "all"]
    rows: list[AlternativeRow] = []
    for choice in choices if chosen in choices else [*choices, chosen]:
        try:
            share = _trained_share(facts.render_again(train_on=choice))
        except DataError as error:
            share = f"refused: {error.problem}"
        rows.append({"train_on": as_written(choice), "trained tokens": share})
    return rows


def _trained_share(examples: Sequence[Example]) -> str:
    supervised = sum(num_supervised(example) for example in examples)
    tokens = sum(len(example.input_ids) for example in examples)
    return f"{supervised:,} of {tokens:,} tokens ({supervised / tokens:.1%})"


def _max_length(facts: Facts) -> str:
    part = facts.prepared.data.report["train"]
    return (
        f"{part['truncated']:,} examples truncated, {part['dropped']:,} dropped; "
        f"the longest has {part['length']['max']:,} tokens"
    )


def _max_length_table(facts: Facts) -> list[AlternativeRow]:
    """One row per power of two up to the longest example, rendered without a limit."""
    examples = facts.render_again(max_length="auto", on_long="truncate")
    lengths = [len(example.input_ids) for example in examples]
    positions = positions_of(facts.model.config) or NO_LIMIT
    limits = {2**power for power in range(6, 21) if 2**power < 2 * max(lengths) and 2**power <= positions}
    limits |= {min(int(facts.prepared.recipe.data.max_length), positions)} - {NO_LIMIT}
    supervised = sum(num_supervised(example) for example in examples)
    rows = []
    for limit in sorted(limits):
        lost = sum(int(example.supervised[max(1, limit) :].sum()) for example in examples)
        rows.append(
            {
                "max_length": f"{limit:,}",
                "longer examples": f"{sum(length > limit for length in lengths):,} of {len(examples):,}",
                "tokens lost by truncate": f"{sum(max(0, length - limit) for length in lengths):,}",
                "trained tokens lost": f"{lost:,} ({lost / supervised:.1%})" if supervised else "0",
            }
        )
    return rows


# ---- adapter


def _rank(facts: Facts) -> str:
    lora, now = facts.prepared.recipe.lora, facts.prepared.adapter.parameters
    return (
        f"{now.trainable:,} trainable parameters ({now.trainable / now.total:.2%}); "
        f"r {2 * lora.r} would have {facts.count(2 * lora.r).trainable:,}"
    )


def _rank_table(facts: Facts) -> list[AlternativeRow]:
    lora, optimizer = facts.prepared.recipe.lora, facts.prepared.recipe.train.optimizer
    return [rank_row(facts.count(r), lora.model_copy(update={"r": r}), optimizer) for r in nearby_powers(lora.r)]


def rank_row(count: ParameterCount, lora: LoraSection, optimizer: Optimizer) -> AlternativeRow:
    """Return the row of one rank: parameters, sizes, and the scale at this alpha.

    `while training` counts weights and gradients in float32 and the optimizer state.
    """
    state = state_bytes(optimizer, [item.matrix for item in count.per_module], lora, count.whole_shapes)
    return {
        "r": str(lora.r),
        "trainable": f"{count.trainable:,}",
        "share": f"{count.trainable / count.total:.3%}",
        "adapter file": bytes_in_words(count.adapter_bytes),
        "while training": bytes_in_words(8 * count.trainable + state),
        f"{scale_in_words(lora)} at alpha {lora.alpha:g}": f"{scale_of(lora):.4g}",
    }


def _alpha(facts: Facts) -> str:
    lora = facts.prepared.recipe.lora
    return f"the update B·A·x is multiplied by {scale_in_words(lora)} = {scale_of(lora):.4g}"


def _targets(facts: Facts) -> str:
    return f"{len(facts.prepared.adapter.targets)} matrices: {facts.prepared.adapter.targets_in_words}"


def _targets_table(facts: Facts) -> list[AlternativeRow]:
    return preset_rows(facts.model, facts.prepared.recipe.lora, facts.head)


def preset_rows(model: PreTrainedModel, lora: LoraSection, head: Sequence[str] = ()) -> list[AlternativeRow]:
    """Return one row per preset: its matrices, and what it trains at this rank and variant."""
    rows = []
    for preset in count_presets(model, lora, head):
        count = preset.parameters
        if count is None:  # the model has no such matrix, or the matrix is fully trained
            continue
        rows.append(
            {
                "targets": preset.name,
                "matrices": preset.targets_in_words,
                "trainable": f"{count.trainable:,}",
                "share": f"{count.trainable / count.total:.3%}",
                "adapter file": bytes_in_words(count.adapter_bytes),
            }
        )
    return rows


# ---- training


def _epochs(facts: Facts) -> str:
    per_epoch = num_steps_per_epoch(len(facts.lengths), facts.prepared.recipe.train.batch_size)
    return f"{facts.prepared.estimate.num_steps:,} steps, {per_epoch:,} per epoch"


def _learning_rate(facts: Facts) -> str:
    rates = facts.learning_rates
    return f"peaks at step {int(rates.argmax()) + 1} of {len(rates):,}, averages {rates.mean():.2e}"


def _learning_rate_table(facts: Facts) -> list[AlternativeRow]:
    rates = facts.learning_rates
    at = sorted({0, int(rates.argmax()), *(round(part * (len(rates) - 1)) for part in (0.25, 0.5, 0.75, 1))})
    return [
        {"step": f"{step + 1:,}", "progress": f"{(step + 1) / len(rates):.0%}", "learning rate": f"{rates[step]:.2e}"}
        for step in at
    ]


def _batch_size(facts: Facts) -> str:
    train = facts.prepared.recipe.train
    tokens = sum(facts.lengths) / num_steps_per_epoch(len(facts.lengths), train.batch_size)
    if train.max_steps is not None:
        return f"{tokens:,.0f} tokens per step"
    double = num_steps(len(facts.lengths), 2 * train.batch_size, train.epochs)
    return (
        f"{tokens:,.0f} tokens per step; batch_size {2 * train.batch_size} would take {double:,} steps "
        f"instead of {facts.prepared.estimate.num_steps:,}"
    )


def _batch_size_table(facts: Facts) -> list[AlternativeRow]:
    train, data = facts.prepared.recipe.train, facts.prepared.data
    supervised = data.scale * sum(num_supervised(example) for example in data.train)
    rows = []
    for batch_size in nearby_powers(train.batch_size):
        per_epoch = num_steps_per_epoch(len(facts.lengths), batch_size)
        rows.append(
            {
                "batch_size": str(batch_size),
                "steps": f"{train.max_steps or num_steps(len(facts.lengths), batch_size, train.epochs):,}",
                "tokens per step": f"{sum(facts.lengths) / per_epoch:,.0f}",
                "trained tokens per step": f"{supervised / per_epoch:,.0f}",
            }
        )
    return rows


def _optimizer(facts: Facts) -> str:
    weights = bytes_in_words(4 * facts.prepared.adapter.parameters.trainable)
    return f"state takes {bytes_in_words(_state_bytes(facts))}, next to {weights} of weights and as much of gradients"


def _optimizer_table(facts: Facts) -> list[AlternativeRow]:
    is_dora = facts.prepared.recipe.lora.variant == "dora"  # its magnitudes are vectors, which Muon cannot take
    names = [name for name in get_args(Optimizer) if not (is_dora and name == "muon")]
    return [{"optimizer": name, "state": bytes_in_words(_state_bytes(facts, name))} for name in names]


def _state_bytes(facts: Facts, optimizer: Optimizer | None = None) -> int:
    recipe, parameters = facts.prepared.recipe, facts.prepared.adapter.parameters
    matrices = [item.matrix for item in parameters.per_module]
    return state_bytes(optimizer or recipe.train.optimizer, matrices, recipe.lora, parameters.whole_shapes)


def _token_budget(facts: Facts) -> str:
    return f"{_micro_batches(facts, int(facts.prepared.recipe.train.token_budget)):.1f} micro-batches per step"


def _token_budget_table(facts: Facts) -> list[AlternativeRow]:
    budgets = nearby_powers(int(facts.prepared.recipe.train.token_budget))
    return [
        {"token_budget": f"{budget:,}", "micro-batches per step": f"{_micro_batches(facts, budget):.1f}"}
        for budget in budgets
    ]


def _micro_batches(facts: Facts, budget: int) -> float:
    """Return the mean number of micro-batches over the first hundred steps."""
    train = facts.prepared.recipe.train
    plan = EpochPlan(lengths=facts.lengths, batch_size=train.batch_size, seed=train.seed, epoch=0, token_budget=budget)
    return float(np.mean([len(plan[step].ranks[0]) for step in range(min(100, len(plan)))]))


def _keep_checkpoints(facts: Facts) -> str:
    train = facts.prepared.recipe.train
    num_bytes = 4 * facts.prepared.adapter.parameters.trainable + _state_bytes(facts)
    saves = count_occurrences(train.save_every, steps=facts.prepared.estimate.num_steps, epochs=train.epochs)
    kept = min(saves, train.keep_checkpoints or saves)
    best = " plus the best one" if kept < saves and train.eval_every != "never" else ""
    return f"{kept:,} of {saves:,} checkpoints kept{best}, about {bytes_in_words(num_bytes)} each"


SUMMARIES: dict[str, Callable[[Facts], str]] = {
    "model.quantization": _quantization,
    "data.train_on": _train_on,
    "data.max_length": _max_length,
    "lora.r": _rank,
    "lora.alpha": _alpha,
    "lora.targets": _targets,
    "train.epochs": _epochs,
    "train.max_steps": _epochs,
    "train.learning_rate": _learning_rate,
    "train.optimizer": _optimizer,
    "train.batch_size": _batch_size,
    "train.token_budget": _token_budget,
    "train.keep_checkpoints": _keep_checkpoints,
}
"""Field → what its value does here, in one line."""

TABLES: dict[str, Callable[[Facts], list[AlternativeRow]]] = {
    "model.quantization": _quantization_table,
    "data.train_on": _train_on_table,
    "data.max_length": _max_length_table,
    "lora.r": _rank_table,
    "lora.targets": _targets_table,
    "train.learning_rate": _learning_rate_table,
    "train.optimizer": _optimizer_table,
    "train.batch_size": _batch_size_table,
    "train.token_budget": _token_budget_table,
}
"""Field → what other values would do. Those of the data section read and tokenize the data again."""
