"""The adapter that a run ends with: the last step's, the best checkpoint's, or the mean of several."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from loratune.data.steps import num_steps_per_epoch
from loratune.model.adapter.attach import save_adapter
from loratune.run import processes
from loratune.run.directory import Record, RunDir, cannot_write, read_json, write_json
from loratune.training.checkpoint import averaged_steps, damage_of, load_adapter_weights, load_mean, sync

if TYPE_CHECKING:
    from peft import PeftModel

    from loratune.planning.preparation import Preparation
    from loratune.run.progress import Progress


def select_final_adapter(
    prepared: Preparation, run: RunDir, model: PeftModel, last_step: int, progress: Progress
) -> bool:
    """Give the model the adapter that the recipe asks for, and return whether that is not the last step's."""
    train = prepared.recipe.train
    if train.average_checkpoints is not None:
        return _take_mean(prepared, run, model, last_step, progress)
    return train.final_adapter == "best" and _take_best(run, model, last_step, progress)


def describe_final_adapter(prepared: Preparation, run: RunDir) -> Record:
    """Return what a finished run's adapter is: `kind` (last, best or mean) and the `steps` it comes from."""
    if run.mean.is_file():
        return {"kind": "mean", "steps": read_json(run.mean)["steps"]}
    if prepared.recipe.train.final_adapter == "best" and run.best.is_file():
        return {"kind": "best", "steps": [read_json(run.best)["step"]]}
    return {
        "kind": "last",
        "steps": [max((line["step"] for line in run.read_metrics()), default=prepared.estimate.num_steps)],
    }


def save_final(prepared: Preparation, run: RunDir, model: PeftModel) -> None:
    """Save the adapter with tokenizer and chat template, completely or not at all."""
    temporary = run.root / ".adapter.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    with cannot_write(run.adapter):
        save_adapter(model, temporary)
        prepared.model.tokenizer.save_pretrained(temporary)
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        temporary.rename(run.adapter)
        sync(run.root)


def _take_best(run: RunDir, model: PeftModel, last_step: int, progress: Progress) -> bool:
    if not run.best.is_file():
        progress.warn("no checkpoint has a held-out loss to choose by: using the adapter of the last step")
        return False
    best = read_json(run.best)
    progress.line(f"the adapter is that of step {best['step']}, with held-out loss {best['eval_nll']:.4f}")
    if best["step"] == last_step:
        return False
    load_adapter_weights(run.checkpoints / str(best["step"]), model)
    return True


def _take_mean(prepared: Preparation, run: RunDir, model: PeftModel, last_step: int, progress: Progress) -> bool:
    train = prepared.recipe.train
    wanted = averaged_steps(
        train,
        last_step=last_step,
        num_steps=prepared.estimate.num_steps,
        num_per_epoch=num_steps_per_epoch(prepared.data.num_examples, train.batch_size),
    )
    steps = []
    for step in wanted:
        problem = damage_of(run.checkpoints / str(step))
        if problem:
            progress.warn(f"checkpoint {step} is damaged ({problem}) and left out of the mean")
        else:
            steps.append(step)
    if not steps:
        progress.warn("no checkpoint left to average: using the adapter of the last step")
        return False
    progress.line(f"the adapter is the mean of those of steps {', '.join(map(str, steps))}")
    load_mean([run.checkpoints / str(step) for step in steps], model)
    if processes.is_main():
        write_json(run.mean, {"steps": steps})
    return True
