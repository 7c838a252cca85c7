"""Ctrl-C and SIGTERM, at awkward moments; and kills, at random ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import Interrupted, Terminated
from loratune.workflows.resume import resume
from loratune.workflows.train import train
from tests.conftest import recipe_maker
from tests.invariants.test_same_mathematics import assert_same
from tests.training.test_disk import Moment

MakeRecipe = Callable[..., Recipe]
KILL = Path(__file__).parents[2] / "benchmarks" / "kill.py"


def send(*numbers: int) -> Callable[[], None]:
    def act() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return act


SETTINGS = {
    "lora__dropout": 0.1,
    "train__epochs": 1.9,
    "train__save_every": 1,
    "train__eval_every": 2,
    "train__keep_checkpoints": 1,
    "train__token_budget": 100,  # three micro-batches in an evaluation
}


@pytest.fixture(scope="module")
def whole(tiny_model: Path, chat_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The run that nothing stops."""
    return train(recipe_maker(tiny_model, chat_files, tmp_path_factory.mktemp("whole"))(**SETTINGS)).run


def test_a_stop_is_in_order_whatever_was_under_way(tiny_recipe: MakeRecipe, whole: RunDir) -> None:
    """At a step with an evaluation, in that evaluation after a resume, and at the last step: the same bits."""
    recipe = tiny_recipe(**SETTINGS)
    with pytest.raises(Terminated, match=r"stopped after step 2 of 6 \(checkpoint saved\)") as stopped:
        train(recipe, progress=Moment("training", send(signal.SIGTERM), at=3))
    assert stopped.value.exit_code == 143
    run = RunDir.open(recipe.train.output_dir)
    assert [record["step"] for record in run.read_metrics()] == [1, 2], "who stops does not wait for an evaluation"
    with pytest.raises(Interrupted, match=r"stopped after step 2 of 6") as stopped:
        resume(run.root, progress=Moment("held-out loss", send(signal.SIGINT), at=1))
    assert stopped.value.exit_code == 130
    with pytest.raises(Interrupted, match="stopped after step 4"):
        resume(run.root, progress=Moment("training", send(signal.SIGINT), at=3))
    with pytest.raises(Interrupted, match="stopped after step 6 of 6"):
        resume(run.root, progress=Moment("training", send(signal.SIGINT), at=3))
    assert not run.has_adapter
    resume(run.root)
    assert_same(whole, run, tolerance=0)
    measured = read_json(run.plan)["measured"]
    steps = [record for record in run.read_metrics() if "loss" in record]
    assert measured["train_seconds"] == pytest.approx(sum(s["num_tokens"] / s["tokens_per_second"] for s in steps))
    assert measured["total_seconds"] > measured["train_seconds"]


@pytest.mark.slow
def test_a_stop_ends_an_evaluation_and_a_second_one_is_at_once_and_harms_no_checkpoint(
    tiny_recipe: MakeRecipe, whole: RunDir
) -> None:
    recipe = tiny_recipe(**SETTINGS)
    with pytest.raises(Interrupted, match="stopped after step 2"):
        train(recipe, progress=Moment("held-out loss", send(signal.SIGINT), at=1))
    run = RunDir.open(recipe.train.output_dir)
    with pytest.raises(KeyboardInterrupt):
        resume(run.root, progress=Moment("training", send(signal.SIGINT, signal.SIGINT), at=2))
    with pytest.raises(SystemExit) as stopped:
        resume(run.root, progress=Moment("training", send(signal.SIGTERM, signal.SIGTERM), at=3))
    assert stopped.value.code == 143
    assert_same(whole, resume(run.root).run, tolerance=0)


@pytest.mark.slow
def test_ctrl_c_in_the_last_evaluation_keeps_the_adapter(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe(train__epochs=1, evaluate__metric="exact_match", evaluate__max_new_tokens=2)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="all steps are done, and the adapter is saved"):
        train(recipe, progress=Moment("tuned answers", interrupt))
    run = RunDir.open(recipe.train.output_dir)
    adapter = (run.adapter / "adapter_model.safetensors").stat().st_mtime_ns
    listener = Moment("training", interrupt)  # would be another training
    assert resume(run.root, progress=listener).evaluation is not None
    assert run.is_complete
    assert (run.adapter / "adapter_model.safetensors").stat().st_mtime_ns == adapter
    assert "so_far" not in read_json(run.plan)


@pytest.mark.slow
def test_a_kill_before_the_first_checkpoint_begins_again(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe(train__save_every="never", train__max_steps=3, train__epochs=9, lora__dropout=0.1)
    run = train(recipe).run
    before, weights = run.read_metrics(), (run.adapter / "adapter_model.safetensors").read_bytes()
    for path in (run.adapter, run.root / "evaluation.json"):
        path.rename(run.root / f".{path.name}.tmp")  # half written
    with run.metrics.open("a") as stream:
        stream.write('{"step": 4, "lo')
    listener = Moment("", lambda: None)
    resume(run.root, progress=listener)
    assert "no checkpoint yet: starting again with the first step" in listener.lines
    same = ("step", "loss", "grad_norm", "eval_nll")
    assert [[r.get(k) for k in same] for r in run.read_metrics()] == [[r.get(k) for k in same] for r in before]
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == weights
    assert not list(run.root.glob(".*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--kills", "5", "--forked", "--seed", "1"],
        pytest.param(["--kills", "20", "--forked"], marks=pytest.mark.slow),
        pytest.param(["--kills", "20"], marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_a_process_that_is_killed_again_and_again_ends_in_the_same_bits(
    tiny_model: Path, chat_files: tuple[Path, Path], tmp_path: Path, options: list[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{name: {tiny_model}, dtype: float32}}\n"
        f"data: {{train: {chat_files[0]}, eval: {chat_files[1]}}}\n"
        "lora: {dropout: 0.1, r: 4}\n"
        "train: {epochs: 2.5, learning_rate: 0.01, batch_size: 4, device: cpu, save_every: 2, eval_every: 3, "
        "keep_checkpoints: 1}\n"
        "evaluate: {metric: exact_match, max_new_tokens: 4}\n"
    )
    done = subprocess.run(
        [sys.executable, str(KILL), str(recipe), "--folder", str(tmp_path / "runs"), *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{options[1]} kills" in done.stdout
    assert "the same adapter and losses, to the bit" in done.stdout
