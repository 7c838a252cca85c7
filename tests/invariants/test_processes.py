"""The number of processes decides the speed only: real processes of torchrun on a CPU, against one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir, read_json
from loratune.workflows.resume import resume
from loratune.workflows.train import train
from tests.conftest import recipe_maker
from tests.data.test_mixture import sources
from tests.invariants.test_same_mathematics import assert_same

MakeRecipe = Callable[..., Recipe]
SETTINGS = {
    "train__token_budget": 150,
    "train__save_every": 2,
    "train__eval_every": 2,
    "lora__targets": "complete",
    "lora__dropout": 0.05,
    "evaluate__metric": "exact_match",
    "evaluate__max_new_tokens": 4,
}
"""Several micro-batches in a step; with 20 examples and a batch of 8 the last step of an epoch has 4."""

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
WAIT_SECONDS = 300


def write_recipe(recipe: Recipe, folder: Path, name: str) -> tuple[Path, RunDir]:
    """A file that trains into `folder/name`."""
    values = recipe.model_dump(mode="json", exclude_unset=True)
    values["train"]["output_dir"] = str(folder / name)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path, RunDir(folder / name)


def command(arguments: Sequence[object]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, arguments)), capture_output=True, text=True, check=False, env={**os.environ, **ENVIRONMENT}
    )


def trained(number: int, recipe: Recipe, folder: Path) -> RunDir:
    """The run of so many processes."""
    file, run = write_recipe(recipe, folder, f"{number}-processes")
    done = command([*TORCHRUN, f"--nproc-per-node={number}", "-m", "loratune", "train", file])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("loading ") == 1, "one process talks"
    return run


def lose_the_end(run: RunDir) -> None:
    """What a kill after step 4 leaves: later checkpoints, the adapter and the evaluation do not exist."""
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoints / "6")
    run.evaluation.unlink()


def sizes(run: RunDir) -> list[tuple[object, ...]]:
    """Which steps there were, and what was in them."""
    names = ("step", "num_tokens", "num_supervised_tokens")
    return [tuple(record[name] for name in names) for record in run.read_metrics() if "loss" in record]


@pytest.fixture(scope="module")
def one(tiny_model: Path, chat_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The run of one process."""
    return train(recipe_maker(tiny_model, chat_files, tmp_path_factory.mktemp("one"))(**SETTINGS)).run


@pytest.mark.parametrize("number", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_take_the_steps_of_one(
    tiny_recipe: MakeRecipe, one: RunDir, tmp_path: Path, number: int
) -> None:
    run = trained(number, tiny_recipe(**SETTINGS), tmp_path)
    assert_same(one, run, tolerance=1e-5)
    assert sizes(run) == sizes(one)
    measured, expected = read_json(run.evaluation), read_json(one.evaluation)
    for name in ("base", "tuned"):
        assert measured[name]["nll"] == pytest.approx(expected[name]["nll"], abs=1e-5)
    assert read_json(run.plan)["num_processes"] == number
    assert read_json(run.lock)["machine"]["processes"] == number
    assert run.is_complete
    lose_the_end(run)
    assert_same(one, resume(run.root).run, tolerance=1e-5)  # in one process: the same examples in the same order
    assert sizes(run) == sizes(one)


@pytest.mark.slow
def test_with_dropout_a_resumed_run_of_two_is_the_uninterrupted_one_to_the_bit(
    tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    run = trained(2, tiny_recipe(**{**SETTINGS, "lora__dropout": 0.1}), tmp_path)
    whole = RunDir(tmp_path / "whole")
    shutil.copytree(run.root, whole.root)
    lose_the_end(run)
    done = command([sys.executable, "-m", "loratune", "resume", run.root, "--processes", 2, "--json"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == str(run.root)
    assert "resuming after step 4" in done.stderr
    assert_same(whole, run, tolerance=0)


@pytest.mark.slow
def test_streamed_rows_are_shared_too(tiny_recipe: MakeRecipe, one: RunDir, tmp_path: Path) -> None:
    run = trained(2, tiny_recipe(**SETTINGS, data__streaming=True), tmp_path)
    assert_same(one, run, tolerance=1e-5)
    assert sizes(run) == sizes(one)


@pytest.mark.slow
def test_losses_of_sources_are_added_up_too(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    settings = {**SETTINGS, "data__train": sources(tmp_path), "evaluate__metric": "none"}
    alone = train(tiny_recipe(**settings)).run
    run = trained(2, tiny_recipe(**settings), tmp_path)
    assert_same(alone, run, tolerance=1e-5)
    expected = [record["loss_by_source"] for record in alone.read_metrics() if "loss" in record]
    found = [record["loss_by_source"] for record in run.read_metrics() if "loss" in record]
    assert len(found) == len(expected) == 6
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


@contextmanager
def started(arguments: Sequence[object]) -> Iterator[subprocess.Popen[str]]:
    """A command that goes on while the test does, and not longer."""
    with subprocess.Popen(
        list(map(str, arguments)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()


def wait_for(condition: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < WAIT_SECONDS
        time.sleep(0.002)


def process_of(torchrun: int, rank: int) -> psutil.Process:
    found = [p for p in psutil.Process(torchrun).children() if p.environ().get("RANK") == str(rank)]
    assert len(found) == 1
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 0])
def test_a_killed_process_is_started_again_and_no_example_is_lost_or_seen_twice(
    tiny_recipe: MakeRecipe, one: RunDir, tmp_path: Path, rank: int
) -> None:
    file, run = write_recipe(tiny_recipe(**SETTINGS), tmp_path, "killed")
    options = ["--nproc-per-node=2", "--max-restarts=1", "-m", "loratune", "train", file]
    with started([*TORCHRUN, *options]) as process:
        wait_for((run.checkpoints / "2").is_dir)
        process_of(process.pid, rank).send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 0, output
    assert "resuming after step" in output
    assert_same(one, run, tolerance=1e-5)
    assert sizes(run) == sizes(one)


@pytest.mark.slow
def test_sigterm_stops_all_processes_in_order(tiny_recipe: MakeRecipe, one: RunDir, tmp_path: Path) -> None:
    file, run = write_recipe(tiny_recipe(**SETTINGS), tmp_path, "stopped")
    with started([sys.executable, "-m", "loratune", "train", file, "--processes=2"]) as process:
        wait_for((run.checkpoints / "2").is_dir)
        process.terminate()
        output, _ = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 143, output
    assert output.count("Terminated") == 1, output
    assert "(checkpoint saved)" in output
    assert_same(one, resume(run.root).run, tolerance=1e-5)


@pytest.mark.slow
def test_an_error_of_all_processes_is_told_once(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    file, _ = write_recipe(tiny_recipe(train__engine="trl"), tmp_path, "refused")
    done = command([sys.executable, "-m", "loratune", "train", file, "--processes", 2])
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("trains in one process here") == 1
    done = command([*TORCHRUN, "--nproc-per-node=2", "-m", "loratune", "plan", file])
    assert done.stderr.count("this command runs in one process") == 1


@contextmanager
def agent(port: int, file: Path, *, is_host: bool) -> Iterator[subprocess.Popen[str]]:
    """One of the torchruns of a run on one or two machines, with one process."""
    meeting = [f"--rdzv-endpoint=localhost:{port}", "--rdzv-backend=c10d", f"--rdzv-id={file.stem}"]
    settings = f"--rdzv-conf=last_call_timeout=2,is_host={int(is_host)}"
    elastic = ["--nnodes=1:2", "--max-restarts=3", settings, *meeting]
    with started([*TORCHRUN, *elastic, "--nproc-per-node=1", "-m", "loratune", "train", file]) as process:
        yield process


@pytest.mark.slow
@pytest.mark.parametrize("change", ["leaves", "joins"])
def test_a_run_goes_on_with_fewer_or_more_machines(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # or torchrun 2.13 never lets one join
    settings = {**SETTINGS, "train__epochs": 40, "train__save_every": 10, "train__eval_every": "never"}
    expected = train(tiny_recipe(**settings, train__output_dir=str(tmp_path / "expected"))).run
    file, run = write_recipe(tiny_recipe(**settings), tmp_path, change)
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    with agent(port, file, is_host=True) as first:
        if change == "leaves":
            with agent(port, file, is_host=False) as second:
                wait_for((run.checkpoints / "10").is_dir)
                for process in (*psutil.Process(second.pid).children(), psutil.Process(second.pid)):
                    process.kill()
                output, _ = first.communicate(timeout=WAIT_SECONDS)
        else:
            wait_for((run.checkpoints / "10").is_dir)
            with agent(port, file, is_host=False) as second:
                output, _ = first.communicate(timeout=WAIT_SECONDS)
                second.communicate(timeout=WAIT_SECONDS)
    assert first.returncode == 0, output
    assert "resuming after step" in output
    assert read_json(run.plan)["num_processes"] == (2 if change == "leaves" else 1), "it was begun so"
    assert sizes(run) == sizes(expected)
    assert_same(expected, run, tolerance=1e-3)  # 120 steps of float noise


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        # AdamW's first step is the sign of a gradient. With this seed, rounding decides one of them, which then moves
        # by 2 × the learning rate; without AdamW the runs are the same to 1e-6.
        {"lora__variant": "pissa", "train__optimizer": "sgd", "train__learning_rate": 0.1},
        {"lora__variant": "eva"},
        {"lora__modules_to_save": ["lm_head", "norm"], "train__learning_rate": 1e-3},
    ],
    ids=["pissa", "eva", "whole"],
)
def test_so_they_do_with(tiny_recipe: MakeRecipe, tmp_path: Path, settings: dict[str, object]) -> None:
    settings = {**SETTINGS, **settings}
    alone = train(tiny_recipe(**settings, train__output_dir=str(tmp_path / "alone"))).run
    file, run = write_recipe(tiny_recipe(**settings), tmp_path, "two")
    done = command([*TORCHRUN, "--nproc-per-node=2", "-m", "loratune", "train", file])
    assert done.returncode == 0, done.stderr
    assert_same(alone, run, tolerance=1e-5)
    assert sizes(run) == sizes(alone)
    measured, expected = read_json(run.evaluation), read_json(alone.evaluation)
    assert measured["tuned"]["nll"] == pytest.approx(expected["tuned"]["nll"], abs=1e-5)
