"""What becomes of a setting of another tool, apart from those of data and task.

Most settings only have a different name (`recipe.other_names`). Those that mean more than that, or that depend on
others, have a rule in `_RULES`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

import yaml

from loratune.recipe.other_names import NO_COUNTERPART, SETTINGS, value_here
from loratune.recipe.recipe import Recipe
from loratune.workflows.guidance.other_tools.settings import OFF, Answer, OtherSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

Rule = Callable[[Any, OtherSettings], Answer | list[Answer]]
"""Takes the value and all settings of the file. Several answers: what is taken over, and why the rest is not."""

_PER_DEVICE = ("per_device_train_batch_size", "micro_batch_size", "batch_size")
_ACCUMULATED = ("gradient_accumulation_steps", "grad_accumulation_steps")
_USUAL_BATCH = {"TRL": 8, "LLaMA-Factory": 8, "Axolotl": 1, "mlx-lm": 4}
"""Tool → examples of a micro-batch if the file does not say."""
_LISTS = ("lora.targets", "lora.modules_to_save", "lora.new_tokens", "train.report_to")
_NOT_OURS = ("name", "train", "eval", "format", "columns", "metric", "layers", "task")
"""Fields of ours whose names mean something else in other tools' files."""
_STRUCTURED = frozenset(
    (
        *("datasets", "test_datasets", "dataset", "dataset_name", "eval_dataset", "train_dataset", "model", "data"),
        *("quantization_config", "loftq_config", "lr_schedule", "lr_scheduler", "lr_schedule.arguments", "report_to"),
        *("target_modules", "lora_target", "lora_target_modules", "keys", "lora_modules_to_save", "additional_target"),
        *("layers_to_transform", "new_special_tokens", "tokens", "roles_to_train", "deepspeed", "fsdp", "fsdp_config"),
        *("gradient_checkpointing_kwargs", "loss_type", "pref_loss", "dpo_loss_type"),
    )
)
"""Settings whose value may be a list or a mapping. That of every other known setting is a word, a number or a truth."""
AS_A_WHOLE = frozenset(
    ("deepspeed", "fsdp", "fsdp_config", "gradient_checkpointing_kwargs", "model", "data", "dataset")
)
"""Mappings whose settings belong together."""


def is_a_word(name: str) -> bool:
    """Whether the value of a setting is one word, number or truth value."""
    last = name.rpartition(".")[2]
    if last in _STRUCTURED or name in _STRUCTURED:
        return False
    return last in _RULES or (last in SETTINGS and not SETTINGS[last].startswith(NO_COUNTERPART))


def answers_to(name: str, value: Any, file: OtherSettings) -> list[Answer]:
    """Return what a setting becomes.

    Args:
        name: Its full name.
        value: Its value.
        file: All settings of the file.
    """
    last = name.rpartition(".")[2]
    if rule := _RULES.get(name) or _RULES.get(last):
        answer = rule(value, file)
        return answer if isinstance(answer, list) else [answer]
    return [_renamed(last, value)]


def _renamed(name: str, value: Any) -> Answer:
    """Return what a setting becomes that only has another name here."""
    answer = SETTINGS.get(name.lower()) or _our_own(name)
    if not answer:
        return "unknown to loratune"
    if answer.startswith(NO_COUNTERPART):
        return answer.removeprefix(NO_COUNTERPART)
    here, _, _ = answer.partition(";")
    ours, switch, wanted = here.partition("=")
    if not switch:
        return {ours: as_ours(ours, value)}
    if "NAME" in wanted:
        return {ours: yaml.safe_load(wanted.replace("NAME", json.dumps(value)))}
    return f"off, and {ours} keeps its default" if value in OFF else {ours: yaml.safe_load(wanted)}


def _our_own(name: str) -> str:
    """Return the setting that has this name here; empty if none has, or the name means something else elsewhere."""
    found = [
        f"{section}.{name}"
        for section, info in Recipe.model_fields.items()
        if name in info.annotation.model_fields and name not in _NOT_OURS  # type: ignore[union-attr]
    ]
    return found[0] if len(found) == 1 else ""


def as_ours(setting: str, value: Any) -> Any:
    """Return a value as it is written here."""
    if isinstance(value, list) and len(value) == 1 and value_here(setting, str(value[0])):
        value = value[0]
    if not isinstance(value, str):
        return value
    value = value.removeprefix("torch.")
    if here := value_here(setting, value):
        return here
    if setting in _LISTS and value not in ("minimal", "balanced", "attention", "complete"):
        return [part.strip() for part in value.split(",") if part.strip()]
    return float(value) if re.fullmatch(r"[-+]?[\d.]+[eE][-+]?\d+", value) else value


# ---- steps and batches


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _batch_size(_: Any, file: OtherSettings) -> Answer:
    if file.tool == "Axolotl" and isinstance(file.first("batch_size"), int):
        return {"train.batch_size": file.first("batch_size")}  # counts all examples of a step, as here
    each = file.first(*_PER_DEVICE, default=_USUAL_BATCH[file.tool])
    times = file.first(*_ACCUMULATED, default=1)
    if not isinstance(each, int) or not isinstance(times, int):
        return "train.batch_size counts the examples of an optimizer step: write their number"
    return {"train.batch_size": each * times}


def _iterations_per_step(file: OtherSettings) -> int:
    """Return how many of the steps that the file counts make an optimizer step: mlx-lm counts micro-batches."""
    times = file.first(*_ACCUMULATED, default=1)
    return times if file.tool == "mlx-lm" and isinstance(times, int) and times > 0 else 1


def _num_steps(file: OtherSettings) -> int | None:
    """Return the optimizer steps of the run; None if the file does not say."""
    given = file.first("max_steps", "iters")
    return int(given) // _iterations_per_step(file) if _is_number(given) and given > 0 else None


def _most_steps(_: Any, file: OtherSettings) -> Answer:
    steps = _num_steps(file)
    return {"train.max_steps": int(steps)} if steps else "no limit, and the epochs count"


def _epochs(file: OtherSettings) -> float:
    epochs = file.first("num_epochs", "num_train_epochs", default=3)
    return float(epochs) if _is_number(epochs) and epochs > 0 else 3.0


def _cadence(field: str, *, strategy: tuple[str, ...], steps: tuple[str, ...], per_epoch: str = "") -> dict[str, Rule]:
    """Return the rule for the settings that together say how often something happens."""

    def rule(_: Any, file: OtherSettings) -> Answer:
        wanted, every, number = file.first(*strategy), file.first(*steps), file.first(per_epoch) if per_epoch else None
        if wanted in ("epoch", "epochs") or (wanted is None and number == 1):
            return {field: "epoch"}
        if wanted in ("no", "never", False) or (wanted is None and every is None and number in OFF):
            return {field: "never"}
        if _is_number(every) and every <= 0:
            return {field: "never"}
        if _is_number(every):
            per_step = _iterations_per_step(file)
            return {field: max(1, round(every / per_step)) if per_step > 1 else every}
        if _is_number(number) and number > 0:
            return {field: 1 / (number * _epochs(file))}  # a fraction of the run, not of an epoch
        return {field: 500} if wanted == "steps" else f"{field} takes epoch, never, a number of steps or a fraction"

    return dict.fromkeys([*strategy, *steps, *([per_epoch] if per_epoch else [])], rule)


def _warmup_steps(value: Any, file: OtherSettings) -> Answer:
    if value in OFF:
        return "off, and the warm-up is that of train.warmup_fraction"
    if isinstance(value, float) and value < 1:
        return {"train.warmup_fraction": value}
    steps = _num_steps(file)
    if _is_number(value) and steps is not None and steps > value:
        return {"train.warmup_fraction": value / steps}
    return "train.warmup_fraction is the fraction of all steps; `loratune plan` says how many there are"


def _warmup_fraction(value: Any, file: OtherSettings) -> Answer:
    if file.first("warmup_steps") not in OFF:
        return "the number of warm-up steps counts"
    return {"train.warmup_fraction": as_ours("train.warmup_fraction", value)}


def _schedule(value: Any, file: OtherSettings) -> Answer:
    numbers = file.named.get("lr_schedule.arguments")
    if value == "linear_schedule" and isinstance(numbers, list) and len(numbers) > 1 and numbers[1] != 0:
        return "train.schedule has no linear change to another rate than 0"
    return {"train.schedule": as_ours("train.schedule", value)}


def _schedule_arguments(value: Any, _: OtherSettings) -> list[Answer]:
    """mlx-lm gives them to the schedule's function: the first is the rate at its start."""
    if not isinstance(value, list) or not value:
        return ["a list was expected"]
    rest = "the first number is the learning rate; train.schedule decays until the last step, to 0"
    return [{"train.learning_rate": value[0]}, *([rest] if len(value) > 1 else [])]


def _learning_rate(value: Any, file: OtherSettings) -> Answer:
    if file.named.get("lr_schedule.arguments"):
        return "mlx-lm takes the first of lr_schedule.arguments instead"
    return {"train.learning_rate": as_ours("train.learning_rate", value)}


# ---- the loss and the data


def _only_answers(name: str, on: str, off: str) -> Rule:
    """Return the rule of a setting that says which tokens are trained."""

    def rule(value: Any, file: OtherSettings) -> Answer:
        others = [other for other in _ALL_TRAINED_ON if other != name and file.first(other) not in OFF]
        if value in OFF and others:
            return f"off, and {others[0]} says what is trained"
        return {"data.train_on": on if value not in OFF else off}

    return rule


_ALL_TRAINED_ON = (
    *("completion_only_loss", "assistant_only_loss", "mask_prompt", "mask_history", "train_on_inputs"),
    "train_on_prompt",
)


def _held_out(value: Any, _: OtherSettings) -> Answer:
    if value in OFF:
        return {"data.eval": "none"}
    return (
        {"data.eval": value} if _is_number(value) and value < 1 else "data.eval is a fraction of the rows, or a source"
    )


# ---- the model and the adapter


def _alpha(value: Any, file: OtherSettings) -> Answer:
    rank = file.first("rank", "r", "lora_rank", default=8)
    if not _is_number(value) or not _is_number(rank):
        return "lora.alpha is scale × lora.r, of two numbers"
    return {"lora.alpha": value * rank}


def _bits(value: Any, _: OtherSettings) -> Answer:
    kinds = {4: "nf4", 8: "int8"}
    return {"model.quantization": kinds[value]} if value in kinds else "4 bits are nf4, 8 bits int8"


def _adapter(value: Any, _: OtherSettings) -> Answer:
    return {"model.quantization": "nf4"} if value == "qlora" else "every run trains LoRA"


def _tuned(value: Any, _: OtherSettings) -> Answer:
    return {"lora.variant": "dora"} if value == "dora" else "every run trains LoRA"


def _precision(kind: str) -> Rule:
    def rule(value: Any, _: OtherSettings) -> Answer:
        if value in OFF:
            return "off, and model.dtype keeps its default"
        return {"model.dtype": "auto" if value in ("auto", "full") else kind}

    return rule


def _targets(value: Any, file: OtherSettings) -> Answer:
    if file.first("lora_target_linear") not in OFF:
        return "lora_target_linear takes every linear layer"
    return {"lora.targets": as_ours("lora.targets", value)}


def _layers(value: Any, _: OtherSettings) -> Answer:
    return {"lora.layers": "all" if value in (-1, "all") else f"last {value}"}


def _initialization(value: Any, _: OtherSettings) -> Answer:
    kinds = ("pissa", "olora", "eva", "loftq")
    if value in (True, "default"):
        return "the same here"
    if value == "gaussian":
        return "A is initialized as PEFT does by default, from Kaiming's uniform distribution"
    return {"lora.variant": value} if value in kinds else f"lora.variant has {', '.join(kinds)}"


def _kind_of_task(value: Any, _: OtherSettings) -> Answer:
    if str(value).upper() == "SEQ_CLS":
        return {"model.task": "sequence_classification"}
    return "model.task says what is learned"


# ---- the rest


def _trackers(value: Any, _: OtherSettings) -> Answer:
    names = value if isinstance(value, list) else [value]
    return {"train.report_to": [name for name in names if name not in OFF]}


def _tracker(value: Any, file: OtherSettings) -> Answer:
    if file.find("report_to"):
        return "report_to names the trackers"
    return "off" if value in OFF else {"train.report_to": ["wandb"]}


def _is_off(reason: str) -> Rule:
    return lambda value, _: "off, as here" if value in OFF else reason


def _is_one(setting: str) -> Rule:
    return lambda value, _: {setting: value} if isinstance(value, str) else f"{setting} names one"


def _all(names: Sequence[str], rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names, rule)


_RULES: dict[str, Rule] = {
    **_all((*_PER_DEVICE, *_ACCUMULATED), _batch_size),
    **_cadence(
        "train.eval_every",
        strategy=("eval_strategy", "evaluation_strategy"),
        steps=("eval_steps", "steps_per_eval"),
        per_epoch="evals_per_epoch",
    ),
    **_cadence(
        "train.save_every", strategy=("save_strategy",), steps=("save_steps", "save_every"), per_epoch="saves_per_epoch"
    ),
    **_cadence("train.log_every", strategy=("logging_strategy",), steps=("logging_steps", "steps_per_report")),
    **_all(("warmup_steps", "warmup"), _warmup_steps),
    "warmup_ratio": _warmup_fraction,
    "lr_schedule.name": _schedule,
    "lr_schedule.arguments": _schedule_arguments,
    "lr_schedule.warmup_init": lambda *_: "the warm-up begins at 0",
    "learning_rate": _learning_rate,
    **_all(("val_size", "val_set_size", "test_size"), _held_out),
    "bf16": _precision("bfloat16"),
    "fp16": _precision("float16"),
    **_all(("max_steps", "iters"), _most_steps),
    **_all(
        ("gradient_checkpointing", "use_gradient_checkpointing", "grad_checkpoint"),
        _is_off("as many layers are recomputed as the memory needs (train.recompute)"),
    ),
    **_all(("gradient_checkpointing_kwargs", "remove_unused_columns"), _is_off("loratune decides this")),
    "completion_only_loss": _only_answers("completion_only_loss", "assistant", "all"),
    "assistant_only_loss": _only_answers("assistant_only_loss", "assistant", "all"),
    "mask_prompt": _only_answers("mask_prompt", "last", "all"),
    "mask_history": _only_answers("mask_history", "last", "assistant"),
    "train_on_inputs": _only_answers("train_on_inputs", "all", "assistant"),
    "train_on_prompt": _only_answers("train_on_prompt", "all", "assistant"),
    **_all(("num_layers", "lora_layers"), _layers),
    **_all(("per_device_eval_batch_size", "eval_batch_size"), _is_off("memory decides (train.token_budget)")),
    **_all(("lora_target_modules", "target_modules"), _targets),
    "scale": _alpha,
    "quantization_bit": _bits,
    "adapter": _adapter,
    **_all(("finetuning_type", "fine_tune_type"), _tuned),
    "report_to": _trackers,
    **_all(("use_wandb", "wandb_project"), _tracker),
    "init_lora_weights": _initialization,
    "task_type": _kind_of_task,
    **_all(("bias", "lora_bias"), _is_off("biases are not trained")),
    **_all(("deepspeed", "fsdp", "fsdp_config"), _is_off("processes share a base that one cannot hold")),
    "model": _is_one("model.name"),
    "data": _is_one("data.train"),
}
"""Name elsewhere, alone or with the mapping that it is in → what its value becomes."""
