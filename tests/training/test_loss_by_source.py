"""The training loss of each source: exact, the same whatever the micro-batches, and for free where there is one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loratune.data.batch import collate, num_supervised
from loratune.data.mixture import source_of_file
from loratune.data.steps import step_examples
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.run.directory import Record, RunDir
from loratune.run.progress import NoProgress
from loratune.training.loss_by_source import PerSourceLoss
from loratune.workflows.load import load_trained
from loratune.workflows.resume import resume
from loratune.workflows.train import train
from tests.data.test_mixture import sources
from tests.invariants.test_same_mathematics import assert_same
from tests.training.test_disk import Moment

MakeRecipe = Callable[..., Recipe]


def lines(run: RunDir) -> list[Record]:
    return [line for line in run.read_metrics() if "loss" in line]


def by_source(run: RunDir) -> list[dict[str, float]]:
    return [line["loss_by_source"] for line in lines(run)]


@pytest.fixture
def mixed(tiny_recipe: MakeRecipe, tmp_path: Path) -> MakeRecipe:
    """Recipes on two sources of which one is seen more often."""
    given = sources(tmp_path)

    def make(**settings: object) -> Recipe:
        return tiny_recipe(
            **{"data__train": given, "train__token_budget": 150, "train__eval_every": "never", **settings}
        )

    return make


def test_each_line_has_the_mean_over_the_tokens_of_each_source(mixed: MakeRecipe, tmp_path: Path) -> None:
    """Of a model that learns nothing, each step's losses are those of its examples, one by one."""
    recipe = mixed(train__learning_rate=1e-30, train__epochs=1)
    prepared = prepare(recipe, NoProgress())
    run = train(recipe).run
    loss = load_trained(prepared, run, NoProgress())[1]
    loss.model.eval()
    found = lines(run)
    of_file = source_of_file(prepared.data.report)
    assert len(found) == 3
    for index, line in enumerate(found):
        numbers = step_examples(24, batch_size=8, seed=recipe.train.seed, epoch=0, index=index)
        sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in of_file.values()}
        for example in (prepared.data.train[i] for i in numbers):
            total = sums[of_file[example.origin.file]]
            total[0] += float(loss.per_token(collate([example])).double().sum())
            total[1] += num_supervised(example)
        expected = {name: total / count for name, (total, count) in sums.items() if count}
        assert line["loss_by_source"] == pytest.approx(expected, abs=1e-5)
        whole = sum(line["loss_by_source"][name] * count for name, (_, count) in sums.items() if count)
        assert whole / line["num_supervised_tokens"] == pytest.approx(line["loss"], abs=1e-6)
        assert sum(count for _, count in sums.values()) == line["num_supervised_tokens"]


@pytest.mark.slow
def test_a_stop_changes_no_bit_and_the_report_draws_them(mixed: MakeRecipe, tmp_path: Path) -> None:
    settings = {"train__save_every": 2, "lora__dropout": 0.1}
    run = train(mixed(**settings)).run
    whole = by_source(run)
    assert len(whole) == 6
    page = run.report.read_text()
    assert "Training loss of each source" in page
    assert "many.jsonl" in page
    assert "Missing data" not in page
    kept = RunDir(tmp_path / "kept")
    shutil.copytree(run.root, kept.root)
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoints / "6")
    resume(run.root)
    assert by_source(run) == whole, "to the bit"
    assert_same(kept, run, tolerance=0)


@pytest.mark.slow
def test_the_token_budget_changes_no_loss_of_a_source(mixed: MakeRecipe, tmp_path: Path) -> None:
    one = by_source(train(mixed()).run)
    other = by_source(train(mixed(train__token_budget=10_000, train__output_dir=str(tmp_path / "other"))).run)
    assert len(one) == len(other) == 6
    for mine, theirs in zip(one, other, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


@pytest.mark.slow
def test_streamed_sources_have_their_losses_too(mixed: MakeRecipe, tmp_path: Path) -> None:
    files = [str(source["name"]) for source in sources(tmp_path)]
    one = by_source(train(mixed(data__train=files)).run)
    other = train(mixed(data__train=files, data__streaming=True, train__output_dir=str(tmp_path / "streamed"))).run
    assert by_source(other) == one


@pytest.mark.slow
def test_stock_trl_has_the_same_losses_of_sources(mixed: MakeRecipe, tmp_path: Path) -> None:
    one = by_source(train(mixed(train__epochs=1)).run)
    stock = mixed(train__epochs=1, train__engine="trl", train__output_dir=str(tmp_path / "trl"))
    other = by_source(train(stock).run)
    assert len(one) == len(other) == 3
    for mine, theirs in zip(one, other, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")  # TRL, of 2.0
def test_one_source_has_no_line_of_its_own_and_what_trl_does_not_say_is_told(
    mixed: MakeRecipe, tiny_recipe: MakeRecipe
) -> None:
    assert not PerSourceLoss({})
    assert PerSourceLoss({}).tally([], torch.device("cpu")) is None
    assert not any("loss_by_source" in line for line in lines(train(tiny_recipe(train__epochs=0.4)).run))
    listener = Moment("", lambda: None)
    smoothed = mixed(train__engine="trl", train__epochs=0.4, train__label_smoothing=0.1)
    run = train(smoothed, progress=listener, overwrite=True).run
    assert not any("loss_by_source" in line for line in lines(run))
    assert any("one smoothed loss for all sources" in line for line in listener.lines)
