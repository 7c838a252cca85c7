"""`plan.json` and `data.json` as tables for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from loratune.reporting.units import as_ratio
from loratune.run.directory import Record
from loratune.run.errors import plural

GIB, MIB = 2**30, 2**20
_MOST_CLASSES = 20
"""Classes that the data table lists."""
_BAR = 40
"""Length of the longest histogram bar, in characters."""


def summary_table(record: Record, *, model: str) -> Table:
    """Return a table of what will be done, one line per topic.

    Args:
        record: `plan.json`, with the recipe's values under `recipe`.
        model: Name and path of the base model.
    """
    parameters, memory, data, clock = record["parameters"], record["memory"], record["data"], record["time"]
    rows = {
        "base model": model,
        "trained": f"{parameters['trainable']:,} of {parameters['total']:,} parameters "
        f"({parameters['share']:.2%}): {parameters['targets']}",
        "adapter file": f"{parameters['adapter_bytes'] / MIB:,.1f} MiB",
        "data": f"{data['num_examples']:,} examples, {data['num_tokens']:,} tokens, "
        + (
            f"one of {data['num_classes']:,} labels each"
            if "num_classes" in data
            else f"{data['num_supervised_tokens']:,} trained ({data['num_supervised_tokens'] / data['num_tokens']:.0%})"
        )
        + f"; {data['num_eval_examples']:,} held out",
        **({"mixture": _mixture(data["sources"])} if len(data["sources"]) > 1 else {}),
        "steps": f"{clock['num_steps']:,} (batch size {record['recipe']['batch_size']}, "
        f"{plural(record['recipe']['epochs'], 'epoch')})",
        "memory": f"peak about {memory['peak_bytes'] / GIB:.1f} GiB, "
        + _interval(memory, lambda low, high: f"{low / GIB:.1f} to {high / GIB:.1f}"),
        "time on one device" if record["scaling"] else "time": _time(clock),
        "output": record["recipe"]["output_dir"],
    }
    if record["probe"]:
        probe = record["probe"]
        rows["probed"] = (
            f"{probe['tokens_per_second']:,.0f} tokens/s in steps of {probe['num_tokens']:,} tokens (first step "
            f"{duration(probe['first_step_seconds'])}), peak {probe['peak_bytes'] / GIB:.1f} GiB"
        )
    if "cost" in record:
        cost = record["cost"]
        each = f" for each of {record['scaling']['devices']} devices" if record["scaling"] else ""
        shown = f"about {cost['cost']:,.2f}" if cost["cost"] >= 0.01 else "less than 0.01"
        rows["cost"] = f"{shown} at {cost['price_per_hour']:g} per hour{each}"
    if record.get("packing") and record["packing"]["why_unpacked"]:  # not in plans of earlier versions
        rows["examples"] = f"not packed: {record['packing']['why_unpacked']}"
    if record["device"]:
        device = record["device"]
        measured = "never been measured" not in record["time"]["source"]
        rows["device"] = (
            f"{device['name']}: estimated from published figures, {device['memory_bytes'] / 1e9:.0f} GB and "
            f"{device['bf16_flops_per_second'] / 1e12:,.0f} TFLOP/s in bfloat16 ({device['source']}); "
            f"{record['time']['source'] if measured else 'loratune has never been measured on it'}"
        )
    table = Table(show_header=False, box=None, padding=(0, 1))
    table.add_column()
    table.add_column(overflow="fold")  # paths are to be copied
    for name, text in rows.items():
        table.add_row(f"[bold]{name}[/bold]", escape(text))
    for name, choice in record["choices"].items():
        table.add_row(f"[dim]{name}: auto[/dim]", escape(f"{choice['value']} ({choice['reason']})"))
    return table


def memory_table(record: Record) -> Table:
    """Return a table of planned bytes by component, with the peak and the phase that reaches it."""
    memory = record["memory"]
    table = Table(title="Memory", title_justify="left")
    table.add_column("component")
    table.add_column("MiB", justify="right")
    table.add_column("what it is")
    kept, none = memory["activation_bytes_without_recomputation"], memory["activation_bytes_with_recomputation"]
    recomputed = memory["num_recomputed"]
    checkpointing = f"gradient checkpointing in {recomputed} layers" if recomputed else "no gradient checkpointing"
    rows = (
        ("weights", memory["weights_bytes"], "frozen base model"),
        ("adapter", memory["adapter_bytes"], "adapter weights and gradients"),
        ("variant", memory.get("variant_bytes", 0), "extra for lora.variant and fully trained modules"),
        ("optimizer", memory["optimizer_bytes"], "optimizer state"),
        (
            "activations",
            memory["activation_bytes"],
            f"kept for the backward pass ({checkpointing}; "
            f"{kept / MIB:,.0f} without it, {none / MIB:,.0f} with it in every layer)",
        ),
        ("loss", memory["loss_bytes"], "logits of one chunk, forward"),
        ("backward", memory["backward_bytes"], "gradients of one layer; replaces the loss"),
        ("evaluation", memory["evaluation_bytes"], "replaces activations, loss and backward during evaluation"),
        ("loading", memory["loading_bytes"], "weight files during conversion; before anything but the weights"),
        ("allocator", memory["allocator_bytes"], "allocator fragmentation"),
        ("process", memory["process_bytes"], "Python, libraries and data"),
    )
    for name, size, words in rows:
        if size:
            table.add_row(name, f"{size / MIB:,.0f}", words)
    table.add_section()
    table.add_row("peak", f"{memory['peak_bytes'] / MIB:,.0f}", f"during {_phase(memory)}", style="bold")
    return table


def _phase(memory: Record) -> str:
    """Return the phase of the run that reaches the peak."""
    base = memory["weights_bytes"] + memory["process_bytes"]
    variant = memory.get("variant_bytes", 0)
    trained = base + variant + memory["allocator_bytes"] + memory["adapter_bytes"] + memory["optimizer_bytes"]
    peaks = {
        "training": trained + memory["activation_bytes"] + max(memory["loss_bytes"], memory["backward_bytes"]),
        "evaluation": trained + memory["evaluation_bytes"],
        "loading the weights": base + memory["loading_bytes"],
    }
    return max(peaks, key=lambda name: peaks[name])


def modules_table(record: Record) -> Table:
    """Return a table of the adapted matrices by kind and shape."""
    table = Table(title="Adapted matrices", title_justify="left")
    for name in ("matrix", "in × out", "number", "parameters each", "parameters"):
        table.add_column(name, justify="left" if name == "matrix" else "right")
    kinds = sorted(
        (_kind(item["name"]), item["d_in"], item["d_out"], item["trainable"])
        for item in record["parameters"]["per_module"]
    )
    for (name, d_in, d_out, each), items in groupby(kinds):
        number = len(list(items))
        table.add_row(name, f"{d_in:,} × {d_out:,}", str(number), f"{each:,}", f"{each * number:,}")
    for item in record["parameters"].get("whole", ()):
        shapes = ", ".join(" × ".join(f"{size:,}" for size in shape) for shape in item.get("shapes", ()))
        table.add_row(f"{item['name']}, fully trained", shapes, "1", *[f"{item['trainable']:,}"] * 2)
    return table


def presets_table(record: Record) -> Table:
    """Return a table that compares the four target presets."""
    table = Table(title=f"Presets at r = {record['recipe']['r']}", title_justify="left")
    table.add_column("lora.targets", no_wrap=True)
    for name in ("trained", "share", "adapter", "memory", "time"):
        table.add_column(name, justify="right")
    for name, preset in record["presets"].items():
        if preset["trainable"] is None:
            table.add_row(name, "not in this model", "", "", "", "")
            continue
        peak = preset["peak_bytes"]
        table.add_row(
            name,
            f"{preset['trainable']:,}",
            f"{preset['share']:.3%}",
            f"{preset['adapter_bytes'] / MIB:,.1f} MiB",
            "does not fit" if peak is None else f"{peak / GIB:.1f} GiB",
            duration(preset["train_seconds"]),
            style="bold" if preset["targets"] == record["parameters"]["targets"] else "",
        )
    return table


def scaling_tables(record: Record) -> tuple[Table, Table]:
    """Return two tables of the run on more and more devices: the totals, and where the time of a step goes."""
    scaling = record["scaling"]
    with_cost = "cost" in scaling["rows"][-1]
    made = Table(title=f"On several {scaling['device']} (computed, not measured)", title_justify="left")
    for name in ("devices", "strategy", "memory", "tokens/s", "efficiency", "total", *(["cost"] if with_cost else [])):
        made.add_column(name, justify="left" if name == "strategy" else "right")
    waits = Table(title="Where the time of a step goes", title_justify="left")
    for name in ("devices", "step", "communication", "tokens per device", "balance", "idle"):
        waits.add_column(name, justify="right")
    for number in scaling["too_few"]:
        made.add_row(f"{number:,}", "does not fit")
    for row in scaling["rows"]:
        nodes = row["nodes"]
        devices = f"{row['devices']:,}" if nodes == 1 else f"{nodes:,}×{row['devices'] // nodes:,}"
        cost = [f"{row['cost']:,.2f}"] if with_cost else []
        made.add_row(
            devices,
            row["strategy"],
            f"{row['peak_bytes'] / GIB:.1f} GiB",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['efficiency']:.0%}",
            duration(row["total_seconds"]),
            *cost,
        )
        waits.add_row(
            devices,
            _short(row["step_seconds"]),
            _short(row["communication_seconds"]),
            f"{row['rank_tokens']:,.0f}",
            f"{row['balance']:.0%}",
            f"{row['idle']:.0%}",
        )
    return made, waits


def scaling_lines(record: Record) -> Iterator[Text]:
    """Yield lines that explain the columns and list the assumptions."""
    scaling = record["scaling"]
    yield Text(
        "memory: per device; efficiency: compared with that many times one device; balance: mean tokens per device "
        "over those of the slowest; idle: share of devices without an example",
        style="dim",
    )
    for link in scaling["interconnect"]:
        what = "between nodes" if link["scope"] == "nodes" else "in a node"
        each = "node" if link["shared"] else "device"
        rate = f"{link['bytes_per_second'] / 1e9:g} GB/s one way per {each}"
        yield Text(f"{what}: {link['name']}, {rate} ({link['source']})", style="dim")
    yield Text(f"assumed: {'; '.join(scaling['assumptions'])}", style="dim")
    yield Text(
        f"fsdp waits for communication if micro-batches have fewer than {scaling['hiding_tokens']:,.0f} tokens: "
        "docs/scaling.md",
        style="dim",
    )


def data_table(report: Record) -> RenderableType:
    """Return a table of training and held-out data, with a histogram of example lengths."""
    sides = [side for side in ("train", "eval") if report[side]]
    table = Table(title="Data", title_justify="left")
    table.add_column("")
    for side in sides:
        table.add_column("held-out" if side == "eval" else "training", justify="right")
    labeled = "labels" in report
    rows = {
        "rows": [f"{report[side]['rows']:,}" for side in sides],
        "conversations": [f"{report[side]['conversations']:,}" for side in sides],
        "turns": [f"{report[side]['turns']:,}" for side in sides],
        "tokens": [f"{report[side]['tokens']:,}" for side in sides],
        "p50 / p95 / max": [
            " / ".join(f"{report[side]['length'][name]:,}" for name in ("p50", "p95", "max")) for side in sides
        ],
        "trained tokens": [f"{report[side]['supervised_share']:.0%}" for side in sides],
        "truncated / dropped": [f"{report[side]['truncated']:,} / {report[side]['dropped']:,}" for side in sides],
        "rejected": [f"{report[side]['num_rejected']:,}" for side in sides],
        "duplicates": [f"{report[side]['duplicates']:,}" for side in sides],
        "scripts": [", ".join(_scripts(report[side]["scripts"])) for side in sides],
    }
    for name, values in rows.items():
        if labeled and name in ("turns", "trained tokens"):
            continue
        table.add_row("texts" if labeled and name == "conversations" else name, *map(escape, values))
    for label in report.get("labels", [])[:_MOST_CLASSES]:
        table.add_row(escape(f"class {label}"), *(f"{report[side]['labels'][label]:,}" for side in sides))
    if len(report.get("labels", [])) > _MOST_CLASSES:
        table.add_row(f"{len(report['labels']) - _MOST_CLASSES} more classes", *("see data.json" for _ in sides))
    return Group(
        table, Text("Training examples by number of tokens"), histogram_text(report["train"]["length"]["histogram"])
    )


def histogram_text(bins: dict[str, list[int]]) -> Text:
    """Return the bins (edges, and the counts between them) as bars of text."""
    edges, counts = bins["edges"], bins["counts"]
    highest, width = max(counts), len(f"{edges[-1]:,}")
    lines = [
        f"{_range(start, end - 1, width)} {'█' * _blocks(count, highest)} {count:,}"
        for start, end, count in zip(edges, edges[1:], counts, strict=False)
    ]
    return Text("\n".join(lines))


def _range(first: int, last: int, width: int) -> str:
    return f"{first:>{width},} to {last:>{width},}" if last > first else f"{first:>{2 * width + 4},}"


def _mixture(sources: list[Record]) -> str:
    total = sum(source["num_supervised_tokens"] for source in sources)
    return "; ".join(
        f"{source['num_examples']:,} examples per epoch from {source['name']}"
        + (f" × {source['weight']:g}" if source["weight"] != 1 else "")
        + f" ({source['num_supervised_tokens'] / total:.0%} of the trained tokens)"
        for source in sources
    )


def notes(record: Record) -> Iterator[Text]:
    """Yield warnings, then advice, one line each."""
    for warning in record["warnings"]:
        yield Text.assemble(("! ", "yellow"), warning)
    for advice in record["advice"]:
        source = f" ({advice['source']})" if advice["source"] else ""
        yield Text.assemble(("→ ", "cyan"), (advice["text"], "bold"), f": {advice['reason']}", (source, "dim"))


def measured_line(record: Record) -> str:
    """Return planned vs. actual time, speed and memory of a finished run, as one line."""
    measured, memory, clock = record["measured"], record["memory"], record["time"]
    parts = [
        _actual("training took", duration, measured["train_seconds"], clock["train_seconds"]),
        _actual("evaluation", duration, measured["evaluate_seconds"], clock["evaluate_seconds"]),
        _actual("", lambda rate: f"{rate:,.0f} tokens/s", measured["tokens_per_second"], clock["tokens_per_second"]),
        _actual("peak memory", lambda size: f"{size / GIB:.1f} GiB", measured["peak_bytes"], memory["peak_bytes"]),
    ]
    return ", ".join(parts)


def _actual(what: str, shown: Callable[[float], str], measured: float, planned: float) -> str:
    ratio = as_ratio(measured, planned)
    ratio = f", {ratio} of plan" if ratio.endswith("%") else f", {ratio} plan" if ratio else ""
    return f"{what} {shown(measured)} (planned {shown(planned)}{ratio})".lstrip()


def _time(clock: Record) -> str:
    return (
        f"{'at most ' if clock['is_upper_bound'] else ''}about {duration(clock['total_seconds'])}, "
        f"{_interval(clock, lambda low, high: f'{duration(low)} to {duration(high)} on a quiet machine')}: "
        f"training {duration(clock['train_seconds'])} at {clock['tokens_per_second']:,.0f} tokens/s, "
        f"evaluation {duration(clock['evaluate_seconds'])}; from {clock['source']}"
    )


def _interval(planned: Record, shown: Callable[[float, float], str]) -> str:
    """Return the bounds of a planned number; that there are none where no run was measured."""
    interval = planned.get("interval")
    return shown(interval["low"], interval["high"]) if interval else "not calibrated by any run"


def duration(seconds: float) -> str:
    """Format seconds: `2 h 5 min`, `3 min 4 s`, `7 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _short(seconds: float) -> str:
    """Format the seconds of a step: `1.2 s`, `34 ms`, `56 µs`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds / 1e-6:,.0f} µs"


def _kind(name: str) -> str:
    return ".".join([part for part in name.split(".") if not part.isdigit()][-2:])


def _scripts(shares: dict[str, float]) -> Iterator[str]:
    for name, share in list(shares.items())[:4]:
        yield f"{name.capitalize()} {share:.1%}"


def _blocks(count: int, highest: int) -> int:
    return max(1, round(_BAR * count / highest)) if count else 0
