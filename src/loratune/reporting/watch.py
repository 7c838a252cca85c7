"""A run in the terminal while another process works on it: `loratune watch`. Reads the run directory only."""

from __future__ import annotations

import itertools
import math
import time
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from loratune.reporting.blocks import UNEXPECTED
from loratune.reporting.run_files import read_run
from loratune.reporting.units import as_bytes, as_duration, as_number, as_ratio
from loratune.reporting.verdict import verdict_on
from loratune.run.errors import plural, printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console, RenderableType

    from loratune.reporting.run_files import RunFiles
    from loratune.run.directory import RunDir

BLOCKS = "▁▂▃▄▅▆▇█"
RECENT_STEPS = 50
"""Steps from which speed and time left are taken: the speed now, not that of the whole run."""
SHOWN_SAMPLES = 2
SHOWN_CHARACTERS = 160
READING_SHARE = 0.1
"""The most of the time that is spent reading: the metrics of a long run take longer to read."""


def show_run(run: RunDir, console: Console, *, once: bool = False, seconds: float = 1.0) -> None:
    """Print the state of a run, and keep printing it until the process that works on it is gone.

    A terminal shows one view that changes; a pipe or file gets a line when something changed, and the view at the end.

    Args:
        run: The run.
        console: Where to print.
        once: Whether to print the view once.
        seconds: The least time between two readings.
    """
    if once:
        console.print(watch_view(read_run(run), console.width))
        return
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for files in follow(run, seconds):
                live.update(watch_view(files, console.width), refresh=True)
        return
    shown = ""
    for files in follow(run, seconds):
        line = f"{files.state} {files.num_done} {len(files.held_out)}"
        if files.state != "running":
            console.print(watch_view(files, console.width))
        elif line != shown:
            console.print(Text(printable(headline(files))), soft_wrap=True)
            shown = line


def follow(run: RunDir, seconds: float = 1.0) -> Iterator[RunFiles]:
    """Yield the files of a run again and again, and once more after the process that works on it is gone.

    Args:
        run: The run.
        seconds: The least time between two readings.
    """
    while True:
        started = time.monotonic()
        files = read_run(run)
        yield files
        if files.state != "running":
            return
        time.sleep(max(seconds, (time.monotonic() - started) / READING_SHARE))


def watch_view(files: RunFiles, width: int = 80) -> RenderableType:
    """Return what is known about a run, as lines for a terminal with that many columns."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in watch_rows(files, width):
        table.add_row(name, Text(printable(text)))
    return Group(Text(printable(headline(files))), table)


def headline(files: RunFiles) -> str:
    """Return name, state, step, last loss and time left in one line, which is all that a pipe gets during a run."""
    total = _num_steps(files)
    parts = [f"{files.name}: {files.state}", f"step {files.num_done:,}" + (f"/{total:,}" if total else "")]
    if files.steps:
        parts.append(f"loss {files.steps[-1].loss:.4f}")
    if files.held_out:
        parts.append(f"held-out {files.held_out[-1].eval_nll:.4f}")
    if files.state == "running" and (left := _seconds_left(files)) is not None:
        parts.append(f"{as_duration(left)} of training left" if left else "evaluating")
    return " · ".join(parts)


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw values as a line of blocks, the highest value as a full one; neighbors share a column by their mean."""
    finite = [value for value in values if math.isfinite(value)]
    columns = min(width, len(finite))
    bounds = [len(finite) * number // columns for number in range(columns + 1)] if columns else []
    means = [math.fsum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def watch_rows(files: RunFiles, width: int) -> Iterator[tuple[str, str]]:
    steps = files.steps
    if steps:
        losses = [step.loss for step in steps]
        yield "loss", sparkline(losses, max(8, width - 14))
        yield "", f"first {as_number(losses[0])}, last {as_number(losses[-1])}, lowest {as_number(min(losses))}"
    if files.held_out:
        yield "held-out", _held_out(files)
    if steps:
        last, recent = steps[-1], steps[-RECENT_STEPS:]
        seconds = math.fsum(step.num_tokens / step.tokens_per_second for step in recent if step.num_tokens)
        rate = sum(step.num_tokens for step in recent) / seconds if seconds else 0.0
        yield "speed", f"{rate:,.0f} tokens/s, {as_duration(seconds / len(recent))} a step"
        yield "memory", _memory(files)
        yield "step", f"learning rate {last.learning_rate:.2e}, gradient norm {as_number(last.grad_norm)}"
    if files.events:
        event = files.events[-1]
        yield "event", f"step {event.step}: {event.message}"
    yield from _samples(files)


def _held_out(files: RunFiles) -> str:
    last = files.held_out[-1]
    best = min(files.held_out, key=lambda line: line.eval_nll)
    lowest = "" if best is last else f"; lowest {as_number(best.eval_nll)} after step {best.step}"
    return f"{as_number(last.eval_nll)} after step {last.step}{lowest}"


def _memory(files: RunFiles) -> str:
    peak = max(step.peak_bytes for step in files.steps)
    try:
        planned = files.plan.memory.peak_bytes if files.plan is not None else 0
    except UNEXPECTED:  # a damaged plan
        planned = 0
    return f"peak {as_bytes(peak)}" + (
        f" of {as_bytes(planned)} planned ({as_ratio(peak, planned)})" if planned else ""
    )


def _samples(files: RunFiles) -> Iterator[tuple[str, str]]:
    """Yield verdict and answers of a run that has been evaluated, or the last answers of one that trains."""
    record = files.evaluation
    if record is None:
        for answer in files.samples[-1].answers or () if files.samples else ():
            yield "prompt", _short(answer.question)
            yield f"step {files.samples[-1].step}", _short(answer.text)
        return
    try:
        yield "result", verdict_on(record).sentence
        for item in record.items[:SHOWN_SAMPLES]:
            yield "prompt", _short(item.question)
            yield record.side_before, _short(item.base.text)
            yield "tuned", _short(item.tuned.text)
        if len(record.items) > SHOWN_SAMPLES:
            yield (
                "",
                f"{plural(len(record.items) - SHOWN_SAMPLES, 'further answer')}: `loratune report {files.run.root}`",
            )
    except UNEXPECTED:  # a damaged evaluation; the report names it
        return


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]}…"


def _num_steps(files: RunFiles) -> int:
    """Return the steps of the whole run; 0 if the plan cannot be read."""
    try:
        return files.plan.time.num_steps if files.plan is not None else 0
    except UNEXPECTED:
        return 0


def _seconds_left(files: RunFiles) -> float | None:
    """Return the seconds that the remaining steps take at the speed of the last ones; None before the first step."""
    recent, total = files.steps[-RECENT_STEPS:], _num_steps(files)
    if not recent or not total:
        return None
    seconds = math.fsum(step.num_tokens / step.tokens_per_second for step in recent if step.num_tokens)
    return seconds / len(recent) * max(0, total - files.num_done)
