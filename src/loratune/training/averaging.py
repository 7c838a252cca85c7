"""Which checkpoints are averaged at the end of a run."""

from __future__ import annotations

from loratune.data.steps import occasion_steps
from loratune.recipe import TrainSection


def averaged_steps(train: TrainSection, *, last_step: int, num_steps: int, num_per_epoch: int) -> list[int]:
    """The steps whose adapters are averaged in a run that ends after `last_step`: the last ones that `save_every` wants, and the
    last step itself. What a stop saves beside does not count, so a run that goes on has the same mean.

    Args:
        train: The recipe's section.
        last_step: Before the end of the run, the step so far: what a run that ended here would average.
        num_steps: Optimizer steps of the whole run.
        num_per_epoch: Of an epoch.
    """
    if train.average_checkpoints is None:
        return []
    wanted = occasion_steps(train.save_every, steps=num_steps, num_per_epoch=num_per_epoch)
    return [*(step for step in wanted if step < last_step), last_step][-train.average_checkpoints :]
