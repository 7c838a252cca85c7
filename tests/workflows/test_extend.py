"""A run that is extended is the run that had been planned longer, to the bit; or says what it has otherwise."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import validate
from safetensors.torch import load_file
from typer.testing import CliRunner

from loratune.__main__ import app
from loratune.recipe.recipe import Recipe, TrainSection
from loratune.run.directory import Record, RunDir, read_json, write_json
from loratune.run.errors import Interrupted, RecipeError, RunError
from loratune.run.progress import NoProgress
from loratune.run.records.schemas import schema_of
from loratune.training import trainer
from loratune.training.checkpoint import load_optimizer
from loratune.training.hf_arguments import branch_step, fraction_of, steps_in_common
from loratune.workflows import extend as workflow
from loratune.workflows import steps as spine
from loratune.workflows.extend import extend
from loratune.workflows.extension import newest_checkpoint
from loratune.workflows.reproduce import compare_adapters, reproduce
from loratune.workflows.resume import resume
from loratune.workflows.train import train
from tests.conftest import conversation, write_jsonl

MakeRecipe = Callable[..., Recipe]
CONSTANT = {"train__schedule": "constant", "train__epochs": 1, "lora__dropout": 0.2, "lora__r": 2}


class Notes(NoProgress):
    """Keeps what a verb says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def line(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.said.append(f"warning: {text}")


@pytest.fixture(scope="module")
def short(tiny_model: Path, chat_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run of one epoch, three steps, at a constant rate after a warm-up of one step."""
    from tests.conftest import recipe_maker

    make = recipe_maker(tiny_model, chat_files, tmp_path_factory.mktemp("short"))
    return train(make(**CONSTANT, train__warmup_fraction=0.3)).run


def steps_of(run: RunDir) -> list[Record]:
    timed = ("time", "tokens_per_second", "peak_bytes", "seconds")
    return [{name: value for name, value in line.items() if name not in timed} for line in run.read_metrics()]


def test_one_epoch_extended_to_two_is_the_run_of_two_to_the_bit(short: RunDir, tmp_path: Path) -> None:
    notes = Notes()
    run = extend(short.root, ["train.epochs=2"], out=tmp_path / "longer", progress=notes).run
    assert "from its step 3 to step 6" in " ".join(notes.said)
    again = reproduce(run.root)  # trains the longer run's recipe from the first step
    assert again.equal
    assert steps_of(run) == steps_of(again.run)
    ours, theirs = (read_json(folder.root / "evaluation.json") for folder in (run, again.run))
    assert ours["tuned"] == theirs["tuned"]
    mine, other = (folder.checkpoints / "6" for folder in (run, again.run))
    assert (mine / "optimizer.safetensors").read_bytes() == (other / "optimizer.safetensors").read_bytes()
    assert not compare_adapters(short, run).equal
    lineage = read_json(run.lock)["extends"]
    assert (lineage["run"], lineage["step"], lineage["exact"]) == (str(short.root), 3, True)
    assert lineage["differs"] == ["train.epochs (1 → 2)"]
    assert f"Extends {short.root}" in run.recipe.read_text()
    assert "as if planned longer" in run.report.read_text()
    assert Recipe.load(run.recipe).train.warmup_fraction < 0.3  # of twice the steps: one step still


@pytest.mark.slow
def test_without_the_optimizers_state_it_would_be_another_run(
    short: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail."""

    def without_moments(folder: Path, optimizer: Any, scheduler: Any) -> None:
        fresh = optimizer.state_dict()["state"]
        load_optimizer(folder, optimizer, scheduler)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": fresh})

    whole = extend(short.root, ["train.epochs=2"], out=tmp_path / "whole").run
    monkeypatch.setattr(trainer, "load_optimizer", without_moments)
    assert not compare_adapters(whole, extend(short.root, ["train.epochs=2"], out=tmp_path / "half").run).equal


@pytest.mark.slow
def test_a_run_that_warms_up_and_decays_goes_on_from_where_it_began_to_decay(
    tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = tiny_recipe(
        train__schedule="warmup_stable_decay", train__epochs=2, train__keep_checkpoints=1, train__batch_size=4
    )
    parent = train(recipe).run  # ten steps, of which the last two decay
    assert sorted(path.name for path in parent.checkpoints.iterdir()) == ["10", "8"]
    run = extend(parent.root, ["train.epochs=3"], out=tmp_path / "longer").run
    assert read_json(run.lock)["extends"]["step"] == 8
    planned = train(
        tiny_recipe(
            train__schedule="warmup_stable_decay",
            train__epochs=3,
            train__batch_size=4,
            train__output_dir=str(tmp_path / "planned"),
        )
    ).run
    assert compare_adapters(run, planned).equal
    shutil.rmtree(parent.checkpoints / "8")
    with pytest.raises(RecipeError, match="no checkpoint from before is left"):
        extend(parent.root, ["train.epochs=3"], out=tmp_path / "other")


@pytest.mark.slow
def test_another_schedule_says_what_differs_and_offers_to_warm_up_again(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = train(tiny_recipe(train__schedule="cosine", train__epochs=1, evaluate__samples=0)).run
    with pytest.raises(
        RecipeError, match=r"other learning rates from step 2 on: 0\.00933 there, 0\.0075 here"
    ) as error:
        extend(parent.root, ["train.epochs=2"], out=tmp_path / "more")
    assert not (tmp_path / "more").exists()
    words = shlex.split(error.value.fix.split("`")[1])
    assert words[:3] == ["loratune", "extend", str(parent.root)]
    assert words[-1] == "--rewarm"

    before = load_file(parent.checkpoints / "3" / "optimizer.safetensors")
    found: dict[str, Any] = {}

    def spied(folder: Path, optimizer: Any, scheduler: Any) -> None:
        load_optimizer(folder, optimizer, scheduler)
        found["state"] = optimizer.state_dict()["state"][0]["exp_avg"].clone()
        found["rate"] = optimizer.param_groups[0]["lr"]

    monkeypatch.setattr(trainer, "load_optimizer", spied)
    run = extend(parent.root, ["train.epochs=2", "train.learning_rate=5e-3"], out=tmp_path / "more", rewarm=True).run
    assert found["state"].equal(before["0.exp_avg"])
    assert found["rate"] == 0  # the new schedule's, which warms up; the cosine's own end was 0 too, of another peak
    lines = [line for line in steps_of(run) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert max(line["learning_rate"] for line in lines) == pytest.approx(5e-3)
    last = load_file(parent.checkpoints / "3" / "adapter_model.safetensors")
    first = load_file(run.checkpoints / "0" / "adapter_model.safetensors")
    assert all(first[name].equal(last[name]) for name in last)
    lineage = read_json(run.lock)["extends"]
    assert not lineage["exact"]
    assert "train.learning_rate (0.01 → 0.005)" in lineage["differs"]
    with pytest.raises(RecipeError, match="began with the adapter and the optimizer's state of"):
        reproduce(run.root)


def test_other_data_begin_a_new_schedule_and_what_is_forgotten_is_measured(
    short: RunDir, tmp_path: Path, chat_files: tuple[Path, Path]
) -> None:
    rows = [conversation(i) for i in range(200, 208)]
    seen = [conversation(i) for i in range(3)]
    new, held_out = write_jsonl(tmp_path / "new.jsonl", rows), write_jsonl(tmp_path / "held.jsonl", seen)
    notes = Notes()
    result = extend(short.root, [f"data.train={new}", f"data.eval={held_out}"], out=tmp_path / "other", progress=notes)
    said = "\n".join(notes.said)
    assert "3 of 3 held-out examples were trained on by" in said
    assert result.evaluation is not None
    loss = result.evaluation["forgetting"]["tuned"]["nll"]
    first = read_json(short.evaluation)["tuned"]["nll"]
    assert f"loss {first:.4f} before it was extended, {loss:.4f} now" in said
    assert read_json(result.run.lock)["extends"]["exact"] is False
    lock = read_json(result.run.lock)["inputs"]
    assert lock["forgetting"] == read_json(short.lock)["inputs"]["eval"]
    card = (result.run.adapter / "README.md").read_text()
    assert "of `new.jsonl`" in card
    assert "Before that, it was trained on `train.jsonl`." in card
    assert len([line for line in result.run.read_metrics() if "loss" in line]) == 1  # 8 examples, one epoch


@pytest.mark.slow
def test_a_file_with_more_rows_is_other_data(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = [conversation(i) for i in range(10)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    parent = train(tiny_recipe(**CONSTANT, data__train=str(file))).run
    with pytest.raises(RecipeError, match="nothing more to train") as error:
        extend(parent.root)
    assert "train.epochs=2" in error.value.fix
    write_jsonl(file, [*rows, *(conversation(i) for i in range(50, 60))])
    run = extend(parent.root).run
    assert run.root == tmp_path / "run-extended"
    assert "inputs.train.tokens" in read_json(run.lock)["extends"]["differs"]
    shutil.rmtree(run.root / "adapter")
    shutil.rmtree(run.checkpoints)
    run.checkpoints.mkdir()
    with pytest.raises(RunError, match="the checkpoint that this run began with is gone"):
        resume(run.root)


@pytest.mark.slow
def test_an_extension_that_is_stopped_is_resumed_to_the_same_end(
    short: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = extend(short.root, ["train.epochs=3"], out=tmp_path / "whole").run
    real = spine.train_steps

    def stopped(*arguments: Any) -> Any:
        arguments[5].ask(signal.SIGINT)  # ends after one step
        return real(*arguments)

    monkeypatch.setattr(spine, "train_steps", stopped)
    with pytest.raises(Interrupted):
        extend(short.root, ["train.epochs=3"], out=tmp_path / "stopped")
    monkeypatch.undo()
    assert compare_adapters(whole, resume(tmp_path / "stopped").run).equal


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("lora.r=4", r"cannot change lora\.r \(2 → 4\)"),
        ("train.optimizer=sgd", r"cannot change train\.optimizer \(adamw → sgd\)"),
        ("train.learning_rate=1e-3", r"would not have taken the steps of this one: train\.learning_rate"),
        ("train.epochs=0.5", "nothing more to train"),
        ("train.output_dir={run}", "would overwrite the one it extends"),
        ("train.average_checkpoints=3", "did not keep the checkpoint of step 2"),
    ],
)
def test_what_would_not_fit_is_refused_and_nothing_is_written(
    change: str, problem: str, short: RunDir, tmp_path: Path
) -> None:
    run = RunDir(Path(shutil.copytree(short.root, tmp_path / "run")))
    changes = [change.format(run=run.root)]
    if "average" in change:
        changes += ["train.epochs=2", "train.save_every=2"]  # 2, 4, 6
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RecipeError, match=problem):
        extend(run.root, changes)
    assert sorted(tmp_path.iterdir()) == before


def test_resume_of_a_finished_run_and_of_an_edited_recipe_point_here(short: RunDir, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(short.root, tmp_path / "run")))
    with pytest.raises(RecipeError) as error:
        resume(run.root)
    assert f"`loratune extend {run.root} train.epochs=2`" in error.value.fix
    run.recipe.write_text(run.recipe.read_text().replace("epochs: 1", "epochs: 2"))
    with pytest.raises(RecipeError, match=r"is not trained: train\.epochs \(1 → 2\)") as error:
        resume(run.root)
    assert f"`loratune extend {run.root}`" in error.value.fix
    read = workflow._read(run, (), None)
    assert read.changed == {"train.epochs": 2.0}
    shutil.rmtree(run.adapter)
    with pytest.raises(RecipeError) as error:
        resume(run.root)
    assert f"`loratune extend {run.root}`" in error.value.fix


@pytest.mark.slow
def test_a_run_ended_by_early_stopping_needs_more_patience(short: RunDir, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(short.root, tmp_path / "run")))
    lock = read_json(run.lock)
    for part in ("recipe", "written"):
        lock[part]["train"]["early_stopping"] = 1
    write_json(run.lock, lock)
    run.recipe.write_text(re.sub(r"( *)(epochs: .*)", r"\1\2\n\1early_stopping: 1", run.recipe.read_text()))
    run.append_metrics({"step": 3, "time": 0.0, "event": "early_stopping", "message": "over", "lowest_at": 1})
    with pytest.raises(RecipeError, match="would end a longer one at the same step"):
        extend(run.root, ["train.epochs=2"])
    longer = extend(run.root, ["train.epochs=2", "train.early_stopping=null"]).run
    assert not [line for line in longer.read_metrics() if line.get("event") == "early_stopping"]
    assert max(line["step"] for line in longer.read_metrics()) == 6


def test_a_run_without_checkpoints_names_the_way_without_the_optimizers_state(finished_run: RunDir) -> None:
    with pytest.raises(RecipeError, match="no checkpoint, with the optimizer's state") as error:
        newest_checkpoint(finished_run)
    assert "lora.start_from=" in error.value.fix


@pytest.mark.parametrize(
    ("schedule", "common"),
    [
        ("constant", 10),
        ("inverse_sqrt", 10),
        ("warmup_stable_decay", 8),
        *((name, 2) for name in ("linear", "cosine", "cosine_with_min_lr")),  # the warm-up, and one step at the peak
    ],
)
def test_plans_part_where_their_learning_rates_do(schedule: Any, common: int) -> None:
    plans = [(TrainSection(schedule=schedule, warmup_fraction=fraction_of(2, steps)), steps) for steps in (10, 20)]
    assert steps_in_common(plans[0], plans[1]) == steps_in_common(plans[1], plans[0]) == common
    other = TrainSection(schedule=schedule, warmup_fraction=0.1, learning_rate=1e-3)
    assert steps_in_common(plans[0], (other, 20)) == 0
    assert branch_step(plans[0][0], 10) == (8 if schedule == "warmup_stable_decay" else None)


def test_a_fraction_gives_its_number_of_steps() -> None:
    for steps in (1, 3, 7, 30, 49, 1000):
        for count in range(1, 2 * steps + 1):
            assert math.ceil(fraction_of(count, steps) * steps) == count
    assert (fraction_of(6, 3), fraction_of(1, 4)) == (2.0, 0.2)


def test_the_verbs_of_the_command_line(short: RunDir, tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, ["resume", str(short.root), "train.epochs=2"])
    assert refused.exit_code == 2
    assert f"loratune extend {short.root} train.epochs=2" in " ".join(refused.stderr.split())
    words = ["extend", str(short.root), "train.epochs=1.4", "--out", str(tmp_path / "more"), "--json"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.stderr
    record = json.loads(shown.stdout)
    validate(record, schema_of("extend"))
    assert record["run"] == str(tmp_path / "more")
    assert max(line["step"] for line in RunDir(tmp_path / "more").read_metrics()) == 5  # 1.4 of three steps
