"""One run → the sections of its page."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from typing import TypeVar

import yaml

from loratune.recipe.roles import trained_in_words
from loratune.reporting.blocks import (
    UNEXPECTED,
    Block,
    Chart,
    Charts,
    Code,
    Figure,
    Fold,
    Items,
    Page,
    Paragraph,
    Table,
    TokenRun,
    Tokens,
    build_sections,
)
from loratune.reporting.charts import Bar, draw_bars
from loratune.reporting.curves_section import curves
from loratune.reporting.data_section import data
from loratune.reporting.result_section import result
from loratune.reporting.run_files import RunFiles
from loratune.reporting.samples_section import failures, samples, short
from loratune.reporting.units import as_bytes, as_duration, as_measure, as_ratio, measure_in_words
from loratune.run.directory import Record
from loratune.run.errors import plural

Built = TypeVar("Built")


def run_page(files: RunFiles) -> Page:
    """Everything that is known about a run. What cannot be told is said on the page."""
    return Page(
        title=files.name,
        lead=_guarded(lambda: _lead(files), "A fine-tuning run of loratune."),
        badge=_guarded(lambda: _badge(files), files.state),
        tone=files.state,
        figures=_guarded(lambda: tuple(_figures(files)), ()),
        sections=build_sections(_PARTS, files, files.complaints),
        footer=f"Read from {files.run.root} at {files.read_at:%Y-%m-%d %H:%M} UTC.",
    )


def _guarded(build: Callable[[], Built], otherwise: Built) -> Built:
    try:
        return build()
    except UNEXPECTED:  # the section on the same file says so
        return otherwise


def _lead(files: RunFiles) -> str:
    recipe, data = files.lock["recipe"], files.plan["data"]
    sources = ", ".join(short(source["name"]) for source in recipe["data"]["train"])
    return (
        f"{short(recipe['model']['name'])}, fine-tuned with LoRA of rank {recipe['lora']['r']} on "
        f"{plural(data['num_examples'], 'labelled text' if files.classifies else 'conversation')} of {sources}."
    )


def _badge(files: RunFiles) -> str:
    if files.state == "finished":
        return "finished"
    if files.is_trained:
        return "trained, evaluation under way" if files.state == "running" else "trained, evaluation did not finish"
    done = f"step {files.num_done:,} of {files.plan['time']['num_steps']:,}"
    return f"running: {done}" if files.state == "running" else f"stopped after {done}"


def _figures(files: RunFiles) -> Iterator[Figure]:
    tuned, base = files.evaluation.get("tuned", {}), files.evaluation.get("base", {})
    for name in (files.evaluation.get("metric", "none"), "nll"):
        if name in tuned:
            yield Figure(
                name=measure_in_words(name),
                value=as_measure(name, tuned[name]),
                note=f"base {as_measure(name, base[name])}",
            )
    if not tuned and files.steps:
        first, last = files.steps[0]["loss"], files.steps[-1]["loss"]
        yield Figure(name="training loss", value=f"{last:.4g}", note=f"first step {first:.4g}")
    if files.steps:
        yield Figure(
            name="time in steps",
            value=as_duration(files.train_seconds),
            note=f"promised {as_duration(_promised_seconds(files))}",
        )
        yield Figure(
            name="speed",
            value=f"{files.num_tokens / files.train_seconds:,.0f}",
            note="tokens per second",
        )
    if "measured" in files.plan:
        yield Figure(
            name="peak memory",
            value=as_bytes(files.plan["measured"]["peak_bytes"]),
            note=f"promised {as_bytes(files.plan['memory']['peak_bytes'])}",
        )


def _trained(files: RunFiles) -> Iterator[Block]:
    if not files.lock:
        return
    inputs = files.lock["inputs"]
    yield Table(caption="What was trained on what", rows=tuple(_facts(files)))
    choices = files.lock["choices"]
    if choices:
        yield Table(
            caption="Settings that were left to loratune",
            columns=("setting", "became", "because"),
            rows=tuple((name, str(choice["value"]), choice["reason"]) for name, choice in choices.items()),
        )
    if files.plan.get("warnings"):
        yield Paragraph(text="Before it started, loratune warned:", tone="warning")
        yield Items(lines=tuple(files.plan["warnings"]))
    rows = [(f"model: {name}", digest) for name, digest in inputs["model"].items()]
    rows.append(("chat template", inputs["template"]))
    sides = [side for side in ("train", "eval", "forgetting", "start") if side in inputs]
    rows += [(f"{side}: {name}", digest) for side in sides for name, digest in inputs[side].items()]
    yield Fold(
        title="Fingerprints of everything that went in (SHA-256)",
        blocks=(
            Table(caption="SHA-256 of model files, chat template, and token ids with their mask", rows=tuple(rows)),
        ),
    )


def _facts(files: RunFiles) -> Iterator[tuple[str, str]]:
    recipe, inputs, adapter = files.lock["recipe"], files.lock["inputs"], files.lock["adapter"]
    model, data, lora, train = (recipe[section] for section in ("model", "data", "lora", "train"))
    yield "base model", model["name"]
    yield (
        "loaded from",
        inputs["model_path"] + (f", revision {inputs['model_revision']}" if inputs["model_revision"] else ""),
    )
    yield "adapter", f"LoRA, rank {lora['r']}, alpha {lora['alpha']:g}, dropout {lora['dropout']:g}"
    yield "adapted", adapter["targets"]
    total = files.plan.get("parameters", {}).get("total")
    share = f" of {total:,} ({adapter['trainable'] / total:.2%})" if total else ""
    yield "trained parameters", f"{adapter['trainable']:,}{share}"
    yield "training data", ", ".join(source["name"] for source in data["train"])
    held_out = data["eval"]
    yield "held-out data", ", ".join(s["name"] for s in held_out) if isinstance(held_out, list) else str(held_out)
    loss_on = trained_in_words(data["train_on"])
    yield "loss on", f"the class of each text: {', '.join(inputs['labels'])}" if "labels" in inputs else loss_on
    yield "length", f"{train['epochs']:g} epochs of {train['batch_size']} examples a step"
    yield (
        "learning rate",
        f"{train['learning_rate']:g}, {train['schedule']}, warm-up over {train['warmup_fraction']:.0%} of the steps",
    )
    yield "on", f"{train['device']}, weights in {model['dtype']}, engine {train['engine']}, seed {train['seed']}"
    yield "machine", f"{files.lock['machine']['platform']}"


def _promise(files: RunFiles) -> Iterator[Block]:
    if not files.plan:
        return
    clock, measured = files.plan["time"], files.plan.get("measured", {})
    done, num_steps, seconds = files.num_done, clock["num_steps"], files.train_seconds
    share = done / num_steps
    promised_seconds = _promised_seconds(files)
    so_far = "" if done == num_steps or files.is_trained else " so far"
    rows = [("optimizer steps", f"{num_steps:,}", f"{done:,}{so_far}", f"{share:.0%}")]
    if done:
        rows.append(
            (
                f"time in steps{so_far}",
                as_duration(promised_seconds),
                as_duration(seconds),
                as_ratio(seconds, promised_seconds),
            )
        )
    peak = files.plan["memory"]["peak_bytes"]
    if measured:
        rows.append(
            ("peak memory", as_bytes(peak), as_bytes(measured["peak_bytes"]), f"{measured['peak_bytes'] / peak:.0%}")
        )
        for name, words in (("evaluate_seconds", "evaluation"), ("total_seconds", "from loading to the end")):
            rows.append(_promised_row(words, clock.get(name), measured.get(name)))
    else:
        rows.append(("peak memory", as_bytes(peak), "known at the end", ""))
    yield Table(
        caption="Promised before the weights were loaded, and measured",
        columns=("", "promised", "measured", "measured / promised"),
        rows=tuple(rows),
        numeric=True,
    )
    if files.state == "running" and 0 < done < num_steps:
        yield Paragraph(text=f"At this rate the steps take {as_duration(seconds / done * (num_steps - done))} more.")
    if files.state == "stopped":
        yield Code(title="Go on", text=f"loratune resume {shlex.quote(str(files.run.root))}")
    yield Charts(charts=(_memory_chart(files.plan),))


def _promised_row(words: str, promised: float | None, measured: float | None) -> tuple[str, str, str, str]:
    """A line of seconds; what an older run has not is left open."""
    ratio = as_ratio(measured, promised) if promised and measured is not None else ""
    return (
        words,
        as_duration(promised) if promised is not None else "",
        as_duration(measured) if measured is not None else "",
        ratio,
    )


def _promised_seconds(files: RunFiles) -> float:
    """For the steps that are done."""
    clock = files.plan["time"]
    return float(clock["train_seconds"] * files.num_done / clock["num_steps"])


def _memory_chart(plan: Record) -> Chart:
    memory, measured = plan["memory"], plan.get("measured")
    parts = _memory_parts(memory)
    bars = [
        Bar(
            name="promised",
            parts=tuple((size / 2**20, colour) for colour, (_, size) in enumerate(parts)),
            label=as_bytes(memory["peak_bytes"]),
        )
    ]
    alt = f"Promised {as_bytes(memory['peak_bytes'])}: " + ", ".join(
        f"{words} {as_bytes(size)}" for words, size in parts
    )
    if measured:
        bars.append(
            Bar(name="measured", parts=((measured["peak_bytes"] / 2**20, 5),), label=as_bytes(measured["peak_bytes"]))
        )
        alt += f". Measured {as_bytes(measured['peak_bytes'])}"
    return Chart(
        title="Memory at its peak",
        svg=draw_bars("memory", f"{alt}.", bars, x_label="MiB"),
        legend=tuple((colour, f"{words} {as_bytes(size)}") for colour, (words, size) in enumerate(parts)),
    )


def _memory_parts(memory: Record) -> list[tuple[str, int]]:
    """The promised peak in as many parts as there are colours."""
    parts = {
        "base weights": memory["weights_bytes"],
        "adapter and optimizer": memory["adapter_bytes"]
        + memory.get("optimizer_bytes", 0)
        + memory.get("variant_bytes", 0),
        "activations": memory["activation_bytes"],
        "process and allocator": memory["process_bytes"] + memory.get("allocator_bytes", 0),
    }
    rest = memory["peak_bytes"] - sum(parts.values())
    beyond = rest > max(memory["loss_bytes"], memory.get("backward_bytes", 0))
    name = "loading or evaluation beyond training" if beyond else "loss, or a layer's gradients"
    return [*list(parts.items())[:3], (name, rest), *list(parts.items())[3:]]


def _tokens(files: RunFiles) -> Iterator[Block]:
    examples = files.preview.get("examples")
    if not examples:
        return
    yield Paragraph(
        text="The first training examples, token by token as training sees them, each with its class."
        if "labels" in files.data
        else "The first training examples, token by token as training sees them. What is marked carries loss: it is what "
        "the model learns to say. Everything else is only read. The frame is the stop token."
    )
    for example in examples:
        runs = (TokenRun(text=run["text"], style=_style(run)) for run in example["pieces"])
        yield Tokens(title=example["title"], runs=tuple(runs))


def _style(run: Record) -> str:
    kinds = ("trained" if run["trained"] else "context", "special" * run["special"], "stop" * run["stop"])
    return " ".join(filter(None, kinds))


def _again(files: RunFiles) -> Iterator[Block]:
    if not files.lock:
        return
    recipe = files.lock["recipe"]
    folder = recipe["train"]["output_dir"].rstrip("/")
    first, again = shlex.quote(folder), shlex.quote(f"{folder}-again")
    yield Paragraph(
        text="Save these settings as recipe.yaml. They hold every setting, also those that were left to loratune, so "
        "nothing hangs on a default."
    )
    yield Fold(
        title="recipe.yaml",
        blocks=(Code(title="recipe.yaml", text=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)),),
    )
    yield Code(
        title="Then, with the versions below installed",
        text=f"loratune train recipe.yaml train.output_dir={again}",
    )
    yield Paragraph(
        text="The lock.json of both runs must have the same inputs: the fingerprints of model, template and examples. On the "
        "same CPU the losses are then the same; elsewhere they agree to float noise."
    )
    yield Code(
        title="See both on one page",
        text=f"loratune compare {first} {again}",
    )
    yield Table(caption="Versions", rows=tuple(files.lock["versions"].items()))


def certificates(files: RunFiles) -> Iterator[Block]:
    """A row for each place that the model was taken to."""
    if not files.certificates:
        return
    yield Paragraph(
        text="What was written was loaded back and compared with the adapter on its base, in training's own code. The "
        "divergence is that of next-token distributions, of a classifier that of classes, in nats; parity.json has all of it."
    )
    yield Table(
        caption="Certificates",
        columns=(
            "",
            "same model",
            "prompts with the same token ids",
            "same likeliest token",
            "mean divergence",
            "same answers",
        ),
        rows=tuple(_row(record) for record in files.certificates),
        numeric=True,
    )
    yield Table(caption="Checked with", rows=tuple((short(c["path"]), c["checked_with"]) for c in files.certificates))


def _row(record: Record) -> tuple[str, ...]:
    template, distributions, answers = record["template"], record["distributions"], record.get("answers")
    return (
        f"{short(record['path'])}\n{record['kind']}",
        "yes" if record["passed"] else "no",
        f"{template['same_token_ids']} of {template['num_prompts']}",
        f"{distributions['top1_agreement']:.1%}",
        f"{distributions['mean_kl']:.2g}",
        f"{answers['same']} of {answers['num_prompts']}" if answers else "",
    )


_MOST = 20


def events(files: RunFiles) -> Iterator[Block]:
    """The section; nothing where nothing happened."""
    if not files.events:
        return
    yield Table(
        caption="Beside the ordinary steps, as metrics.jsonl has it",
        columns=("step", "what happened"),
        rows=tuple((f"{event['step']:,}", event["message"]) for event in files.events[:_MOST]),
    )
    if len(files.events) > _MOST:
        yield Paragraph(text=f"{len(files.events) - _MOST:,} more in metrics.jsonl.")


_PARTS: tuple[tuple[str, str, Callable[[RunFiles], Iterator[Block]]], ...] = (
    ("result", "Base against tuned", result),
    ("curves", "Curves", curves),
    ("events", "What happened", events),
    ("trained", "What was trained on what", _trained),
    ("promise", "Promised and measured", _promise),
    ("data", "Data", data),
    ("tokens", "Which tokens were trained", _tokens),
    ("samples", "Samples", samples),
    ("failures", "Failures", failures),
    ("certificates", "Taken elsewhere", certificates),
    ("again", "Do it again", _again),
)
