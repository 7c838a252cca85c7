"""The sections of one run's page."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, TypeVar

import yaml
from pydantic import BaseModel

from loratune.reporting.blocks import (
    UNEXPECTED,
    Block,
    Code,
    Figure,
    Fold,
    Items,
    Page,
    Paragraph,
    Table,
    TokenRun,
    TokenText,
    build_sections,
)
from loratune.reporting.curves_section import curves
from loratune.reporting.data_section import data
from loratune.reporting.plan_section import planned_and_actual, planned_train_seconds
from loratune.reporting.result_section import result
from loratune.reporting.samples_section import answers_during_training, failures, last_part, samples
from loratune.reporting.units import as_bytes, as_duration, as_measure, as_path, measure_in_words, unbroken
from loratune.reporting.verdict import verdict_on
from loratune.run.errors import plural

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from loratune.reporting.run_files import RunFiles
    from loratune.run.records.certificate import CertificateRecord
    from loratune.run.records.lock import Inputs, LockRecord
    from loratune.run.records.preview import PreviewExample, PreviewPiece

    _Part = tuple[str, str, Callable[["RunFiles"], Iterator[Block]]]

Built = TypeVar("Built")


def run_page(files: RunFiles) -> Page:
    """Return everything that is known about a run. What is missing or damaged is named on the page."""
    return Page(
        title=files.name,
        lead=_or_default(lambda: _lead(files), "A fine-tuning run of loratune."),
        badge=_or_default(lambda: _badge(files), files.state),
        tone=files.state,
        figures=_or_default(lambda: tuple(_figures(files)), ()),
        sections=build_sections(_parts(files), files, files.complaints),
        footer=f"Read from {as_path(files.run.root)} at {files.read_at:%Y-%m-%d %H:%M} UTC.",
    )


def _or_default(build: Callable[[], Built], default: Built) -> Built:
    try:
        return build()
    except UNEXPECTED:  # the section on the same file says so
        return default


def _lead(files: RunFiles) -> str:
    assert files.lock is not None
    assert files.plan is not None
    recipe = files.lock.recipe
    sources = ", ".join(last_part(source["name"]) for source in recipe["data"]["train"])
    return (
        f"{last_part(recipe['model']['name'])}, fine-tuned with LoRA of rank {recipe['lora']['r']} on "
        f"{plural(files.plan.data.num_examples, files.task.training_example)} of {sources}."
    )


def _badge(files: RunFiles) -> str:
    if files.state == "finished":
        return "finished"
    if files.is_trained:
        return "trained, evaluation running" if files.state == "running" else "trained, evaluation not finished"
    assert files.plan is not None
    done = f"step {files.num_done:,} of {files.plan.time.num_steps:,}"
    return f"running: {done}" if files.state == "running" else f"stopped after {done}"


def _figures(files: RunFiles) -> Iterator[Figure]:
    evaluation, plan = files.evaluation, files.plan
    if evaluation is not None:
        for name in (evaluation.metric, "nll"):
            if name in evaluation.tuned:
                yield Figure(
                    name=measure_in_words(name),
                    value=as_measure(name, evaluation.tuned[name]),
                    note=f"{evaluation.side_before} {as_measure(name, evaluation.base[name])}",
                )
    elif files.steps:
        first, last = files.steps[0].loss, files.steps[-1].loss
        yield Figure(name="training loss", value=f"{last:.4g}", note=f"first step {first:.4g}")
    if files.steps:
        note = ""
        if plan is not None:
            note = f"planned {unbroken(as_duration(planned_train_seconds(plan, files.num_done)))}"
        yield Figure(name="training time", value=as_duration(files.train_seconds), note=note)
    if plan is not None and plan.measured is not None:
        yield Figure(
            name="peak memory",
            value=as_bytes(plan.measured.peak_bytes),
            note=f"planned {unbroken(as_bytes(plan.memory.peak_bytes))}",
        )


def _verdict(files: RunFiles) -> Iterator[Block]:
    """Say in one sentence whether the fine-tuned model is better."""
    if files.evaluation is not None:
        found = verdict_on(files.evaluation)
        text = f"{found.sentence[0].upper()}{found.sentence[1:]}."
        yield Paragraph(text=text, tone="plain" if found.outcome == "better" else "warning")
    elif files.lock is not None and files.is_trained and files.lock.recipe["data"]["eval"] == "none":
        yield Paragraph(text="Not measured: the run has no held-out data (data.eval).", tone="note")


def _settings(files: RunFiles) -> Iterator[Block]:
    lock = files.lock
    if lock is None:
        return
    yield Table(caption="Model, data, settings", rows=tuple(_facts(files, lock)))
    if lock.choices:
        yield Table(
            caption="Automatic settings",
            columns=("setting", "value", "reason"),
            rows=tuple((name, choice.value, choice.reason) for name, choice in lock.choices.items()),
        )
    if files.plan is not None and files.plan.warnings:
        yield Paragraph(text="Warnings before the start:", tone="warning")
        yield Items(lines=files.plan.warnings)
    yield Fold(
        title="Fingerprints of all inputs (SHA-256)",
        blocks=(
            Table(
                caption="SHA-256 of model files, chat template, and token ids with their mask",
                rows=tuple(_fingerprints(lock.inputs)),
            ),
        ),
    )


def _facts(files: RunFiles, lock: LockRecord) -> Iterator[tuple[str, str]]:
    inputs, adapter = lock.inputs, lock.adapter
    model, data, lora, train = (lock.recipe[section] for section in ("model", "data", "lora", "train"))
    yield "base model", model["name"]
    yield (
        "loaded from",
        as_path(inputs.model_path) + (f", revision {inputs.model_revision}" if inputs.model_revision else ""),
    )
    yield "adapter", f"LoRA, rank {lora['r']}, alpha {lora['alpha']:g}, dropout {lora['dropout']:g}"
    yield "adapted modules", adapter.targets
    total = files.plan.parameters.total if files.plan is not None else None
    share = f" of {total:,} ({adapter.trainable / total:.2%})" if total else ""
    yield "trained parameters", f"{adapter.trainable:,}{share}"
    yield "training data", ", ".join(source["name"] for source in data["train"])
    held_out = data["eval"]
    yield "held-out data", ", ".join(s["name"] for s in held_out) if isinstance(held_out, list) else str(held_out)
    yield "trained on", files.task.trained_on(lock)
    yield "length", f"{plural(train['epochs'], 'epoch')}, {plural(train['batch_size'], 'example')} per step"
    yield (
        "learning rate",
        f"{train['learning_rate']:g}, {train['schedule']} schedule, warm-up over {train['warmup_fraction']:.0%} of the "
        "steps",
    )
    if lock.extends is not None:
        way = "as if planned longer" if lock.extends.exact else "with a new schedule"
        yield "extends", f"{lock.extends.run} from its step {lock.extends.step:,}, {way}"
    yield "device", f"{train['device']}, weights in {model['dtype']}, engine {train['engine']}, seed {train['seed']}"
    yield "machine", lock.machine.platform


def _fingerprints(inputs: Inputs) -> Iterator[tuple[str, str]]:
    for name, digest in inputs.model.items():
        yield f"model: {name}", digest
    yield "chat template", inputs.template
    for side in ("train", "eval", "forgetting", "start"):
        part = getattr(inputs, side)
        values = part.model_dump(exclude_unset=True) if isinstance(part, BaseModel) else part or {}
        for name, digest in values.items():
            yield f"{side}: {name}", str(digest)


def _tokens(files: RunFiles) -> Iterator[Block]:
    if files.preview is None or not files.preview.examples:
        return
    trains_tokens = any(piece.trained for example in files.preview.examples for piece in example.pieces)
    yield Paragraph(
        text="The first training examples, token by token as training sees them."
        + (
            " Marked text is trained: the model learns to write it. All other text is context. The framed token is the "
            "stop token."
            if trains_tokens
            else ""
        )
    )
    for example in files.preview.examples:
        yield token_text(example)


def token_text(example: PreviewExample) -> TokenText:
    """Return an example of a preview as a block."""
    runs = (TokenRun(text=piece.text, style=_style(piece)) for piece in example.pieces)
    return TokenText(title=example.title, runs=tuple(runs))


def _style(piece: PreviewPiece) -> str:
    kinds = ("trained" if piece.trained else "context", "special" * piece.special, "stop" * piece.stop)
    return " ".join(filter(None, kinds))


def _reproduce(files: RunFiles) -> Iterator[Block]:
    if files.lock is None:
        return
    recipe = files.lock.recipe
    folder = recipe["train"]["output_dir"].rstrip("/")
    first, again = shlex.quote(folder), shlex.quote(f"{folder}-again")
    yield Paragraph(text="Save these settings as recipe.yaml. All of them are written out, so no default matters.")
    yield Fold(
        title="recipe.yaml",
        blocks=(Code(title="recipe.yaml", text=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)),),
    )
    yield Code(
        title="With the versions below installed, run",
        text=f"loratune train recipe.yaml train.output_dir={again}",
    )
    yield Paragraph(
        text="The lock.json of both runs must have the same inputs: fingerprints of model, template and examples. On "
        "the same CPU the losses are then identical; elsewhere they agree up to floating-point noise."
    )
    yield Code(title="Compare both runs on one page", text=f"loratune compare {first} {again}")
    yield Table(caption="Versions", rows=tuple(files.lock.versions.items()))


def _exports(files: RunFiles) -> Iterator[Block]:
    """Show the certificate of each place that the model was exported to."""
    if not files.certificates:
        return
    yield Paragraph(
        text="Each export was loaded back and compared with base + adapter in the code of training. The KL divergence "
        "is that of next-token distributions (of class distributions for a classifier), in nats; details are in "
        "parity.json."
    )
    yield Table(
        caption="Certificates",
        columns=("", *certificate_facts(files.certificates[0])),
        rows=tuple(
            (f"{last_part(record.path)}\n{record.kind}", *certificate_facts(record).values())
            for record in files.certificates
        ),
        numeric=True,
    )
    verified = tuple((last_part(record.path), record.checked_with) for record in files.certificates)
    yield Table(caption="Verified with", rows=verified)


def certificate_facts(record: CertificateRecord) -> dict[str, str]:
    """Return what a certificate says, by the heads of its columns."""
    template, distributions, answers = record.template, record.distributions, record.answers
    return {
        "same model": {"same": "yes", "different": "no"}.get(record.verdict, record.verdict),
        "prompts with the same token ids": f"{template.same_token_ids} of {template.num_prompts}",
        "same top token": "–" if distributions is None else f"{distributions.top1_agreement:.1%}",
        "mean KL": ("–" if distributions is None or distributions.mean_kl is None else f"{distributions.mean_kl:.2g}"),
        "same answers": f"{answers.same} of {answers.num_prompts}" if answers is not None else "",
    }


_MAX_EVENTS = 20


def _events(files: RunFiles) -> Iterator[Block]:
    """Show skipped steps, loss spikes, memory that ran out, and the like."""
    if not files.events:
        return
    yield Table(
        caption="Events, from metrics.jsonl",
        columns=("step", "event"),
        rows=tuple((f"{event.step:,}", event.message) for event in files.events[:_MAX_EVENTS]),
    )
    if len(files.events) > _MAX_EVENTS:
        yield Paragraph(text=f"{len(files.events) - _MAX_EVENTS:,} more in metrics.jsonl.")


def _parts(files: RunFiles) -> tuple[_Part, ...]:
    """Return the sections; that of the result is named after what the run is compared with."""

    def compared_with() -> str:
        return "Base" if files.evaluation is None else files.evaluation.side_before.capitalize()

    side = _or_default(compared_with, "Base")
    return tuple(
        (name, f"{side} vs. fine-tuned" if name == "result" else title, build) for name, title, build in _PARTS
    )


_PARTS: tuple[_Part, ...] = (
    ("verdict", "Verdict", _verdict),
    ("samples", "Samples", samples),
    ("result", "Base vs. fine-tuned", result),
    ("progress", "Answers during training", answers_during_training),
    ("curves", "Curves", curves),
    ("events", "What happened", _events),
    ("settings", "Model, data, settings", _settings),
    ("plan", "Planned vs. actual", planned_and_actual),
    ("data", "Data", data),
    ("tokens", "Which tokens were trained", _tokens),
    ("failures", "Failures", failures),
    ("exports", "Exports", _exports),
    ("reproduce", "Reproduce", _reproduce),
)
