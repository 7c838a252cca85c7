"""The data of an ejected script: the user's own rows if stock TRL makes the same tokens and labels of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.utils.logging import disable_progress_bar

from loratune.data.examples import PairExample
from loratune.data.rows.sources import is_local
from loratune.planning.auto import NO_LIMIT
from loratune.recipe.recipe import Source
from loratune.recipe.roles import as_written, trained_roles
from loratune.training.trl_dataset import preparation_difference, with_label_ids
from loratune.workflows.tasks.preference.trl_trainer import rows_of_pairs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.data.examples import Example
    from loratune.planning.preparation import Preparation

BUILDERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
"""File suffix → the builder of `load_dataset` that reads it."""


def why_not_directly(prepared: Preparation) -> str:
    """Return why TRL cannot turn the user's own rows into the same tokens and labels; empty if it can."""
    data = prepared.recipe.data
    if is_pairs(prepared):
        return "DPOTrainer finds the answers in its own way, which loratune does not compare with its masks"
    if prepared.recipe.lora.variant == "eva":
        return "lora.variant is eva, whose initialization needs the tokens"
    sides: list[tuple[Source, list[Example]]] = []
    for side, sources, examples in (
        ("train", data.train, prepared.data.train),
        ("eval", eval_sources(prepared), prepared.data.eval),
    ):
        if not examples:
            continue
        if sources is None:
            return "the held-out conversations are a part of the training data, chosen by loratune"
        reason = _why_not_one_source(sources) or ("has columns with other names" if data.columns else "")
        if reason:
            return f"the {side} data {reason}"
        sides.append((sources[0], examples))
    if trained_roles(data.train_on) not in ((), ("assistant",)):
        return (
            f"data.train_on is {as_written(data.train_on)}, but TRL trains either the assistant's answers or all tokens"
        )
    max_length = min(int(data.max_length), NO_LIMIT)
    for source, examples in sides:
        try:
            rows = _load(source)
        except (ValueError, OSError, DatasetGenerationError, DatasetNotFoundError) as error:
            return f"load_dataset cannot read {source.name}: {str(error).partition(chr(10))[0]}"
        difference = preparation_difference(
            rows, examples, prepared.model.tokenizer, max_length=max_length, assistant_only=data.train_on != "all"
        )
        if difference:
            return difference
    return ""


def eval_sources(prepared: Preparation) -> tuple[Source, ...] | None:
    """Return the sources of the held-out data; None if it is a part of the training data."""
    wanted = prepared.recipe.data.eval
    if isinstance(wanted, tuple):
        return wanted
    (source, *_) = prepared.data.report["eval"]["sources"] if prepared.data.eval else [{"held_out": 0}]
    if "held_out" in source:
        return None
    return (Source.model_validate({key: source[key] for key in Source.model_fields}),)


def _why_not_one_source(sources: Sequence[Source]) -> str:
    if len(sources) > 1:
        return "comes from several sources"
    if sources[0].weight != 1:
        return f"has the weight {sources[0].weight:g}"
    if is_local(sources[0]) and Path(sources[0].name).suffix.lower() not in BUILDERS:
        path = Path(sources[0].name).expanduser()
        return "is a folder of files" if path.is_dir() else f"is a {path.suffix} file, which load_dataset does not read"
    return ""


def _load(source: Source) -> Any:
    disable_progress_bar()
    if not is_local(source):
        return load_dataset(source.name, source.config, split=source.split or "train")
    return load_dataset(builder(source), data_files=str(Path(source.name).expanduser()), split="train")


def builder(source: Source) -> str:
    """Return the builder of `load_dataset` that reads a file."""
    return BUILDERS[Path(source.name).suffix.lower()]


def is_pairs(prepared: Preparation) -> bool:
    """Tell whether the run trains pairs of answers."""
    return isinstance(prepared.data.train[0], PairExample)


def write_rows(prepared: Preparation, folder: Path) -> None:
    """Write tokens and labels of all examples as Parquet files; of pairs, tokens and masks of both answers."""
    as_rows = rows_of_pairs if is_pairs(prepared) else with_label_ids
    folder.mkdir(exist_ok=True)
    (folder / "eval.parquet").unlink(missing_ok=True)  # may be left from an earlier script with held-out data
    disable_progress_bar()
    as_rows(prepared.data.train).to_parquet(folder / "train.parquet")
    if prepared.data.eval:
        as_rows(prepared.data.eval).to_parquet(folder / "eval.parquet")
