"""What each verb does, in order: the one module that knows every stage.

plan        prepare, and tell
train       prepare → run directory → weights and adapter → steps → adapter saved → base against tuned
resume      what of that is left, after checking that nothing it depends on changed
evaluate    base against tuned, of a finished run

Of several processes (`world`) each goes this way until the last step is taken; then the first one saves and evaluates alone, or
where they share the base (`shards`), evaluates with the others in step.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel

from loratune import world
from loratune.assessment import assess, memory_errors_told
from loratune.data.mixture import held_out_groups, source_of_file
from loratune.data.preview import preview
from loratune.data.steps import examples_of_largest_step, num_steps_per_epoch
from loratune.early_checks import check_prompts
from loratune.errors import DataError, Interrupted, RecipeError, RunError
from loratune.evaluation.classify import MEASURES
from loratune.evaluation.gates import check_names, parse_gate, pass_gates
from loratune.evaluation.harness import check_harness, run_harness
from loratune.evaluation.own_metric import load_metric
from loratune.final_adapter import save_final, take_final
from loratune.joint_preparation import prepare_together
from loratune.loading import adapt, load_base, load_trained
from loratune.lock import changed_settings, differences
from loratune.model.device import free_memory, peak_bytes
from loratune.model.load import load_config, positions_of
from loratune.model.variants import has_changed_base
from loratune.planning.cluster import find_machine
from loratune.planning.memory import wants_rehearsal
from loratune.planning.speed import StepProbe
from loratune.preparation import Preparation, held_out_prompts, output_dir, prepare
from loratune.progress import Progress, Silent
from loratune.recipe import Recipe
from loratune.recipe_tasks import is_classification, refuse_classifier
from loratune.reporting.card import write_card
from loratune.reporting.page import report_or_warn
from loratune.run import Record, RunDir, read_json, write_json, write_text
from loratune.sitting import Sitting
from loratune.training.arguments import TrainingData
from loratune.training.callbacks import RunCallback
from loratune.training.checkpoint import checkpoint_to_go_on_from
from loratune.training.classifier_trainer import ReferenceClassifier
from loratune.training.held_out import Nll
from loratune.training.loss import SupervisedLoss
from loratune.training.shards import is_sharded, told_if_lost
from loratune.training.sharing import check_same
from loratune.training.stopping import StopRequest, stopping_in_order
from loratune.training.trainer import FastTrainer, ReferenceTrainer, TrainerSetup, resume_state

PROBE_STEPS = 3
"""Of `plan --probe`; the first compiles and warms up."""

PREVIEW_EXAMPLES = 5
"""Examples whose tokens are kept in the run directory."""

_NOBODY = Silent()
_NEXT, _EVALUATE = "checkpoint", "evaluate"
_UNEVALUATED = "stopped before the evaluation was done; all steps are, and the adapter is saved"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run left behind.

    Attributes:
        run: Its directory.
        evaluation: `evaluation.json`, or None without held-out data; None in all processes but the first.
    """

    run: RunDir
    evaluation: Record | None


def plan(
    recipe: Recipe,
    *,
    device: str | None = None,
    devices: str | None = None,
    interconnect: Sequence[str] = (),
    probe: bool = False,
    progress: Progress = _NOBODY,
) -> Preparation:
    """What would be trained, and whether it fits. `.as_plan()` is the record.

    Args:
        recipe: What to do.
        device: A GPU of `loratune.planning.devices` to plan for; None for this machine.
        devices: Several of them: `8xh100-80gb`, or `2x8xh100-80gb` for two nodes.
        interconnect: What joins them, of `loratune.planning.interconnect`; empty for the usual.
        probe: Whether to run the longest step three times on the real weights, the one case in which they are loaded, and
            to promise what these took. Nothing is written.
        progress: Who is told how it goes.

    Raises:
        RecipeError, DataError, MachineError: As `prepare`; or a device that is not here is to be probed.
        RunError: A step of the probe failed.
    """
    named, cluster = find_machine(device, devices, interconnect)
    if probe and named is not None:
        raise RecipeError(f"--probe runs steps here, and {named.name} is not here", fix="leave one of them out")
    prepared = prepare(recipe, progress, named, cluster=cluster, weights=probe)
    return prepared.with_probe(_probe(prepared, progress)) if probe else prepared


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
    world.start()
    root = output_dir(recipe)
    if _began_before(RunDir.at(root)):
        return _go_on(RunDir.open(root), progress)
    if world.is_main():
        RunDir.check(root, overwrite=overwrite)
    prepared = prepare_together(recipe, progress)
    if not world.is_main():
        return _run(prepared, RunDir.at(root), None, progress)
    if on_plan is not None:
        on_plan(prepared)
    run = RunDir.create(root, overwrite=overwrite)
    with run.exclusive():
        write_text(run.recipe, written if written is not None else recipe.to_yaml())
        write_json(run.data, prepared.data.report)
        write_json(run.preview, preview(prepared.data.train, prepared.tokenizer, PREVIEW_EXAMPLES).as_record())
        write_json(run.plan, prepared.as_plan())
        _write_lock(prepared, run)
        return _run(prepared, run, None, progress)


def resume(root: str | Path, *, progress: Progress = _NOBODY) -> RunResult:
    """Go on where a run stopped, whatever stopped it and whenever.

    Raises:
        RecipeError: The run is finished, or its recipe, model, template or data changed since it began.
        RunError: All its checkpoints are damaged.
    """
    world.start()
    run = RunDir.open(root)
    if run.is_complete:
        raise RecipeError("the run is finished", file=run.root, fix=f"`loratune evaluate {root}`, or train anew")
    return _go_on(run, progress)


def _began_before(run: RunDir) -> bool:
    """Whether torchrun starts its processes again after one was killed, and the run is the one that they began."""
    launch = world.launch()
    return world.gather(bool(launch) and run.lock.is_file() and read_json(run.lock).get("launch") == launch)[0]


def _go_on(run: RunDir, progress: Progress) -> RunResult:
    lock = read_json(run.lock)
    if "written" not in lock:
        raise RecipeError("the run was begun by an earlier version, which kept too little to go on", file=run.lock)
    world.gather(None)  # all have read what there is, before anything changes
    with run.exclusive():
        if world.is_main():
            run.clean()
            _refuse(changed_settings(lock["written"], _as_written(run)), run.recipe)
        prepared = prepare_together(Recipe.parse(lock["recipe"], file=run.lock), progress)
        if not world.is_main():
            return _follow(prepared, run, progress)
        _refuse(_changed_inputs(lock, prepared, run), run.lock)
        if run.is_finished:
            world.publish(_NEXT, _EVALUATE)
            if not is_sharded(prepared.recipe):
                world.stop()
            progress.line("all steps are done and the adapter is saved; going on with the evaluation")
            return _finish_trained(prepared, run, progress)
        checkpoint = checkpoint_to_go_on_from(run, progress)
        step = resume_state(checkpoint) if checkpoint is not None else 0
        run.rewind_metrics(step)
        world.publish(_NEXT, checkpoint.name if checkpoint is not None else "")
        if checkpoint is None:
            progress.line("there is no checkpoint yet: beginning again with the first step")
        else:
            progress.line(f"going on after step {step}")
        return _run(prepared, run, checkpoint, progress)


def _follow(prepared: Preparation, run: RunDir, progress: Progress) -> RunResult:
    """What the other processes do when the first one knows where to go on."""
    name = world.read(_NEXT)
    if name == _EVALUATE and is_sharded(prepared.recipe):
        return _finish_trained(prepared, run, progress)
    if name == _EVALUATE:
        world.stop()
        return RunResult(run=run, evaluation=None)
    checkpoint = run.checkpoints / name if name else None
    if checkpoint is not None and not checkpoint.is_dir():
        raise RunError("the checkpoint is not on this machine", file=checkpoint, fix="a folder that all machines share")
    return _run(prepared, run, checkpoint, progress)


def _as_written(run: RunDir) -> Record:
    """The settings of RUN/recipe.yaml, `auto` as it stands there."""
    return Recipe.load(run.recipe).model_dump(mode="json")


def _changed_inputs(lock: Record, prepared: Preparation, run: RunDir) -> list[str]:
    now = prepared.as_lock()
    if prepared.base.revision and not run.metrics.is_file():
        # Stopped while the weights were fetched: a commit's files do not change, but the lock may not know all of them yet.
        known = lock["inputs"]["model"]
        now["inputs"]["model"] = {name: digest for name, digest in now["inputs"]["model"].items() if name in known}
    return differences(lock, now)


def _refuse(changed: list[str], file: Path) -> None:
    if changed:
        raise RecipeError(
            f"changed since the run began: {', '.join(changed)}", file=file, fix="restore it, or train anew"
        )


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
    if is_classification(recipe):
        measures = [*MEASURES]
        if extras.metric or extras.harness:
            refuse_classifier(recipe, "--metric" if extras.metric else "--harness", "--gate accuracy>=0.9, or f1")
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
    model, loss = load_trained(prepared, run, progress)
    with memory_errors_told(run):
        evaluation = assess(prepared, run, model, loss, progress, own=own)
    if extras.harness:
        progress.line(f"lm-evaluation-harness: {', '.join(extras.harness)}")
        evaluation["harness"] = run_harness(model, prepared.tokenizer, extras.harness, allow_code=extras.allow_code)
    pass_gates(gates, evaluation)
    write_json(run.evaluation, evaluation)
    write_card(run)
    report_or_warn(run, progress)
    return RunResult(run=run, evaluation=evaluation)


def _run(prepared: Preparation, run: RunDir, checkpoint: Path | None, progress: Progress) -> RunResult:
    """From the weights to the report."""
    sitting = Sitting(run, prepared.recipe.train.device)
    model, loss = _load(prepared, run, checkpoint, progress)
    stop = StopRequest()
    try:
        with memory_errors_told(run), told_if_lost():
            last_step, tuned_nll = _train(prepared, run, model, loss, checkpoint, stop, progress)
        if loss.sharded:
            stop.agree(world.gather(stop.asked or 0))
        else:
            world.stop()
            if not world.is_main():
                return RunResult(run=run, evaluation=None)
        if take_final(prepared, run, model, last_step, progress):
            tuned_nll = None
        if world.is_main():
            save_final(prepared, run, model)
        if stop:
            raise stop.as_error(_UNEVALUATED, run)
    except Interrupted:
        sitting.note()
        raise
    sitting.note()
    if has_changed_base(model):  # base against tuned means the base as everybody has it
        del model, loss
        free_memory()
        model, loss = load_trained(prepared, run, progress)
        tuned_nll = None
    return _finish(prepared, run, model, loss, sitting, progress, tuned_nll)


def _finish_trained(prepared: Preparation, run: RunDir, progress: Progress) -> RunResult:
    """What is left to do when the adapter stands."""
    sitting = Sitting(run, prepared.recipe.train.device)
    if "measured" in read_json(run.plan):
        if world.is_main():
            report_or_warn(run, progress)
        return RunResult(run=run, evaluation=read_json(run.evaluation) if prepared.data.eval else None)
    model, loss = load_trained(prepared, run, progress)
    return _finish(prepared, run, model, loss, sitting, progress)


def _finish(
    prepared: Preparation,
    run: RunDir,
    model: PeftModel,
    loss: SupervisedLoss,
    sitting: Sitting,
    progress: Progress,
    tuned_nll: Nll | None = None,
) -> RunResult:
    """Evaluation, card, what was measured, report. `measured` comes last of what must be there: with it a run is done."""
    evaluation, started = None, time.perf_counter()
    try:
        with memory_errors_told(run), told_if_lost():
            if prepared.data.eval:
                evaluation = assess(prepared, run, model, loss, progress, tuned_nll)
    except KeyboardInterrupt:
        sitting.note()
        raise StopRequest().as_error(_UNEVALUATED, run) from None
    if not world.is_main():
        return RunResult(run=run, evaluation=None)
    seconds = time.perf_counter() - started
    write_card(run)
    sitting.close(evaluate_seconds=seconds)
    report_or_warn(run, progress)
    return RunResult(run=run, evaluation=evaluation)


def _load(
    prepared: Preparation, run: RunDir, checkpoint: Path | None, progress: Progress
) -> tuple[PeftModel, SupervisedLoss]:
    """Base, fresh adapter, and the way to the loss."""
    base = load_base(prepared, progress)
    if checkpoint is None and prepared.base.revision and world.is_main():
        _write_lock(prepared, run)  # the weights of a hub model were not there before
    return adapt(prepared, base, progress)


def _write_lock(prepared: Preparation, run: RunDir) -> None:
    write_json(run.lock, {**prepared.as_lock(), "written": _as_written(run), "launch": world.launch()})


def _probe(prepared: Preparation, progress: Progress) -> StepProbe:
    """Run the longest step three times, and throw the result away."""
    train = prepared.recipe.train
    lengths = [len(example.input_ids) for example in prepared.data.train]
    longest = examples_of_largest_step(lengths, batch_size=train.batch_size, seed=train.seed)
    # One step is all the data, so an epoch is a step.
    changes = {
        "epochs": PROBE_STEPS,
        "eval_every": "never",
        "save_every": "never",
        "log_every": "never",
        "report_to": (),
    }
    short = replace(
        prepared,
        recipe=prepared.recipe.model_copy(update={"train": train.model_copy(update=changes)}),
        data=replace(prepared.data, train=[prepared.data.train[i] for i in longest], eval=[], stream=None),
        num_steps=PROBE_STEPS,
    )
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir.create(Path(folder) / "probe", overwrite=False)
        model, loss = adapt(short, load_base(short, progress), progress)
        _train(short, run, model, loss, None, StopRequest(), progress)
        seconds = [step["num_tokens"] / step["tokens_per_second"] for step in run.read_metrics()]
    return StepProbe(
        num_tokens=sum(lengths[i] for i in longest),
        first_step_seconds=seconds[0],
        step_seconds=min(seconds[1:]),
        peak_bytes=peak_bytes(train.device),
    )


def _train(
    prepared: Preparation,
    run: RunDir,
    model: PeftModel,
    loss: SupervisedLoss,
    checkpoint: Path | None,
    stop: StopRequest,
    progress: Progress,
) -> tuple[int, Nll | None]:
    """All optimizer steps; returns the number of the last one, and its held-out losses if it was evaluated.

    Raises:
        Interrupted: The user stopped it.
    """
    recipe, data = prepared.recipe, prepared.data
    done = resume_state(checkpoint) if checkpoint is not None else 0
    torch.manual_seed(recipe.train.seed)
    with progress.task("training", prepared.num_steps, "steps") as task, stopping_in_order(stop, progress):
        task.advance(done)
        callback = RunCallback(
            run, progress, task, stop, num_steps_per_epoch(data.num_examples, recipe.train.batch_size)
        )
        setup = TrainerSetup(
            model=model,
            tokenizer=prepared.tokenizer,
            train=recipe.train,
            data=TrainingData(
                train=data.train if data.stream is None else data.stream,
                known=data.train,
                eval=data.eval,
                eval_groups=held_out_groups(data.eval, data.report),
                token_budget=prepared.memory.token_budget,
                source_of_file=source_of_file(data.report),
            ),
            loss=loss,
            run=run,
            stop=stop,
            progress=progress,
            callback=callback,
        )
        reference = ReferenceTrainer if prepared.classes is None else ReferenceClassifier
        trainer = FastTrainer(setup) if recipe.train.engine == "fast" else reference(setup)
        callback.watch(trainer)
        check_same(model)
        over = False
        if checkpoint is not None and (done == prepared.num_steps or recipe.train.early_stopping is not None):
            trainer.restore(checkpoint)
            callback.evaluate_if_owed()
            over = done == prepared.num_steps or trainer.ends_early()
        if not over:
            if isinstance(trainer, FastTrainer) and wants_rehearsal(prepared.memory, recipe.train.device):
                trainer.rehearse()
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        check_same(model)
    if callback.stopped_at is not None:
        raise stop.after(callback.stopped_at, prepared.num_steps, run)
    last_step, (step, losses) = trainer.state.global_step, trainer.last_evaluation
    if last_step < prepared.num_steps:
        progress.line(f"training ended early, after step {last_step} of {prepared.num_steps}")
    return last_step, losses if step == last_step else None
