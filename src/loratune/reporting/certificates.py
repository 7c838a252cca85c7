"""What was merged and exported, and how it was shown to be the same model."""

from __future__ import annotations

from collections.abc import Iterator

from loratune.reporting.answers import short
from loratune.reporting.blocks import Block, Paragraph, Table
from loratune.reporting.files import RunFiles
from loratune.run import Record


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
