"""`loratune evaluate`: repeat the comparison of base and fine-tuned model of a finished run, with further metrics and
gates."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from loratune.evaluation.gates import check_names, parse_gate, pass_gates
from loratune.evaluation.lm_eval import check_harness, run_harness
from loratune.evaluation.user_metric import UserMetric, load_metric
from loratune.planning.checks import check_prompts
from loratune.planning.prepare import prepare
from loratune.recipe.sections.evaluate import METRICS, EvaluateSection
from loratune.recipe.tasks import require_text
from loratune.reporting.html import report_or_warn
from loratune.reporting.model_card import write_card
from loratune.run.directory import RunDir
from loratune.run.errors import DataError, RecipeError
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.run.records.evaluation import EvaluationRecord
from loratune.run.records.files import write_record
from loratune.run.run_log import RunLog
from loratune.workflows.assess import compare_base_and_tuned, explain_out_of_memory
from loratune.workflows.before_training import before_training
from loratune.workflows.finished import recipe_here
from loratune.workflows.load import load_trained
from loratune.workflows.result import RunResult
from loratune.workflows.tasks.task import task_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from loratune.planning.preparation import Preparation
    from loratune.recipe.recipe import Recipe


def evaluate(
    root: str | Path,
    *,
    metric: str = "",
    harness: Sequence[str] = (),
    gates: Sequence[str] = (),
    allow_code: bool = False,
    progress: Progress = NO_PROGRESS,
) -> RunResult:
    """Compare base and fine-tuned model of a finished run again, and rewrite `evaluation.json`, model card and report.

    The record says whether the gates were passed; `evaluation.gates.check_gates` raises if one was not.

    Args:
        root: The run directory.
        metric: A metric of `evaluate.metric`, or `path/to/file.py:function`; empty for the recipe's.
        harness: Tasks of lm-evaluation-harness, by name or as YAML files.
        gates: Thresholds such as `json>=0.8`.
        allow_code: Whether Python code that metric and tasks name may run.
        progress: Shows how far it is.

    Raises:
        RecipeError: The run is not finished, has no held-out data, or metric, tasks or gates do not fit.
        DataError: No held-out conversation has an answer for the metric, or its prompt leaves no room for one.
        MachineError: lm-evaluation-harness is asked for and not installed.
        RunError: The metric or a task fails.
    """
    run = RunDir.open(root)
    run.require_adapter()
    with RunLog(progress, run.log) as log:
        log.note(" ".join(["evaluate", *(f"--metric {name}" for name in [metric] if name)]))
        result = _evaluate(run, metric, harness, gates, log, allow_code=allow_code)
        log.note(result.verdict)  # the terminal says it below the tables
    return result


def _evaluate(
    run: RunDir, metric: str, harness: Sequence[str], gates: Sequence[str], progress: Progress, *, allow_code: bool
) -> RunResult:
    recipe = recipe_here(run, progress)
    if recipe.data.eval == "none":
        raise RecipeError("data.eval of this run is none: there is nothing to evaluate on", file=run.lock)
    recipe, own = _with_metric(recipe, metric, allow_code=allow_code)
    parsed = [parse_gate(text) for text in gates]
    task = task_of(recipe)
    if harness:
        require_text(recipe, "--harness", "--gate accuracy>=0.9, or f1")
    measures = task.measures(recipe, own)
    forgets = recipe.evaluate.forgetting != "none"
    check_names(parsed, measures, forgetting=forgets, harness=bool(harness))
    if harness:
        check_harness(harness, allow_code=allow_code)
    prepared = prepare(recipe, progress)
    if own is not None:
        prepared = _with_prompts(prepared)
    model, loss = load_trained(prepared, run, progress)
    with explain_out_of_memory(run):
        evaluation, _ = compare_base_and_tuned(prepared, run, model, loss, progress, metric=own)
    if harness:
        progress.line(f"lm-evaluation-harness: {', '.join(harness)}")
        before = partial(before_training, model, run, started=evaluation["before"] == "start")
        tokenizer = prepared.model.tokenizer
        evaluation["harness"] = run_harness(model, tokenizer, harness, before=before, allow_code=allow_code)
    pass_gates(parsed, evaluation)
    evaluation = write_record(run.evaluation, EvaluationRecord, evaluation)
    write_card(run)
    report_or_warn(run, progress)
    return RunResult(run=run, evaluation=evaluation)


def _with_prompts(prepared: Preparation) -> Preparation:
    """Return the run with held-out prompts, which a run without a metric has not.

    Raises:
        DataError: There are none, or one leaves no room for an answer.
    """
    prompts = task_of(prepared.recipe).prompts(prepared.recipe, prepared.data, prepared.model.tokenizer)
    if not prompts:
        raise DataError(
            "no held-out conversation has an answer for --metric to score",
            fix="train a run whose data.eval has answers",
        )
    check_prompts(prepared.recipe, prompts, prepared.model.positions)
    return replace(prepared, data=replace(prepared.data, prompts=prompts))


def _with_metric(recipe: Recipe, metric: str, *, allow_code: bool) -> tuple[Recipe, UserMetric | None]:
    """Return the recipe with the built-in metric of this name, or else the user's own metric.

    Raises:
        RecipeError: The metric is neither, or the model writes no text for a built-in one to score.
    """
    if not metric:
        return recipe, None
    changes: dict[str, object] = {} if recipe.evaluate.samples else {"samples": EvaluateSection().samples}
    own = None
    if metric in METRICS:
        require_text(recipe, f"--metric {metric}", "leave --metric out; a classifier has its own measures")
        changes["metric"] = metric
    else:
        own = load_metric(metric, allow_code=allow_code)
    return recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update=changes)}), own
