"""Sources → validated items (conversations or labeled texts), and which conversations are held out."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from loratune.data.rows.formats import check_columns, detect_format, rename_columns, to_conversations
from loratune.data.rows.hub import hub_has_split
from loratune.data.rows.sources import files_left_out, hash_files, hash_rows, is_local, read_rows
from loratune.recipe.roles import as_written
from loratune.run.errors import DataError, plural

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from loratune.data.rows.conversation import Conversation
    from loratune.data.rows.fields import Unread
    from loratune.data.rows.row import Rejected, Row
    from loratune.recipe.recipe import DataSection, Source
    from loratune.run.progress import Progress

AUTO_EVAL_FRACTION = 0.05

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadSide(Generic[T]):
    """One side of the data, train or eval, as it was read."""

    sources: list[dict[str, Any]]
    """A description of each source, for the data report."""
    format: str
    num_rows: int
    items: list[T]
    """The valid rows: conversations, or labeled texts."""
    keys: list[Any]
    """A hashable key of each item; equal for items with the same content."""
    rejected: list[Rejected]
    unread: Unread = field(default_factory=Counter)
    """The fields of the rows that are not read."""
    left_out: list[str] = field(default_factory=list)
    """The files of folders that are not read, each with the reason."""
    num_held_out: int = 0
    """Rows that were moved to the held-out side."""
    num_held_out_copies: int = 0
    """Further copies of these, which neither side has."""

    def choose(self, numbers: Sequence[int]) -> ReadSide[T]:
        """Return the side with these items only."""
        return replace(self, items=[self.items[n] for n in numbers], keys=[self.keys[n] for n in numbers])


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted(Generic[T]):
    """The rows of one source, validated."""

    format: str
    items: list[T]
    rejected: list[Rejected]
    unread: Unread = field(default_factory=Counter)


def held_out_sources(data: DataSection) -> tuple[Source, ...] | float:
    """Return the sources of held-out data, or the fraction of the training data to hold out; no sources: none."""
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
    """Reads sources. Rows of a Hub dataset are read once, since only the rows identify it.

    Attributes:
        complete: Whether all rows are read, not only a sample.
    """

    complete = True

    def __init__(self, data: DataSection, seed: int, progress: Progress) -> None:
        self.data = data
        self.seed = seed
        self.progress = progress
        self._hub_rows: dict[Source, list[Row]] = {}

    def __call__(self, sources: Sequence[Source]) -> ReadSide[Conversation]:
        """Read the rows of all sources as conversations. Each source has its own format.

        Raises:
            DataError, MachineError: As `read`.
        """

        def convert(source: Source, rows: list[Row]) -> Converted[Conversation]:
            format_name = _format(rows, self.data, source)
            unread: Unread = Counter()
            good, bad = to_conversations(rows, format_name, unread)
            return Converted(format=format_name, items=good, rejected=bad, unread=unread)

        return self.read(sources, convert, _content_key)

    def read(
        self,
        sources: Sequence[Source],
        convert: Callable[[Source, list[Row]], Converted[T]],
        key: Callable[[T], Hashable],
    ) -> ReadSide[T]:
        """Read the rows of all sources.

        Args:
            sources: The sources.
            convert: Validates the rows of a source, whose columns are renamed already.
            key: Returns a key that is equal for items with the same content.

        Raises:
            DataError: A row cannot be trained on and `data.on_bad_row` is `error`, or see `read_rows`.
            MachineError: See `read_rows`.
        """
        described: list[dict[str, Any]] = []
        items: list[T] = []
        rejected: list[Rejected] = []
        unread: Unread = Counter()
        left_out: list[str] = []
        num_rows = 0
        for source in sources:
            rows = self.rows(source)
            check_columns(rows, self.data.columns)
            rows = rename_columns(rows, self.data.columns)
            converted = convert(source, rows)
            described.append(
                {
                    **source.model_dump(),
                    "format": converted.format,
                    "rows": self.count(source, rows),
                    "sha256": self.contents(source),
                }
            )
            items += converted.items
            rejected += converted.rejected
            unread.update(converted.unread)
            left_out += files_left_out(source)
            num_rows += len(rows)
        apply_policy(rejected, self.data)
        return ReadSide(
            sources=described,
            format=", ".join(dict.fromkeys(source["format"] for source in described if source["format"])),
            num_rows=num_rows,
            items=items,
            keys=[key(item) for item in items],
            rejected=rejected,
            unread=unread,
            left_out=list(dict.fromkeys(left_out)),
        )

    def contents(self, source: Source) -> dict[str, str]:
        """Return the SHA-256 of each file, or of the rows of a Hub dataset."""
        return hash_files(source) if is_local(source) else hash_rows(self.rows(source))

    def count(self, source: Source, rows: Sequence[Row]) -> int:  # noqa: ARG002 - a reader of samples needs the source
        """Return how many rows the source has, of which `rows` were read."""
        return len(rows)

    def rows(self, source: Source) -> list[Row]:
        """Return the rows of a source.

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
    name = detect_format(rows, strict=data.on_bad_row == "error") if data.format == "auto" else data.format
    if name == "text" and data.train_on != "all":
        raise DataError(
            f"the rows are plain text, which has no answers, but train_on is {as_written(data.train_on)}",
            file=source.name,
            fix="task=sequence_classification, to learn the labels, or data.train_on=all, to learn the texts"
            if any(isinstance(row.value, dict) and "label" in row.value for row in rows[:1])
            else "set data.train_on=all",
        )
    return name


def apply_policy(rejected: Sequence[Rejected], data: DataSection) -> None:
    """Raise if rows were rejected and the recipe does not skip them.

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
            fix="correct the row, or leave such rows out with data.on_bad_row=skip; data.json lists them",
        )


def _content_key(conversation: Conversation) -> int:
    # A hash of 128 bits instead of the text, which would hold every conversation in memory twice.
    text = json.dumps([conversation.messages, conversation.tools, conversation.text], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest())


def hold_out(
    side: ReadSide[T], fraction: float, seed: int, stratum: Callable[[T], str] = lambda _: ""
) -> tuple[ReadSide[T], ReadSide[T]]:
    """Split off a seeded choice of distinct conversations or pairs; all copies of one go to the same side.

    Args:
        side: The training side.
        fraction: The fraction to hold out, 0 to 1.
        seed: Seed of the choice.
        stratum: Returns a word for the kind of an item; the fraction is held out of each kind, at least one item.

    Returns:
        The training side and the held-out side.

    Raises:
        DataError: There are fewer than two distinct conversations, or of one kind.
    """
    groups: dict[int, list[int]] = {}
    for number, key in enumerate(side.keys):
        groups.setdefault(key, []).append(number)
    strata: dict[str, list[int]] = {} if groups else {"": []}
    for key, group in groups.items():
        strata.setdefault(stratum(side.items[group[0]]), []).append(key)
    draw = random.Random(seed)  # noqa: S311 - no secret
    chosen: set[int] = set()
    for kind, keys in strata.items():
        if len(keys) < 2:
            what = f"distinct {kind} conversation" if kind else "distinct conversation"
            raise DataError(
                f"{plural(len(keys), what)}: nothing can be held out",
                fix="provide more data, or set data.eval=none or data.eval=FILE",
            )
        draw.shuffle(keys)
        chosen.update(keys[: min(max(1, round(fraction * len(keys))), len(keys) - 1)])
    train = sorted(n for key, group in groups.items() if key not in chosen for n in group)
    evaluation = [group[0] for key, group in groups.items() if key in chosen]
    copies = len(side.items) - len(train) - len(evaluation)
    kept = replace(side.choose(train), num_held_out=len(evaluation), num_held_out_copies=copies)
    return kept, held_out_side(side, evaluation, fraction, seed)


def held_out_side(side: ReadSide[T], numbers: Sequence[int], fraction: float, seed: int) -> ReadSide[T]:
    """Return the held-out side of items chosen from the training side."""
    note = [{"held_out": fraction, "seed": seed, "from": "train"}]
    chosen = side.choose(numbers)
    return replace(chosen, sources=note, num_rows=len(numbers), rejected=[], unread=Counter(), left_out=[])
