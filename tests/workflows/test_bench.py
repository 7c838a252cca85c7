"""`loratune bench` measures two engines on one recipe."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.run.progress import NoProgress
from loratune.training.trl_dataset import trl_preparation_seconds
from loratune.workflows.bench import _preparation, _rows_prepared, bench, bench_table

MakeRecipe = Callable[..., Recipe]


def test_rows_are_prepared_by_both(tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rates are rows over seconds: with one more second, 20 rows cannot exceed 20 per second."""
    prepared = prepare(tiny_recipe(data__train_on="all"), NoProgress())
    rates = _preparation(prepared)
    assert rates["trl"] is not None
    assert rates["fast"] is not None
    from loratune.workflows import bench as module

    real = module.prepare_data

    def slower(*args: object, **kwargs: object) -> object:
        time.sleep(1)
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "prepare_data", slower)
    slow = _preparation(prepared)["fast"]
    assert slow is not None
    assert slow <= 20


def test_what_trl_refuses_has_no_rate(tiny_recipe: MakeRecipe) -> None:
    from datasets import Dataset

    prepared = prepare(tiny_recipe(), NoProgress())
    seconds = trl_preparation_seconds(
        Dataset.from_list([{"nothing": "useful"}]), prepared.model.tokenizer, max_length=64, assistant_only=False
    )
    assert seconds is None


def test_a_missing_rate_is_explained() -> None:
    assert _rows_prepared(600.0, 300.0) == ("600", "300", "2.00")
    assert _rows_prepared(600.0, None) == ("600", "refuses the rows", "")
    assert _rows_prepared(None, None) == ("streamed, during the steps", "", "")


@pytest.mark.slow
def test_the_engines_are_compared(tiny_recipe: MakeRecipe) -> None:
    record = bench(tiny_recipe(), rounds=1, steps=4, progress=NoProgress())
    assert record["loss"]["largest_difference"] < 1e-4
    assert [engine["packing"]["packed"] for engine in record["engines"].values()] == [True, False]
    for engine in record["engines"].values():
        assert len(engine["losses"]) == 4
        assert engine["tokens_per_second"] > 0
        assert engine["peak_bytes"] > 10 * 2**20
        assert 0 < engine["seconds_to_first_step"] < 600
    assert record["ratio"]["tokens_per_second"] == pytest.approx(
        record["engines"]["fast"]["tokens_per_second"] / record["engines"]["trl"]["tokens_per_second"]
    )
    assert bench_table(record).row_count == 8
