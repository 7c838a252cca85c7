"""The runs in a folder: `loratune runs`, and the ranked table of `loratune compare`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from loratune.reporting.blocks import UNEXPECTED
from loratune.reporting.comparison_page import names
from loratune.reporting.run_files import read_run
from loratune.reporting.units import as_interval, as_measure, measure_in_words
from loratune.reporting.verdict import verdict_on
from loratune.run.directory import RunDir
from loratune.run.errors import RecipeError
from loratune.run.html_table import ShownList

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from loratune.reporting.run_files import RunFiles
    from loratune.run.directory import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedRun:
    """A run in a list.

    Attributes:
        run: The run directory.
        state: `finished`, `running` or `stopped`.
        steps: Finished steps.
        changed: When its metrics or, before the first step, its lock were last written; ISO 8601, UTC.
        verdict: The verdict in one sentence; empty before the evaluation.
    """

    run: str
    state: str
    steps: int
    changed: str
    verdict: str

    def as_dict(self) -> Record:
        """Return what `--json` prints."""
        return asdict(self)


def list_runs(folder: str | Path = "__models") -> list[ListedRun]:
    """Return the runs in a folder and its subfolders, the most recently changed first.

    Raises:
        RecipeError: There is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RecipeError("no such folder", file=folder, fix="name the folder with your runs")
    return list_these(sorted(path.parent for path in folder.rglob("lock.json")), title=f"Runs in {folder}")


def list_these(roots: Iterable[Path], *, title: str) -> list[ListedRun]:
    """Return runs, the most recently changed first.

    Args:
        roots: The run directories.
        title: What they are, for notebooks.
    """
    found = [(_last_change(root / "lock.json"), _listed(root / "lock.json")) for root in roots]
    return ShownList(
        (run for _, run in sorted(found, key=lambda pair: -pair[0])),
        title=title,
        columns={
            "run": lambda run: run.run,
            "state": lambda run: run.state,
            "steps": lambda run: f"{run.steps:,}",
            "changed (UTC)": lambda run: run.changed,
            "result": lambda run: run.verdict,
        },
    )


def _last_change(lock: Path) -> float:
    metrics = lock.with_name("metrics.jsonl")
    return (metrics if metrics.is_file() else lock).stat().st_mtime


def _listed(lock: Path) -> ListedRun:
    files = read_run(RunDir.at(lock.parent))
    changed = datetime.fromtimestamp(_last_change(lock), UTC)
    return ListedRun(
        run=str(lock.parent),
        state=files.state,
        steps=files.num_done,
        changed=f"{changed:%Y-%m-%dT%H:%M:%SZ}",
        verdict=_sentence(files),
    )


def _sentence(files: RunFiles) -> str:
    try:
        sentence = "" if files.evaluation is None else verdict_on(files.evaluation).sentence
    except UNEXPECTED:  # a damaged file; the report names it
        return ""
    numbers, more, _ = sentence.partition("); ")  # what follows is advice
    return f"{numbers})" if more else numbers


def runs_table(runs: Iterable[ListedRun]) -> Table:
    """Return a table with one row per run."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("run", "state", "steps", "changed (UTC)", "result"):
        table.add_column(name, overflow="fold", justify="right" if name == "steps" else "left")
    for run in runs:
        changed = run.changed.replace("T", " ").rpartition(":")[0]
        table.add_row(escape(run.run), run.state, f"{run.steps:,}", changed, escape(run.verdict))
    return table


def ranked_table(roots: Sequence[str | Path]) -> Table:
    """Return a table of several runs, the best first: by their common metric, or else by the held-out loss.

    Raises:
        RecipeError: A folder is not a run.
    """
    runs = [read_run(RunDir.open(root)) for root in roots]
    records = [run.evaluation for run in runs if run.evaluation is not None]
    metrics = {record.metric if record.metric in record.tuned else "nll" for record in records}
    name = metrics.pop() if len(metrics) == 1 else "nll"
    table = Table(title=f"Fine-tuned, best first: {measure_in_words(name)}", title_justify="left")
    for column in ("run", measure_in_words(name), "before", "difference, interval", "held-out loss"):
        table.add_column(column, overflow="fold", justify="left" if column == "run" else "right")

    def rank(run: RunFiles) -> float:
        if run.evaluation is None or name not in run.evaluation.tuned:
            return float("inf")
        value = run.evaluation.tuned[name]
        return value if name in ("nll", "perplexity") else -value

    shown = {id(run): escape(text) for run, text in zip(runs, names(runs), strict=True)}
    for run in sorted(runs, key=rank):
        record = run.evaluation
        if record is None or name not in record.tuned:
            table.add_row(shown[id(run)], "–", "–", f"not evaluated ({run.state})", "–")
            continue
        table.add_row(
            shown[id(run)],
            as_measure(name, record.tuned[name]),
            as_measure(name, record.base[name]),
            as_interval(name, record.difference[name]),
            as_measure("nll", record.tuned["nll"]),
        )
    return table
