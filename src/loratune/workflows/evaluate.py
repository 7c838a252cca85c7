"""workflows.evaluate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from loratune.evaluation.gates import check_names, parse_gate, pass_gates
from loratune.evaluation.lm_eval import check_harness, run_harness
from loratune.evaluation.user_metric import load_metric
from loratune.planning.checks import check_prompts
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.recipe.tasks import require_text
from loratune.reporting.html import report_or_warn
from loratune.reporting.model_card import write_card
from loratune.run.directory import RunDir, read_json, write_json
from loratune.run.errors import DataError, RecipeError
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.workflows.assess import compare_base_and_tuned, explain_out_of_memory
from loratune.workflows.load import load_trained
from loratune.workflows.result import RunResult
from loratune.workflows.tasks.task import task_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """What an evaluation measures beside what the recipe says.

    Attributes:
        metric: `path/to/file.py:function`, in the place of the recipe's metric; empty: none.
        harness: Tasks of lm-evaluation-harness, by name or as YAML files.
        gates: Thresholds such as `json>=0.8`.
        allow_code: Whether Python code that metric and tasks name may run.
    """

    metric: str = ""
    harness: tuple[str, ...] = ()
    gates: tuple[str, ...] = ()
    allow_code: bool = False


_NOTHING_MORE = Extras()


def evaluate(root: str | Path, *, extras: Extras = _NOTHING_MORE, progress: Progress = NO_PROGRESS) -> RunResult:
    """Measure base against tuned of a finished run again, and write `evaluation.json`, the card and the report.

    Whether the gates were passed stands in the record; `evaluation.gates.check_gates` raises where they were not.

    Raises:
        RecipeError: The run is not finished, has no held-out data, or the extras do not fit.
        DataError: No held-out conversation has an answer for the metric, or its prompt leaves no room for one.
        MachineError: lm-evaluation-harness is asked for and not installed.
        RunError: The metric or a task fails.
    """
    run = RunDir.open(root)
    if not run.has_adapter:
        raise RecipeError("the run has no adapter yet", file=run.root, fix=f"`loratune resume {root}`")
    recipe = Recipe.parse(read_json(run.lock)["recipe"], file=run.lock)
    if recipe.data.eval == "none":
        raise RecipeError("data.eval of this run is none: there is nothing to evaluate on", file=run.lock)
    own = load_metric(extras.metric, allow_code=extras.allow_code) if extras.metric else None
    gates = [parse_gate(text) for text in extras.gates]
    task = task_of(recipe)
    if extras.harness:
        require_text(recipe, "--harness", "--gate accuracy>=0.9, or f1")
    measures = task.measures(recipe, own)
    forgets = recipe.evaluate.forgetting != "none"
    check_names(gates, measures, forgetting=forgets, harness=bool(extras.harness))
    if extras.harness:
        check_harness(extras.harness, allow_code=extras.allow_code)
    prepared = prepare(recipe, progress)
    if own is not None:
        prompts = task.prompts(recipe, prepared.data, prepared.model.tokenizer)
        prepared = replace(prepared, data=replace(prepared.data, prompts=prompts))
        if not prepared.data.prompts:
            raise DataError("no held-out conversation has an answer for --metric to score", fix="other data.eval")
        check_prompts(recipe, prepared.data.prompts, prepared.model.positions)
    model, loss = load_trained(prepared, run, progress)
    with explain_out_of_memory(run):
        evaluation = compare_base_and_tuned(prepared, run, model, loss, progress, metric=own)
    if extras.harness:
        progress.line(f"lm-evaluation-harness: {', '.join(extras.harness)}")
        evaluation["harness"] = run_harness(
            model, prepared.model.tokenizer, extras.harness, allow_code=extras.allow_code
        )
    pass_gates(gates, evaluation)
    write_json(run.evaluation, evaluation)
    write_card(run)
    report_or_warn(run, progress)
    return RunResult(run=run, evaluation=evaluation)
