"""`loratune extend`: train a run further, as a new run that starts from one of its checkpoints.

Two ways, and the new run's lock says which (`extends.exact`):

as if planned longer   The examples are the same, and so are the learning rates up to a checkpoint. The steps
                       after it are, bit for bit, those that the longer run would have taken: constant rates, or
                       `warmup_stable_decay` before it decays.
with a new schedule    Other data, or a schedule that a longer run would have gone through more slowly. The adapter and
                       the optimizer's moments stay; steps, schedule and order of the examples start over.

The new run's directory is written up to its first checkpoint; from there it is a run that `resume` continues.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from loratune.data.steps import num_steps_per_epoch, trigger_steps
from loratune.model.adapter.start_from import WEIGHTS
from loratune.planning.lock import changed_inputs
from loratune.recipe.recipe import Recipe
from loratune.run import processes
from loratune.run.digest import file_sha256
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import RecipeError, plural
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.run.run_log import RunLog
from loratune.training.checkpoint import adopt_checkpoint, averaged_steps, best_checkpoint
from loratune.training.early_stopping import EVENT
from loratune.training.event_log import History
from loratune.workflows.before_training import keep_start
from loratune.workflows.extension import Extension, ExtensionStart, as_if_planned_longer, with_new_schedule
from loratune.workflows.resume import continue_run, was_relaunched
from loratune.workflows.start import write_initial_files
from loratune.workflows.steps import write_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from loratune.planning.preparation import Preparation
    from loratune.run.directory import Record
    from loratune.workflows.result import RunResult


def extend(
    root: str | Path,
    overrides: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    rewarm: bool = False,
    overwrite: bool = False,
    progress: Progress = NO_PROGRESS,
    on_plan: Callable[[Preparation], None] | None = None,
) -> RunResult:
    """Train a run further, as a new run.

    Args:
        root: The run, finished or interrupted.
        overrides: What changes, as `section.field=value`: `train.epochs=6`, `data.train=more.jsonl`. What was changed
            in the run's `recipe.yaml` since it began counts too.
        out: The new run's directory; None for the run's name with `-extended`.
        rewarm: Whether to begin a new learning-rate schedule.
        overwrite: Whether to overwrite an existing run in `out`.
        progress: Shows how far the run is.
        on_plan: Called with the `Preparation` before the weights load.

    Raises:
        RecipeError: There is nothing more to train, the run's adapter or optimizer would not fit, or the longer run
            would have taken other steps and `rewarm` is false.
    """
    processes.start()
    extension = _read(RunDir.open(root), overrides, out)
    new = RunDir.at(extension.out)
    if was_relaunched(new):
        with RunLog(progress, new.log) as log:
            return continue_run(new, log)
    if not processes.is_main():
        return continue_run(RunDir.open(processes.store_wait("extended")), progress)
    RunDir.check(new.root, overwrite=overwrite)
    with RunLog(progress) as log:
        return _begin_and_train(extension, log, rewarm=rewarm, overwrite=overwrite, on_plan=on_plan)


def _begin_and_train(
    extension: Extension,
    progress: RunLog,
    *,
    rewarm: bool,
    overwrite: bool,
    on_plan: Callable[[Preparation], None] | None,
) -> RunResult:
    """Decide how the new run begins, write its directory, and train it."""
    start = (None if rewarm else as_if_planned_longer(extension, progress)) or with_new_schedule(
        extension, progress, rewarm=rewarm
    )
    if on_plan is not None:
        on_plan(start.prepared)
    new = RunDir.create(extension.out, overwrite=overwrite)
    progress.begin(new.log)
    with new.exclusive():
        _write(extension, start, new)
    processes.store_set("extended", str(new.root))
    result = continue_run(new, progress)
    _compare_on_old_data(extension, new, progress)
    return result


def _read(parent: RunDir, overrides: Sequence[str], out: str | Path | None) -> Extension:
    """Read a run, and what changes."""
    if parent.is_in_use:
        raise RecipeError("a process is working on the run", file=parent.root, fix="wait for it, or stop it")
    lock = read_json(parent.lock)
    if "written" not in lock:
        raise RecipeError(
            "the run was made by an earlier version, which did not record enough to extend it", file=parent.lock
        )
    written = Recipe.load(parent.recipe, list(overrides))
    changed = {
        f"{section}.{field}": value
        for section, fields in written.model_dump(mode="json").items()
        for field, value in fields.items()
        if lock["written"].get(section, {}).get(field) != value
    }
    given = changed.pop("train.output_dir", None)
    target = Path(out or given or parent.root.with_name(f"{parent.root.name}-extended"))
    if RunDir.at(target).root == parent.root:
        raise RecipeError("the new run would overwrite the one it extends", file=target, fix="choose another --out")
    words = ["loratune", "extend", str(parent.root), *overrides, *(["--out", str(out)] if out else [])]
    extension = Extension(
        parent=parent, lock=lock, written=written, changed=changed, out=target, command=shlex.join(words)
    )
    for name in changed:
        if name == "train.optimizer" or (name.startswith(("model.", "lora.")) and name != "lora.dropout"):
            found = next(words for words in extension.differences if words.startswith(f"{name} "))
            raise RecipeError(
                f"an extended run has the base, the adapter and the optimizer of its run, and cannot change {found}",
                file=parent.root,
                fix=f"leave {name} as it is, or `loratune train` a new run",
            )
    return extension


def _write(extension: Extension, start: ExtensionStart, new: RunDir) -> None:
    """Write the directory of the new run up to its first checkpoint; the lock, which makes it a run, comes last."""
    prepared, checkpoint = start.prepared, start.checkpoint
    step = int(checkpoint.name)
    train = {**start.settings.get("train", {}), "output_dir": str(extension.out)}
    written = extension.written.replace(**{**start.settings, "train": train})
    title = f"# Extends {extension.parent.root} from its step {step}.\n"
    write_initial_files(prepared, new, title + written.to_yaml())
    if (extension.parent.start / WEIGHTS).is_file():
        keep_start(new, extension.parent.start)
    if start.exact:
        _write_history(extension, prepared, new, step)
    for number, source in _wanted(extension.parent, start, new).items():
        adopt_checkpoint(
            source, new.checkpoints / str(number), prepared.recipe.train, num_steps=prepared.estimate.num_steps
        )
    lineage = {
        "run": str(extension.parent.root),
        "step": step,
        "adapter": file_sha256(checkpoint / "adapter_model.safetensors"),
        "exact": start.exact,
        "trained_on": _trained_on(extension.lock),
        "differs": list(start.differs),
        "command": extension.command,
    }
    write_lock(prepared, new, extends=lineage)


def _trained_on(lock: Record) -> list[str]:
    """Return the names of the data that a run, and those that it extends, were trained on."""
    earlier = lock["extends"]["trained_on"] if "extends" in lock else []
    return list(dict.fromkeys([*earlier, *(source["name"] for source in lock["recipe"]["data"]["train"])]))


def _wanted(parent: RunDir, start: ExtensionStart, new: RunDir) -> dict[int, Path]:
    """Return the checkpoints that a new run begins with, by their step in it: one, the best, those to be averaged."""
    if not start.exact:
        return {0: start.checkpoint}
    step, prepared = int(start.checkpoint.name), start.prepared
    train, steps = prepared.recipe.train, prepared.estimate.num_steps
    per_epoch = num_steps_per_epoch(prepared.data.num_examples, train.batch_size)
    held_out = {number: loss for number, loss in History.of(new.read_metrics()).held_out.items() if number <= step}
    averaged = averaged_steps(train, last_step=steps, num_steps=steps, num_per_epoch=per_epoch)
    numbers = {step, best_checkpoint(parent.checkpoints, held_out), *averaged}
    found = {number: parent.checkpoints / str(number) for number in numbers if number is not None and number <= step}
    return {number: path for number, path in sorted(found.items()) if path.is_dir()}


def _write_history(extension: Extension, prepared: Preparation, new: RunDir, step: int) -> None:
    """Write what the longer run would have recorded up to its checkpoint."""
    train, steps = prepared.recipe.train, prepared.estimate.num_steps
    per_epoch = num_steps_per_epoch(prepared.data.num_examples, train.batch_size)
    evaluated = set(trigger_steps(train.eval_every, steps=steps, num_per_epoch=per_epoch))
    if changed_inputs(extension.lock, prepared.as_lock(), keys=("eval",)):
        evaluated = set()
    lines = [
        line
        for line in extension.parent.read_metrics()
        if line["step"] <= step
        and line.get("event") != EVENT
        and (line["step"] in evaluated or not ("eval_nll" in line or line.get("event") == "evaluation_failed"))
    ]
    new.metrics.touch()
    for line in lines:
        new.append_metrics(line)


def _compare_on_old_data(extension: Extension, new: RunDir, progress: Progress) -> None:
    """Say how the loss on the held-out data of the extended run changed."""
    old, lock = extension.lock["inputs"]["eval"], read_json(new.lock)["inputs"]
    if not (extension.parent.evaluation.is_file() and new.evaluation.is_file()):
        return
    before, now = read_json(extension.parent.evaluation), read_json(new.evaluation)
    found: Record | None = now if lock["eval"] == old else None
    if lock.get("forgetting") == old:
        found = now.get("forgetting")
    if found is None or "nll" not in before["tuned"]:
        return
    first, second = before["tuned"]["nll"], found["tuned"]["nll"]
    words = f"on the held-out data of {extension.parent.root.name} ({plural(before['num_examples'], 'example')})"
    line = f"{words}: loss {first:.4f} before it was extended, {second:.4f} now (the base: {before['base']['nll']:.4f})"
    if second > first:
        progress.warn(f"{line}: some of it is forgotten")
    else:
        progress.line(line)
