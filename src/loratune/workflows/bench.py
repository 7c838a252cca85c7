"""`loratune bench`: the fast engine against stock TRL on one recipe, in alternating runs, each in its own process.

Each is an ordinary run of a few steps without evaluation and checkpoints; the numbers come from its run directory. The
two engines see the same examples in the same order, so their losses must agree.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from datasets import Dataset as HubDataset
from rich.table import Table

from loratune.data.prepare import prepare_data
from loratune.data.rows.reading import Reader
from loratune.data.steps import epochs_of, num_steps_per_epoch
from loratune.model.device import torch_dtype
from loratune.model.load import load_config
from loratune.planning.parameters import skeleton
from loratune.planning.prepare import prepare
from loratune.planning.speed import matmul_rate_of
from loratune.recipe.recipe import Recipe, as_recipe
from loratune.recipe.tasks import require_text
from loratune.run.directory import Record, RunDir, read_json
from loratune.run.errors import RecipeError, RunError
from loratune.run.progress import NO_PROGRESS, NoProgress, Progress
from loratune.training.trl_dataset import trl_preparation_seconds

if TYPE_CHECKING:
    from loratune.planning.preparation import Preparation

WARM_UP = 2
"""Steps at the start of a run that are not counted, because they compile and fill caches."""

ENGINES = ("fast", "trl")


def bench(recipe: Recipe | str | Path, *, rounds: int = 2, steps: int = 8, progress: Progress = NO_PROGRESS) -> Record:
    """Run both engines in alternation and compare them.

    Args:
        recipe: The recipe, or its file; evaluation, checkpoints and number of steps are set by the benchmark.
        rounds: Number of runs of each engine; the engine that runs first alternates.
        steps: Optimizer steps per run, of which the first two are not counted.
        progress: Receives one line per run.

    Returns:
        Per engine the median tokens/s, peak bytes, seconds to the first step, rows/s prepared and losses; the ratios;
        and the raw numbers of each run, as `turns`.

    Raises:
        RecipeError: There are too few steps, or the recipe is wrong.
        RunError: A run failed.
    """
    if steps <= WARM_UP:
        raise RecipeError(f"{steps} steps are too few: {WARM_UP} are warm-up", fix=f"--steps {WARM_UP + 4}")
    recipe = as_recipe(recipe)
    require_text(recipe, "loratune bench")
    prepared = prepare(_few_steps(recipe, "fast", 1.0, "auto"), progress)
    # The recipe file of a run contains every setting, and a written default is no longer adapted to the model.
    data = recipe.data.model_copy(update={"max_length": prepared.recipe.data.max_length})
    measured = recipe.model_copy(update={"data": data})
    epochs = epochs_of(steps, num_steps_per_epoch(len(prepared.data.train), recipe.train.batch_size))
    turns: list[Record] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for engine in ENGINES if number % 2 == 0 else reversed(ENGINES):
                turn = _turn(_few_steps(measured, engine, epochs, f"{folder}/{number}-{engine}"))
                progress.line(
                    f"round {number + 1}, {engine}: {statistics.median(turn['tokens_per_second']):,.0f} tokens/s, "
                    f"{turn['peak_bytes'] / 2**30:.2f} GiB, first step after {turn['seconds_to_first_step']:.0f} s"
                )
                turns.append(turn)
    # Streamed data is prepared during the steps.
    rates = [] if prepared.data.stream else [_preparation(prepared) for _ in range(rounds)]
    return _record(prepared, turns, steps, rates)


def _few_steps(recipe: Recipe, engine: str, epochs: float, output_dir: str) -> Recipe:
    values = recipe.model_dump(mode="json", exclude_unset=True)  # unset defaults are adapted to the model
    for section in ("data", "evaluate", "train"):
        values.setdefault(section, {})
    values["data"]["eval"] = "none"
    values["evaluate"]["metric"] = "none"
    never = dict.fromkeys(("eval_every", "save_every", "log_every"), "never")
    # A few steps do not repay compilation, but we measure the steady state of a long run.
    compiled = recipe.train.compile if engine == "fast" else False
    length = {"epochs": epochs, "max_steps": None}
    values["train"] |= {"engine": engine, **length, "output_dir": output_dir, "compile": compiled, **never}
    values["train"]["share_prefixes"] = recipe.train.share_prefixes if engine == "fast" else False
    return Recipe.parse(values)


def _turn(recipe: Recipe) -> Record:
    """Run one engine in its own process."""
    file = Path(recipe.train.output_dir).with_suffix(".yaml")
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    started = time.time()
    done = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-m", "loratune", "train", str(file), "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RunError(f"engine {recipe.train.engine} failed: {done.stderr.strip()[-2000:]}")
    run = RunDir.open(recipe.train.output_dir)
    metrics = [record for record in run.read_metrics() if "loss" in record]
    first, measured = metrics[0], read_json(run.plan)["measured"]
    return {
        "engine": recipe.train.engine,
        "loss": [step["loss"] for step in metrics],
        "tokens_per_second": [step["tokens_per_second"] for step in metrics[WARM_UP:]],
        "peak_bytes": measured["peak_bytes"],
        "packing": measured["packing"],
        "seconds_to_first_step": first["time"] - first["num_tokens"] / first["tokens_per_second"] - started,
        "first_step_seconds": first["num_tokens"] / first["tokens_per_second"],
    }


def _preparation(prepared: Preparation) -> dict[str, float | None]:
    """Measure rows/s from conversations to labeled tokens, without a cache, by engine.

    For loratune this includes reading the file and all verification. None for `SFTTrainer` if it refuses the rows.
    """
    data, tokenizer = prepared.recipe.data, prepared.model.tokenizer
    max_length = int(data.max_length)
    reader = Reader(data, prepared.recipe.train.seed, NoProgress())
    rows = [
        {"text": c.text}
        if c.text is not None
        else {"messages": list(c.messages), **({"tools": c.tools} if c.tools else {})}
        for c in reader(data.train).items
    ]
    started = time.perf_counter()
    prepare_data(data, tokenizer, max_length=max_length, seed=prepared.recipe.train.seed)
    fast = len(rows) / (time.perf_counter() - started)
    trl = trl_preparation_seconds(
        HubDataset.from_list(rows), tokenizer, max_length=max_length, assistant_only=data.train_on != "all"
    )
    return {"fast": fast, "trl": trl and len(rows) / trl}


def _record(prepared: Preparation, turns: list[Record], steps: int, rates: list[dict[str, float | None]]) -> Record:
    engines = {}
    for engine in ENGINES:
        mine = [turn for turn in turns if turn["engine"] == engine]
        engines[engine] = {
            "tokens_per_second": statistics.median(rate for turn in mine for rate in turn["tokens_per_second"]),
            "peak_bytes": statistics.median(turn["peak_bytes"] for turn in mine),
            "seconds_to_first_step": statistics.median(turn["seconds_to_first_step"] for turn in mine),
            "first_step_seconds": statistics.median(turn["first_step_seconds"] for turn in mine),
            "rows_per_second": _median_or_none([turn[engine] for turn in rates]),
            "losses": mine[0]["loss"],
            "packing": mine[0]["packing"],
        }
    fast, trl = (engines[name] for name in ENGINES)
    differences = [abs(a - b) for a, b in zip(fast["losses"], trl["losses"], strict=True)]
    data = prepared.as_plan()["data"]
    flops_per_token = prepared.estimate.time.flops / prepared.recipe.train.epochs / data["num_tokens"]
    peak_rate = _peak_rate(prepared)
    return {
        "engines": engines,
        "ratio": {
            "tokens_per_second": fast["tokens_per_second"] / trl["tokens_per_second"],
            "peak_bytes": fast["peak_bytes"] / trl["peak_bytes"],
        },
        "loss": {"largest_difference": max(differences), "mean_difference": statistics.mean(differences)},
        "matmul": {
            "flops_per_second": peak_rate,
            "flops_per_token": flops_per_token,
            "share": {name: engines[name]["tokens_per_second"] * flops_per_token / peak_rate for name in ENGINES},
        },
        "settings": {
            "steps": steps,
            "rounds": len(turns) // 2,
            "rows": data["num_examples"],
            "recipe": prepared.recipe.model_dump(mode="json"),
        },
        "versions": {
            **{name: version(name) for name in ("loratune", "torch", "transformers", "trl", "peft")},
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {prepared.recipe.train.device}",
        },
        "turns": turns,
    }


def _median_or_none(rates: list[float | None]) -> float | None:
    known = [rate for rate in rates if rate]
    return statistics.median(known) if known else None


def _peak_rate(prepared: Preparation) -> float:
    """Measure FLOP/s of the model's own matrix products (forward, and gradient to the input), weighted by work."""
    recipe = prepared.recipe
    model = skeleton(load_config(prepared.model.base, recipe.model), trust_remote_code=recipe.model.trust_remote_code)
    shapes = Counter((m.in_features, m.out_features) for m in model.modules() if isinstance(m, torch.nn.Linear))
    return matmul_rate_of(shapes, device=recipe.train.device, dtype=torch_dtype(recipe.model.dtype))


def bench_table(record: Record) -> Table:
    """Return a table that compares the fast engine and stock TRL."""
    table = Table("", "fast", "stock TRL", "ratio", box=None)
    for line in _lines(record):
        table.add_row(*line)
    return table


def _lines(record: Record) -> list[list[str]]:
    fast, trl = (record["engines"][name] for name in ENGINES)
    share = record["matmul"]["share"]
    prepared = _rows_prepared(fast["rows_per_second"], trl["rows_per_second"])

    def row(name: str, key: str, scale: float, form: str) -> list[str]:
        a, b = fast[key] / scale, trl[key] / scale
        return [name, format(a, form), format(b, form), f"{a / b:.2f}"]

    return [
        row("tokens/s, no padding counted", "tokens_per_second", 1, ",.0f"),
        ["share of the matmul rate", f"{share['fast']:.0%}", f"{share['trl']:.0%}", ""],
        row("peak memory, GiB", "peak_bytes", 2**30, ".2f"),
        row("seconds before the first step", "seconds_to_first_step", 1, ".1f"),
        row("seconds of the first step", "first_step_seconds", 1, ".1f"),
        [f"rows/s prepared ({record['settings']['rows']:,} rows)", *prepared],
        ["mean loss", f"{statistics.mean(fast['losses']):.4f}", f"{statistics.mean(trl['losses']):.4f}",
         f"differ by at most {record['loss']['largest_difference']:.4f}"],
        ["examples", *(_packing(engine["packing"]) for engine in (fast, trl)), ""],
    ]  # fmt: skip


def _packing(packing: Record) -> str:
    if not packing["packed"]:
        return f"not packed: {packing['why_unpacked']}"
    return f"packed; attention is slow: {packing['slow_attention']}" if packing["slow_attention"] else "packed"


def _rows_prepared(fast: float | None, trl: float | None) -> tuple[str, str, str]:
    if fast is None:
        return "streamed, during the steps", "", ""
    return (f"{fast:,.0f}", f"{trl:,.0f}", f"{fast / trl:.2f}") if trl else (f"{fast:,.0f}", "refuses the rows", "")
