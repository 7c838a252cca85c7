"""The intervals of a plan hold for the runs that they were chosen on, and a plan without any says so."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from loratune.cli.plan_tables import summary_table
from loratune.planning.intervals import Bounds, memory_interval, time_interval
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.run.progress import NO_PROGRESS

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def columns(page: str, *names: str) -> list[tuple[float, ...]]:
    """Return the numbers in these columns of every table of a page that has them."""
    found, places = [], None
    for line in (RESULTS / page).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if set(names) <= set(cells):
            places = [cells.index(name) for name in names]
        elif cells and places is not None and not cells[0].startswith("---"):
            found.append(tuple(float(re.sub(r"[^\d.]", "", cells[place])) for place in places))
        elif not cells:
            places = None
    return found


def share_inside(interval: Bounds | None, ratios: list[float]) -> tuple[int, int]:
    assert interval is not None
    inside = sum(interval.low <= ratio <= interval.high for ratio in ratios)
    assert interval.source.startswith(f"{inside} of {len(ratios)} ")
    return inside, len(ratios)


def test_the_range_of_memory_holds_for_the_runs_of_the_page() -> None:
    runs = columns("memory.md", "predicted", "measured")
    decoders, encoders = runs[:19], runs[19:]
    decoders += columns("quantization.md", "peak, planned", "peak")
    decoders += [pair for pair in columns("qwen2-1.5b-cpu.md", "planned", "measured") if pair[0] < 10]
    inside, number = share_inside(memory_interval("cpu", is_encoder=False), [m / p for p, m in decoders])
    assert number == 26
    assert inside >= 0.9 * number
    inside, number = share_inside(memory_interval("cpu", is_encoder=True), [m / p for p, m in encoders])
    assert inside >= 0.9 * number


def test_the_range_of_time_holds_for_the_runs_of_the_page() -> None:
    ratios = [ratio for (ratio,) in columns("time.md", "measured / planned")]
    inside, number = share_inside(time_interval("cpu", is_encoder=False), ratios)
    assert inside >= 0.9 * number


@pytest.mark.parametrize("device", ["cuda", "mps", "NVIDIA H100 80 GB"])
def test_where_nothing_was_measured_there_is_no_interval(device: str) -> None:
    assert memory_interval(device, is_encoder=False) is None
    assert time_interval(device, is_encoder=False) is None
    assert time_interval("cpu", is_encoder=True) is None


def test_the_plan_has_the_interval_around_its_numbers_and_shows_it(tiny_recipe: Callable[..., Recipe]) -> None:
    prepared = prepare(tiny_recipe(evaluate__metric="none"), NO_PROGRESS)
    plan = prepared.as_plan()
    assert plan["memory"]["interval"]["low"] == pytest.approx(0.88 * plan["memory"]["peak_bytes"])
    assert plan["time"]["interval"]["high"] == pytest.approx(1.3 * plan["time"]["total_seconds"])
    record = {**plan, "recipe": {"batch_size": 8, "epochs": 1, "output_dir": "out"}}
    cells = " ".join(str(cell) for column in summary_table(record, model="m").columns for cell in column.cells)
    low, high = (plan["memory"]["interval"][name] / 2**30 for name in ("low", "high"))
    assert f"GiB, {low:.1f} to {high:.1f}" in cells
    assert "on a quiet machine: training" in cells
    record["memory"] = {**plan["memory"], "interval": None}
    cells = " ".join(str(cell) for column in summary_table(record, model="m").columns for cell in column.cells)
    assert "GiB, not calibrated by any run" in cells
