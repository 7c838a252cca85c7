"""Data that is too large to be prepared before training: rows become examples when their step comes.

Before training starts, every line is counted, and a random sample is read, verified and reported like smaller data. The
steps are planned over row numbers, so that any of them can be computed without those before. A row that turns out not to be
trainable leaves its step one example smaller.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from loratune.data.examples import Example
from loratune.data.masking.render import Policy, Renderer
from loratune.data.masking.token_labels import backend_of
from loratune.data.prepare import PreparedData, assemble_data
from loratune.data.rows.conversation import Origin, Rejected, rename_columns, to_conversations
from loratune.data.rows.reading import Reader, apply_policy, held_out_sources
from loratune.data.rows.sources import Row
from loratune.data.rows.tables import Chain, Table, can_open, open_table
from loratune.recipe.recipe import DataSection, Source
from loratune.run.errors import DataError, plural
from loratune.run.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MANY_ROWS = 100_000
"""From here on `data.streaming: auto` streams. Preparing so many chats of 240 tokens takes two cores 17 seconds."""

SAMPLE_ROWS = 2_000
LEAST_OF_A_SOURCE = 200
MOST_HELD_OUT = 1_000
"""Conversations that `data.eval: auto` holds out of large data."""


def can_stream(data: DataSection) -> bool:
    """Whether the rows of all training sources can be read one by one.

    Raises:
        DataError: A file or folder is missing.
    """
    return len(set(data.train)) == len(data.train) and all(can_open(source) for source in data.train)


def open_tables(data: DataSection, progress: Progress) -> dict[Source, Table]:
    """The rows of each training source, which `can_stream`.

    Raises:
        DataError: A file cannot be read, or has no rows.
        MachineError: The hub does not answer.
    """
    with progress.task("finding the rows", None):
        return {source: open_table(source) for source in data.train}


class ExampleStream(Sequence[Example | Rejected]):
    """The training examples of large data, each made when it is asked for, and verified like any other.

    Args:
        parts: Tables, each with the format of its rows.
        numbers: The rows to train on, counted over all tables.
        renderer: Makes conversations examples.
        data: The recipe's data section.
        max_length: The longest example, in tokens.
    """

    def __init__(
        self,
        parts: Sequence[tuple[Table, str]],
        numbers: npt.NDArray[np.int64],
        renderer: Renderer,
        data: DataSection,
        max_length: int,
    ) -> None:
        self._rows = Chain([table for table, _ in parts])
        self._formats = [form for _, form in parts]
        self._numbers = numbers
        self._renderer = renderer
        self._data = data
        self._max_length = max_length

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Example | Rejected: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example | Rejected]: ...
    def __getitem__(self, index: int | slice) -> Example | Rejected | list[Example | Rejected]:
        """The example, or why the row is none.

        Raises:
            DataError: The row cannot be trained on, and `data.on_bad_row` is `error`; or it cannot be read at all.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = int(self._numbers[index])
        try:
            row = self._rows[number]
        except DataError as error:
            if self._data.on_bad_row == "error":
                raise
            return Rejected(origin=Origin(file=str(error.file), line=error.line or 0), reason=error.problem)
        made = self._make(row, self._formats[self._rows.which(number)])
        if isinstance(made, Rejected) and made.reason not in _DROPPED:
            apply_policy([made], self._data)
        return made

    def _make(self, row: Row, form: str) -> Example | Rejected:
        conversations, bad = to_conversations(rename_columns([row], self._data.columns), form)
        if bad:
            return bad[0]
        chunk = self._renderer(conversations)
        chunk.too_long.complain(self._max_length)
        for example in chunk.examples(conversations):
            return example
        reason = chunk.rejected[0][1] if chunk.rejected else _DROPPED[bool(chunk.counts["dropped_empty"])]
        return Rejected(origin=conversations[0].origin, reason=reason)

    @property
    def contents(self) -> dict[str, Any]:
        """What decides the examples, besides tokenizer, template and policy: for `lock.json`."""
        return {**self._rows.contents, "rows": len(self)}


_DROPPED = ("longer than data.max_length", "nothing is left to train after data.max_length")
"""What `data.on_long` decided about, not `data.on_bad_row`."""


def stream_data(
    data: DataSection,
    tables: dict[Source, Table],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    seed: int,
    progress: Progress,
) -> PreparedData:
    """What `prepare_data` returns, but with a sample of the training examples, and a stream of all of them.

    Args:
        data: The recipe's data section.
        tables: From `open_tables`.
        tokenizer: Of the base model.
        max_length: The longest example, in tokens.
        seed: Decides the sample, and which conversations are held out.
        progress: Who is told how it goes.

    Raises:
        DataError: A row of the sample, or of the held-out data, cannot be trained on; see `prepare_data`.
        MachineError: The hub does not answer.
    """
    backend_of(tokenizer)
    rows = Chain(list(tables.values()))
    held_out = held_out_sources(data)
    num_held_out = round(held_out * len(rows)) if isinstance(held_out, float) else 0
    if data.eval == "auto":
        num_held_out = min(num_held_out, MOST_HELD_OUT)
    sample = _Sample(tables, SAMPLE_ROWS + num_held_out, seed)
    read = _SampleReader(data, seed, progress, sample)
    share = num_held_out / sample.size if isinstance(held_out, float) else held_out
    prepared = assemble_data(read, share, tokenizer, max_length, None)
    numbers, copies = _without(rows, sample, prepared) if isinstance(held_out, float) else (np.arange(len(rows)), 0)
    forms = [str(source["format"]) for source in prepared.report["train"]["sources"]]
    policy = Policy(
        train_on=data.train_on,
        thinking=data.thinking,
        max_length=max_length,
        on_long=data.on_long,
        special_tokens_in_text=data.special_tokens_in_text,
    )
    stream = ExampleStream(
        list(zip(tables.values(), forms, strict=True)), numbers, Renderer(tokenizer, policy), data, max_length
    )
    duplicates = len(rows.keys) - len(np.unique(rows.keys))
    report = prepared.report
    report["streamed"] = {
        "rows": len(numbers),
        "sampled_rows": sample.size,
        "duplicate_rows": duplicates,
        "copies_of_held_out_rows": copies,
    }
    report["notices"] = [
        f"{len(numbers):,} rows are read and verified while training runs; lengths and findings are those of a sample of "
        f"{len(prepared.train):,}.",
        *([f"{plural(duplicates, 'row is', 'rows are')} written exactly like an earlier one."] if duplicates else []),
        *report["notices"],
    ]
    return replace(prepared, stream=stream)


class _Sample:
    """Random rows of each source: as many as its share, and a few at least."""

    def __init__(self, tables: dict[Source, Table], size: int, seed: int) -> None:
        total = sum(map(len, tables.values()))
        starts = accumulate((len(table) for table in tables.values()), initial=0)
        self.rows: dict[Source, list[Row]] = {}
        self.lengths = {source: len(table) for source, table in tables.items()}
        self.contents = {source: table.contents for source, table in tables.items()}
        self.numbers: dict[Origin, int] = {}
        for (source, table), start in zip(tables.items(), starts):  # noqa: B905 - the last start is the end
            wanted = min(len(table), max(LEAST_OF_A_SOURCE, round(size * len(table) / total)))
            chosen = self._choose(table, wanted, seed)
            self.rows[source] = [table[number] for number in chosen]
            for number, row in zip(chosen, self.rows[source], strict=True):
                self.numbers[Origin(file=row.file, line=row.line)] = start + number
        self.size = sum(map(len, self.rows.values()))

    def _choose(self, table: Table, wanted: int, seed: int) -> list[int]:
        return sorted(random.Random(seed).sample(range(len(table)), wanted))  # noqa: S311 - no secret


class _SampleReader(Reader):
    """Reads the sample in place of the training sources; others as they are."""

    complete = False

    def __init__(self, data: DataSection, seed: int, progress: Progress, sample: _Sample) -> None:
        super().__init__(data, seed, progress)
        self._sample = sample

    def contents(self, source: Source) -> dict[str, str]:
        return self._sample.contents.get(source) or super().contents(source)

    def count(self, source: Source, rows: Sequence[Row]) -> int:
        return self._sample.lengths.get(source, len(rows))

    def rows(self, source: Source) -> list[Row]:
        return self._sample.rows[source] if source in self._sample.rows else super().rows(source)


def _without(rows: Chain, sample: _Sample, prepared: PreparedData) -> tuple[npt.NDArray[np.int64], int]:
    """The row numbers without those that are held out and their copies, and how many copies there were."""
    held_out = np.array([sample.numbers[c.origin] for c in prepared.eval_conversations], dtype=np.int64)
    out = np.zeros(len(rows), dtype=np.bool_)
    if len(rows.keys):
        out = np.isin(rows.keys, rows.keys[held_out])
    out[held_out] = True
    if out.all():
        raise DataError("every row is a copy of one that is held out", fix="give data.eval=FILE, or data.eval=none")
    return np.flatnonzero(~out), int(out.sum()) - len(held_out)
