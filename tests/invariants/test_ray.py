"""Ray as the launcher: a real cluster of this machine, against the plain run of two processes."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[train]'")
from ray.cluster_utils import Cluster

from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir, read_json
from loratune.workflows.resume import resume
from tests.conftest import recipe_maker
from tests.invariants.test_processes import (
    SETTINGS,
    WAIT_SECONDS,
    command,
    sizes,
    started,
    trained,
    wait_for,
    write_recipe,
)
from tests.invariants.test_same_mathematics import assert_same

pytestmark = pytest.mark.slow  # a cluster takes 10 s to start on two cores

MakeRecipe = Callable[..., Recipe]
RAY = ["--engine", "ray", "--workers", 2]


@pytest.fixture(scope="module")
def two(tiny_model: Path, chat_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The plain run of two processes."""
    folder = tmp_path_factory.mktemp("two")
    return trained(2, recipe_maker(tiny_model, chat_files, folder)(**SETTINGS), folder)


def workers_of(driver: int) -> list[psutil.Process]:
    return [p for p in psutil.Process(driver).children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]


def is_at_work_on(run: RunDir, process: psutil.Process) -> bool:
    """Whether it is the worker that holds the run directory, which is the first one."""
    return any(Path(file.path) == run.root / ".in_use" for file in process.open_files())


def test_two_workers_of_ray_are_two_processes(
    tiny_recipe: MakeRecipe, two: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = tmp_path / "heard"
    monkeypatch.setenv("RAY_HEARD", str(heard))
    monkeypatch.setenv("RAY_TRAIN_CALLBACKS", "tests.invariants.ray_listener.Listener")
    file, run = write_recipe(tiny_recipe(**SETTINGS), tmp_path, "ray-run")
    done = command(
        [sys.executable, "-m", "loratune", "train", file, *RAY, "--json", "--storage", (tmp_path / "records").as_uri()]
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == str(run.root), "and nothing of Ray's"
    assert "pid=" not in done.stderr, "nor in what is told"
    assert done.stderr.count("loading ") == 1
    heard_of = [json.loads(line) for line in heard.read_text().splitlines()]
    reports = [report for report in heard_of if "loss" in report[0]]
    steps = [record for record in run.read_metrics() if "loss" in record]
    assert [[each["loss"] for each in report] for report in reports] == [[step["loss"]] * 2 for step in steps]
    assert_same(two, run, tolerance=1e-5)
    assert sizes(run) == sizes(two)
    assert read_json(run.plan)["num_processes"] == 2
    assert run.is_complete
    copies = sorted((tmp_path / "records").glob("ray-run-*/checkpoint_*/adapter_model.safetensors"))
    assert [file.read_bytes() for file in copies] == [
        (run.checkpoints / str(step) / "adapter_model.safetensors").read_bytes() for step in (2, 4, 6)
    ]


@pytest.mark.parametrize("first", [False, True])
def test_a_killed_worker_is_started_again_and_no_example_is_lost_or_seen_twice(
    tiny_recipe: MakeRecipe, two: RunDir, tmp_path: Path, first: bool
) -> None:
    file, run = write_recipe(tiny_recipe(**SETTINGS), tmp_path, "killed")
    with started([sys.executable, "-m", "loratune", "train", file, *RAY, "--max-failures=1"]) as process:
        wait_for((run.checkpoints / "2").is_dir)
        workers = workers_of(process.pid)
        assert len(workers) == 2
        (victim,) = [worker for worker in workers if is_at_work_on(run, worker) == first]
        victim.kill()
        output, _ = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 0, output
    assert "resuming after step" in output
    assert_same(two, run, tolerance=1e-5)
    assert sizes(run) == sizes(two)


def test_a_lost_worker_is_told_where_none_may_fail(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    file, run = write_recipe(tiny_recipe(**SETTINGS), tmp_path, "lost")
    with started([sys.executable, "-m", "loratune", "train", file, *RAY]) as process:
        wait_for((run.checkpoints / "2").is_dir)
        workers_of(process.pid)[1].kill()
        output, _ = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 1, output
    assert output.count("workers were lost") == 1, output
    assert "Traceback" not in output


def test_an_error_of_all_workers_is_told_once_with_its_exit_code(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    file, _ = write_recipe(tiny_recipe(train__engine="trl"), tmp_path, "refused")
    done = command([sys.executable, "-m", "loratune", "train", file, *RAY, "--max-failures", 2])
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("trains in one process here") == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_a_storage_that_is_none_is_told_without_a_traceback(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    file, _ = write_recipe(tiny_recipe(**SETTINGS), tmp_path, "nowhere")
    done = command([sys.executable, "-m", "loratune", "train", file, *RAY, "--storage", "nosuch://bucket"])
    assert done.returncode == 2, done.stderr
    assert "--storage nosuch://bucket" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_keeps_its_exit_code_and_leaves_no_worker(
    tiny_recipe: MakeRecipe, two: RunDir, tmp_path: Path, number: int, exit_code: int
) -> None:
    file, run = write_recipe(tiny_recipe(**SETTINGS), tmp_path, "stopped")
    with started([sys.executable, "-m", "loratune", "train", file, *RAY]) as process:
        wait_for((run.checkpoints / "2").is_dir)
        workers = workers_of(process.pid)
        process.send_signal(number)
        output, _ = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == exit_code, output
    assert output.count("loratune resume") == 1, output
    wait_for(lambda: not any(worker.is_running() for worker in workers))
    assert_same(two, resume(run.root).run, tolerance=1e-5)


def test_a_cluster_that_loses_a_node_goes_on_with_another(tiny_recipe: MakeRecipe, two: RunDir, tmp_path: Path) -> None:
    """Nodes of one machine, each with one core, so that each has one worker."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        lost = cluster.add_node(num_cpus=1)
        file, run = write_recipe(tiny_recipe(**SETTINGS), tmp_path, "nodes")
        options = [*RAY, "--max-failures=1", "--address", cluster.address]
        with started([sys.executable, "-m", "loratune", "train", file, *options]) as process:
            wait_for((run.checkpoints / "2").is_dir)
            cluster.add_node(num_cpus=1)
            cluster.remove_node(lost, allow_graceful=False)
            output, _ = process.communicate(timeout=WAIT_SECONDS)
    finally:
        cluster.shutdown()
    assert process.returncode == 0, output
    assert "resuming after step" in output
    assert_same(two, run, tolerance=1e-5)
    assert sizes(run) == sizes(two)
