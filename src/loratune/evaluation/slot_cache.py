"""Keys and values of answers that come and go: every row of a batch is a slot that prompts enter and answers leave.

Rows end at the same column, whatever their length: a step writes one column, in place, and the distance between two
columns is the distance between their tokens, as sliding windows need. The columns in front of a shorter row hold zeros
or what a former row left there; the attention mask hides them.

Shapes: R rows, H key/value heads, C columns, D dimensions of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers.configuration_utils import PreTrainedConfig


@dataclass(slots=True)
class Slots:
    """Where the rows lie in the cache; shared by its layers.

    Attributes:
        num_rows: The most rows at a time.
        num_columns: Columns of the cache; no row may become longer.
        end: The column after the last token of every row.
        lengths: The cached tokens of each row.
        beginning: The tokens of the shared beginning of the rows that are being filled.
        filling: The length of each row that is being filled, beginning included; empty in a step of all rows.
    """

    num_rows: int
    num_columns: int
    end: int = 0
    lengths: list[int] = field(default_factory=list)
    beginning: int = 0
    filling: Sequence[int] = ()

    @property
    def width(self) -> int:
        """The tokens of the longest row."""
        return max(self.lengths, default=0)


class SlotCache(Cache):
    """The cache of all layers of a model that `holds_plain_keys`.

    Call `fill` or `step` before every forward pass, and `done` after it.
    """

    def __init__(self, config: PreTrainedConfig, slots: Slots) -> None:
        self.slots = slots
        super().__init__(
            layers=[
                _SlotLayer(slots, layer.is_sliding) if isinstance(layer, DynamicLayer) else layer
                for layer in DynamicCache(config=config).layers
            ]
        )

    def fill(self, lengths: Sequence[int], beginning: SlotCache | None = None) -> None:
        """Prepare a pass over the tokens of new rows, padded on the right.

        Args:
            lengths: The tokens of each row, those of the beginning included.
            beginning: The cache of one row with which they all begin, whose tokens are not passed again.
        """
        slots = self.slots
        self._move_end(max(slots.end if slots.lengths else 0, *lengths))
        slots.filling, slots.beginning = lengths, 0 if beginning is None else beginning.slots.end
        firsts = [None] * len(self._own()) if beginning is None else beginning._own()
        for layer, first in zip(self._own(), firsts, strict=True):
            layer.beginning = first

    def step(self) -> None:
        """Prepare a pass over one more token of every row."""
        if self.slots.end == self.slots.num_columns:
            self._move_end(self.slots.width)

    def done(self) -> None:
        """Count the tokens of the pass."""
        slots = self.slots
        if slots.filling:
            slots.lengths += slots.filling
        else:
            slots.lengths = [length + 1 for length in slots.lengths]
            slots.end += 1
        slots.filling, slots.beginning = (), 0

    def drop(self, row: int) -> None:
        """Remove a row; the last one takes its place."""
        last = self.slots.lengths.pop()
        if row < len(self.slots.lengths):
            columns = slice(self.slots.end - last, self.slots.end)
            for layer in self._own():
                for held in (layer.keys, layer.values):
                    held[row, :, columns] = held[len(self.slots.lengths), :, columns]
            self.slots.lengths[row] = last

    def _move_end(self, end: int) -> None:
        slots = self.slots
        if slots.lengths and end != slots.end:
            for layer in self._own():
                for held in (layer.keys, layer.values):
                    rows = held[: len(slots.lengths)]
                    rows[:, :, end - slots.width : end] = rows[:, :, slots.end - slots.width : slots.end].clone()
        slots.end = end

    def _own(self) -> list[_SlotLayer]:
        return [layer for layer in self.layers if isinstance(layer, _SlotLayer)]


class _SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values [R, H, C, D] of one layer."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, slots: Slots, is_sliding: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.slots, self.is_sliding = slots, is_sliding
        self.beginning: _SlotLayer | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # Zeros, because what the mask hides is multiplied by zero, and zero times NaN is NaN.
        _, heads, _, size = key_states.shape
        self.keys = key_states.new_zeros(self.slots.num_rows, heads, self.slots.num_columns, size)
        _, heads, _, size = value_states.shape
        self.values = value_states.new_zeros(self.slots.num_rows, heads, self.slots.num_columns, size)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new keys and values; return all that the queries of this pass may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first = self.beginning
        if self.slots.filling:
            return (
                self._filled(self.keys, key_states, None if first is None else first.keys),
                self._filled(self.values, value_states, None if first is None else first.values),
            )
        return self._stepped(self.keys, key_states), self._stepped(self.values, value_states)

    def _filled(self, held: torch.Tensor, new: torch.Tensor, beginning: torch.Tensor | None) -> torch.Tensor:
        if beginning is not None:
            new = torch.cat([beginning.expand(len(new), -1, -1, -1), new], dim=2)
        for row, length in enumerate(self.slots.filling, start=len(self.slots.lengths)):
            held[row, :, self.slots.end - length : self.slots.end] = new[row - len(self.slots.lengths), :, :length]
        return new

    def _stepped(self, held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        end, rows = self.slots.end, len(self.slots.lengths)
        held[:rows, :, end] = new[:, :, 0]
        return held[:rows, :, end - self.slots.width : end + 1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns that a query may see, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Return the columns before those of this pass."""
        return self.slots.beginning if self.slots.filling else self.slots.width

    def get_max_length(self) -> int:
        """Return the most tokens of a row."""
        return self.slots.num_columns


def holds_plain_keys(config: PreTrainedConfig) -> bool:
    """Return whether every layer of the model keeps keys and values of single tokens, and nothing else."""
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    return kinds <= {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}
