"""Measure what a quantized base costs, against the full one: held-out loss before and after a short run, speed, memory.

    python benchmarks/quantization_loss.py [--steps 20] [--held-out 100] [--recipe FILE] [--dtype bfloat16] [--json]

One `loratune train` for each kind of base, in a process of its own, so that its peak is its own. Nothing but the base's
type and quantization differs: the same adapter at the start, the same examples in the same order.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from loratune.model.quantization.kinds import PACKED
from loratune.recipe.recipe import Recipe

KINDS = ("none", *PACKED)
PACKAGES = ("loratune", "torch", "transformers", "peft", "bitsandbytes", "torchao")
MIB = 2**20


def run(recipe: Path, quantization: str, dtype: str, *, epochs: float, held_out: Path, folder: Path) -> dict[str, Any]:
    settings = {
        "model.quantization": quantization,
        "model.dtype": dtype,
        "data.eval": held_out,
        "train.epochs": epochs,
        "train.compile": False,
        "train.eval_every": "never",
        "train.save_every": "never",
        "train.output_dir": folder,
        "evaluate.metric": "none",
    }
    words = [f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "loratune", "train", str(recipe), *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{quantization} in {dtype} failed: {done.stderr[-2000:]}")
    evaluation, plan = (json.loads((folder / name).read_text()) for name in ("evaluation.json", "plan.json"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "tokens_per_second" in line]
    return {
        "quantization": quantization,
        "dtype": dtype,
        "steps": len(steps),
        "base_nll": evaluation["base"]["nll"],
        "tuned_nll": evaluation["tuned"]["nll"],
        "tokens_per_second": median(step["tokens_per_second"] for step in steps),
        "weights_bytes": plan["memory"]["weights_bytes"],
        "planned_peak_bytes": plan["memory"]["peak_bytes"],
        "peak_bytes": plan["measured"]["peak_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", type=Path, default=Path("recipes/quickstart.yaml"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    recipe = Recipe.load(arguments.recipe)
    (source,) = recipe.data.train
    (held_out,) = recipe.data.eval if isinstance(recipe.data.eval, tuple) else recipe.data.train
    num_rows = len(Path(source.name).read_text(encoding="utf-8").splitlines())
    epochs = arguments.steps * recipe.train.batch_size / num_rows
    rows = []
    for quantization in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "eval.jsonl"
            lines = Path(held_out.name).read_text(encoding="utf-8").splitlines(keepends=True)
            part.write_text("".join(lines[: arguments.held_out]), encoding="utf-8")
            row = run(
                arguments.recipe,
                quantization,
                arguments.dtype,
                epochs=epochs,
                held_out=part,
                folder=Path(folder) / "run",
            )
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    versions = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    if arguments.json:
        print(json.dumps({"rows": rows, "versions": versions}, indent=2))
        return
    print("| base | weights | held-out loss before | after | tokens/s | peak, planned | peak |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        name = row["dtype"] if row["quantization"] == "none" else f"{row['quantization']} ({row['dtype']})"
        print(
            f"| {name} | {row['weights_bytes'] / MIB:,.0f} MiB | {row['base_nll']:.4f} | {row['tuned_nll']:.4f} "
            f"| {row['tokens_per_second']:,.0f} | {row['planned_peak_bytes'] / MIB:,.0f} MiB "
            f"| {row['peak_bytes'] / MIB:,.0f} MiB |"
        )
    print(f"{rows[0]['steps']} steps; {versions}")


if __name__ == "__main__":
    main()
