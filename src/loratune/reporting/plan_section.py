"""Planned vs. actual: steps, time and memory of a run next to what `plan` estimated before the weights were loaded."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from loratune.reporting.blocks import Block, Chart, Charts, Code, Paragraph, Table
from loratune.reporting.charts import Bar, draw_bars
from loratune.reporting.units import as_bytes, as_duration, as_ratio

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loratune.reporting.run_files import RunFiles
    from loratune.run.records.plan import Measured, Memory, PlanRecord

Row = tuple[str, str, str, str]


def planned_and_actual(files: RunFiles) -> Iterator[Block]:
    """Build the section."""
    plan = files.plan
    if plan is None:
        return
    done, num_steps, seconds = files.num_done, plan.time.num_steps, files.train_seconds
    so_far = "" if done == num_steps or files.is_trained else " so far"
    rows: list[Row] = [("optimizer steps", f"{num_steps:,}", f"{done:,}{so_far}", f"{done / num_steps:.0%}")]
    if done:
        rows.append(_duration_row(f"training time{so_far}", planned_train_seconds(plan, done), seconds))
    rows += _totals(plan)
    yield Table(
        caption="Planned before the weights were loaded, and actual",
        columns=("", "planned", "actual", "actual / planned"),
        rows=tuple(rows),
        numeric=True,
    )
    if files.state == "running" and 0 < done < num_steps:
        left = as_duration(seconds / done * (num_steps - done))
        yield Paragraph(text=f"At this speed the remaining steps take {left}.")
    if files.state == "stopped":
        yield Code(title="Resume", text=f"loratune resume {shlex.quote(str(files.run.root))}")
    yield Charts(charts=(memory_chart(plan.memory, plan.measured),))


def planned_train_seconds(plan: PlanRecord, num_steps: int) -> float:
    """Return the planned time of the first steps, in seconds."""
    return plan.time.train_seconds * num_steps / plan.time.num_steps


def _totals(plan: PlanRecord) -> Iterator[Row]:
    """Yield what is known at the end: peak memory, evaluation, and the whole run."""
    peak, measured = plan.memory.peak_bytes, plan.measured
    if measured is None:
        yield ("peak memory", as_bytes(peak), "known at the end", "")
        return
    yield ("peak memory", as_bytes(peak), as_bytes(measured.peak_bytes), as_ratio(measured.peak_bytes, peak))
    yield _duration_row("evaluation", plan.time.evaluate_seconds, measured.evaluate_seconds)
    yield _duration_row("total, loading included", plan.time.total_seconds, measured.total_seconds)


def _duration_row(label: str, planned: float, actual: float) -> Row:
    return (label, as_duration(planned), as_duration(actual), as_ratio(actual, planned))


def memory_chart(memory: Memory, measured: Measured | None) -> Chart:
    parts = _memory_parts(memory)
    bars = [
        Bar(
            name="planned",
            parts=tuple((size / 2**20, color) for color, (_, size) in enumerate(parts)),
            label=as_bytes(memory.peak_bytes),
        )
    ]
    alt = f"Planned {as_bytes(memory.peak_bytes)}: " + ", ".join(f"{name} {as_bytes(size)}" for name, size in parts)
    if measured is not None:
        bars.append(Bar(name="actual", parts=((measured.peak_bytes / 2**20, 5),), label=as_bytes(measured.peak_bytes)))
        alt += f". Actual {as_bytes(measured.peak_bytes)}"
    return Chart(
        title="Peak memory",
        svg=draw_bars(f"{alt}.", bars, x_label="MiB"),
        legend=tuple((color, f"{name} {as_bytes(size)}") for color, (name, size) in enumerate(parts)),
    )


def _memory_parts(memory: Memory) -> list[tuple[str, int]]:
    """Split the planned peak into five named parts; the sixth color is that of the actual peak."""
    adapter = memory.adapter_bytes + memory.optimizer_bytes + memory.variant_bytes
    process = memory.process_bytes + memory.allocator_bytes
    rest = memory.peak_bytes - memory.weights_bytes - adapter - memory.activation_bytes - process
    beyond = rest > max(memory.loss_bytes, memory.backward_bytes)
    return [
        ("base weights", memory.weights_bytes),
        ("adapter and optimizer", adapter),
        ("activations", memory.activation_bytes),
        ("loading or evaluation beyond training" if beyond else "loss, or backward pass of a layer", rest),
        ("process and allocator", process),
    ]
