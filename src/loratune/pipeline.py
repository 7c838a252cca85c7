"""What each verb does, in order: the one module that knows every stage.

plan        prepare, and tell
train       prepare → run directory → weights and adapter → steps → adapter saved → base against tuned
resume      the same from a checkpoint, after checking that nothing it depends on changed
evaluate    base against tuned, of a finished run
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from loratune.data.preview import preview
from loratune.data.render import stop_token_ids
from loratune.early_checks import check_prompts
from loratune.errors import DataError, Interrupted, RecipeError, RunError
from loratune.evaluation.compare import evaluation_record, nll_record
from loratune.evaluation.gates import check_names, parse_gate, pass_gates
from loratune.evaluation.generate import Answer, generate_answers
from loratune.evaluation.harness import check_harness, run_harness
from loratune.evaluation.own_metric import OwnMetric, load_metric
from loratune.lock import differences
from loratune.model.adapter import attach_adapter, save_adapter
from loratune.model.device import peak_bytes, torch_dtype
from loratune.model.load import load_config, load_model, positions_of
from loratune.planning.devices import find_device
from loratune.preparation import Preparation, held_out_prompts, output_dir, prepare
from loratune.progress import Progress, Silent
from loratune.recipe import Recipe
from loratune.reporting.card import write_card
from loratune.reporting.page import report_or_warn
from loratune.run import Record, RunDir, read_json, write_json
from loratune.training.callbacks import RunCallback, stopping_in_order
from loratune.training.checkpoint import latest_checkpoint
from loratune.training.compilation import prepare_layers
from loratune.training.loss import SupervisedLoss, make_loss
from loratune.training.trainer import FastTrainer, ReferenceTrainer, TrainingData, evaluate_nll, resume_state

Nll = list[tuple[float, int]]
"""Per held-out example: the sum of -log p over its supervised tokens, and their number."""

PREVIEW_EXAMPLES = 5
"""Examples whose tokens are kept in the run directory."""

_NOBODY = Silent()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run left behind.

    Attributes:
        run: Its directory.
        evaluation: `evaluation.json`, or None without held-out data.
    """

    run: RunDir
    evaluation: Record | None


def plan(recipe: Recipe, *, device: str | None = None, progress: Progress = _NOBODY) -> Preparation:
    """What would be trained, and whether it fits; loads no weights. `.as_plan()` is the record.

    Args:
        recipe: What to do.
        device: A GPU of `loratune.planning.devices` to plan for; None for this machine.
        progress: Who is told how it goes.
    """
    return prepare(recipe, progress, find_device(device) if device is not None else None)


def train(
    recipe: Recipe,
    *,
    written: str | None = None,
    overwrite: bool = False,
    progress: Progress = _NOBODY,
    on_plan: Callable[[Preparation], None] | None = None,
) -> RunResult:
    """Fine-tune, and evaluate base against tuned.

    Args:
        recipe: What to do.
        written: The recipe as the user wrote it, kept in the run directory.
        overwrite: Whether a run that is there already may be deleted.
        progress: Who is told how it goes.
        on_plan: Called with the `Preparation` before the weights load.

    Raises:
        RecipeError, DataError, MachineError: Nothing was started.
        Interrupted: The user stopped it; `resume` goes on.
        RunError: It failed while running.
    """
    RunDir.check(output_dir(recipe), overwrite=overwrite)
    prepared = prepare(recipe, progress)
    if on_plan is not None:
        on_plan(prepared)
    run = RunDir.create(output_dir(recipe), overwrite=overwrite)
    with run.exclusive():
        run.recipe.write_text(written if written is not None else recipe.to_yaml(), encoding="utf-8")
        write_json(run.data, prepared.data.report)
        write_json(run.preview, preview(prepared.data.train, prepared.tokenizer, PREVIEW_EXAMPLES).as_record())
        write_json(run.plan, prepared.as_plan())
        write_json(run.lock, prepared.as_lock())
        return _run(prepared, run, None, progress)


def resume(root: str | Path, *, progress: Progress = _NOBODY) -> RunResult:
    """Go on where a run stopped.

    Raises:
        RecipeError: The run is finished, or its model, template or data changed since it began.
        RunError: There is no checkpoint that can be used.
    """
    run = RunDir.open(root)
    if run.is_finished:
        raise RecipeError("the run is finished", file=run.root, fix=f"`loratune evaluate {root}`, or train anew")
    with run.exclusive():
        lock = read_json(run.lock)
        prepared = prepare(Recipe.parse(lock["recipe"], file=run.lock), progress)
        changed = differences(lock, prepared.as_lock())
        if changed:
            raise RecipeError(
                f"changed since the run began: {', '.join(changed)}", file=run.lock, fix="restore it, or train anew"
            )
        checkpoint, complaints = latest_checkpoint(run.checkpoints)
        for complaint in complaints:
            progress.warn(complaint)
        if checkpoint is None:
            raise RunError(
                "the run has no checkpoint to go on from", file=run.checkpoints, fix="train anew with --overwrite"
            )
        step = resume_state(checkpoint)
        run.rewind_metrics(step)
        progress.line(f"going on after step {step}")
        return _run(prepared, run, checkpoint, progress)


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


def evaluate(root: str | Path, *, extras: Extras = _NOTHING_MORE, progress: Progress = _NOBODY) -> RunResult:
    """Measure base against tuned of a finished run again, and write `evaluation.json`, the card and the report.

    Whether the gates were passed stands in the record; `evaluation.gates.check_gates` raises where they were not.

    Raises:
        RecipeError: The run is not finished, has no held-out data, or the extras do not fit.
        DataError: No held-out conversation has an answer for the metric, or its prompt leaves no room for one.
        MachineError: lm-evaluation-harness is asked for and not installed.
        RunError: The metric or a task fails.
    """
    run = RunDir.open(root)
    if not run.is_finished:
        raise RecipeError("the run has no adapter yet", file=run.root, fix=f"`loratune resume {root}`")
    recipe = Recipe.parse(read_json(run.lock)["recipe"], file=run.lock)
    if recipe.data.eval == "none":
        raise RecipeError("data.eval of this run is none: there is nothing to evaluate on", file=run.lock)
    own = load_metric(extras.metric, allow_code=extras.allow_code) if extras.metric else None
    gates = [parse_gate(text) for text in extras.gates]
    metric = own.name if own else recipe.evaluate.metric
    measures = [*([metric] if metric != "none" else []), "nll", "perplexity"]
    forgets = recipe.evaluate.forgetting != "none"
    check_names(gates, measures, forgetting=forgets, harness=bool(extras.harness))
    if extras.harness:
        check_harness(extras.harness, allow_code=extras.allow_code)
    prepared = prepare(recipe, progress)
    if own is not None:
        prepared = replace(prepared, prompts=held_out_prompts(recipe, prepared.data, prepared.tokenizer))
        if not prepared.prompts:
            raise DataError("no held-out conversation has an answer for --metric to score", fix="other data.eval")
        check_prompts(recipe, prepared.prompts, positions_of(load_config(prepared.base, recipe.model)))
    base = _load_base(prepared, progress)
    model = PeftModel.from_pretrained(base, str(run.adapter))
    loss, _ = make_loss(model, prepared.data.train)
    evaluation = _evaluate(prepared, run, model, loss, progress, own=own)
    if extras.harness:
        progress.line(f"lm-evaluation-harness: {', '.join(extras.harness)}")
        evaluation["harness"] = run_harness(model, prepared.tokenizer, extras.harness, allow_code=extras.allow_code)
    pass_gates(gates, evaluation)
    write_json(run.evaluation, evaluation)
    write_card(run)
    report_or_warn(run, progress)
    return RunResult(run=run, evaluation=evaluation)


def _run(prepared: Preparation, run: RunDir, checkpoint: Path | None, progress: Progress) -> RunResult:
    """From the weights to the evaluation."""
    started = time.perf_counter()
    recipe = prepared.recipe
    base = _load_base(prepared, progress)
    if checkpoint is None and prepared.base.revision:
        write_json(run.lock, prepared.as_lock())  # the weights of a hub model were not there before
    model = attach_adapter(
        base, recipe.lora, prepared.targets, base_name=_loadable_name(prepared), seed=recipe.train.seed
    )
    if recipe.train.engine == "fast":
        loss, reason = make_loss(model, prepared.data.train)
        if reason:
            progress.warn(f"one example at a time: {reason}")
        loss.compiled = recipe.train.compile is True
        prepare_layers(model, compiled=loss.compiled, num_recomputed=int(recipe.train.recompute))
    else:
        loss = SupervisedLoss(model, packed=False)
    seconds, tuned_nll = _train(prepared, run, model, loss, checkpoint, progress)
    _save(prepared, run, model)
    evaluation = _evaluate(prepared, run, model, loss, progress, tuned_nll) if prepared.data.eval else None
    record = read_json(run.plan)
    record["measured"] = {
        "peak_bytes": peak_bytes(recipe.train.device),
        "train_seconds": seconds,
        "tokens_per_second": tokens_per_second(run.read_metrics()),
        "total_seconds": time.perf_counter() - started,
    }
    write_json(run.plan, record)
    write_card(run)
    report_or_warn(run, progress)
    return RunResult(run=run, evaluation=evaluation)


def _load_base(prepared: Preparation, progress: Progress) -> Any:
    recipe = prepared.recipe
    progress.line(f"loading {recipe.model.name} in {recipe.model.dtype} on {recipe.train.device}")
    return load_model(prepared.base, recipe.model, dtype=torch_dtype(recipe.model.dtype), device=recipe.train.device)


def _loadable_name(prepared: Preparation) -> str:
    """What PEFT can load the base by: its hub id, or its folder."""
    return prepared.base.name if prepared.base.revision else str(prepared.base.path)


def _train(
    prepared: Preparation,
    run: RunDir,
    model: PeftModel,
    loss: SupervisedLoss,
    checkpoint: Path | None,
    progress: Progress,
) -> tuple[float, Nll | None]:
    """All optimizer steps; returns the seconds spent in them, and the last step's held-out losses if it was evaluated."""
    recipe, data = prepared.recipe, prepared.data
    done = resume_state(checkpoint) if checkpoint is not None else 0
    torch.manual_seed(recipe.train.seed)
    with progress.task("training", prepared.num_steps, "steps") as task:
        task.advance(done)
        callback = RunCallback(run, progress, task)
        common = {
            "model": model,
            "train": recipe.train,
            "data": TrainingData(train=data.train, eval=data.eval, token_budget=prepared.memory.token_budget),
            "loss": loss,
            "run": run,
            "callbacks": [callback],
            "progress": progress,
        }
        trainer = (
            FastTrainer(**common)
            if recipe.train.engine == "fast"
            else ReferenceTrainer(**common, tokenizer=prepared.tokenizer)
        )
        callback.watch(trainer)
        with stopping_in_order(callback, progress):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    if callback.stopped_at is not None:
        raise Interrupted(
            f"stopped after step {callback.stopped_at} of {prepared.num_steps}, which is saved",
            fix=f"`loratune resume {run.root}` goes on",
        )
    step, losses = trainer.last_evaluation
    return callback.train_seconds, losses if step == prepared.num_steps else None


def _save(prepared: Preparation, run: RunDir, model: PeftModel) -> None:
    """The adapter with tokenizer and template, whole or not at all."""
    temporary = run.root / ".adapter.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    save_adapter(model, temporary)
    prepared.tokenizer.save_pretrained(temporary)
    shutil.rmtree(run.adapter, ignore_errors=True)
    temporary.rename(run.adapter)


def _evaluate(
    prepared: Preparation,
    run: RunDir,
    model: PeftModel,
    loss: SupervisedLoss,
    progress: Progress,
    tuned_nll: Nll | None = None,
    own: OwnMetric | None = None,
) -> Record:
    """Base and tuned from the same loaded model, adapter off and on.

    `tuned_nll`: where it is known already; `own`: in the place of the recipe's metric.
    """
    section, data = prepared.recipe.evaluate, prepared.data
    prompts = prepared.prompts
    stops = stop_token_ids(prepared.tokenizer) if prompts else ()

    def measure(name: str, known: Nll | None = None) -> tuple[Nll, Nll, list[Answer]]:
        nll = known or evaluate_nll(loss, data.eval, prepared.memory.token_budget, progress)
        other = evaluate_nll(loss, prepared.forgetting, prepared.memory.token_budget, progress)
        if not prompts:
            return nll, other, []
        with progress.task(f"{name} answers", len(prompts), "prompts") as task:
            answers = generate_answers(
                model,
                prepared.tokenizer,
                prompts,
                max_new_tokens=section.max_new_tokens,
                stop_token_ids=stops,
                progress=task.advance,
            )
        return nll, other, answers

    model.eval()
    with model.disable_adapter():
        base_nll, base_other, base_answers = measure("base")
    tuned_nll, tuned_other, tuned_answers = measure("tuned", tuned_nll)
    record = evaluation_record(
        metric=own.name if own else section.metric,
        prompts=prompts,
        base_answers=base_answers,
        tuned_answers=tuned_answers,
        base_nll=base_nll,
        tuned_nll=tuned_nll,
        scorer=own,
    )
    if prepared.forgetting:
        record["forgetting"] = nll_record(base_other, tuned_other)
        rise = record["forgetting"]["difference"]["nll"]
        if rise["low"] > 0:
            progress.warn(f"the loss on evaluate.forgetting rose by {rise['value']:.4g} nats per token: it forgets")
    write_json(run.evaluation, record)
    return record


def tokens_per_second(metrics: list[Record]) -> float:
    """Over all optimizer steps of a run, also those before it was resumed; evaluation and saving do not count."""
    steps = [record for record in metrics if "tokens_per_second" in record]
    seconds = sum(record["num_tokens"] / record["tokens_per_second"] for record in steps)
    return float(sum(record["num_tokens"] for record in steps) / seconds) if seconds else 0.0
