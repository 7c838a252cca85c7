"""The curves of a run, step by step."""

from __future__ import annotations

from collections.abc import Iterator

from loratune.data.rows.sources import short_names
from loratune.reporting.blocks import Block, Chart, Charts
from loratune.reporting.charts import NUM_COLOURS, Series, describe, draw_lines
from loratune.reporting.run_files import RunFiles
from loratune.run.errors import plural


def curves(files: RunFiles) -> Iterator[Block]:
    """Of the loss, of that of each source, and of what else is known of each step."""
    if not files.steps:
        return
    steps = [step["step"] for step in files.steps]
    yield Charts(charts=(_loss_chart(files, steps), *_source_charts(files), *_step_charts(files, steps)))


def _loss_chart(files: RunFiles, steps: list[int]) -> Chart:
    losses = [step["loss"] for step in files.steps]
    held_out = [(line["step"], line["eval_nll"]) for line in files.held_out]
    if files.evaluation:
        held_out.insert(0, (0, files.evaluation["base"]["nll"]))
    curves = [Series(x=steps, y=losses)]
    legend = [(0, "training, each step")]
    alt = describe("Training loss", losses)
    if held_out:
        curves.append(Series(x=[x for x, _ in held_out], y=[y for _, y in held_out], colour=1, form="points"))
        legend.append((1, "held out"))
        alt += " " + describe("Held-out loss", [y for _, y in held_out])
    values = [value for curve in curves for value in curve.y]
    log = min(values) > 0 and max(values) > 10 * min(values)
    return Chart(
        title="Loss",
        svg=draw_lines("loss", alt, curves, x_label="step", y_label=files.nats, log=log),
        legend=tuple(legend),
        caption="The held-out loss at step 0 is that of the base model." if files.evaluation else "",
    )


def _source_charts(files: RunFiles) -> Iterator[Chart]:
    yield from _trained_by_source(files)
    yield from _held_out_by_source(files)


def _trained_by_source(files: RunFiles) -> Iterator[Chart]:
    """The training loss of each source, of as many as there are colours, where there are several."""
    points: dict[str, list[tuple[int, float]]] = {}
    for step in files.steps:
        for name, loss in step.get("loss_by_source", {}).items():
            points.setdefault(name, []).append((step["step"], loss))
    if len(points) < 2:
        return
    shown = sorted(points, key=lambda name: -len(points[name]))[:NUM_COLOURS]
    curves = [
        Series(x=[x for x, _ in points[name]], y=[y for _, y in points[name]], colour=colour)
        for colour, name in enumerate(shown)
    ]
    labels = short_names(points)
    words = (describe(f"Training loss of {labels[name]}", curve.y) for name, curve in zip(shown, curves, strict=True))
    more = plural(len(points) - len(shown), "more source is", "more sources are")
    yield Chart(
        title="Training loss of each source",
        svg=draw_lines("loss-by-source", " ".join(words), curves, x_label="step", y_label=files.nats),
        legend=tuple((colour, labels[name]) for colour, name in enumerate(shown)),
        caption="Each in the steps that have examples of it."
        + (f" {more} in metrics.jsonl." if len(points) > len(shown) else ""),
    )


def _held_out_by_source(files: RunFiles) -> Iterator[Chart]:
    """The held-out loss of each source, where there are several and not more than colours."""
    parts = files.evaluation.get("sources", {})
    lines = [line for line in files.held_out if "eval_nll_by_source" in line]
    names = list(lines[-1]["eval_nll_by_source"]) if lines else []
    if not 1 < len(names) <= NUM_COLOURS:
        return
    curves, alts, labels = [], [], short_names(names)
    for colour, name in enumerate(names):
        points = [(line["step"], line["eval_nll_by_source"][name]) for line in lines]
        points = [(0, parts[name]["base"]["nll"]), *points] if name in parts else points
        curves.append(Series(x=[x for x, _ in points], y=[y for _, y in points], colour=colour, form="points"))
        alts.append(describe(f"Held-out loss of {labels[name]}", [y for _, y in points]))
    yield Chart(
        title="Held-out loss of each source",
        svg=draw_lines("source-loss", " ".join(alts), curves, x_label="step", y_label=files.nats),
        legend=tuple((colour, labels[name]) for colour, name in enumerate(names)),
    )


def _step_charts(files: RunFiles, steps: list[int]) -> Iterator[Chart]:
    train = files.lock.get("recipe", {}).get("train", {})
    for key, title, unit in (
        ("learning_rate", "Learning rate", ""),
        ("grad_norm", "Gradient norm", "before clipping"),
        ("tokens_per_second", "Speed", "tokens per second"),
        ("peak_bytes", "Memory", "GiB at the peak so far"),
    ):
        scale = 2**30 if key == "peak_bytes" else 1
        points = [(x, step[key] / scale) for x, step in zip(steps, files.steps, strict=True) if key in step]
        if not points:
            continue
        values = [y for _, y in points]
        curves = [Series(x=[x for x, _ in points], y=values)]
        caption = ""
        limit = train.get("max_grad_norm")
        if key == "grad_norm" and limit:
            clipped = sum(value > limit for value in values)
            caption = f"Longer gradients are scaled down to {limit:g}: {plural(clipped, 'step')} of {len(values):,}."
            if clipped:
                curves.append(Series(x=(steps[0], steps[-1]), y=(limit, limit), form="rule"))
        yield Chart(
            title=title,
            svg=draw_lines(
                key.replace("_", "-"), describe(title, values), curves, x_label="step", y_label=unit, from_zero=True
            ),
            caption=caption,
        )
