"""The curves of a run over its optimizer steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratune.recipe.short_names import short_names
from loratune.reporting.blocks import Block, Chart, Charts
from loratune.reporting.charts import NUM_COLORS, Series, describe_series, draw_lines
from loratune.run.errors import plural

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from loratune.reporting.run_files import RunFiles
    from loratune.run.records.metrics import StepLine


def curves(files: RunFiles) -> Iterator[Block]:
    """Build the section: losses, losses by source, and what else is known of each step."""
    if not files.steps:
        return
    yield Charts(charts=(_loss_chart(files), *_trained_by_source(files), *_held_out_by_source(files), *_others(files)))


def _loss_chart(files: RunFiles) -> Chart:
    losses = [step.loss for step in files.steps]
    held_out = [(line.step, line.eval_nll) for line in files.held_out]
    if files.evaluation is not None:
        held_out.insert(0, (0, files.evaluation.base["nll"]))
    curves = [Series(x=[step.step for step in files.steps], y=losses)]
    legend = [(0, "training, every step")]
    alt = describe_series("Training loss", losses)
    if held_out:
        curves.append(Series(x=[x for x, _ in held_out], y=[y for _, y in held_out], color=1, form="points"))
        legend.append((1, "held-out"))
        alt += " " + describe_series("Held-out loss", [y for _, y in held_out])
    values = [value for curve in curves for value in curve.y]
    log = min(values) > 0 and max(values) > 10 * min(values)
    before = files.evaluation.model_before if files.evaluation is not None else ""
    return Chart(
        title="Loss",
        svg=draw_lines(alt, curves, x_label="step", y_label=files.task.curve, log=log),
        legend=tuple(legend),
        caption=f"The held-out loss at step 0 is that of {before}." if before else "",
    )


def _trained_by_source(files: RunFiles) -> Iterator[Chart]:
    """Draw the training loss of each of several sources, up to the number of colors."""
    points: dict[str, list[tuple[int, float]]] = {}
    for step in files.steps:
        for name, loss in (step.loss_by_source or {}).items():
            points.setdefault(name, []).append((step.step, loss))
    if len(points) < 2:
        return
    shown = sorted(points, key=lambda name: -len(points[name]))[:NUM_COLORS]
    curves = [
        Series(x=[x for x, _ in points[name]], y=[y for _, y in points[name]], color=color)
        for color, name in enumerate(shown)
    ]
    labels = short_names(points)
    alts = (
        describe_series(f"Training loss of {labels[name]}", curve.y) for name, curve in zip(shown, curves, strict=True)
    )
    more = plural(len(points) - len(shown), "more source is", "more sources are")
    yield Chart(
        title="Training loss of each source",
        svg=draw_lines(" ".join(alts), curves, x_label="step", y_label=files.task.curve),
        legend=tuple((color, labels[name]) for color, name in enumerate(shown)),
        caption="Each source in the steps that contain examples of it."
        + (f" {more} in metrics.jsonl." if len(points) > len(shown) else ""),
    )


def _held_out_by_source(files: RunFiles) -> Iterator[Chart]:
    """Draw the held-out loss of each of several sources, if there are enough colors."""
    base = (files.evaluation.sources if files.evaluation is not None else None) or {}
    lines = [(line.step, line.eval_nll_by_source) for line in files.held_out if line.eval_nll_by_source is not None]
    names = list(lines[-1][1]) if lines else []
    if not 1 < len(names) <= NUM_COLORS:
        return
    curves, alts, labels = [], [], short_names(names)
    for color, name in enumerate(names):
        points = [(step, losses[name]) for step, losses in lines]
        if name in base:
            points.insert(0, (0, base[name].base["nll"]))
        curves.append(Series(x=[x for x, _ in points], y=[y for _, y in points], color=color, form="points"))
        alts.append(describe_series(f"Held-out loss of {labels[name]}", [y for _, y in points]))
    yield Chart(
        title="Held-out loss of each source",
        svg=draw_lines(" ".join(alts), curves, x_label="step", y_label=files.task.curve),
        legend=tuple((color, labels[name]) for color, name in enumerate(names)),
    )


_OTHERS: tuple[tuple[str, str, Callable[[StepLine], float]], ...] = (
    ("Learning rate", "", lambda step: step.learning_rate),
    ("Gradient norm", "before clipping", lambda step: step.grad_norm),
    ("Speed", "tokens per second", lambda step: step.tokens_per_second),
    ("Memory", "peak so far, GiB", lambda step: step.peak_bytes / 2**30),
)


def _others(files: RunFiles) -> Iterator[Chart]:
    steps = [step.step for step in files.steps]
    for title, unit, value_of in _OTHERS:
        values = [value_of(step) for step in files.steps]
        curves = [Series(x=steps, y=values)]
        caption = ""
        if title == "Gradient norm" and (limit := _max_grad_norm(files)):
            clipped = sum(value > limit for value in values)
            caption = f"Gradients with norm > {limit:g} are clipped: {plural(clipped, 'step')} of {len(values):,}."
            if clipped:
                curves.append(Series(x=(steps[0], steps[-1]), y=(limit, limit), form="rule"))
        svg = draw_lines(describe_series(title, values), curves, x_label="step", y_label=unit, from_zero=True)
        yield Chart(title=title, svg=svg, caption=caption)


def _max_grad_norm(files: RunFiles) -> float | None:
    return files.lock.recipe.get("train", {}).get("max_grad_norm") if files.lock is not None else None
