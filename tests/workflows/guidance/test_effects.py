"""The effects that `explain` computes are those of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from loratune.data.steps import count_occurrences
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe, TrainSection
from loratune.run.progress import NoProgress
from loratune.workflows.guidance.effects import SUMMARIES, TABLES
from loratune.workflows.guidance.explain import all_fields
from loratune.workflows.guidance.facts import Facts, learning_rates
from loratune.workflows.train import train
from tests.conftest import conversation, write_jsonl

MakeRecipe = Callable[..., Recipe]


def facts(recipe: Recipe) -> Facts:
    return Facts(prepare(recipe, NoProgress()))


@pytest.mark.slow
def test_learning_rates_steps_checkpoints_and_evaluations_are_those_of_a_run(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe(
        train__epochs=2.5,
        train__schedule="cosine",
        train__warmup_fraction=0.3,
        train__eval_every=0.3,
        train__save_every=3,
    )
    run = train(recipe).run
    metrics = run.read_metrics()
    rates = [record["learning_rate"] for record in metrics if "loss" in record]
    assert facts(recipe).learning_rates == pytest.approx(rates)
    assert len(rates) == 8
    happened = sum("eval_nll" in record for record in metrics)
    assert happened == count_occurrences(recipe.train.eval_every, steps=8, epochs=2.5) == 3
    saved = len(list(run.checkpoints.iterdir()))
    assert saved == count_occurrences(recipe.train.save_every, steps=8, epochs=2.5) == 3
    keep = SUMMARIES["train.keep_checkpoints"](facts(recipe))
    state = (run.checkpoints / "8" / "optimizer.safetensors").stat().st_size
    weights = (run.checkpoints / "8" / "adapter_model.safetensors").stat().st_size
    assert keep == "3 of 3 checkpoints kept, about 10.5 KiB each"
    assert 10.5 * 1024 <= state + weights < 10.5 * 1024 + 4096, "and the files' headers"


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedules_rise_over_the_warm_up_and_end_as_their_name_says(schedule: str) -> None:
    rates = learning_rates(TrainSection(schedule=schedule, warmup_fraction=0.25, learning_rate=1e-3), 100)
    assert rates[:25] == pytest.approx(np.arange(25) / 25 * 1e-3)
    assert rates.max() == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-3) if schedule == "constant" else rates[-1] < 3e-5


def test_schedules_that_do_not_end_at_zero_end_where_their_words_say() -> None:
    def rates(schedule: str) -> np.ndarray:
        return learning_rates(TrainSection(schedule=schedule, warmup_fraction=0.25, learning_rate=1e-3), 1000)

    assert rates("cosine_with_min_lr")[-1] == pytest.approx(1e-4, rel=1e-2)
    stable = rates("warmup_stable_decay")
    assert stable[250:800] == pytest.approx(1e-3)
    assert (np.diff(stable[800:]) < 0).all()
    assert stable[-1] == pytest.approx(1e-3 * (1 - math.sqrt(199 / 200)))
    root = rates("inverse_sqrt")
    assert root[999] == pytest.approx(1e-3 * math.sqrt(250 / 999))


def test_the_rank_doubles_the_parameters_and_halves_the_scale(tiny_recipe: MakeRecipe) -> None:
    rows = {row["r"]: row for row in TABLES["lora.r"](facts(tiny_recipe(lora__r=4, lora__alpha=8)))}
    trainable = {r: int(row["trainable"].replace(",", "")) for r, row in rows.items()}
    assert trainable == {str(r): r * 2 * (32 + 32 + 32 + 16) for r in (1, 2, 4, 8, 16)}
    assert [row["alpha/r at alpha 8"] for row in rows.values()] == ["8", "4", "2", "1", "0.5"]


@pytest.mark.slow
def test_what_a_limit_would_cut_is_what_it_cuts(tiny_recipe: MakeRecipe) -> None:
    rows = {row["max_length"]: row for row in TABLES["data.max_length"](facts(tiny_recipe(data__max_length=64)))}
    assert set(rows) == {"64", "128"}
    cut, whole = facts(tiny_recipe(data__max_length=64)), facts(tiny_recipe(data__max_length=128))
    assert rows["64"]["longer examples"] == f"{cut.prepared.data.report['train']['truncated']} of 20"
    assert int(rows["64"]["tokens lost by truncate"]) == sum(whole.lengths) - sum(cut.lengths) > 0
    supervised = [f.prepared.as_plan()["data"]["num_supervised_tokens"] for f in (whole, cut)]
    assert rows["64"]["trained tokens lost"].startswith(f"{supervised[0] - supervised[1]} ")


@pytest.mark.slow
def test_what_else_could_be_trained_on_is_counted_by_rendering_it(tiny_recipe: MakeRecipe) -> None:
    rows = {row["train_on"]: row["trained tokens"] for row in TABLES["data.train_on"](facts(tiny_recipe()))}
    for choice, words in rows.items():
        data = facts(tiny_recipe(data__train_on=choice)).prepared.as_plan()["data"]
        assert words.startswith(f"{data['num_supervised_tokens']:,} of {data['num_tokens']:,} ")
    assert len(set(rows.values())) == 3


def test_the_quantized_base_is_smaller_by_the_planned_share(tiny_recipe: MakeRecipe) -> None:
    made = facts(tiny_recipe())
    assert SUMMARIES["model.quantization"](made).endswith("100% of their size in float32")
    rows = {row["quantization"]: row["frozen weights"] for row in TABLES["model.quantization"](made)}
    assert rows["none"] in SUMMARIES["model.quantization"](made)
    assert rows["none"] not in {words for name, words in rows.items() if name != "none"}


def test_a_smaller_token_budget_means_more_micro_batches(tiny_recipe: MakeRecipe) -> None:
    made = facts(tiny_recipe(train__token_budget=128))
    numbers = [float(row["micro-batches per step"]) for row in TABLES["train.token_budget"](made)]
    assert numbers == sorted(numbers, reverse=True)
    assert SUMMARIES["train.token_budget"](made) == f"{numbers[2]:.1f} micro-batches per step"


def test_trained_roles_are_counted_and_listed_with_the_other_choices(tiny_recipe: MakeRecipe) -> None:
    made = facts(tiny_recipe(data__train_on=["user"]))
    rows = {row["train_on"]: row["trained tokens"] for row in TABLES["data.train_on"](made)}
    assert list(rows) == ["assistant", "last", "all", "[user]"]
    words = SUMMARIES["data.train_on"](made)
    assert words == f"{rows['[user]']} in 27 user messages"


def test_batch_size_and_epochs_give_the_steps_that_are_planned(tiny_recipe: MakeRecipe) -> None:
    rows = {row["batch_size"]: row["steps"] for row in TABLES["train.batch_size"](facts(tiny_recipe(train__epochs=3)))}
    assert list(rows) == ["2", "4", "8", "16", "32"]
    assert rows["16"] == str(facts(tiny_recipe(train__epochs=3, train__batch_size=16)).prepared.estimate.num_steps)
    assert SUMMARIES["train.epochs"](facts(tiny_recipe(train__epochs=2.5))) == "8 steps, 3 per epoch"


def test_plain_text_has_one_way_to_be_trained(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "t.jsonl", [{"text": json.dumps(conversation(i))} for i in range(6)])
    recipe = tiny_recipe(data__train=str(rows), data__eval="none", data__train_on="all")
    assert [row["train_on"] for row in TABLES["data.train_on"](facts(recipe))] == ["all"]


def test_every_effect_belongs_to_a_field_and_can_be_computed(tiny_recipe: MakeRecipe) -> None:
    assert set(SUMMARIES) | set(TABLES) <= set(all_fields())
    made = facts(tiny_recipe(evaluate__metric="exact_match"))
    assert all(summary(made) for summary in SUMMARIES.values())
    assert all(len(table(made)) >= 1 for table in TABLES.values())
