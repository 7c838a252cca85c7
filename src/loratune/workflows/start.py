"""The start of a run: what was planned is written into its directory, and the training begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratune.data.preview import preview
from loratune.run.directory import RunDir, write_text
from loratune.run.records.data import DataRecord
from loratune.run.records.files import write_record
from loratune.run.records.plan import PlanRecord
from loratune.run.records.preview import PreviewRecord
from loratune.workflows.before_training import keep_start
from loratune.workflows.steps import FULL_RUN, Leg, run_from_weights, write_lock

if TYPE_CHECKING:
    from loratune.planning.preparation import Preparation
    from loratune.run.progress import Progress
    from loratune.workflows.result import RunResult

PREVIEW_EXAMPLES = 5
"""Examples whose tokens are kept in the run directory."""


def start_run(prepared: Preparation, run: RunDir, written: str, progress: Progress, leg: Leg = FULL_RUN) -> RunResult:
    """Write what was planned into the empty run directory, and train.

    Args:
        prepared: The prepared run.
        run: Its directory.
        written: The recipe as the user wrote it.
        progress: Shows how far the run is.
        leg: How far to go.

    Raises:
        Paused: The leg ends before the run does.
    """
    with run.exclusive():
        write_initial_files(prepared, run, written)
        write_lock(prepared, run)
        return run_from_weights(prepared, run, None, progress, leg)


def write_initial_files(prepared: Preparation, run: RunDir, written: str) -> None:
    """Write what a run begins with, but for the lock: recipe as written, data report, examples, plan, first adapter."""
    write_text(run.recipe, written)
    write_record(run.data, DataRecord, prepared.data.report)
    examples = preview(prepared.data.train, prepared.model.tokenizer, PREVIEW_EXAMPLES)
    write_record(run.preview, PreviewRecord, examples.as_record())
    write_record(run.plan, PlanRecord, prepared.as_plan())
    if prepared.adapter.start is not None:
        keep_start(run, prepared.adapter.start)
