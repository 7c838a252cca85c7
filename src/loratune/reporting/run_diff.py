"""`loratune diff`: how two runs differ, from their files alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table

from loratune.run.directory import RunDir
from loratune.run.html_table import ShownList
from loratune.run.records.data import DataRecord, SideReport, SourceRead
from loratune.run.records.evaluation import EvaluationRecord
from loratune.run.records.files import read_metrics, read_record
from loratune.run.records.lock import Fingerprints, Inputs, LockRecord
from loratune.run.records.metrics import EvaluationLine, StepLine
from loratune.run.records.plan import PlanRecord

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from loratune.run.directory import Record

GROUPS = ("settings", "model", "template", "data", "mask", "adapter", "versions", "machine", "results")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDifference:
    """A value that differs between two runs.

    Attributes:
        group: One of `GROUPS`.
        name: Name inside the group, such as `lora.r`.
        first, second: The values; None if a run has none.
    """

    group: str
    name: str
    first: Any
    second: Any

    def as_dict(self) -> Record:
        """Return what `--json` prints."""
        return asdict(self)


def diff(first: RunDir | str | Path, second: RunDir | str | Path) -> list[RunDifference]:
    """Return all differences between two runs, group by group.

    Args:
        first: A run, or its folder.
        second: The other one.

    Raises:
        RecipeError: A folder is not a run.
        RunError: A file of a run is missing, damaged or of another version.
    """
    runs = [run if isinstance(run, RunDir) else RunDir.open(run) for run in (first, second)]
    one, other = map(facts, runs)
    names = [run.root.name for run in runs]
    return ShownList(
        (
            RunDifference(group=group, name=name, first=one[group].get(name), second=other[group].get(name))
            for group in GROUPS
            for name in dict.fromkeys([*one[group], *other[group]])
            if one[group].get(name) != other[group].get(name)
        ),
        title=f"{names[0]} and {names[1]}",
        columns={
            "what": lambda found: found.group,
            "name": lambda found: found.name,
            "first": lambda found: "–" if found.first is None else found.first,
            "second": lambda found: "–" if found.second is None else found.second,
        },
    )


def facts(run: RunDir) -> dict[str, dict[str, Any]]:
    """Return what is known about a run: group → name → value."""
    lock, data = read_record(run.lock, LockRecord), read_record(run.data, DataRecord)
    settings = dict(_flat(lock.recipe))
    settings.pop("train.output_dir", None)  # always differs
    prints = _fingerprints(lock.inputs)
    return {
        "settings": settings,
        "model": lock.inputs.model,
        "template": {"chat template": lock.inputs.template},
        "data": {**_data_facts(data), **{name: value for name, value in prints.items() if name.endswith("tokens")}},
        "mask": {
            "method": data.mask.method,
            **{name: value for name, value in prints.items() if not name.endswith("tokens")},
        },
        "adapter": lock.adapter.model_dump(),
        "versions": lock.versions,
        "machine": lock.machine.model_dump(),
        "results": _results(run),
    }


def _fingerprints(inputs: Inputs) -> dict[str, str]:
    """Return `train tokens`, `eval mask` and the like → SHA-256. Streamed data has those of its files instead."""
    found = {
        f"{side} {name}": value
        for name in ("tokens", "mask", "classes")
        for side, part in (("train", inputs.train), ("eval", inputs.eval))
        if isinstance(part, Fingerprints) and (value := getattr(part, name)) is not None
    }
    if inputs.labels is not None:
        found["classes"] = ", ".join(inputs.labels)
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _data_facts(data: DataRecord) -> dict[str, Any]:
    return dict(
        fact for side, part in (("train", data.train), ("eval", data.eval)) if part for fact in _side_facts(side, part)
    )


def _side_facts(side: str, part: SideReport) -> Iterator[tuple[str, Any]]:
    for name in ("rows", "conversations", "tokens", "supervised_tokens", "truncated", "dropped", "num_rejected"):
        yield f"{side} {name}", getattr(part, name)
    for source in part.sources:
        if isinstance(source, SourceRead):
            yield from ((f"{side} file {file}", digest) for file, digest in source.sha256.items())


def _results(run: RunDir) -> dict[str, Any]:
    lines = read_metrics(run)
    losses = [line.loss for line in lines if isinstance(line, StepLine)]
    held_out = [line.eval_nll for line in lines if isinstance(line, EvaluationLine)]
    results: dict[str, Any] = {"steps": len(losses), "finished": run.has_adapter}
    if losses:
        results["loss of the last step"] = losses[-1]
    if held_out:
        results["held-out loss at the end"] = held_out[-1]
        results["lowest held-out loss"] = min(held_out)
    if run.evaluation.is_file():
        evaluation = read_record(run.evaluation, EvaluationRecord)
        for side, measures in (("base", evaluation.base), ("fine-tuned", evaluation.tuned)):
            results.update({f"{side} {name}": value for name, value in measures.items()})
    measured = read_record(run.plan, PlanRecord).measured
    results.update({f"measured {name}": value for name, value in measured.model_dump().items()} if measured else {})
    return results


def difference_table(differences: list[RunDifference], first: RunDir, second: RunDir) -> Table:
    """Return a table with one row per difference; SHA-256 digests are shortened."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", first.root.name, second.root.name, "change"):
        table.add_column(column, overflow="fold")
    for group in GROUPS:
        rows = [item for item in differences if item.group == group]
        if not rows:
            continue
        table.add_section()
        table.add_row(f"[bold]{group}[/bold]")
        for item in rows:
            change = _change(item.first, item.second)
            table.add_row(*(escape(text) for text in (item.name, _shown(item.first), _shown(item.second), change)))
    return table


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef"):
        return f"{value[:12]}…"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _change(first: Any, second: Any) -> str:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (first, second))
    return f"{second - first:+.4g} ({second / first - 1:+.1%})" if numbers and first else ""
