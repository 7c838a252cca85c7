"""What each setting does to the user's own model and data, in numbers that are computed, never typed in."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
import psutil
import torch

from loratune.data.batch import num_supervised
from loratune.data.examples import Example
from loratune.data.mixture import mixture
from loratune.data.steps import EpochPlan, count_occurrences, num_steps, num_steps_per_epoch, trigger_steps
from loratune.model.adapter.patterns import pattern_of
from loratune.model.device import torch_dtype
from loratune.model.load import positions_of
from loratune.model.quantization.kinds import GROUP, PACKED
from loratune.model.quantization.quantize import base_bytes, quantized_matrices
from loratune.planning.auto import NO_LIMIT
from loratune.planning.memory.optimizer import state_bytes
from loratune.recipe.recipe import Optimizer
from loratune.recipe.roles import TrainOn, as_written
from loratune.run.errors import DataError, plural
from loratune.training.checkpoint import averaged_steps
from loratune.workflows.guidance import adapter_effects
from loratune.workflows.guidance.facts import AlternativeRow, Facts, nearby_powers, size

# ---- model


def _name(facts: Facts) -> str:
    config = facts.model.config.get_text_config()
    return f"{config.num_hidden_layers} layers of width {config.hidden_size:,}, {facts.base_parameters:,} parameters"


def _revision(facts: Facts) -> str:
    base = facts.prepared.model.base
    return f"commit {base.revision}" if base.revision else "a local model has none"


def _dtype(facts: Facts) -> str:
    dtype = torch_dtype(facts.prepared.recipe.model.dtype)
    return f"the frozen weights take {size(facts.base_parameters * dtype.itemsize)}"


def _quantization(facts: Facts) -> str:
    section, memory = facts.prepared.recipe.model, facts.prepared.estimate.memory
    plain = facts.base_parameters * torch_dtype(section.dtype).itemsize
    return (
        f"the frozen weights take {size(memory.weights_bytes)}, {memory.weights_bytes / plain:.0%} of {section.dtype}"
    )


def _task(facts: Facts) -> str:
    classes, parameters = facts.prepared.model.classes, facts.prepared.adapter.parameters
    if classes is None:
        return "writes text"
    whole = f"{', '.join(classes.head)} with {parameters.trainable - parameters.in_adapter:,} parameters trained whole"
    return f"names one of {len(classes.names)} classes: {_some(classes.names)}; {whole}"


def _quantization_table(facts: Facts) -> list[AlternativeRow]:
    dtype_bytes = torch_dtype(facts.prepared.recipe.model.dtype).itemsize
    sizes = {"none": facts.base_parameters * dtype_bytes}
    whole_groups = all(matrix.in_features % GROUP == 0 for _, matrix in quantized_matrices(facts.model))
    kinds = [name for name in PACKED if name != "int4_weight_only" or whole_groups]
    sizes |= {name: base_bytes(facts.model, name, dtype_bytes) for name in kinds}
    return [{"quantization": name, "frozen weights": size(num_bytes)} for name, num_bytes in sizes.items()]


def _dtype_table(facts: Facts) -> list[AlternativeRow]:
    names = ("float32", "bfloat16", "float16")
    return [
        {"dtype": name, "frozen weights": size(facts.base_parameters * torch_dtype(name).itemsize)} for name in names
    ]


# ---- data


def _train(facts: Facts) -> str:
    part = facts.prepared.data.report["train"]
    words = f"{plural(part['rows'], 'row')}, {plural(part['conversations'], 'example')}, {part['tokens']:,} tokens"
    data = facts.prepared.data
    sources = mixture(data.train, data.report, data.scale)
    if len(sources) > 1:
        words += "; an epoch has " + ", ".join(f"{source['num_examples']:,} of {source['name']}" for source in sources)
    return words


def _eval(facts: Facts) -> str:
    report = facts.prepared.data.report
    overlap = f", {len(report['overlap'])} of them also in the training data" if report["overlap"] else ""
    return f"{plural(len(facts.prepared.data.eval), 'held-out example')}{overlap}"


def _format(facts: Facts) -> str:
    part = facts.prepared.data.report["train"]
    return f"{plural(part['rows'], 'row')} read as {part['format']}"


def _columns(facts: Facts) -> str:
    columns = facts.prepared.recipe.data.columns
    named = ", ".join(f"{column} as {field}" for field, column in columns.items())
    return f"reads {named}" if columns else "columns are found by their names"


def _train_on(facts: Facts) -> str:
    if facts.prepared.model.classes is not None:
        return "no token carries loss: the class of each text does"
    counts = facts.prepared.data.report["train"]["trained_messages"]
    messages = " and ".join(f"{number:,} of {role}" for role, number in counts.items())
    return _share_supervised(facts.prepared.data.train) + (f", in messages: {messages}" if messages else "")


def _train_on_table(facts: Facts) -> list[AlternativeRow]:
    plain = facts.prepared.data.report["train"]["format"] == "text"
    chosen = facts.prepared.recipe.data.train_on
    choices: list[TrainOn] = ["all"] if plain else ["assistant", "last", "all"]
    rows: list[AlternativeRow] = []
    for choice in choices if chosen in choices else [*choices, chosen]:
        try:
            share = _share_supervised(facts.render_again(train_on=choice))
        except DataError as error:
            share = f"refused: {error.problem}"
        rows.append({"train_on": as_written(choice), "tokens that carry loss": share})
    return rows


def _thinking(facts: Facts) -> str:
    part = facts.prepared.data.report["train"]
    return f"{plural(part['answers_with_thoughts'], 'answer has', 'answers have')} thoughts"


def _special_tokens_in_text(facts: Facts) -> str:
    part = facts.prepared.data.report["train"]
    return f"{plural(part['special_tokens_in_text'], 'conversation names', 'conversations name')} special tokens in their texts"


def _max_length(facts: Facts) -> str:
    part = facts.prepared.data.report["train"]
    longest = part["length"]["max"]
    return f"{part['truncated']:,} cut, {part['dropped']:,} left out for their length; the longest has {longest:,}"


def _max_length_table(facts: Facts) -> list[AlternativeRow]:
    """Rows for powers of two up to the longest example, as it is without any limit."""
    whole = facts.render_again(max_length="auto", on_long="truncate")
    lengths = [len(example.input_ids) for example in whole]
    positions = positions_of(facts.model.config) or NO_LIMIT
    limits = {2**power for power in range(6, 21) if 2**power < 2 * max(lengths) and 2**power <= positions}
    limits |= {min(int(facts.prepared.recipe.data.max_length), positions)} - {NO_LIMIT}
    supervised = sum(num_supervised(example) for example in whole)
    rows = []
    for limit in sorted(limits):
        lost = sum(int(example.supervised[max(1, limit) :].sum()) for example in whole)
        rows.append(
            {
                "max_length": f"{limit:,}",
                "examples longer": f"{sum(length > limit for length in lengths):,} of {len(whole):,}",
                "tokens lost by truncate": f"{sum(max(0, length - limit) for length in lengths):,}",
                "of those that carry loss": f"{lost:,} ({lost / supervised:.1%})",
            }
        )
    return rows


def _on_long(facts: Facts) -> str:
    part = facts.prepared.data.report["train"]
    return f"{part['truncated']:,} cut, {part['dropped']:,} left out"


def _streaming(facts: Facts) -> str:
    streamed = facts.prepared.data.stream is not None
    return f"{facts.prepared.data.num_examples:,} rows, {'made examples a few steps ahead' if streamed else 'all prepared'}"


def _on_bad_row(facts: Facts) -> str:
    return f"{plural(facts.prepared.data.report['train']['num_rejected'], 'training row')} left out"


# ---- train


def _epochs(facts: Facts) -> str:
    per_epoch = num_steps_per_epoch(len(facts.lengths), facts.prepared.recipe.train.batch_size)
    return f"{facts.prepared.estimate.num_steps:,} steps, {per_epoch:,} an epoch"


def _epochs_table(facts: Facts) -> list[AlternativeRow]:
    train, tokens = facts.prepared.recipe.train, sum(facts.lengths)
    return [
        {
            "epochs": f"{epochs:g}",
            "steps": f"{num_steps(len(facts.lengths), train.batch_size, epochs):,}",
            "tokens": f"{epochs * tokens:,.0f}",
        }
        for epochs in sorted({1.0, 2.0, 3.0, 5.0, float(train.epochs)})
    ]


def _learning_rate(facts: Facts) -> str:
    rates = facts.learning_rates
    return f"highest at step {int(rates.argmax()) + 1} of {len(rates):,}, on average {rates.mean():.2e}"


def _schedule_table(facts: Facts) -> list[AlternativeRow]:
    rates = facts.learning_rates
    at = sorted({0, int(rates.argmax()), *(round(part * (len(rates) - 1)) for part in (0.25, 0.5, 0.75, 1))})
    return [
        {"step": f"{step + 1:,}", "of the run": f"{(step + 1) / len(rates):.0%}", "learning rate": f"{rates[step]:.2e}"}
        for step in at
    ]


def _schedule(facts: Facts) -> str:
    rates, highest = facts.learning_rates, facts.prepared.recipe.train.learning_rate
    return f"on average {rates.mean() / highest:.0%} of the highest rate; the last step has {rates[-1]:.1e}"


def _warmup(facts: Facts) -> str:
    steps = facts.prepared.estimate.num_steps
    return f"{math.ceil(facts.prepared.recipe.train.warmup_fraction * steps):,} of {steps:,} steps"


def _batch_size(facts: Facts) -> str:
    train = facts.prepared.recipe.train
    tokens = sum(facts.lengths) / num_steps_per_epoch(len(facts.lengths), train.batch_size)
    double = num_steps(len(facts.lengths), 2 * train.batch_size, train.epochs)
    return f"{tokens:,.0f} tokens a step; {2 * train.batch_size} would make {double:,} steps instead of {facts.prepared.estimate.num_steps:,}"


def _batch_size_table(facts: Facts) -> list[AlternativeRow]:
    train = facts.prepared.recipe.train
    data = facts.prepared.data
    supervised = data.scale * sum(num_supervised(example) for example in data.train)
    rows = []
    for batch_size in nearby_powers(train.batch_size):
        per_epoch = num_steps_per_epoch(len(facts.lengths), batch_size)
        rows.append(
            {
                "batch_size": str(batch_size),
                "steps": f"{num_steps(len(facts.lengths), batch_size, train.epochs):,}",
                "tokens a step": f"{sum(facts.lengths) / per_epoch:,.0f}",
                "of those carry loss": f"{supervised / per_epoch:,.0f}",
            }
        )
    return rows


def _state(facts: Facts, optimizer: Optimizer | None = None) -> int:
    recipe, parameters = facts.prepared.recipe, facts.prepared.adapter.parameters
    matrices = [item.matrix for item in parameters.per_module]
    return state_bytes(optimizer or recipe.train.optimizer, matrices, recipe.lora, parameters.whole_shapes)


def _optimizer(facts: Facts) -> str:
    trainable = facts.prepared.adapter.parameters.trainable
    return f"keeps {size(_state(facts))} beside {size(4 * trainable)} of weights and as many of gradients"


def _optimizer_table(facts: Facts) -> list[AlternativeRow]:
    plain = facts.prepared.recipe.lora.variant != "dora"
    names = [name for name in get_args(Optimizer) if plain or name != "muon"]
    return [{"optimizer": name, "keeps": size(_state(facts, name))} for name in names]


def _learning_rate_pattern(facts: Facts) -> str:
    train, parameters = facts.prepared.recipe.train, facts.prepared.adapter.parameters
    names = [*(matrix.name for matrix in parameters.matrices), *(item.name for item in parameters.whole)]
    rates = Counter(
        train.learning_rate_pattern.get(pattern_of(train.learning_rate_pattern, name), train.learning_rate)
        for name in names
    )
    return ", ".join(f"{count} modules with at most {rate:g}" for rate, count in rates.most_common())


def _lora_plus_ratio(facts: Facts) -> str:
    train = facts.prepared.recipe.train
    return f"A learns with at most {train.learning_rate:g}, B with {train.lora_plus_ratio * train.learning_rate:g}"


def _weight_decay(facts: Facts) -> str:
    decay = facts.prepared.recipe.train.weight_decay
    kept = float(np.prod(1 - decay * facts.learning_rates))
    return f"a weight without gradient would keep {kept:.2%} of its value over the run"


def _seed(facts: Facts) -> str:
    train = facts.prepared.recipe.train
    plan = EpochPlan(lengths=facts.lengths, batch_size=train.batch_size, seed=train.seed, epoch=0, token_budget=1)
    data = facts.prepared.data
    examples = data.train if data.stream is None else data.stream
    first = [examples[i].origin.line for i in plan[0].examples]
    return f"the first step takes rows {_some(first)}"


def _token_budget(facts: Facts) -> str:
    return f"{_micro_batches(facts, int(facts.prepared.recipe.train.token_budget)):.1f} micro-batches a step"


def _token_budget_table(facts: Facts) -> list[AlternativeRow]:
    budgets = nearby_powers(int(facts.prepared.recipe.train.token_budget))
    return [
        {"token_budget": f"{budget:,}", "micro-batches a step": f"{_micro_batches(facts, budget):.1f}"}
        for budget in budgets
    ]


def _micro_batches(facts: Facts, budget: int) -> float:
    """On average over the first hundred steps."""
    train = facts.prepared.recipe.train
    plan = EpochPlan(lengths=facts.lengths, batch_size=train.batch_size, seed=train.seed, epoch=0, token_budget=budget)
    return float(np.mean([len(plan[step].ranks[0]) for step in range(min(100, len(plan)))]))


def _device(facts: Facts) -> str:
    if facts.prepared.recipe.train.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        return f"{_gib(free)} of {_gib(total)} are free"
    memory = psutil.virtual_memory()
    return f"{_gib(memory.available)} of {_gib(memory.total)} are free"


def _occasions(field: str, what: str) -> Callable[[Facts], str]:
    def say(facts: Facts) -> str:
        train = facts.prepared.recipe.train
        every = getattr(train, field)
        steps = facts.prepared.estimate.num_steps
        times = count_occurrences(every, steps=steps, epochs=train.epochs, at_end=field != "log_every")
        return f"{times:,} {what} in {steps:,} steps"

    return say


def _keep(facts: Facts) -> str:
    train, num_bytes = facts.prepared.recipe.train, 4 * facts.prepared.adapter.parameters.trainable + _state(facts)
    saves = count_occurrences(train.save_every, steps=facts.prepared.estimate.num_steps, epochs=train.epochs)
    kept = min(saves, train.keep_checkpoints or saves)
    best = " and the best" if kept < saves and train.eval_every != "never" else ""
    return f"{kept:,} stay{best}, about {size(num_bytes)} each (weights and the optimizer's state)"


def _early_stopping(facts: Facts) -> str:
    train, steps = facts.prepared.recipe.train, facts.prepared.estimate.num_steps
    if train.early_stopping is None:
        return f"all {steps:,} steps are taken"
    per_epoch = num_steps_per_epoch(len(facts.lengths), train.batch_size)
    times = trigger_steps(train.eval_every, steps=steps, num_per_epoch=per_epoch)
    if len(times) <= train.early_stopping + 1:
        return f"ends no run of {len(times):,} evaluations early"
    return f"ends the run after step {times[train.early_stopping]:,} of {steps:,} at the earliest"


def _average(facts: Facts) -> str:
    train, steps = facts.prepared.recipe.train, facts.prepared.estimate.num_steps
    per_epoch = num_steps_per_epoch(len(facts.lengths), train.batch_size)
    chosen = averaged_steps(train, last_step=steps, num_steps=steps, num_per_epoch=per_epoch)
    return f"the mean of the adapters after steps {_some(chosen)}" if chosen else "the adapter is of one step"


def _neftune(facts: Facts) -> str:
    alpha, width = facts.prepared.recipe.train.neftune_noise_alpha, facts.model.config.get_text_config().hidden_size
    if not alpha:
        return "no noise"
    most = [alpha / math.sqrt(tokens * width) for tokens in (min(facts.lengths), max(facts.lengths))]
    return f"noise of at most {most[0]:.2g} in the shortest example, {most[1]:.2g} in the longest"


def _label_smoothing(facts: Facts) -> str:
    """The lowest training loss is the entropy of a smoothed target."""
    part = facts.prepared.recipe.train.label_smoothing
    if not part:
        return "the training loss is that of the tokens themselves"
    model: Any = facts.model
    vocabulary = model.get_output_embeddings().weight.shape[0]
    even = part / vocabulary
    own = 1 - part + even
    lowest = -own * math.log(own) - (vocabulary - 1) * even * math.log(even)
    return f"no training loss is below {lowest:.3f}, which a vocabulary of {vocabulary:,} leaves"


# ---- evaluate


def _metric(facts: Facts) -> str:
    prompts = facts.prepared.data.prompts
    more = sum(len(prompt.references) for prompt in prompts) - len(prompts)
    several = f"; {len(prompts) + more:,} references" if more else ""
    return f"{len(prompts):,} answers each by base and tuned{several}"


def _max_new_tokens(facts: Facts) -> str:
    references = [reference for prompt in facts.prepared.data.prompts for reference in prompt.references]
    if not references:
        return "no answers are generated"
    lengths = [len(ids) for ids in facts.prepared.model.tokenizer(references, add_special_tokens=False)["input_ids"]]
    longer = sum(length >= facts.prepared.recipe.evaluate.max_new_tokens for length in lengths)
    return (
        f"the longest reference has {max(lengths):,} tokens; {longer:,} of {len(lengths):,} do not fit with their end"
    )


def _forgetting(facts: Facts) -> str:
    other = facts.prepared.data.forgetting
    return f"{len(other):,} examples of another kind, {_share_supervised(other)} compared" if other else "not measured"


SUMMARIES: dict[str, Callable[[Facts], str]] = {
    "model.name": _name,
    "model.revision": _revision,
    "model.dtype": _dtype,
    "model.quantization": _quantization,
    "model.task": _task,
    "data.train": _train,
    "data.eval": _eval,
    "data.format": _format,
    "data.columns": _columns,
    "data.train_on": _train_on,
    "data.thinking": _thinking,
    "data.special_tokens_in_text": _special_tokens_in_text,
    "data.max_length": _max_length,
    "data.on_long": _on_long,
    "data.on_bad_row": _on_bad_row,
    "data.streaming": _streaming,
    **adapter_effects.SUMMARIES,
    "train.epochs": _epochs,
    "train.learning_rate": _learning_rate,
    "train.optimizer": _optimizer,
    "train.lora_plus_ratio": _lora_plus_ratio,
    "train.learning_rate_pattern": _learning_rate_pattern,
    "train.schedule": _schedule,
    "train.warmup_fraction": _warmup,
    "train.batch_size": _batch_size,
    "train.weight_decay": _weight_decay,
    "train.seed": _seed,
    "train.device": _device,
    "train.token_budget": _token_budget,
    "train.eval_every": _occasions("eval_every", "evaluations"),
    "train.save_every": _occasions("save_every", "checkpoints"),
    "train.log_every": _occasions("log_every", "lines"),
    "train.keep_checkpoints": _keep,
    "train.early_stopping": _early_stopping,
    "train.average_checkpoints": _average,
    "train.neftune_noise_alpha": _neftune,
    "train.label_smoothing": _label_smoothing,
    "evaluate.metric": _metric,
    "evaluate.samples": _metric,
    "evaluate.max_new_tokens": _max_new_tokens,
    "evaluate.forgetting": _forgetting,
}
"""Field → what its value does here, in one line."""

TABLES: dict[str, Callable[[Facts], list[AlternativeRow]]] = {
    "model.dtype": _dtype_table,
    "model.quantization": _quantization_table,
    "data.train_on": _train_on_table,
    "data.max_length": _max_length_table,
    **adapter_effects.TABLES,
    "train.epochs": _epochs_table,
    "train.learning_rate": _schedule_table,
    "train.optimizer": _optimizer_table,
    "train.schedule": _schedule_table,
    "train.warmup_fraction": _schedule_table,
    "train.batch_size": _batch_size_table,
    "train.token_budget": _token_budget_table,
}
"""Field → what other values would do. Those of the data section read and tokenise the data again."""


def _share_supervised(examples: Sequence[Example]) -> str:
    supervised = sum(num_supervised(example) for example in examples)
    tokens = sum(len(example.input_ids) for example in examples)
    return f"{supervised:,} of {tokens:,} tokens ({supervised / tokens:.1%})"


def _some(items: Sequence[object], shown: int = 8) -> str:
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(str(item) for item in items[:shown]) + more


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"
