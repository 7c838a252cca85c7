"""The files of a run, as far as they can be read, even of a run that is in progress or has crashed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel

from loratune.reporting.task import ReportedTask, reported_task
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import RunError
from loratune.run.records.base import read_valid_parts
from loratune.run.records.certificate import CertificateRecord
from loratune.run.records.data import DataRecord
from loratune.run.records.evaluation import EvaluationRecord
from loratune.run.records.lock import LockRecord
from loratune.run.records.metrics import EvaluationLine, EventLine, StepLine, parse_metrics_line
from loratune.run.records.plan import PlanRecord
from loratune.run.records.preview import PreviewRecord

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Line = StepLine | EvaluationLine | EventLine
AnyRecord = TypeVar("AnyRecord", bound=BaseModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """The contents of a run's files at one moment.

    A record is None where its file is missing or unreadable. Of a file that is damaged in part, the other parts are
    there, and reading a damaged one is an AttributeError: the section that needs it is left out of the page, which says
    so.

    Attributes:
        run: The run.
        task: Its task.
        lock: `lock.json`.
        plan: `plan.json`.
        data: `data.json`.
        evaluation: `evaluation.json`.
        preview: `preview.json`.
        certificates: Certificates in `parity.json`; none if nothing was merged or exported.
        steps: Optimizer steps in `metrics.jsonl`, in order.
        held_out: Evaluations in `metrics.jsonl`.
        events: Events in `metrics.jsonl`, without the answers given during training.
        samples: Answers given during training, in `metrics.jsonl`.
        state: `finished`, `running` or `stopped`.
        is_trained: Whether the adapter is written.
        read_at: When the files were read.
        complaints: What is missing or damaged, in words.
    """

    run: RunDir
    task: ReportedTask
    lock: LockRecord | None
    plan: PlanRecord | None
    data: DataRecord | None
    evaluation: EvaluationRecord | None
    preview: PreviewRecord | None
    certificates: list[CertificateRecord]
    steps: list[StepLine]
    held_out: list[EvaluationLine]
    events: list[EventLine]
    samples: list[EventLine]
    state: str
    is_trained: bool
    read_at: datetime
    complaints: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return self.run.root.name

    @property
    def train_seconds(self) -> float:
        """Seconds spent in optimizer steps, including those before the run was resumed."""
        return math.fsum(step.num_tokens / step.tokens_per_second for step in self.steps if step.num_tokens)

    @property
    def num_done(self) -> int:
        """Finished steps, including skipped ones."""
        return len(self.steps) + sum(event.event == "skipped" for event in self.events)

    @property
    def num_tokens(self) -> int:
        """Tokens of all finished steps."""
        return sum(step.num_tokens for step in self.steps)


def read_run(run: RunDir) -> RunFiles:
    """Read what is there."""
    complaints: list[str] = []
    running = run.is_in_use
    plan = _read(run.plan, PlanRecord, complaints)
    measured = plan is not None and "measured" in plan.model_fields_set
    state = "finished" if run.has_adapter and measured else "running" if running else "stopped"
    lines = _read_lines(run.metrics, complaints, growing=state == "running")
    lock = _read(run.lock, LockRecord, complaints)
    return RunFiles(
        run=run,
        task=reported_task(lock),
        lock=lock,
        plan=plan,
        data=_read(run.data, DataRecord, complaints),
        evaluation=_read(
            run.evaluation, EvaluationRecord, complaints, expected=state == "finished" and _has_held_out_data(lock)
        ),
        preview=_read(run.preview, PreviewRecord, complaints),
        certificates=_read_certificates(run.parity, complaints),
        steps=[line for line in lines if isinstance(line, StepLine)],
        held_out=[line for line in lines if isinstance(line, EvaluationLine)],
        events=[line for line in lines if isinstance(line, EventLine) and not line.answers],
        samples=[line for line in lines if isinstance(line, EventLine) and line.answers],
        state=state,
        is_trained=run.has_adapter,
        read_at=datetime.now(UTC),
        complaints=tuple(complaints),
    )


def _has_held_out_data(lock: LockRecord | None) -> bool:
    try:
        return lock is not None and lock.recipe["data"]["eval"] != "none"
    except (KeyError, AttributeError):
        return False


def _read(path: Path, model: type[AnyRecord], complaints: list[str], *, expected: bool = True) -> AnyRecord | None:
    if not path.exists():
        if expected:
            complaints.append(f"{path.name} is missing.")
        return None
    values = _read_values(path, dict, "object", complaints)
    return None if values is None else read_valid_parts(model, values)


def _read_certificates(path: Path, complaints: list[str]) -> list[CertificateRecord]:
    found = _read_values(path, list, "list", complaints) if path.exists() else []
    return [read_valid_parts(CertificateRecord, values) for values in found or () if isinstance(values, dict)]


def _read_values(path: Path, kind: type, words: str, complaints: list[str]) -> Any:
    """Return the JSON value of a file if it is of a kind, else None with a complaint."""
    try:
        values = read_json(path)
    except (RunError, OSError, RecursionError) as error:
        complaints.append(f"{path.name} cannot be read: {error.problem if isinstance(error, RunError) else error}.")
        return None
    if not isinstance(values, kind):
        complaints.append(f"{path.name} cannot be read: it is not a JSON {words}.")
        return None
    return _encodable(values)


def _encodable(value: Any) -> Any:
    """Return JSON values with half characters (U+D800) spelled out: JSON can name them, no encoding can hold them."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_encodable(key): _encodable(inner) for key, inner in value.items()}
    return [_encodable(inner) for inner in value] if isinstance(value, list) else value


def _read_lines(path: Path, complaints: list[str], *, growing: bool) -> list[Line]:
    """Return all lines of the metrics that can be read. While a run is going, its last line may be half written."""
    if not path.exists():
        complaints.append(f"{path.name} is missing: no step was finished.")
        return []
    try:
        written = path.read_bytes().decode(errors="replace").split("\n")
    except OSError as error:
        complaints.append(f"{path.name} cannot be read: {error}.")
        return []
    records, damaged = [], []
    for number, line in enumerate(written, 1):
        record = _read_line(line)
        if record is not None:
            records.append(record)
        elif line and not (growing and number == len(written)):
            damaged.append(number)
    if damaged:
        more = "" if len(damaged) == 1 else f" and {len(damaged) - 1} more"
        complaints.append(f"{path.name}: line {damaged[0]}{more} cannot be read and is left out of the curves.")
    return records


def _read_line(line: str) -> Line | None:
    try:
        record = parse_metrics_line(line, lenient=True)
        return record if all(map(math.isfinite, _numbers(record))) else None
    except (ValueError, OverflowError):
        return None


def _numbers(record: Line) -> Iterator[float]:
    """Yield the numbers that are drawn: of steps and evaluations all, including the losses of the sources."""
    if isinstance(record, EventLine):
        yield from (record.step, record.time)
        return
    for value in record.__dict__.values():
        if isinstance(value, dict):
            yield from value.values()
        elif value is not None:
            yield value
