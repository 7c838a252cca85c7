"""The example jobs: parsed, and their commands run with recorders in the place of what a cluster would run."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from torch.distributed.run import parse_args

from loratune.__main__ import app
from loratune.recipe.recipe import Recipe

ROOT = Path(__file__).parents[1]
JOBS = ROOT / "examples" / "jobs"
RECIPE = "recipes/chat.yaml"

RECORD = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["RECORDED"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""
SRUN = "os.execvp(sys.argv[1], sys.argv[1:])\n"
SCONTROL = 'print("node-a\\nnode-b") if sys.argv[1:3] == ["show", "hostnames"] else sys.exit(1)\n'

Job = Callable[..., list[list[str]]]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout without a virtual environment, and recorders in its `bin`."""
    folder = tmp_path / "checkout"
    programs = folder / "bin"
    programs.mkdir(parents=True)
    (folder / "recipes").symlink_to(ROOT / "recipes")
    for name, more in {"torchrun": "", "make": "", "python": "", "srun": SRUN, "scontrol": SCONTROL}.items():
        (programs / name).write_text(RECORD + more)
        (programs / name).chmod(0o755)
    return folder


@pytest.fixture
def run_job(checkout: Path) -> Job:
    """Run a script in the checkout; what was called, program first."""

    def run(script: str, **variables: str) -> list[list[str]]:
        recorded = checkout / "recorded"
        recorded.write_text("")
        environment = {"PATH": f"{checkout / 'bin'}:/usr/bin:/bin", "RECORDED": str(recorded), **variables}
        done = subprocess.run(
            ["bash", "-c", script], cwd=checkout, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in recorded.read_text().splitlines()]

    return run


def launched(calls: list[list[str]]) -> Any:
    """What torchrun was asked for, read by torchrun's own parser."""
    (arguments,) = [call[1:] for call in calls if call[0] == "torchrun"]
    parsed = parse_args(arguments)
    assert parsed.module
    assert parsed.training_script == "loratune"
    return parsed


def check_trains(arguments: list[str], run: str, *, processes: int) -> None:
    """These arguments train a recipe of ours, whose steps feed all processes."""
    verb, *rest = arguments
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    given = command.make_context(verb, rest).params
    assert verb == "train"
    recipe = Recipe.load(ROOT / given["recipe"], given["overrides"])
    assert recipe.train.output_dir == run
    assert recipe.train.batch_size >= processes


def check_resumes(arguments: list[str], run: str) -> None:
    """These arguments go on with that run."""
    verb, *rest = arguments
    assert verb == "resume"
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    assert command.make_context(verb, rest).params["run"] == Path(run)


def begun(folder: Path) -> str:
    """A run directory that a job left."""
    folder.mkdir(parents=True)
    (folder / "lock.json").write_text("{}")
    return str(folder)


@pytest.mark.parametrize("name", ["slurm.sh", "ray.sh"])
def test_scripts_are_bash(name: str) -> None:
    subprocess.run(["bash", "-n", JOBS / name], check=True)
    assert os.access(JOBS / name, os.X_OK)


SLURM = {
    "SLURM_JOB_ID": "71",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "node-[a-b]",
    "SLURM_GPUS_ON_NODE": "8",
}


def test_slurm_starts_one_torchrun_a_node_and_goes_on_under_the_same_number(run_job: Job, checkout: Path) -> None:
    script = (JOBS / "slurm.sh").read_text()
    slurm = {**SLURM, "SLURM_SUBMIT_DIR": str(checkout)}
    calls = run_job(script, **slurm)
    assert ["scontrol", "show", "hostnames", "node-[a-b]"] in calls
    assert [call[0] for call in calls if call[0] != "scontrol"] == ["srun", "torchrun"]
    torchrun = launched(calls)
    assert (torchrun.nnodes, torchrun.nproc_per_node, torchrun.rdzv_id) == ("2", "8", "71")
    assert (torchrun.rdzv_backend, torchrun.rdzv_endpoint) == ("c10d", "node-a:29500")
    run = str(checkout / "__models" / "slurm-71")
    check_trains(torchrun.training_script_args, run, processes=16)

    begun(Path(run))
    check_resumes(launched(run_job(script, **slurm)).training_script_args, run)


def test_slurm_options_are_those_of_one_task_a_node() -> None:
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", (JOBS / "slurm.sh").read_text(), flags=re.MULTILINE))
    assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == ("2", "1", "8")
    assert "requeue" in options


def test_skypilot_runs_on_every_node_with_its_rank(run_job: Job, checkout: Path) -> None:
    task = yaml.safe_load((JOBS / "skypilot.yaml").read_text())
    assert set(task) == {"name", "resources", "num_nodes", "workdir", "envs", "setup", "run"}
    kind, number = task["resources"]["accelerators"].split(":")
    assert (kind, number, task["num_nodes"], task["workdir"]) == ("H100", "8", 1, ".")
    assert run_job(task["setup"]) == [["make", ".venv/.installed"]]
    sky = {
        **task["envs"],
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_GPUS_PER_NODE": number,
    }
    torchrun = launched(run_job(task["run"], **sky))
    assert (torchrun.nnodes, torchrun.node_rank, torchrun.nproc_per_node) == ("2", 1, "8")
    assert (torchrun.master_addr, torchrun.master_port) == ("10.0.0.1", 29500)
    check_trains(torchrun.training_script_args, task["envs"]["RUN"], processes=8)

    run = begun(checkout / "runs" / "mine")
    check_resumes(launched(run_job(task["run"], **{**sky, "RUN": run})).training_script_args, run)


def test_kubernetes_pods_find_the_first_by_the_service(run_job: Job, checkout: Path) -> None:
    service, job = yaml.safe_load_all((JOBS / "kubernetes.yaml").read_text())
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert (service["kind"], service["spec"]["clusterIP"]) == ("Service", "None")
    assert service["spec"]["selector"] == {"job-name": name}
    assert (job["apiVersion"], job["kind"], spec["completionMode"]) == ("batch/v1", "Job", "Indexed")
    assert pod["subdomain"] == service["metadata"]["name"]
    assert pod["restartPolicy"] == "Never"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}

    variables = {item["name"]: item["value"] for item in container["env"]}
    assert int(variables["NODES"]) == spec["completions"] == spec["parallelism"]
    assert int(variables["GPUS"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    bash, option, script = container["command"]
    assert (bash, option) == ("bash", "-c")
    calls = run_job(script, **variables, JOB_COMPLETION_INDEX="1")
    assert calls[0] == ["python", "-m", "pip", "install", "--quiet", "--constraint", "constraints.txt", "."]
    torchrun = launched(calls)
    assert (torchrun.nnodes, torchrun.node_rank, torchrun.nproc_per_node) == ("2", 1, "8")
    assert torchrun.master_addr == f"{name}-0.{pod['subdomain']}"
    check_trains(torchrun.training_script_args, variables["RUN"], processes=16)

    variables["RUN"] = begun(checkout / "runs" / "mine")
    again = launched(run_job(script, **variables, JOB_COMPLETION_INDEX="0"))
    assert again.node_rank == 0
    check_resumes(again.training_script_args, variables["RUN"])


def test_ray_starts_torchrun_on_the_node_that_it_picks(run_job: Job, checkout: Path) -> None:
    script = (JOBS / "ray.sh").read_text()
    (submit,) = re.findall(r"^# +(ray job submit .*)$", script, flags=re.MULTILINE)
    words = shlex.split(submit)
    assert words[words.index("--entrypoint-num-gpus") + 1] == "8"
    assert (ROOT / words[-1]) == JOBS / "ray.sh"
    calls = run_job(script, RUN="/shared/runs/mine")
    assert calls[0] == ["make", ".venv/.installed"]
    torchrun = launched(calls)
    assert (torchrun.standalone, torchrun.nproc_per_node) == (True, "8")
    check_trains(torchrun.training_script_args, "/shared/runs/mine", processes=8)

    run = begun(checkout / "runs" / "mine")
    check_resumes(launched(run_job(script, RUN=run)).training_script_args, run)


def test_the_recipe_of_the_jobs_is_there() -> None:
    for path in JOBS.iterdir():
        assert RECIPE in path.read_text(), path.name
    assert (ROOT / RECIPE).is_file()


@pytest.mark.slow
def test_the_slurm_script_trains_with_the_real_torchrun(
    tiny_model: Path, chat_files: tuple[Path, Path], checkout: Path
) -> None:
    for name in ("torchrun", "python"):
        (checkout / "bin" / name).unlink()
        (checkout / "bin" / name).symlink_to(Path(sys.executable).parent / name)
    (checkout / "bin" / "scontrol").write_text("#!/bin/bash\necho localhost\n")
    recipe = checkout / "tiny.yaml"
    recipe.write_text(
        f"model:\n  name: {tiny_model}\n  dtype: float32\ndata:\n  train: {chat_files[0]}\n  eval: {chat_files[1]}\n"
        "train:\n  epochs: 1\n  device: cpu\n  batch_size: 4\nevaluate:\n  samples: 0\n"
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    slurm = {**SLURM, "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_SUBMIT_DIR": str(checkout)}
    own = {"PATH": f"{checkout / 'bin'}:{os.environ['PATH']}", "RECORDED": str(checkout / "recorded"), "PORT": port}
    environment = {**os.environ, **slurm, **own, "RECIPE": "tiny.yaml", "OMP_NUM_THREADS": "1"}
    script = ["bash", str(JOBS / "slurm.sh")]

    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run = checkout / "__models" / "slurm-71"
    assert json.loads((run / "plan.json").read_text())["num_processes"] == 2
    assert (run / "adapter" / "adapter_model.safetensors").is_file()

    again = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode != 0
    assert "the run is finished" in again.stderr, "it was resumed, not trained anew"
