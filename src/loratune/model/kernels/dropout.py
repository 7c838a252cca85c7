"""Dropout whose mask is a function of seed, optimizer step, example, position in the example, module and column.

Each token gets a 32-bit number (its row), each column of each module another, and an element is dropped by a hash of
the two. No generator is involved, so the mask of an example is the same in any micro-batch, on any rank, when a layer
is recomputed, when a step is repeated, and in compiled and eager code. All of it is integer arithmetic, so it is the
same on every device.

Shapes: T tokens (rows), I columns.
"""

from __future__ import annotations

import zlib
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils._triton import has_triton

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 2**64 - 1


def row_numbers(seed: int, step: int, examples: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    """Return a number for each token of a micro-batch, int32 [T].

    Args:
        seed: The recipe's seed.
        step: The optimizer step.
        examples: Each example's index in the training data.
        lengths: Tokens of each example.
    """
    start = np.uint64((seed * _GOLDEN + step + 1) & _WORD)
    of_step = _mix(np.array([start], dtype=np.uint64))
    of_example = _mix(of_step + np.asarray(examples, dtype=np.uint64) * np.uint64(_GOLDEN))
    positions = np.concatenate([np.arange(n, dtype=np.uint64) for n in lengths])
    return _upper(_mix(np.repeat(of_example, lengths) + positions * np.uint64(_GOLDEN)))


def column_numbers(module: str, width: int) -> torch.Tensor:
    """Return a number for each column of a module's input, int32 [I], from the module's name."""
    of_module = _mix(np.array([zlib.crc32(module.encode())], dtype=np.uint64))
    return _upper(_mix(of_module + np.arange(width, dtype=np.uint64) * np.uint64(_GOLDEN)))


def _mix(x: np.ndarray) -> np.ndarray:
    """Mix 64 bits as SplitMix64 does (Steele, Lea and Flood 2014)."""
    x = x + np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _upper(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((x >> np.uint64(32)).astype(np.uint32).view(np.int32))


class _Current:
    rows: torch.Tensor | None = None


_current = _Current()


@contextmanager
def rows_of_forward(rows: torch.Tensor | None) -> Iterator[None]:
    """Let adapters in this forward drop by these row numbers, int32, one for each token of their inputs."""
    before, _current.rows = _current.rows, rows
    try:
        yield
    finally:
        _current.rows = before


def current_rows() -> torch.Tensor | None:
    """Return the row numbers of the running forward; None: there are none."""
    return _current.rows


def keep_mask(x: torch.Tensor, columns_I: torch.Tensor, dropout: float) -> torch.Tensor:
    """Return a boolean mask shaped like `x`, [..., I], true with probability 1 - `dropout`.

    A module that sees other rows than the forward's tokens, such as an expert, gets numbers made of all tokens' ones:
    these masks depend on the micro-batch. Outside `rows_of_forward`, rows come from torch's generator.
    """
    num_columns = x.shape[-1]
    num_rows = x.numel() // num_columns
    rows = _current.rows
    if rows is None:
        rows = torch.randint(-(2**31), 2**31, (num_rows,), dtype=torch.int32, device=x.device)
    elif rows.numel() != num_rows:
        counted = torch.arange(num_rows, dtype=torch.int32, device=x.device)
        rows = _hash(_hash(counted) ^ rows.sum(dtype=torch.int64).to(torch.int32))
    # Compiled code fuses the hash into its use; eager mode computes the same bits in pieces that fit a cache.
    mask = _hash_mask if torch.compiler.is_compiling() else _mask_on(x.device.type)
    return mask(rows.reshape(-1, 1), columns_I, round(dropout * 2**32) - 2**31).view(x.shape)


def uniform(rows_T: torch.Tensor, columns_I: torch.Tensor) -> torch.Tensor:
    """Return float32 numbers in [-1, 1], [T, I], from the same hash."""
    return _hash(rows_T[:, None] ^ columns_I).float() * 2.0**-31


_FACTORS = (-0x61C88647, -0x7A143589)
"""Odd multipliers: 2³² over the golden ratio (Knuth, TAOCP, section 6.4), and a prime of xxHash32."""


def _hash(number: torch.Tensor) -> torch.Tensor:
    hashed = number * _FACTORS[0]
    return (hashed ^ ((hashed >> 15) & 0x1FFFF)) * _FACTORS[1]


def _hash_mask(by_row_T1: torch.Tensor, by_column_I: torch.Tensor, threshold: int) -> torch.Tensor:
    return _hash(by_row_T1 ^ by_column_I) >= threshold


@cache
def _mask_on(device: str) -> Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]:
    """Return how eager code computes the mask on a device."""
    if device == "cpu":
        return _mask_in_pieces
    # Seven passes over memory would cost more than drawing the mask.
    return torch.compile(_hash_mask, dynamic=True) if device == "cuda" and has_triton() else _hash_mask


_PIECE = 2**16
"""Elements of a piece; its int32 numbers fit into the L2 cache of a core."""


def _mask_in_pieces(by_row_T1: torch.Tensor, by_column_I: torch.Tensor, threshold: int) -> torch.Tensor:
    num_rows, num_columns = by_row_T1.shape[0], by_column_I.shape[0]
    step = max(1, _PIECE // num_columns)
    mask = torch.empty(num_rows, num_columns, dtype=torch.bool)
    hashed = torch.empty(min(step, num_rows), num_columns, dtype=torch.int32)
    shifted = torch.empty_like(hashed)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        h, s = hashed[: rows.stop - start], shifted[: rows.stop - start]
        torch.bitwise_xor(by_row_T1[rows], by_column_I, out=h).mul_(_FACTORS[0])
        torch.bitwise_right_shift(h, 15, out=s).bitwise_and_(0x1FFFF)
        torch.ge(h.bitwise_xor_(s).mul_(_FACTORS[1]), threshold, out=mask[rows])
    return mask


class AdapterDropout(torch.nn.Dropout):
    """The dropout of an adapter's input, by `keep_mask`, in place of PEFT's.

    Args:
        p: Fraction in [0, 1) of elements set to zero; the others are scaled by 1/(1 - p).
        module: Name of the adapted module.
        width: Columns of its input.
        device: Where it runs.
    """

    def __init__(self, p: float, module: str, width: int, device: torch.device) -> None:
        super().__init__(p)
        self.columns: torch.Tensor
        self.register_buffer("columns", column_numbers(module, width).to(device), persistent=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 # torch's name
        if not self.training:
            return input
        return torch.where(keep_mask(input, self.columns, self.p), input, 0) / (1 - self.p)
