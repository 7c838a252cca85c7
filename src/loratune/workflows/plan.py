"""`loratune plan`: what would be trained, without training; with `probe`, timed on a few real steps."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loratune.data.steps import examples_of_largest_step
from loratune.model.device import peak_bytes
from loratune.planning.hardware.cluster import find_machine
from loratune.planning.prepare import prepare
from loratune.planning.speed import StepProbe
from loratune.recipe.recipe import as_recipe
from loratune.run.directory import RunDir
from loratune.run.errors import RecipeError
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.training.signals import StopRequest
from loratune.workflows.load import attach_adapter_and_loss, load_base
from loratune.workflows.steps import train_steps
from loratune.workflows.tasks.task import Started, task_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.planning.preparation import Preparation
    from loratune.recipe.recipe import Recipe

PROBE_STEPS = 3
"""Steps of `plan --probe`; the first one compiles and warms up."""


def plan(
    recipe: Recipe | str | Path,
    *,
    device: str | None = None,
    devices: str | None = None,
    interconnect: Sequence[str] = (),
    probe: bool = False,
    progress: Progress = NO_PROGRESS,
) -> Preparation:
    """Find out what would be trained, whether it fits, and how long it takes. `.as_plan()` is the record.

    Args:
        recipe: What to do: a recipe, or its file.
        device: A GPU of `loratune.planning.hardware.devices` to plan for; None for this machine.
        devices: Several of them: `8xh100-80gb`, or `2x8xh100-80gb` for two nodes.
        interconnect: The links between them, from `loratune.planning.hardware.interconnect`; empty for the usual ones.
        probe: Whether to run the longest step three times and base the estimate on it. This is the only case in which
            weights are loaded; nothing is written.
        progress: Shows how far it is.

    Raises:
        RecipeError, DataError, MachineError: As `prepare`; or a device that is not here is to be probed.
        RunError: A step of the probe failed.
    """
    named, cluster = find_machine(device, devices, interconnect)
    if probe and named is not None:
        raise RecipeError(f"--probe runs steps here, and {named.name} is not here", fix="leave one of them out")
    prepared = prepare(as_recipe(recipe), progress, named, cluster=cluster, weights=probe)
    return prepared.with_probe(_probe(prepared, progress)) if probe else prepared


def _probe(prepared: Preparation, progress: Progress) -> StepProbe:
    """Time the longest step on the real weights, and discard the result."""
    train = prepared.recipe.train
    lengths = [len(example.input_ids) for example in prepared.data.train]
    longest = examples_of_largest_step(lengths, batch_size=train.batch_size, seed=train.seed)
    # The data of one step is all the data of this short run, so an epoch is a step.
    changes = {
        "epochs": PROBE_STEPS,
        "max_steps": None,
        "eval_every": "never",
        "save_every": "never",
        "log_every": "never",
        "report_to": (),
    }
    short = replace(
        prepared,
        recipe=prepared.recipe.model_copy(update={"train": train.model_copy(update=changes)}),
        data=replace(prepared.data, train=[prepared.data.train[i] for i in longest], eval=[], stream=None),
        estimate=replace(prepared.estimate, num_steps=PROBE_STEPS),
    )
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir.create(Path(folder) / "probe", overwrite=False)
        model, loss = attach_adapter_and_loss(short, load_base(short, progress), progress)
        short = task_of(short.recipe).before_training(
            Started(prepared=short, run=run, model=model, loss=loss, progress=progress)
        )
        train_steps(short, run, model, loss, None, StopRequest(), progress)
        seconds = [step["num_tokens"] / step["tokens_per_second"] for step in run.read_metrics()]
    return StepProbe(
        num_tokens=sum(lengths[i] for i in longest),
        first_step_seconds=seconds[0],
        step_seconds=min(seconds[1:]),
        peak_bytes=peak_bytes(train.device),
    )
