"""Sources → conversations, and which of them are held out."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from loratune.data.rows.conversation import (
    Conversation,
    Rejected,
    check_columns,
    detect_format,
    rename_columns,
    to_conversations,
)
from loratune.data.rows.sources import Row, hash_files, hash_rows, hub_has_split, is_local, read_rows
from loratune.recipe.recipe import DataSection, Source
from loratune.recipe.roles import as_written
from loratune.run.errors import DataError, plural
from loratune.run.progress import Progress

AUTO_EVAL_FRACTION = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadSide:
    """One side of the data, train or eval, as it was read."""

    sources: list[dict[str, Any]]
    format: str
    num_rows: int
    conversations: list[Conversation]
    keys: list[int]
    """Of each conversation; equal for those that say the same."""
    rejected: list[Rejected]


def held_out_sources(data: DataSection) -> tuple[Source, ...] | float:
    """Sources of held-out data, or the fraction of the training data to hold out; no sources: nothing is held out."""
    if data.eval == "none":
        return ()
    if data.eval != "auto":
        return data.eval if isinstance(data.eval, tuple) else float(data.eval)
    first = data.train[0]
    from_hub = len(data.train) == 1 and not is_local(first) and (first.config or first.split)
    if from_hub and first.split != "test" and hub_has_split(first, "test"):
        return (first.model_copy(update={"split": "test", "weight": 1.0}),)
    return AUTO_EVAL_FRACTION


class Reader:
    """Reads sources as conversations. Rows of a hub data set are read once, since only they tell what they are.

    Attributes:
        complete: Whether all rows are read.
    """

    complete = True

    def __init__(self, data: DataSection, seed: int, progress: Progress) -> None:
        self.data = data
        self.seed = seed
        self.progress = progress
        self._hub_rows: dict[Source, list[Row]] = {}

    def __call__(self, sources: Sequence[Source]) -> ReadSide:
        """Rows of all sources, as conversations. Each source has its own format."""
        described: list[dict[str, Any]] = []
        conversations: list[Conversation] = []
        rejected: list[Rejected] = []
        num_rows = 0
        for source in sources:
            rows = self.rows(source)
            check_columns(rows, self.data.columns)
            rows = rename_columns(rows, self.data.columns)
            form = _format(rows, self.data, source)
            good, bad = to_conversations(rows, form)
            described.append(
                {
                    **source.model_dump(),
                    "format": form,
                    "rows": self.count(source, rows),
                    "sha256": self.contents(source),
                }
            )
            conversations += good
            rejected += bad
            num_rows += len(rows)
        apply_policy(rejected, self.data)
        formats = dict.fromkeys(source["format"] for source in described)
        return ReadSide(
            sources=described,
            format=", ".join(formats),
            num_rows=num_rows,
            conversations=conversations,
            keys=[_key(conversation) for conversation in conversations],
            rejected=rejected,
        )

    def contents(self, source: Source) -> dict[str, str]:
        """The SHA-256 of each file; of a hub data set, of its rows."""
        return hash_files(source) if is_local(source) else hash_rows(self.rows(source))

    def count(self, source: Source, rows: Sequence[Row]) -> int:  # noqa: ARG002 - of a sample, the source knows
        """How many rows the source has, of which these were read."""
        return len(rows)

    def rows(self, source: Source) -> list[Row]:
        """The rows of a source.

        Raises:
            DataError, MachineError: As `read_rows`.
        """
        if source in self._hub_rows:
            return self._hub_rows[source]
        with self.progress.task(f"reading {source.name}", None):
            rows = read_rows(source, seed=self.seed)
        if not is_local(source):
            self._hub_rows[source] = rows
        return rows


def _format(rows: Sequence[Row], data: DataSection, source: Source) -> str:
    form = detect_format(rows, strict=data.on_bad_row == "error") if data.format == "auto" else data.format
    if form == "text" and data.train_on != "all":
        raise DataError(
            f"the rows are plain text, which has no answers, but train_on is {as_written(data.train_on)}",
            file=source.name,
            fix="task=sequence_classification, to learn the labels, or data.train_on=all, to learn the texts"
            if any(isinstance(row.value, dict) and "label" in row.value for row in rows[:1])
            else "set data.train_on=all",
        )
    return form


def apply_policy(rejected: Sequence[Rejected], data: DataSection) -> None:
    """Refuse rows that cannot be trained on, where the recipe does not leave them out.

    Raises:
        DataError: There are some, and `data.on_bad_row` is `error`.
    """
    if rejected and data.on_bad_row == "error":
        first = rejected[0]
        more = f" ({len(rejected)} such rows)" if len(rejected) > 1 else ""
        raise DataError(
            f"{first.reason}{more}",
            file=first.origin.file,
            line=first.origin.line,
            fix="correct the row, or leave such rows out with data.on_bad_row=skip; they are listed in data.json",
        )


def _key(conversation: Conversation) -> int:
    """Equal for conversations that say the same: a hash of 128 bits, since the texts would be held twice."""
    text = json.dumps([conversation.messages, conversation.tools, conversation.text], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest())


def hold_out(part: ReadSide, fraction: float, seed: int) -> tuple[ReadSide, ReadSide]:
    """Split off a seeded choice of distinct conversations: all copies of one go to the same side.

    Raises:
        DataError: There are fewer than two.
    """
    groups: dict[int, list[int]] = {}
    for number, key in enumerate(part.keys):
        groups.setdefault(key, []).append(number)
    if len(groups) < 2:
        raise DataError(
            f"{plural(len(groups), 'distinct conversation')}: nothing can be held out",
            fix="give more data, or set data.eval=none or data.eval=FILE",
        )
    keys = list(groups)
    random.Random(seed).shuffle(keys)  # noqa: S311 - no secret
    number = min(max(1, round(fraction * len(keys))), len(keys) - 1)
    chosen = set(keys[:number])
    train = sorted(n for key, group in groups.items() if key not in chosen for n in group)
    evaluation = [group[0] for key, group in groups.items() if key in chosen]
    note = [{"held_out": fraction, "seed": seed, "from": "train"}]
    return (
        _choose(part, train),
        replace(_choose(part, evaluation), sources=note, num_rows=len(evaluation), rejected=[]),
    )


def _choose(part: ReadSide, numbers: Sequence[int]) -> ReadSide:
    return replace(part, conversations=[part.conversations[n] for n in numbers], keys=[part.keys[n] for n in numbers])
