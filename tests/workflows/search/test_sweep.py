"""A sweep: its trials are the runs of `train`, and a sweep that was killed ends with the same table."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from loratune.__main__ import app
from loratune.cli.output import show_sweep
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import MachineError, RecipeError, RunError
from loratune.run.progress import NO_PROGRESS
from loratune.run.records.schemas import schema_of
from loratune.workflows import start, steps
from loratune.workflows.load import attach_adapter_and_loss
from loratune.workflows.resume import resume
from loratune.workflows.search import legs as module
from loratune.workflows.search.folder import SweepDir
from loratune.workflows.search.shared_base import SharedBase
from loratune.workflows.search.sweep import SweepResult, sweep
from loratune.workflows.tasks.generation import compare
from loratune.workflows.train import train
from tests.conftest import recipe_maker

SETTINGS = ("train.learning_rate=1e-4,2e-2", "lora.r=2,4")


def table(result: SweepResult) -> dict[str, Any]:
    """The result without times and places."""
    record = result.record.model_dump(mode="json")
    for trial in record["trials"]:
        trial["run"] = Path(trial["run"]).name
        for rung in trial["rungs"]:
            rung.pop("seconds")
    return {name: value for name, value in record.items() if name not in ("folder", "recipe", "page")}


def trajectory(run: RunDir) -> list[tuple[Any, ...]]:
    """Losses of all steps and evaluations, without times."""
    names = ("step", "loss", "learning_rate", "grad_norm", "eval_nll")
    return [tuple(line.get(name) for name in names) for line in run.read_metrics()]


def checkpoints(run: RunDir) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


@pytest.fixture(scope="module")
def swept(tiny_model: Path, chat_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A sweep of four trials of nine steps, whose rungs are neither evaluated nor saved by the recipe."""
    make = recipe_maker(tiny_model, chat_files, tmp_path_factory.mktemp("sweep"))
    recipe = make(
        train__epochs=3,
        train__eval_every=2,
        train__save_every=4,
        train__final_adapter="best",
        lora__dropout=0.1,
        evaluate__samples=2,
        evaluate__max_new_tokens=4,
    )
    return recipe, sweep(recipe, SETTINGS)


def test_a_trial_is_the_run_of_train_with_its_settings_alone(swept: tuple[Recipe, SweepResult], tmp_path: Path) -> None:
    recipe, result = swept
    best = result.record.trials[0]
    assert [rung.step for rung in best.rungs] == [3, 5, 9]
    assert best.state == "finished"
    rate, r = best.settings["train.learning_rate"], int(best.settings["lora.r"])
    own = recipe.replace(train={"learning_rate": float(rate), "output_dir": str(tmp_path / "run")}, lora={"r": r})
    done = train(own)
    alone, trial = done.run, RunDir.open(best.run)
    assert trial.adapter_weights.read_bytes() == alone.adapter_weights.read_bytes()
    assert trajectory(trial) == trajectory(alone)
    assert read_json(trial.evaluation) == read_json(alone.evaluation)
    assert checkpoints(trial) == checkpoints(alone) == ["4", "8", "9"]
    assert read_json(trial.best) == read_json(alone.best)
    assert len(read_json(trial.preview)["examples"]) == start.PREVIEW_EXAMPLES
    logs = [run.log.read_text(encoding="utf-8") for run in (trial, alone)]
    assert "Paused: paused after step 3 of 9 (checkpoint saved)" in logs[0]
    assert logs[0].splitlines()[-1][21:] == logs[1].splitlines()[-1][21:] == done.verdict
    locks = [read_json(run.lock) for run in (trial, alone)]
    assert locks[0]["inputs"] == locks[1]["inputs"]
    for lock in locks:
        lock["recipe"]["train"].pop("output_dir")
        lock["written"]["train"].pop("output_dir")
    assert locks[0]["recipe"] == locks[1]["recipe"]
    assert locks[0]["written"] == locks[1]["written"]

    other = read_json(RunDir.open(result.record.trials[1].run).lock)  # the comparison can fail
    assert other["recipe"] != locks[1]["recipe"]


@pytest.mark.slow
def test_a_dropped_trial_goes_on_to_the_end_as_any_run(swept: tuple[Recipe, SweepResult], tmp_path: Path) -> None:
    recipe, result = swept
    lost = result.record.trials[-1]
    assert lost.state == "dropped"
    copied = tmp_path / "sweep"
    shutil.copytree(result.folder, copied)
    run = resume(copied / "trials" / Path(lost.run).name).run
    rate, r = float(lost.settings["train.learning_rate"]), int(lost.settings["lora.r"])
    own = recipe.replace(train={"learning_rate": rate, "output_dir": str(tmp_path / "run")}, lora={"r": r})
    assert run.adapter_weights.read_bytes() == train(own).run.adapter_weights.read_bytes()


def test_the_loss_of_the_base_is_measured_once_and_not_taken_where_it_may_differ(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_base: list[bool] = []
    original = compare.evaluate_nll

    def counted(loss: Any, *others: Any) -> Any:
        of_base.append(any(getattr(module, "disable_adapters", False) for module in loss.model.modules()))
        return original(loss, *others)

    monkeypatch.setattr(compare, "evaluate_nll", counted)
    recipe = tiny_recipe(train__max_steps=2, evaluate__metric="none", evaluate__samples=0)
    result = sweep(recipe, ["train.learning_rate=1e-3,1e-2", "lora.targets=attention,complete"], halving=False)
    assert of_base.count(True) == 2, "one for each choice of targets"
    for trial in result.record.trials:
        own = {"learning_rate": float(trial.settings["train.learning_rate"]), "output_dir": str(tmp_path / "own")}
        alone = recipe.replace(train=own, lora={"targets": trial.settings["lora.targets"]})
        expected = read_json(train(alone, overwrite=True).run.evaluation)
        assert read_json(RunDir.open(trial.run).evaluation) == expected


def test_the_table_says_which_rates_lose_and_by_how_much(swept: tuple[Recipe, SweepResult]) -> None:
    _, result = swept
    record = result.record
    assert record.state == "finished"
    assert record.num_examples == 6
    assert record.sensitivity[0].setting == "train.learning_rate"
    assert record.sensitivity[0].spread > record.sensitivity[1].spread
    low = [trial for trial in record.trials if trial.settings["train.learning_rate"] == "1e-4"]
    assert len(low) == 2
    for trial in low:
        assert trial.state == "dropped"
        assert trial.to_best is not None
        assert 0 < trial.to_best.low < trial.to_best.value < trial.to_best.high
        assert trial.to_best.step == trial.rungs[-1].step
    assert any("beats learning_rate=1e-4" in sentence for sentence in record.sentences)
    assert any("6 held-out rows, which are few" in sentence for sentence in record.sentences)
    assert "r=" in repr(result)
    assert len(repr(result)) < 300
    best = Recipe.load(result.recipe)
    assert best.train.learning_rate == 2e-2
    assert best.train.output_dir.endswith("run")
    page = Path(record.page).read_text(encoding="utf-8")
    assert "Sweep of 4 trials" in page
    assert "What matters" in page


def test_the_same_call_again_changes_nothing_and_another_one_is_refused(swept: tuple[Recipe, SweepResult]) -> None:
    recipe, result = swept
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "start_run", None)
        patch.setattr(module, "continue_run", None)
        assert table(sweep(recipe, SETTINGS)) == table(result)
    with pytest.raises(RecipeError, match="another recipe or of other settings"):
        sweep(recipe, ["lora.r=2,4"])


def test_the_command_prints_the_record_or_the_table(
    swept: tuple[Recipe, SweepResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, result = swept
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    done = CliRunner().invoke(app, ["sweep", str(file), *SETTINGS, "--json"])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    Draft202012Validator(schema_of("sweep")).validate(printed)
    assert printed["best"] == result.record.best
    show_sweep(result.record, as_json=False)
    shown = capsys.readouterr().out
    assert "is best: held-out loss" in shown
    assert f"$ loratune train {result.record.recipe}" in shown
    refused = CliRunner().invoke(app, ["sweep", str(file), "lora.r=2,4", "--budget", "soon"])
    assert refused.exit_code == 2
    assert "30m" in refused.stderr


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@pytest.mark.slow
@pytest.mark.parametrize("writes", [2, 7, 15, 22, 28])
def test_a_sweep_that_was_killed_ends_with_the_same_table(
    swept: tuple[Recipe, SweepResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """Killed at the n-th of 29 lines of the metrics, in the middle of a trial."""
    recipe, result = swept
    recipe = recipe.replace(train={"output_dir": str(tmp_path / "run")})
    append, done = RunDir.append_metrics, 0

    def write(run: RunDir, record: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        if done == writes:
            raise Killed
        append(run, record)

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "append_metrics", write)
        with pytest.raises(Killed):
            sweep(recipe, SETTINGS)
    assert table(sweep(recipe, SETTINGS)) == table(result)


def test_trials_share_the_weights_of_one_base_and_leave_them_alone(tiny_recipe: Callable[..., Recipe]) -> None:
    shared = SharedBase()
    recipes = [
        tiny_recipe(lora__targets="complete", lora__modules_to_save=["lm_head"]),
        tiny_recipe(lora__variant="dora", lora__new_tokens=["<|tool|>"]),
    ]
    plain = prepare(tiny_recipe(), NO_PROGRESS)
    before = {name: value.clone() for name, value in shared(plain, NO_PROGRESS).state_dict().items()}
    pointers = {p.data_ptr() for p in shared(plain, NO_PROGRESS).parameters()}
    for recipe in recipes:
        prepared = prepare(recipe, NO_PROGRESS)
        base = shared(prepared, NO_PROGRESS)
        assert {p.data_ptr() for p in base.parameters()} == pointers
        model, loss = attach_adapter_and_loss(prepared, base, NO_PROGRESS)
        assert loss.model is model
    after = shared(plain, NO_PROGRESS).state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    pissa = prepare(tiny_recipe(lora__variant="pissa"), NO_PROGRESS)
    changed = shared(pissa, NO_PROGRESS)
    assert not {p.data_ptr() for p in changed.parameters()} & pointers


@pytest.mark.slow
def test_a_trial_that_fails_loses_and_the_others_go_on(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that runs out is a failure of the trial; a full disk ends the sweep, which the same call continues."""
    recipe = tiny_recipe(train__epochs=1, evaluate__samples=0)
    write, attach = steps.write_lock, steps.attach_adapter_and_loss

    def fill(prepared: Any, run: RunDir) -> None:
        if prepared.recipe.lora.r == 2:
            raise MachineError("cannot write: the disk is full")
        write(prepared, run)

    def exhaust(prepared: Any, *rest: Any) -> Any:
        if prepared.recipe.lora.r == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return attach(prepared, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(start, "write_lock", fill)
        with pytest.raises(MachineError, match="the disk is full"):
            sweep(recipe, ["lora.r=2,4"])
    monkeypatch.setattr(steps, "attach_adapter_and_loss", exhaust)
    record = sweep(recipe, ["lora.r=2,4"]).record
    assert [(trial.settings["lora.r"], trial.state) for trial in record.trials] == [("4", "finished"), ("2", "failed")]
    assert record.trials[1].problem == "out of memory: CUDA out of memory."
    assert "Failed: r=2." in record.sentences
    with pytest.raises(RunError, match="no trial has a held-out loss: out of memory"):
        sweep(tiny_recipe(train__output_dir=recipe.train.output_dir + "2", lora__r=2), ["lora.alpha=2,4"])


@pytest.mark.slow
def test_a_budget_ends_a_sweep_with_what_was_measured(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe(evaluate__samples=0)
    record = sweep(recipe, ["train.learning_rate=1e-3,1e-2"], budget=1e-6).record
    assert record.state == "time is up"
    assert [len(trial.rungs) for trial in record.trials] == [1, 0]
    assert record.trials[0].state == record.trials[1].state == "waiting"
    assert record.best == 1
    more = sweep(recipe, ["train.learning_rate=1e-3,1e-2"]).record  # the same sweep, with time
    assert more.state == "finished"
    assert more.rungs == record.rungs


def test_what_cannot_be_compared_is_refused_before_anything_is_trained(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="no data is held out"):
        sweep(tiny_recipe(data__eval="none", train__eval_every="never"), ["lora.r=2,4"])
    with pytest.raises(RecipeError, match="decides which rows are held out"):
        sweep(tiny_recipe(data__eval=0.3, train__output_dir=str(tmp_path / "seeds")), ["train.seed=1,2"])
    for _ in range(2):  # the folder that is left from the first attempt is in nobody's way
        with pytest.raises(RecipeError, match=r"lora\.r"):
            sweep(tiny_recipe(train__output_dir=str(tmp_path / "wrong")), ["lora.r=4,0"])
    (tmp_path / "else-sweep").mkdir()
    (tmp_path / "else-sweep" / "thesis.txt").touch()
    with pytest.raises(RecipeError, match="is not a sweep"):
        sweep(tiny_recipe(train__output_dir=str(tmp_path / "else")), ["lora.r=4,2"], overwrite=True)
    (tmp_path / "old-sweep" / "losses").mkdir(parents=True)
    (tmp_path / "old-sweep" / "losses" / "01-0.json").touch()
    with pytest.raises(RecipeError, match="is not a sweep"):  # losses of another one would decide
        sweep(tiny_recipe(train__output_dir=str(tmp_path / "old")), ["lora.r=4,2"])
    assert not list(tmp_path.rglob("metrics.jsonl"))
    folder = SweepDir(tmp_path)
    assert folder.trial(3).root == tmp_path / "trials" / "03"


@pytest.mark.slow
def test_a_sweep_killed_ten_times_at_random_ends_with_the_same_table(
    swept: tuple[Recipe, SweepResult], tmp_path: Path
) -> None:
    recipe, result = swept
    recipe = recipe.replace(train={"output_dir": str(tmp_path / "run")})
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "loratune", "sweep", str(file), *SETTINGS, "--json"]
    chance, folder, whole = random.Random(0), tmp_path / "run-sweep", _lines(Path(result.folder))
    for kill in range(10):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # Each may take its share of what is left, so that all ten come before the end; the last may come after
        # the last step, while the winner is evaluated or the page is written.
        left = whole - _lines(folder)
        lines = _lines(folder) + chance.randint(1, max(1, left // (10 - kill)))
        while process.poll() is None and _lines(folder) < min(lines, whole):
            time.sleep(0.005)
        time.sleep(chance.random() * 0.3 * max(left, 0) / whole)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
        print(f"kill {kill + 1}: {_lines(folder)} of {whole} lines in {_lines_of_trials(folder)}")  # noqa: T201
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(out)["best"] == result.record.best
    assert table(sweep(recipe, SETTINGS)) == table(result)


def _lines(folder: Path) -> int:
    return sum(_lines_of_trials(folder).values())


def _lines_of_trials(folder: Path) -> dict[str, int]:
    return {path.parent.name: path.read_bytes().count(b"\n") for path in sorted(folder.glob("trials/*/metrics.jsonl"))}
