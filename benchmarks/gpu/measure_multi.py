"""Several GPUs, or several processes of a CPU: the links, runs beside the run of one process, and a lost process.

python measure_multi.py alone RECIPE | equal RECIPE RUN… | lost RECIPE, and under torchrun: links
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from typing import Any

import psutil
import torch
import yaml
from measure_common import BIG, DEVICE, ON_GPU, SMALL, WORK, attempt, milliseconds, recipe, record, write_model

from loratune.run import processes
from loratune.run.directory import RunDir
from loratune.workflows.train import train

PROCESSES = int(os.environ["PROCESSES"])
WARM_UP = 2
"""Steps that compile and fill caches."""


def links() -> None:
    """Add up numbers over all processes, as a step does with its gradients."""
    processes.start()
    sizes = (1, 2**18, 2**22, 2**26) if ON_GPU else (1, 2**12)
    for numbers in sizes:
        bucket = torch.ones(numbers, device=DEVICE)

        def work(bucket: torch.Tensor = bucket, numbers: int = numbers) -> None:
            processes.all_reduce_sum(bucket)
            right = bool((bucket == processes.size()).all())
            spent = milliseconds(lambda: processes.all_reduce_sum(bucket), runs=10) / 1e3
            if processes.is_main():
                record(what=f"sum of {numbers:,} numbers over {processes.size()} processes", ok=right)
                record(all_reduce_bytes=4 * numbers, processes=processes.size(), seconds=spent)

        attempt(f"sum of {numbers:,} numbers", work)


def alone(name: str) -> None:
    """Write a model, rows and a recipe for the steps that follow, and train as one process."""
    big = name == "big"
    model = write_model("big", "qwen2", BIG, torch.bfloat16) if big else small_model()
    steps = {"tokens": 4096 if ON_GPU else 256, "batch": 8 * PROCESSES if ON_GPU else 4, "steps": 6}
    settings: dict[str, Any] = {"compile": ON_GPU, "recompute": 0} if big else {"compile": False, "token_budget": 600}
    if not big:
        steps = {"tokens": 384, "batch": 4 * PROCESSES, "steps": 5}
    sections = {"model": {"dtype": "bfloat16" if big else "float32"}, "lora": {"targets": "complete"}}
    wanted = recipe(name, model, ragged=not big, **steps, **sections, train=settings)
    values = wanted.model_dump(mode="json", exclude_unset=True)
    (WORK / f"{name}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    train(wanted, overwrite=True)


def small_model() -> Any:
    return write_model("small-qwen2-float32", "qwen2", SMALL, torch.float32)


def equal(name: str, *others: str) -> None:
    """Compare the losses of runs with those of the run of one process, and their speed."""
    expected = steps_of(name)
    single = speed_of(expected)
    for other in others:

        def work(other: str = other) -> None:
            found = steps_of(other)
            apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(found, expected, strict=True))
            record(what=f"{other} = one process", ok=apart < (0.05 if name == "big" else 1e-4), errors=[apart])
            speed = speed_of(found)
            record(together=other, processes=PROCESSES, tokens_per_second=speed, times_one_process=speed / single)

        attempt(f"{other} = one process", work)


def steps_of(name: str) -> list[dict[str, Any]]:
    return [line for line in RunDir.open(WORK / "runs" / name).read_metrics() if "loss" in line]


def speed_of(steps: list[dict[str, Any]]) -> float:
    return statistics.median(step["tokens_per_second"] for step in steps[WARM_UP:])


def lost(name: str) -> None:
    """Kill the last process of a run after its first step: the others must end, with an error that says why."""
    run = RunDir(WORK / "runs" / "lost")
    arguments = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}", "-m", "loratune"]
    arguments += ["train", str(WORK / f"{name}.yaml"), f"train.output_dir={run.root}", "train.epochs=50", "--overwrite"]
    launched = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        while not (run.metrics.is_file() and "loss" in run.metrics.read_text(encoding="utf-8")):
            if launched.poll() is not None:
                raise RuntimeError(f"the run ended before its first step: {launched.communicate()[0][-500:]}")
            time.sleep(0.1)
        workers = [child for child in psutil.Process(launched.pid).children() if "loratune" in child.cmdline()]
        workers[-1].kill()
        killed = time.perf_counter()
        said, _ = launched.communicate(timeout=80)
        waited = time.perf_counter() - killed
    finally:
        launched.kill()
    left = [worker.pid for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]
    ok = launched.returncode != 0 and not left
    record(
        what="all processes end when one is killed", ok=ok, seconds=waited, exit=launched.returncode, end=said[-800:]
    )


if __name__ == "__main__":
    WORK.mkdir(exist_ok=True)
    {"links": links, "alone": alone, "equal": equal, "lost": lost}[sys.argv[1]](*sys.argv[2:])
