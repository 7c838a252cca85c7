"""A third task, as somebody would add it: a folder with a `TASK`. It trains all tokens of short examples by twice the
usual loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from rich.console import RenderableType

from loratune.data.prepared import PreparedData
from loratune.planning.task import StepCosts
from loratune.training.loss import SupervisedLoss
from loratune.workflows.tasks.generation import TextGeneration

MOST_TOKENS = 90


class DoubledLoss(SupervisedLoss):
    def sum(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().sum(*args, **kwargs)


class Doubling(TextGeneration):
    name = "doubling"
    trains_in_processes = False

    def problems(self, recipe: Any) -> Iterator[tuple[str, str]]:
        if recipe.lora.variant == "dora":
            yield "lora.variant is dora, which doubling does not have", "lora.variant=plain"

    def read_data(self, *args: Any) -> tuple[Any, PreparedData]:
        streaming, data = super().read_data(*args)
        chosen = [example for example in data.train if len(example.input_ids) <= MOST_TOKENS]
        return streaming, replace(
            data, train=[replace(example, supervised=np.ones_like(example.supervised)) for example in chosen]
        )

    def step_costs(self, model: Any) -> StepCosts:
        return StepCosts(why_uncompiled="the tests are quicker without")

    def plan_entries(self, classes: Any) -> dict[str, Any]:
        return {"doubled": True}

    def lock_entries(self, classes: Any) -> dict[str, Any]:
        return {"doubling": "twice"}

    def make_loss(self, model: Any, examples: Sequence[Any], recipe: Any) -> tuple[SupervisedLoss, str]:
        return DoubledLoss(model, packed=False), "doubling takes examples one at a time"

    def measures(self, recipe: Any, metric: Any) -> list[str]:
        return ["nll"]

    def tables(self, evaluation: Any) -> list[RenderableType]:
        return [f"doubled: {evaluation['tuned']['nll']:.3f}"]


TASK = Doubling()
