"""Kill a training process again and again, let `resume` go on each time, and compare with a run that was left alone.

    python benchmarks/kill.py recipes/quickstart.yaml --kills 20
    python benchmarks/kill.py RECIPE train.save_every=2 train.eval_every=3 lora.dropout=0.1 --kills 20 --seed 1

Each process is killed by SIGKILL at a moment that the seed chooses: some time after its start, after some steps, while
a checkpoint is written, or once the adapter is written. A run that finishes is compared with the one that was left
alone (losses, gradient norms, learning rates and held-out losses in metrics.jsonl, the bytes of the adapter,
evaluation.json), and the next one starts, until the wanted number of kills is reached. Exit code 0: no difference.

`--forked` imports everything once and forks a child for each start, which is as real to the run directory and ten times
as quick; it needs a CPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import yaml

from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir

COMPARED = ("step", "loss", "grad_norm", "learning_rate", "eval_nll")
POLL_SECONDS = 0.002
"""How often the run directory is looked at: a checkpoint of a tiny model is written in a few milliseconds."""


class Child:
    """A process that trains or resumes, its output in a file."""

    def __init__(self, run: RunDir, recipe: Path, log: Path, *, forked: bool) -> None:
        self.log = log
        verb, what = ("resume", run.root) if run.lock.is_file() else ("train", recipe)
        self.verb = verb
        self._code: int | None = None
        if not forked:
            with log.open("wb") as out:
                command = [sys.executable, "-m", "loratune", verb, str(what)]
                self.pid = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT).pid
            return
        self.pid = os.fork()
        if self.pid == 0:
            _work(verb, what, log)

    def ended(self) -> int | None:
        """Its exit code; None while it lives."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def kill(self) -> int:
        """SIGKILL, and the exit code: that of the signal, if it was not too late."""
        if self._code is None:
            os.kill(self.pid, signal.SIGKILL)
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code


def _work(verb: str, what: Path, log: Path) -> None:
    """In the child: do it, and end without coming back."""
    code = 1
    try:
        with log.open("w", encoding="utf-8") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        from loratune.cli.terminal import TerminalProgress
        from loratune.workflows.resume import resume
        from loratune.workflows.train import train

        if verb == "train":
            train(Recipe.load(what), progress=TerminalProgress())
        else:
            resume(what, progress=TerminalProgress())
        code = 0
    except BaseException:  # noqa: BLE001 - also SystemExit must not go on in the parent's code
        traceback.print_exc()
    finally:
        os._exit(code)


def moment(draw: random.Random, run: RunDir, *, start_seconds: float, num_steps: int) -> tuple[str, Callable[[], bool]]:
    """What to wait for, in words, and whether it has come."""
    began = time.monotonic()
    done = num_lines(run)
    kinds = ["time", "steps", "steps", "saving", "saving"] + ["end", "end"] * (done > num_steps * 0.6)
    kind = draw.choice(kinds)
    delay = draw.random() * 0.05
    if kind == "time":
        seconds = draw.uniform(0, 1.5 * start_seconds)
        return f"{seconds:.2f} s after its start", lambda: time.monotonic() - began > seconds
    if kind == "steps":
        more = draw.randint(1, max(1, num_steps // 5))
        return f"{more} steps on, {delay:.3f} s later", _later(lambda: num_lines(run) >= done + more, delay)
    if kind == "saving":
        skip = draw.randint(0, 2)
        seen: set[str] = set()

        def saving() -> bool:
            seen.update(path.name for path in run.checkpoints.glob(".*.tmp"))
            return len(seen) > skip

        delay = delay * draw.choice([0, 0.02, 0.2])
        return f"in a save, {delay:.4f} s later", _later(saving, delay)
    seconds = draw.uniform(0, start_seconds / 4)
    return f"{seconds:.2f} s after the adapter", _later(run.adapter.exists, seconds)


def _later(condition: Callable[[], bool], seconds: float) -> Callable[[], bool]:
    came: list[float] = []

    def check() -> bool:
        if not came and condition():
            came.append(time.monotonic())
        return bool(came) and time.monotonic() - came[0] >= seconds

    return check


def num_lines(run: RunDir) -> int:
    """Lines in metrics.jsonl, a half one included."""
    return len(run.metrics.read_bytes().splitlines()) if run.metrics.is_file() else 0


def where(run: RunDir) -> str:
    """What the run directory says about the moment."""
    if run.evaluation.is_file():
        return "after the evaluation"
    if run.adapter.exists():
        return "between adapter and evaluation"
    leftovers = [path.name for path in (*run.root.glob(".*.tmp"), *run.checkpoints.glob(".*.tmp"))]
    steps = [record["step"] for record in run.read_metrics()]
    if not run.lock.is_file():
        return "before the run began"
    return f"after step {steps[-1] if steps else 0}{', leaving ' + ', '.join(leftovers) if leftovers else ''}"


def trace(run: RunDir) -> list[tuple[object, ...]]:
    """What has to be the same, line by line."""
    return [tuple(record.get(name) for name in COMPARED) for record in run.read_metrics()]


def differences(run: RunDir, whole: RunDir) -> list[str]:
    """What is not the same."""
    found = []
    if trace(run) != trace(whole):
        first = next((a for a, b in itertools.zip_longest(trace(run), trace(whole)) if a != b), None)
        found.append(f"metrics.jsonl, first at {first}")
    weights = "adapter_model.safetensors"
    if (run.adapter / weights).read_bytes() != (whole.adapter / weights).read_bytes():
        found.append("adapter")
    if whole.evaluation.is_file() and run.evaluation.read_bytes() != whole.evaluation.read_bytes():
        found.append("evaluation.json")
    left = [str(path) for path in run.root.rglob(".*.tmp")]
    return found + ([f"left behind: {', '.join(left)}"] if left else [])


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="where the runs go; a temporary one by default")
    parser.add_argument("--forked", action="store_true")
    options = parser.parse_args(arguments)
    recipe = Recipe.load(options.recipe, options.settings)
    if options.forked:
        import torch

        from loratune.workflows.train import train  # noqa: F401 - for the children

        torch.set_num_threads(1)  # threads do not survive a fork
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        return harness(recipe, folder, kills=options.kills, seed=options.seed, forked=options.forked)


def harness(recipe: Recipe, folder: Path, *, kills: int, seed: int, forked: bool) -> int:
    """The whole of it."""
    draw = random.Random(seed)

    def prepare(name: str) -> tuple[RunDir, Path]:
        file = folder / f"{name}.yaml"
        values = recipe.model_dump(mode="json", exclude_unset=True)
        values.setdefault("train", {})["output_dir"] = str(folder / name)
        file.write_text(yaml.safe_dump(values), encoding="utf-8")
        return RunDir(folder / name), file

    whole, file = prepare("whole")
    started, start_seconds = time.monotonic(), 0.0
    child = Child(whole, file, folder / "whole.log", forked=forked)
    while child.ended() is None:
        if not start_seconds and whole.metrics.is_file():
            start_seconds = time.monotonic() - started
        time.sleep(POLL_SECONDS)
    if child.ended():
        print(child.log.read_text(encoding="utf-8"), file=sys.stderr)
        return 1
    # What `auto` became must be the same in all runs; on a machine that others use it might not.
    recipe = Recipe.parse(json.loads(whole.lock.read_text(encoding="utf-8"))["recipe"])
    num_steps = json.loads(whole.plan.read_text(encoding="utf-8"))["time"]["num_steps"]
    print(f"left alone: {num_steps} steps in {time.monotonic() - started:.1f} s, the first after {start_seconds:.1f} s")
    killed, bad = 0, 0
    for number in itertools.count(1):
        run, file = prepare(f"round-{number}")
        killed = _one_run(run, file, draw, killed, kills, start_seconds, num_steps, forked=forked)
        found = differences(run, whole) if run.is_complete else ["the run failed"]
        bad += bool(found)
        seconds = json.loads(run.plan.read_text(encoding="utf-8")).get("measured", {}).get("train_seconds", 0)
        print(f"round {number}: {'DIFFERENT: ' + '; '.join(found) if found else 'the same to the bit'}; "
              f"{seconds:.1f} s in steps", flush=True)  # fmt: skip
        if killed >= kills or bad:
            break
    print(f"{killed} kills in {number} runs: {'NOT the same' if bad else 'the same adapter and losses, to the bit'}")
    return 1 if bad else 0


def _one_run(
    run: RunDir,
    file: Path,
    draw: random.Random,
    killed: int,
    kills: int,
    start_seconds: float,
    num_steps: int,
    *,
    forked: bool,
) -> int:
    """Start and kill until the run is done; returns the number of kills."""
    for sitting in itertools.count(1):
        child = Child(run, file, file.with_suffix(f".{sitting}.log"), forked=forked)
        words, has_come = moment(draw, run, start_seconds=start_seconds, num_steps=num_steps)
        began = time.monotonic()
        while child.ended() is None and (killed >= kills or not has_come()):
            time.sleep(POLL_SECONDS)
        code = child.ended() if killed >= kills else child.kill()
        if code == -signal.SIGKILL:
            killed += 1
            print(f"kill {killed:2}: {child.verb}, {words}: {time.monotonic() - began:.2f} s, {where(run)}", flush=True)
            continue
        if code:
            print(child.log.read_text(encoding="utf-8"), file=sys.stderr)
        return killed
    raise AssertionError


if __name__ == "__main__":
    raise SystemExit(main())
