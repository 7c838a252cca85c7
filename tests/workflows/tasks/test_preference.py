"""Preferences from rows to report, on a tiny model: the losses, the reference, and stock DPOTrainer as the referee."""

from __future__ import annotations

import ast
import math
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from loratune.__main__ import app
from loratune.planning import cost
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import Interrupted, RecipeError
from loratune.run.progress import NoProgress
from loratune.workflows.guidance.eject import eject
from loratune.workflows.guidance.eject_support import check_supported
from loratune.workflows.plan import plan
from loratune.workflows.resume import resume
from loratune.workflows.tasks.preference import compare, reference
from loratune.workflows.tasks.preference.log_probs import answers_of
from loratune.workflows.train import train
from tests.conftest import write_jsonl
from tests.invariants.test_processes import WAIT_SECONDS, started, trained, wait_for, write_recipe
from tests.workflows.guidance.test_eject import losses_of_script

MakeRecipe = Callable[..., Recipe]
COLORS = ("red", "blue", "green", "white", "black", "brown")


def pair(number: int) -> dict[str, Any]:
    color = COLORS[number % len(COLORS)]
    return {
        "prompt": f"Which color has box {number}?",
        "chosen": f"It is {color}." + " Really." * (number % 3),
        "rejected": "I do not know." + " Sorry." * (number % 4),
    }


@pytest.fixture(scope="module")
def pair_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pairs")
    return (
        write_jsonl(folder / "train.jsonl", [pair(i) for i in range(18)]),
        write_jsonl(folder / "eval.jsonl", [pair(i) for i in range(100, 106)]),
    )


@pytest.fixture
def make(tiny_recipe: MakeRecipe, pair_files: tuple[Path, Path]) -> MakeRecipe:
    """Makes recipes of pairs on the tiny model; settings as `train__epochs=1`."""

    def recipe(**settings: object) -> Recipe:
        own: dict[str, object] = {
            "model__task": "preference",
            "data__train": str(pair_files[0]),
            "data__eval": str(pair_files[1]),
            "evaluate__samples": 0,
        }
        return tiny_recipe(**{**own, **settings})

    return recipe


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def losses(run: RunDir) -> list[float]:
    return [line["loss"] for line in run.read_metrics() if "loss" in line]


def adapter(run: RunDir) -> dict[str, Any]:
    return load_file(run.adapter_weights)


def assert_close(one: RunDir, other: RunDir, tolerance: float = 1e-5) -> None:
    assert losses(one) == pytest.approx(losses(other), abs=tolerance)
    mine, theirs = adapter(one), adapter(other)
    assert mine.keys() == theirs.keys()
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < tolerance


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"preference__loss": "ipo"}, marks=pytest.mark.slow),
        pytest.param({"train__optimizer": "muon", "train__learning_rate": 1e-2}, marks=pytest.mark.slow),
    ],
    ids=["dpo", "ipo", "muon"],
)
def test_the_fast_engine_trains_as_stock_dpo_trainer(
    make: MakeRecipe, tmp_path: Path, settings: dict[str, object]
) -> None:
    runs = {}
    for engine in ("fast", "trl"):
        recipe = make(train__engine=engine, train__epochs=1, train__output_dir=str(tmp_path / engine), **settings)
        runs[engine] = train(recipe).run
    assert_close(runs["fast"], runs["trl"])
    fast, trl = (read_json(run.evaluation) for run in runs.values())
    for name in ("pair_accuracy", "pair_margin"):
        assert fast["tuned"][name] == pytest.approx(trl["tuned"][name], abs=1e-4)
    assert fast["tuned"]["pair_margin"] > fast["base"]["pair_margin"] + 0.5  # something was learned


def test_a_run_begins_at_log_2_learns_and_reports(make: MakeRecipe) -> None:
    result = train(make(evaluate__samples=2, evaluate__max_new_tokens=4))
    run, evaluation = result.run, result.evaluation
    assert evaluation is not None
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(run)[-1] < 0.5
    first = run.read_metrics()[0]
    assert first["num_supervised_tokens"] > 2 * 8  # tokens, not pairs
    rewards = evaluation["preference"]["rewards"]
    assert rewards["accuracy"]["value"] == 1.0
    assert rewards["margin"]["low"] > 0
    assert rewards["margin"]["value"] == pytest.approx(rewards["chosen"] - rewards["rejected"])
    # the base is the reference, so the reward margin is the growth of the margin times beta
    assert rewards["margin"]["value"] == pytest.approx(0.1 * evaluation["difference"]["pair_margin"]["value"], abs=1e-6)
    report, card = run.report.read_text(encoding="utf-8"), (run.adapter / "README.md").read_text(encoding="utf-8")
    assert "reward margin" in report
    assert "which of two answers is better (dpo, beta 0.1)" in report
    assert "which of two answers is better" in card
    lock = read_json(run.lock)
    assert lock["choices"]["preference.beta"]["value"] == "0.1"
    shown = CliRunner().invoke(app, ["evaluate", str(run.root), "--gate", "pair_accuracy_per_token>=0.9"])
    assert shown.exit_code == 0, shown.output
    assert "chosen likelier" in shown.stdout
    assert "not better: chosen answer likelier" in shown.output  # length decides on the sums of a random model
    assert "but the margin of log p, nats" in shown.output


@pytest.mark.slow
def test_packed_pairs_train_as_pairs_one_by_one(make: MakeRecipe, tmp_path: Path) -> None:
    packed = train(make(train__epochs=1, train__output_dir=str(tmp_path / "packed"))).run
    alone = train(make(train__epochs=1, train__token_budget=1, train__output_dir=str(tmp_path / "alone"))).run
    assert_close(packed, alone)


@pytest.mark.slow
def test_two_processes_train_as_one(make: MakeRecipe, tmp_path: Path, own_cache: Path) -> None:
    """The second run computes its own reference, each process a share of it."""
    settings = {"train__epochs": 1, "lora__dropout": 0.1}
    one = train(make(**settings, train__output_dir=str(tmp_path / "one"))).run
    two = trained(2, make(**settings), tmp_path)
    assert len(list((own_cache / "reference").iterdir())) == 2
    assert_close(one, two)


class StopAfter(NoProgress):
    """Stops the run as Ctrl-C does, when a checkpoint is written."""

    def checkpoint(self, metrics: Any, folder: Path) -> None:
        raise KeyboardInterrupt


@pytest.mark.slow
def test_a_resumed_run_is_the_same_to_the_bit_and_needs_no_reference_pass(
    make: MakeRecipe, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"train__save_every": 3, "train__eval_every": "never"}
    whole = train(make(train__output_dir=str(tmp_path / "whole"), **settings)).run
    stopped = make(train__output_dir=str(tmp_path / "stopped"), **settings)
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        train(stopped, progress=StopAfter())
    run = RunDir.open(tmp_path / "stopped")
    assert [path.name for path in run.checkpoints.iterdir()] == ["3"]
    for path in (own_cache / "reference").iterdir():
        path.unlink()  # only the run directory has it
    passes = count_passes(monkeypatch)
    resume(run.root)
    assert passes == ["initial", "fine-tuned"]
    assert losses(run) == losses(whole)
    one, other = adapter(whole), adapter(run)
    assert all(bool((one[name] == other[name]).all()) for name in one)


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record whose log-probabilities are computed from now on."""
    passes: list[str] = []
    real = reference.log_probs

    def counted(loss: Any, pairs: Any, budget: Any, progress: Any, what: str) -> Any:
        passes.append(what)
        return real(loss, pairs, budget, progress, what)

    for module in (reference, compare):
        monkeypatch.setattr(module, "log_probs", counted)
    return passes


@pytest.mark.slow
def test_the_reference_is_cached_checked_and_computed_again_if_it_is_wrong(
    make: MakeRecipe, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = count_passes(monkeypatch)
    settings = {"train__epochs": 1, "data__eval": "none"}
    first = train(make(train__output_dir=str(tmp_path / "1"), **settings)).run
    again = train(make(train__output_dir=str(tmp_path / "2"), **settings)).run
    assert passes == ["reference"]
    assert losses(first) == losses(again)
    (entry,) = (own_cache / "reference").iterdir()
    cache = reference.Cache(entry.parent, NoProgress())
    stored = cache.load(entry.stem)
    assert stored is not None
    assert stored["train"].shape == (18, 2)
    assert (stored["train"] < 0).all()
    cache.store(entry.stem, {**stored, "train": np.ascontiguousarray(stored["train"] + 1.0)})

    class Warned(NoProgress):
        def warn(self, message: str) -> None:
            warnings.append(message)

    warnings: list[str] = []
    third = train(make(train__output_dir=str(tmp_path / "3"), **settings), progress=Warned()).run
    assert passes == ["reference", "reference"]
    assert "the stored reference differs from the loaded model (by 1 nats" in " ".join(warnings)
    assert losses(third) == losses(first)
    repaired = cache.load(entry.stem)
    assert repaired is not None
    assert (repaired["train"] == stored["train"]).all()


@pytest.mark.slow
def test_the_reference_of_a_continued_run_is_the_adapter_it_starts_from(make: MakeRecipe, tmp_path: Path) -> None:
    first = train(make(train__output_dir=str(tmp_path / "first"))).run
    second = train(
        make(train__epochs=1, train__output_dir=str(tmp_path / "second"), lora__start_from=str(first.adapter))
    )
    assert losses(second.run)[0] == pytest.approx(math.log(2), abs=1e-6)  # not the loss that the first run ended with
    assert second.evaluation is not None
    growth = second.evaluation["tuned"]["pair_margin"] - read_json(first.evaluation)["tuned"]["pair_margin"]
    rewards = second.evaluation["preference"]["rewards"]
    assert rewards["margin"]["value"] == pytest.approx(0.1 * growth, abs=1e-4)
    again = evaluate_again(second.run)["rewards"]
    assert again["margin"]["value"] == pytest.approx(rewards["margin"]["value"], abs=1e-6)
    assert second.evaluation["before"] == "start"
    assert second.evaluation["base"]["pair_margin"] == read_json(first.evaluation)["tuned"]["pair_margin"]
    for file in second.run.start.iterdir():
        file.unlink()
    assert evaluate_again(second.run)["rewards"] is None  # not measured from the bare base
    assert read_json(second.run.evaluation)["before"] == "base"


def evaluate_again(run: RunDir) -> dict[str, Any]:
    assert CliRunner().invoke(app, ["evaluate", str(run.root)]).exit_code == 0
    found = read_json(run.evaluation)["preference"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("loss", ["orpo", pytest.param("simpo", marks=pytest.mark.slow)])
def test_losses_without_a_reference_train_and_compute_none(
    make: MakeRecipe, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = count_passes(monkeypatch)
    result = train(make(preference__loss=loss))
    assert passes == ["initial", "fine-tuned"]
    assert result.evaluation is not None
    assert result.evaluation["preference"]["rewards"] is None
    difference = result.evaluation["difference"]
    assert difference["pair_accuracy_per_token"]["value"] > 0
    assert difference["pair_margin"]["low"] > 0
    assert not result.run.reference.exists()


def test_the_plan_counts_pairs_and_the_preview_shows_both_answers(make: MakeRecipe) -> None:
    prepared = plan(make())
    record = prepared.as_plan()["data"]
    assert record["num_examples"] == 18
    pairs = answers_of(prepared.data.train)
    assert record["num_tokens"] == sum(len(example.input_ids) for example in pairs)
    assert record["num_supervised_tokens"] == sum(int(example.supervised.sum()) for example in pairs)
    side = prepared.data.report["train"]
    assert side["pairs"]["rejected_tokens"] > 0
    assert prepared.recipe.preference.beta == 0.1
    assert "train.learning_rate" not in [advice.about for advice in plan(make(train__learning_rate=1e-5)).notes.advice]
    both = [*pairs, *answers_of(prepared.data.eval)]
    assert cost._reference_pass(make(), prepared.data, 2) == {
        "reference_tokens": sum(len(example.input_ids) for example in both),
        "reference_supervised": sum(int(example.supervised.sum()) for example in both),
    }
    assert cost._reference_pass(make(preference__loss="orpo"), prepared.data, 2) == {}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"preference__loss": "ipo", "lora__dropout": 0.1, "data__eval": "none"}, id="ipo"),
        pytest.param({"preference__beta": 0.3, "lora__start_from": "FIRST"}, marks=pytest.mark.slow, id="start"),
        pytest.param({"train__optimizer": "muon", "train__average_checkpoints": 2}, marks=pytest.mark.slow, id="muon"),
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_the_ejected_script_trains_as_the_trl_engine(
    make: MakeRecipe, tmp_path: Path, settings: dict[str, object]
) -> None:
    if "lora__start_from" in settings:
        first = train(make(train__epochs=1, train__output_dir=str(tmp_path / "first"))).run
        settings = {**settings, "lora__start_from": str(first.adapter)}
    own = {
        "train__epochs": 2,
        "train__log_every": 1,
        "train__save_every": 2,
        "train__output_dir": str(tmp_path / "run"),
        **settings,
    }
    script = tmp_path / "script.py"
    ejected = eject(prepare(make(**own), NoProgress()), script)
    assert "DPOTrainer" in ejected.why_rows
    imported = {node.module for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.ImportFrom)}
    assert imported <= {"datasets", "transformers", "peft", "trl", "pathlib"}
    runpy.run_path(str(script), run_name="__main__")
    run = train(make(train__engine="trl", **own)).run
    assert losses_of_script(tmp_path / "run-ejected") == losses(run)
    one, other = (folder / "adapter_model.safetensors" for folder in (tmp_path / "run-ejected", run.adapter))
    assert one.read_bytes() == other.read_bytes(), "the adapters differ"
    assert not (tmp_path / "run-ejected" / "ref").exists()


@pytest.mark.parametrize(
    ("settings", "problem", "fix"),
    [
        ({"preference__loss": "orpo"}, "preference.loss is orpo", "preference.loss=dpo or ipo"),
        ({"preference__sft_weight": 0.5}, "preference.sft_weight is 0.5", "use preference.sft_weight=0.0"),
        ({"lora__variant": "pissa"}, "would change the base", "lora.variant=plain"),
        ({"train__early_stopping": 2, "train__eval_every": 1}, "train.early_stopping is 2", "leave"),
    ],
)
def test_eject_names_what_a_script_for_pairs_cannot_follow(
    make: MakeRecipe, settings: dict[str, object], problem: str, fix: str
) -> None:
    with pytest.raises(RecipeError, match=problem) as refused:
        check_supported(make(**settings))
    assert fix in refused.value.fix


@pytest.mark.slow
def test_an_adapter_with_trained_modules_is_merged_first_and_is_then_the_reference(
    make: MakeRecipe, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    first = train(tiny_recipe(lora__modules_to_save=["lm_head"], train__output_dir=str(tmp_path / "first"))).run
    with pytest.raises(RecipeError, match="trained in full, which the recipe does not train") as refused:
        plan(make(lora__start_from=str(first.adapter)))
    assert "`loratune merge`" in refused.value.fix
    with pytest.raises(RecipeError, match="is merged first"):
        make(lora__start_from=str(first.adapter), lora__modules_to_save=["lm_head"])
    merged = tmp_path / "merged"
    assert CliRunner().invoke(app, ["merge", str(first.root), str(merged)]).exit_code == 0
    second = train(make(model__name=str(merged), train__epochs=1, train__output_dir=str(tmp_path / "second"))).run
    assert losses(second)[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_killed_run_is_resumed_to_the_bit(make: MakeRecipe, tmp_path: Path, kind: str) -> None:
    settings: dict[str, object] = {"train__save_every": 2, "train__epochs": 4, "lora__dropout": 0.1}
    if kind == "kto":
        rows = [{"prompt": pair(i)["prompt"], "completion": pair(i)["chosen"], "label": i % 3 > 0} for i in range(18)]
        file = write_jsonl(tmp_path / "judged.jsonl", rows)
        settings |= {"preference__loss": "kto", "data__train": str(file), "data__eval": "none"}
    recipe = make(**settings, train__output_dir=str(tmp_path / "whole"))
    file, run = write_recipe(recipe, tmp_path, "killed")
    with started([sys.executable, "-m", "loratune", "train", file]) as process:
        wait_for((run.checkpoints / "4").is_dir)
        process.kill()
        process.wait(WAIT_SECONDS)
    assert process.returncode == -signal.SIGKILL
    assert not run.is_complete
    resume(run.root)
    whole = train(recipe).run
    assert losses(run) == losses(whole)
    one, other = adapter(whole), adapter(run)
    assert one.keys() == other.keys()
    assert all(bool((one[name] == other[name]).all()) for name in one)


def refusals() -> Iterator[tuple[dict[str, object], str]]:
    yield {"data__train_on": "all"}, "data.train_on is all"
    yield {"data__on_long": "split"}, "a pair cannot be divided"
    yield {"train__label_smoothing": 0.1}, "preference.label_smoothing is for pairs"
    yield {"lora__modules_to_save": ["norm"]}, "frozen output head"
    yield {"data__columns": {"completion": "x"}}, "data.columns names completion"
    yield {"preference__loss": "simpo", "train__engine": "trl"}, "DPOTrainer has no simpo"
    yield {"preference__loss": "ipo", "preference__label_smoothing": 0.1}, "which is for dpo"
    yield {"preference__target_margin": 0.5}, "which is for simpo"
    yield {"model__task": "causal_lm", "preference__beta": 0.3}, "preference.beta is 0.3"
    yield {"model__task": "sequence_classification", "preference__beta": 0.3}, "preference.beta is 0.3"


@pytest.mark.parametrize(("settings", "problem"), refusals())
def test_what_does_not_fit_is_refused_when_the_recipe_is_read(
    make: MakeRecipe, settings: dict[str, object], problem: str
) -> None:
    with pytest.raises(RecipeError, match=problem):
        make(**settings)
