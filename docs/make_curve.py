"""Draw the loss of a run: `python docs/make_curve.py RUN OUT.svg`."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl

from loratune.run.directory import RunDir

mpl.use("svg")
import matplotlib.pyplot as plt


def draw(run: RunDir, out: Path) -> None:
    """Training loss of every step, and the held-out loss where it was measured."""
    records = run.read_metrics()
    steps = [(record["step"], record["loss"]) for record in records if "loss" in record]
    held_out = [(record["step"], record["eval_nll"]) for record in records if "eval_nll" in record]
    plt.rcParams.update(
        {"svg.hashsalt": "loratune", "font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    )
    figure, axes = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
    axes.plot(*zip(*steps, strict=True), color="#3366cc", linewidth=1.6, label="training, each step")
    axes.plot(*zip(*held_out, strict=True), "o", color="#cc5500", markersize=7, label="held out")
    axes.set(xlabel="step", ylabel="nats per trained token", yscale="log")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    draw(RunDir.open(sys.argv[1]), Path(sys.argv[2]))
