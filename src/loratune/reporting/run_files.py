"""The files of a run, as far as they can be read: also of a run that is still going or that died."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loratune.run.directory import Record, RunDir, read_json
from loratune.run.errors import RunError


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """What the files of a run hold at one moment.

    Attributes:
        run: The run.
        lock: `lock.json`; empty where it cannot be read, as all records here.
        plan: `plan.json`.
        data: `data.json`.
        evaluation: `evaluation.json`.
        preview: `preview.json`.
        certificates: What `parity.json` lists, if anything was merged or exported.
        steps: The lines of `metrics.jsonl` that are optimizer steps, one a step, in their order.
        held_out: Those that are evaluations.
        events: Those that tell what happened beside the steps.
        state: `finished`, `running` or `stopped`.
        is_trained: Whether the adapter is written.
        read_at: When the files were read.
        complaints: What is missing or damaged, for people.
    """

    run: RunDir
    lock: Record
    plan: Record
    data: Record
    evaluation: Record
    preview: Record
    certificates: list[Record]
    steps: list[Record]
    held_out: list[Record]
    events: list[Record]
    state: str
    is_trained: bool
    read_at: datetime
    complaints: tuple[str, ...]

    @property
    def name(self) -> str:
        """What people call the run: the name of its folder."""
        return self.run.root.name

    @property
    def classifies(self) -> bool:
        """Whether texts are named, not answered."""
        return "labels" in self.lock.get("inputs", {}) or "labels" in self.data

    @property
    def example(self) -> str:
        """What one of its examples is called."""
        return "text" if self.classifies else "conversation"

    @property
    def nats(self) -> str:
        """The unit of its losses."""
        return "nats per text" if self.classifies else "nats per supervised token"

    @property
    def train_seconds(self) -> float:
        """Seconds spent in steps, over all sittings of a resumed run."""
        return math.fsum(step["num_tokens"] / step["tokens_per_second"] for step in self.steps if step["num_tokens"])

    @property
    def num_done(self) -> int:
        """Steps that are done, the skipped ones among them."""
        skipped = sum(event["event"] == "skipped" for event in self.events)
        return len(self.steps) + skipped

    @property
    def num_tokens(self) -> int:
        """Tokens of all steps."""
        return sum(step["num_tokens"] for step in self.steps if step["num_tokens"])


def read_run(run: RunDir) -> RunFiles:
    """Read what is there."""
    complaints: list[str] = []
    running = run.is_in_use
    plan = _record(run.plan, complaints)
    state = "finished" if run.has_adapter and "measured" in plan else "running" if running else "stopped"
    lines = _lines(run.metrics, complaints, growing=state == "running")
    lock = _record(run.lock, complaints)
    return RunFiles(
        run=run,
        lock=lock,
        plan=plan,
        data=_record(run.data, complaints),
        evaluation=_record(run.evaluation, complaints, expected=state == "finished" and _holds_out(lock)),
        preview=_record(run.preview, complaints),
        certificates=_certificates(run.parity, complaints),
        steps=[line for line in lines if "loss" in line],
        held_out=[line for line in lines if "eval_nll" in line],
        events=[line for line in lines if "event" in line],
        state=state,
        is_trained=run.has_adapter,
        read_at=datetime.now(UTC),
        complaints=tuple(complaints),
    )


def _holds_out(lock: Record) -> bool:
    try:
        return bool(lock["recipe"]["data"]["eval"] != "none")
    except (KeyError, TypeError):
        return False


def _record(path: Path, complaints: list[str], *, expected: bool = True) -> Record:
    if not path.exists():
        if expected:
            complaints.append(f"{path.name} is not there.")
        return {}
    try:
        record = read_json(path)
    except (RunError, OSError, RecursionError) as error:
        complaints.append(f"{path.name} cannot be read: {error.problem if isinstance(error, RunError) else error}.")
        return {}
    if not isinstance(record, dict):
        complaints.append(f"{path.name} cannot be read: it holds no object.")
        return {}
    return record


def _certificates(path: Path, complaints: list[str]) -> list[Record]:
    if not path.exists():
        return []
    try:
        found = read_json(path)
    except (RunError, OSError, RecursionError) as error:
        complaints.append(f"{path.name} cannot be read: {error.problem if isinstance(error, RunError) else error}.")
        return []
    if not isinstance(found, list):
        complaints.append(f"{path.name} cannot be read: it holds no list.")
        return []
    return [record for record in found if isinstance(record, dict)]


def _lines(path: Path, complaints: list[str], *, growing: bool) -> list[Record]:
    """All metrics that can be read. While a run is going, its last line may be half written."""
    if not path.exists():
        complaints.append(f"{path.name} is not there: no step was finished.")
        return []
    try:
        written = path.read_bytes().decode(errors="replace").split("\n")
    except OSError as error:
        complaints.append(f"{path.name} cannot be read: {error}.")
        return []
    records, damaged = [], []
    for number, line in enumerate(written, 1):
        record = _metrics(line)
        if record is not None:
            records.append(record)
        elif line and not (growing and number == len(written)):
            damaged.append(number)
    if damaged:
        more = "" if len(damaged) == 1 else f" and {len(damaged) - 1} more"
        complaints.append(f"{path.name}: line {damaged[0]}{more} cannot be read and is left out of the curves.")
    return records


def _metrics(line: str) -> Record | None:
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            return None
        numbers = (record["step"], record["time"]) if "event" in record else _flat(record)
        return record if all(map(_is_number, numbers)) else None
    except (LookupError, ValueError, OverflowError, RecursionError):
        return None


def _flat(record: Record) -> Iterator[Any]:
    """The values, with those of the sources of a held-out loss."""
    for value in record.values():
        if isinstance(value, dict):
            yield from value.values()
        else:
            yield value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
