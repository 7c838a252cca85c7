"""The plan as tables, from its records alone."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from loratune.cli import plan_tables
from loratune.recipe.recipe import Recipe
from loratune.run.directory import Record
from loratune.workflows.plan import plan


def printed(*renderables: object) -> str:
    output = io.StringIO()
    Console(file=output, width=160).print(*renderables, sep="\n")  # type: ignore[arg-type]
    return output.getvalue()


@pytest.fixture
def shown(tiny_recipe: Callable[..., Recipe]) -> tuple[Record, Record]:
    """`plan.json` with the recipe's values, and `data.json`."""
    prepared = plan(tiny_recipe(train__learning_rate=5e-5))
    recipe = prepared.recipe
    values = {"batch_size": 8, "epochs": 2, "output_dir": recipe.train.output_dir, "r": recipe.lora.r}
    return {**prepared.as_plan(), "recipe": values}, prepared.data.report


def test_tables_show_what_the_records_say(shown: tuple[Record, Record]) -> None:
    record, report = shown
    text = printed(plan_tables.modules_table(record), plan_tables.presets_table(record), plan_tables.data_table(report))

    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert ["self_attn.q_proj", "32 × 32", "2", "256", "512"] in rows
    assert ["self_attn.v_proj", "32 × 16", "2", "192", "384"] in rows
    assert next(row for row in rows if row[0] == "balanced")[1] == "896"
    assert ["rows", "20", "6"] in rows
    assert sum(int(line.rpartition(" ")[2]) for line in text.splitlines() if " to " in line) == 20


def test_the_summary_says_for_which_device_and_at_what_price(shown: tuple[Record, Record]) -> None:
    record = {**shown[0], "cost": {"price_per_hour": 2.5, "cost": 1.25}}
    source = "published figures of l4, on which loratune has never been measured"
    record["time"] = {**record["time"], "source": source}
    record["device"] = {
        "name": "l4",
        "memory_bytes": 24 * 10**9,
        "bf16_flops_per_second": 121e12,
        "source": "datasheet",
    }

    text = " ".join(printed(plan_tables.summary_table(record, model="tiny")).split())

    assert "l4: estimated from published figures, 24 GB and 121 TFLOP/s in bfloat16 (datasheet); " in text
    assert "loratune has never been measured on it" in text
    assert "about 1.25 at 2.5 per hour" in text
    assert "measured for a matrix product" not in text


def test_notes_give_advice_with_reason_and_source(shown: tuple[Record, Record]) -> None:
    lines = [note.plain for note in plan_tables.notes({**shown[0], "warnings": ["[red]careful[/red]"]})]

    assert lines[0] == "! [red]careful[/red]"
    assert any(line.startswith("→ train.learning_rate=2e-4: 5e-05 is low") and "Schulman" in line for line in lines)


def test_promise_and_measurement_stand_side_by_side() -> None:
    line = plan_tables.measured_line(
        {
            "measured": {
                "train_seconds": 65,
                "evaluate_seconds": 8,
                "tokens_per_second": 1234.5,
                "peak_bytes": 2**31,
            },
            "memory": {"peak_bytes": 2**30},
            "time": {"train_seconds": 130, "evaluate_seconds": 0, "tokens_per_second": 22.4},
        }
    )

    assert line == (
        "training took 1 min 5 s (planned 2 min 10 s, 50% of plan), evaluation 8 s (planned 0 s), "
        "1,234 tokens/s (planned 22 tokens/s, 55 × plan), peak memory 2.0 GiB (planned 1.0 GiB, 200% of plan)"
    )
