"""The settings of another tool's file as settings of a recipe, and what has no counterpart.

Reads YAML of Axolotl, LLaMA-Factory and mlx-lm, and arguments of TRL, PEFT and transformers as YAML or JSON. Names and
values come from `recipe.other_names`; what needs more than another name is in `_RULES`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from loratune.recipe.other_names import NO_COUNTERPART, SETTINGS, value_here
from loratune.recipe.recipe import Recipe
from loratune.recipe.validation_errors import shown
from loratune.recipe.yaml import read_yaml, refuse_secrets
from loratune.run.errors import RecipeError
from loratune.workflows.guidance.other_data import AXOLOTL_KEYS, axolotl_datasets, factory_datasets, hub_split

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

Answer = dict[str, Any] | str
"""What a setting becomes, as `section.field` → value; or why it becomes nothing."""
Everything = dict[str, Any]
"""All settings of the file by their own names, those of nested mappings too."""

_PER_DEVICE = ("per_device_train_batch_size", "micro_batch_size", "batch_size")
_ACCUMULATED = ("gradient_accumulation_steps", "grad_accumulation_steps")
_OFF = (None, False, "", "no", "none", "None", 0)
_LISTS = ("lora.targets", "lora.modules_to_save", "lora.new_tokens", "train.report_to")
_NOT_OURS = ("name", "train", "eval", "format", "columns", "metric", "layers")
"""Fields of ours whose names mean something else in other tools' files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A setting that was not taken over.

    Attributes:
        name: Its name in the file; of a nested one, with the names above it.
        value: Its value, as text.
        reason: Why, or what to do instead.
    """

    name: str
    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.value} ({self.reason})"


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherFile:
    """What a file of another tool says.

    Attributes:
        tool: The tool.
        settings: `section.field` → value.
        left_out: What was not taken over.
    """

    tool: str
    settings: dict[str, Any]
    left_out: tuple[LeftOut, ...]


def read_other_file(path: Path) -> OtherFile:
    """Translate the settings of another tool's file.

    Args:
        path: YAML, or JSON if its name ends in `.json`.

    Raises:
        RecipeError: The file cannot be read, trains something that is not supervised, or is a recipe already.
    """
    values = _read(path)
    if values and set(values) <= {"task", *Recipe.model_fields}:
        raise RecipeError("this is a recipe of loratune already", file=path, fix=f"loratune plan {path}")
    named = list(_flat(values, ""))
    everything = {name.rpartition(".")[2]: value for name, value in named}
    for name in ("stage", "rl"):
        if everything.get(name, "sft") not in ("sft", "pt", *_OFF):
            raise RecipeError(
                f"{name} is {everything[name]}, and only supervised fine-tuning is translated",
                file=path,
                fix="`loratune init DATA` writes a recipe for your data",
            )
    everything["FOLDER"] = path.parent
    settings: dict[str, Any] = {}
    left_out: list[LeftOut] = []
    waiting: list[tuple[str, Any, dict[str, Any]]] = []
    for name, value in named:
        answer = _translate(name.rpartition(".")[2], value, everything)
        if isinstance(answer, str):
            left_out.append(LeftOut(name=name, value=shown(value, 60), reason=answer))
        elif _add(settings, answer):  # refused, perhaps only until another setting is there too
            waiting.append((name, value, answer))
    for name, value, answer in waiting:
        if reason := _add(settings, answer):
            left_out.append(LeftOut(name=name, value=shown(value, 60), reason=reason))
    return OtherFile(tool=_tool(everything), settings=settings, left_out=tuple(left_out))


def _read(path: Path) -> dict[str, Any]:
    if path.suffix.lower() != ".json":
        return read_yaml(path)[0]
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"cannot read the settings: {error}", file=path, fix="provide a JSON object") from None
    refuse_secrets(text, path)
    if not isinstance(values, dict):
        raise RecipeError("not a JSON object of settings", file=path, fix='write {"learning_rate": 2e-4, …}')
    return values


def _flat(values: dict[str, Any], above: str) -> Iterator[tuple[str, Any]]:
    """Yield every setting that has a value, those of nested mappings with the names above them."""
    for name, value in values.items():
        if isinstance(value, dict) and name not in _RULES:
            yield from _flat(value, f"{above}{name}.")
        elif name == "datasets" and isinstance(value, list):
            yield name, value
            for number, item in enumerate(part for part in value if isinstance(part, dict)):
                others = {key: part for key, part in item.items() if key not in AXOLOTL_KEYS}
                yield from _flat(others, f"{name}.{number}.")
        elif value is not None:
            yield f"{above}{name}", value


def _tool(everything: Everything) -> str:
    marks = {
        "Axolotl": ("base_model", "micro_batch_size", "sequence_len"),
        "LLaMA-Factory": ("finetuning_type", "stage", "cutoff_len"),
        "mlx-lm": ("iters", "steps_per_eval", "fine_tune_type"),
    }
    return next((tool for tool, names in marks.items() if any(name in everything for name in names)), "TRL")


def _add(settings: dict[str, Any], answer: dict[str, Any]) -> str:
    """Add an answer to the settings if they make a recipe with it; else return why not."""
    merged = {**settings, **answer}
    if "data.columns" in settings and "data.columns" in answer:
        merged["data.columns"] = {**settings["data.columns"], **answer["data.columns"]}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in merged.items():
        section, _, field = name.partition(".")
        nested.setdefault(section, {})[field] = value
    try:
        Recipe.parse(nested, file="the recipe")
    except RecipeError as error:
        return f"{error.problem}; {error.fix}"
    settings.update(merged)
    return ""


def _translate(name: str, value: Any, everything: Everything) -> Answer:
    """Return what a setting becomes."""
    if name in _RULES:
        return _RULES[name](value, everything)
    answer = SETTINGS.get(name.lower()) or _our_own(name)
    if not answer:
        return "unknown to loratune"
    if answer.startswith(NO_COUNTERPART):
        return answer.removeprefix(NO_COUNTERPART)
    here, _, _ = answer.partition(";")
    ours, switch, wanted = here.partition("=")
    if not switch:
        return {ours: _value(ours, value)}
    if "NAME" in wanted:
        return {ours: yaml.safe_load(wanted.replace("NAME", json.dumps(value)))}
    return {} if value in _OFF else {ours: yaml.safe_load(wanted)}


def _our_own(name: str) -> str:
    """Return the setting that has this name here; empty if none has, or the name means something else elsewhere."""
    found = [
        f"{section}.{name}"
        for section, info in Recipe.model_fields.items()
        if name in info.annotation.model_fields and name not in _NOT_OURS  # type: ignore[union-attr]
    ]
    return found[0] if len(found) == 1 else ""


def _value(setting: str, value: Any) -> Any:
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


# ---- what needs more than another name


def _first(everything: Everything, names: tuple[str, ...], default: Any = None) -> Any:
    return next((everything[name] for name in names if name in everything), default)


def _batch_size(_: Any, everything: Everything) -> Answer:
    usual = 8 if _tool(everything) == "TRL" else 1
    each, times = _first(everything, _PER_DEVICE, usual), _first(everything, _ACCUMULATED, 1)
    if not isinstance(each, int) or not isinstance(times, int):
        return "train.batch_size counts the examples of an optimizer step: write their number"
    return {"train.batch_size": each * times}


def _epochs(everything: Everything) -> float:
    epochs = _first(everything, ("num_epochs", "num_train_epochs"), 3)
    return float(epochs) if isinstance(epochs, int | float) and epochs > 0 else 3.0


def _cadence(field: str, *, strategy: tuple[str, ...], steps: tuple[str, ...], per_epoch: str = "") -> Any:
    """Return the rule for the settings that together say how often something happens."""

    def rule(_: Any, everything: Everything) -> Answer:
        wanted, every, number = _first(everything, strategy), _first(everything, steps), everything.get(per_epoch)
        if wanted in ("epoch", "epochs") or (wanted is None and number == 1):
            return {field: "epoch"}
        if wanted in ("no", "never", False) or (wanted is None and every is None and number in _OFF):
            return {field: "never"}
        if isinstance(every, int | float) and not isinstance(every, bool):
            return {field: every} if every > 0 else {field: "never"}
        if isinstance(number, int | float):
            return {field: 1 / (number * _epochs(everything))}  # a fraction of the run, not of an epoch
        return {field: 500} if wanted == "steps" else f"{field} takes epoch, never, a number of steps or a fraction"

    return dict.fromkeys([*strategy, *steps, *([per_epoch] if per_epoch else [])], rule)


def _warmup_steps(value: Any, everything: Everything) -> Answer:
    steps = _first(everything, ("max_steps", "iters"))
    if value in _OFF:
        return {}
    if isinstance(value, float) and value < 1:
        return {"train.warmup_fraction": value}
    if isinstance(value, int | float) and isinstance(steps, int) and steps > value:
        return {"train.warmup_fraction": value / steps}
    return "train.warmup_fraction is the fraction of all steps; `loratune plan` says how many there are"


def _held_out(value: Any, _: Everything) -> Answer:
    if value in _OFF:
        return {"data.eval": "none"}
    if isinstance(value, int | float) and value < 1:
        return {"data.eval": value}
    return "data.eval is a fraction of the rows, or a source"


def _held_out_datasets(value: Any, everything: Everything) -> Answer:
    found = factory_datasets(value, everything)
    return {"data.eval": found["data.train"]} if isinstance(found, dict) else found


def _alpha(value: Any, everything: Everything) -> Answer:
    rank = _first(everything, ("rank", "r", "lora_rank"), 8)
    return {"lora.alpha": value * rank}


def _bits(value: Any, _: Everything) -> Answer:
    kinds = {4: "nf4", 8: "int8"}
    return {"model.quantization": kinds[value]} if value in kinds else "4 bits are nf4, 8 bits int8"


def _adapter(value: Any, _: Everything) -> Answer:
    if value == "qlora":
        return {"model.quantization": "nf4"}
    return {} if value == "lora" else "every run trains LoRA"


def _precision(kind: str) -> Callable[[Any, Everything], Answer]:
    def rule(value: Any, _: Everything) -> Answer:
        return {"model.dtype": "auto" if value in ("auto", "full") else kind} if value not in _OFF else {}

    return rule


def _checkpointing(value: Any, _: Everything) -> Answer:
    return {} if value in _OFF else "as many layers are recomputed as the memory needs (train.recompute)"


def _trackers(value: Any, _: Everything) -> Answer:
    names = value if isinstance(value, list) else [value]
    wanted = [name for name in names if name not in _OFF]
    return {"train.report_to": wanted} if wanted else {}


def _most_steps(value: Any, _: Everything) -> Answer:
    return {"train.max_steps": value} if isinstance(value, int) and value > 0 else {}


def _only_answers(value: Any, _: Everything) -> Answer:
    return {"data.train_on": "assistant" if value not in _OFF else "all"}


def _layers(value: Any, _: Everything) -> Answer:
    return {"lora.layers": "all" if value in (-1, "all") else f"last {value}"}


def _initialization(value: Any, _: Everything) -> Answer:
    kinds = {"pissa": "pissa", "olora": "olora", "eva": "eva", "loftq": "loftq"}
    if value in (True, "default", "gaussian"):
        return {}
    return {"lora.variant": kinds[value]} if value in kinds else "lora.variant has pissa, olora, eva and loftq"


def _schedule(value: Any, everything: Everything) -> Answer:
    if not isinstance(value, dict):
        return {"train.schedule": _value("train.schedule", value)}
    warmup = _warmup_steps(value.get("warmup"), everything)
    return {
        "train.schedule": _value("train.schedule", value.get("name")),
        **(warmup if isinstance(warmup, dict) else {}),
    }


def _is_off(reason: str) -> Callable[[Any, Everything], Answer]:
    def rule(value: Any, _: Everything) -> Answer:
        return {} if value in _OFF else reason

    return rule


def _is_one(setting: str) -> Callable[[Any, Everything], Answer]:
    def rule(value: Any, _: Everything) -> Answer:
        return {setting: value} if isinstance(value, str) else f"{setting} names one"

    return rule


_RULES: dict[str, Callable[[Any, Everything], Answer]] = {
    **dict.fromkeys((*_PER_DEVICE, *_ACCUMULATED), _batch_size),
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
    **dict.fromkeys(("warmup_steps", "warmup"), _warmup_steps),
    **dict.fromkeys(("val_size", "val_set_size", "test_size"), _held_out),
    **dict.fromkeys(("bf16",), _precision("bfloat16")),
    **dict.fromkeys(("fp16",), _precision("float16")),
    **dict.fromkeys(("max_steps", "iters"), _most_steps),
    **dict.fromkeys(("gradient_checkpointing", "use_gradient_checkpointing", "grad_checkpoint"), _checkpointing),
    **dict.fromkeys(("gradient_checkpointing_kwargs", "remove_unused_columns"), _is_off("loratune decides this")),
    **dict.fromkeys(("completion_only_loss", "assistant_only_loss", "mask_prompt"), _only_answers),
    **dict.fromkeys(("num_layers", "lora_layers"), _layers),
    **dict.fromkeys(("per_device_eval_batch_size", "eval_batch_size"), _is_off("memory decides (train.token_budget)")),
    "eval_dataset": _held_out_datasets,
    "scale": _alpha,
    "quantization_bit": _bits,
    "adapter": _adapter,
    "report_to": _trackers,
    "init_lora_weights": _initialization,
    "bias": _is_off("biases are not trained"),
    "lora_bias": _is_off("biases are not trained"),
    "finetuning_type": lambda value, _: {} if value == "lora" else "every run trains LoRA",
    "fine_tune_type": lambda value, _: {"lora.variant": "dora"} if value == "dora" else {},
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config"), _is_off("processes share a base that one cannot hold")),
    "stage": lambda value, _: {"data.train_on": "all"} if value == "pt" else {},
    "lr_schedule": _schedule,
    "model": _is_one("model.name"),
    "data": _is_one("data.train"),
    "datasets": axolotl_datasets,
    "dataset": factory_datasets,
    "dataset_name": hub_split,
    **dict.fromkeys(("dataset_config", "dataset_train_split", "dataset_test_split", "dataset_dir"), lambda *_: {}),
}
"""Name elsewhere → what its value becomes; `dataset_name` and `dataset` read the settings around them."""
