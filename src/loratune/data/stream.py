"""Streaming of data too large to prepare before training: rows become examples shortly before their step.

Before training starts, all lines are counted, and a random sample is read, verified and reported like smaller data. The
steps are planned over row numbers, so any step can be computed without those before it. A row that turns out to be
untrainable leaves its step one example smaller.
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
from loratune.data.masking.policy import Policy
from loratune.data.masking.renderer import Renderer
from loratune.data.masking.tokenizer import backend_of
from loratune.data.prepare import assemble_data
from loratune.data.rows.formats import rename_columns, to_conversations
from loratune.data.rows.reading import Reader, apply_policy, held_out_sources
from loratune.data.rows.row import Origin, Rejected, Row
from loratune.data.rows.tables import Chain, RowTable, can_open, open_table
from loratune.run.errors import DataError, plural

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loratune.data.prepared import PreparedData
    from loratune.recipe.recipe import DataSection, Source
    from loratune.run.progress import Progress

MANY_ROWS = 100_000
"""Rows from which `data.streaming: auto` streams. Preparing this many chats of 240 tokens takes two cores 17 s."""

SAMPLE_ROWS = 2_000
LEAST_OF_A_SOURCE = 200
MOST_HELD_OUT = 1_000
"""Maximum conversations that `data.eval: auto` holds out of streamed data."""


def can_stream(data: DataSection) -> bool:
    """Whether the rows of all training sources can be read one by one.

    Raises:
        DataError: A file or folder is missing.
    """
    if data.on_long == "split":  # a row would be several examples, and steps are planned over rows
        return False
    return len(set(data.train)) == len(data.train) and all(can_open(source) for source in data.train)


def open_tables(data: DataSection, progress: Progress) -> dict[Source, RowTable]:
    """Open the rows of each training source of data for which `can_stream` is true.

    Raises:
        DataError: A file cannot be read, or has no rows.
        MachineError: The Hub does not answer.
    """
    with progress.task("finding the rows", None):
        return {source: open_table(source) for source in data.train}


class ExampleStream(Sequence[Example | Rejected]):
    """The training examples of large data, each made on demand, and verified like any other.

    Args:
        parts: Tables, each with the format of its rows.
        numbers: Numbers of the rows to train on, counted over all tables.
        renderer: Turns conversations into examples.
        data: The recipe's data section.
        max_length: The maximum length of an example, in tokens.
    """

    def __init__(
        self,
        parts: Sequence[tuple[RowTable, str]],
        numbers: npt.NDArray[np.int64],
        renderer: Renderer,
        data: DataSection,
        max_length: int,
    ) -> None:
        self._rows = Chain([table for table, _ in parts])
        self._formats = [format_name for _, format_name in parts]
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
        """Return the example, or the reason why the row is not one.

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
        result = self._make(row, self._formats[self._rows.which(number)])
        if isinstance(result, Rejected) and result.reason not in _DROPPED:
            apply_policy([result], self._data)
        return result

    def _make(self, row: Row, format_name: str) -> Example | Rejected:
        conversations, bad = to_conversations(rename_columns([row], self._data.columns), format_name)
        if bad:
            return bad[0]
        chunk = self._renderer(conversations)
        chunk.too_long.raise_if_any(self._max_length)
        for example in chunk.examples(conversations):
            return example
        reason = chunk.rejected[0][1] if chunk.rejected else _DROPPED[bool(chunk.counts["dropped_empty"])]
        return Rejected(origin=conversations[0].origin, reason=reason)

    @property
    def contents(self) -> dict[str, Any]:
        """What decides the examples in addition to tokenizer, template and policy, for `lock.json`."""
        return {**self._rows.contents, "rows": len(self)}


_DROPPED = ("longer than data.max_length", "nothing is left to train after data.max_length")
"""Reasons under `data.on_long`, to which `data.on_bad_row` does not apply."""


def stream_data(
    data: DataSection,
    tables: dict[Source, RowTable],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    seed: int,
    progress: Progress,
) -> PreparedData:
    """Prepare data like `prepare_data`, with a sample of the training examples and a stream of all of them.

    Args:
        data: The recipe's data section.
        tables: The tables from `open_tables`.
        tokenizer: The tokenizer of the base model.
        max_length: The maximum length of an example, in tokens.
        seed: Seed of the sample, and of the conversations that are held out.
        progress: Receives progress, lines and warnings.

    Raises:
        DataError: A row of the sample, or of the held-out data, cannot be trained on; see `prepare_data`.
        MachineError: The Hub does not answer.
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
    formats = [str(source["format"]) for source in prepared.report["train"]["sources"]]
    renderer = Renderer(tokenizer, Policy.of(data, max_length))
    stream = ExampleStream(list(zip(tables.values(), formats, strict=True)), numbers, renderer, data, max_length)
    held_out_rows = len(prepared.eval_conversations) if isinstance(held_out, float) else 0
    assert len(rows) == len(numbers) + held_out_rows + copies
    duplicates = len(rows.keys) - len(np.unique(rows.keys))
    report = prepared.report
    report["streamed"] = {
        "rows": len(numbers),
        "sampled_rows": sample.size,
        "duplicate_rows": duplicates,
        "copies_of_held_out_rows": copies,
    }
    report["notices"] = [
        f"{len(numbers):,} rows are read and verified during training; lengths and findings are those of a sample of "
        f"{len(prepared.train):,}.",
        *([f"{plural(duplicates, 'row is', 'rows are')} written exactly like an earlier one."] if duplicates else []),
        *report["notices"],
    ]
    return replace(prepared, stream=stream)


class _Sample:
    """Random rows of each source, in proportion to its size, and at least a few."""

    def __init__(self, tables: dict[Source, RowTable], size: int, seed: int) -> None:
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

    def _choose(self, table: RowTable, wanted: int, seed: int) -> list[int]:
        return sorted(random.Random(seed).sample(range(len(table)), wanted))  # noqa: S311 - no secret


class _SampleReader(Reader):
    """Reads the sample instead of the training sources; reads other sources in full."""

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
    """Return the row numbers without held-out rows and their copies, and the number of copies."""
    held_out = np.array([sample.numbers[c.origin] for c in prepared.eval_conversations], dtype=np.int64)
    out = np.zeros(len(rows), dtype=np.bool_)
    if len(rows.keys):
        out = np.isin(rows.keys, rows.keys[held_out])
    out[held_out] = True
    if out.all():
        raise DataError("every row is a copy of one that is held out", fix="give data.eval=FILE, or data.eval=none")
    return np.flatnonzero(~out), int(out.sum()) - len(held_out)
