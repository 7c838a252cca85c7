"""Base vs. fine-tuned for a model that writes text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.run.errors import MachineError
from loratune.run.progress import NO_PROGRESS
from loratune.training.event_log import EventLog
from loratune.training.token_budget import TokenBudget
from loratune.workflows.load import load_trained
from loratune.workflows.tasks.generation import compare
from loratune.workflows.tasks.task import Comparison
from loratune.workflows.train import train


def test_answers_and_losses_are_of_the_adapter_off_and_on(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(
        evaluate__metric="exact_match", evaluate__samples=2, evaluate__max_new_tokens=4, train__epochs=1
    )
    run = train(recipe).run
    prepared = prepare(recipe, NO_PROGRESS)
    model, loss = load_trained(prepared, run, NO_PROGRESS)
    events = EventLog(run, NO_PROGRESS)
    answered: list[bool] = []
    generate = compare.generate_answers

    def watched(model: Any, *args: Any, **kwargs: Any) -> Any:
        answered.append(next(layer for layer in model.modules() if hasattr(layer, "lora_A")).disable_adapters)
        kwargs["warn"]("smaller batches")
        return generate(model, *args, **kwargs)

    monkeypatch.setattr(compare, "generate_answers", watched)
    comparison = Comparison(
        prepared=prepared,
        model=model,
        started=False,
        before=model.disable_adapter,
        loss=loss,
        budget=TokenBudget(4096, events),
        events=events,
        progress=NO_PROGRESS,
        run=run,
    )
    compared = compare.compare_answers(comparison)
    assert answered == [True, False], "the base first, with the adapter off"
    assert compared.base_nll != compared.tuned_nll
    assert len(compared.record["items"]) == 2
    assert [line["event"] for line in run.read_metrics() if "event" in line][-2:] == 2 * ["smaller_answer_batches"]
    loss.sharded = True
    with pytest.raises(MachineError, match="cannot do alone"):
        compare.compare_answers(comparison)
