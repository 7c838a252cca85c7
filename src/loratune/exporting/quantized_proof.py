"""What quantized values show about an update if only the quantizer knows how they are rounded.

W = B + s·D + noise, with base B and update D. A right file has s = 1, one without the update s = 0. The noise of one
weight is far larger than its update, but a matrix has many: s is found by least squares, and its standard error says
how much the matrix proves. What the noise may be is known, too: a type of n bits has 2ⁿ steps in each block.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BLOCK = 32
"""Weights that share a scale in the largest blocks of llama.cpp's types."""
MOST_NOISE = 2.0
"""How many times the error of evenly spaced steps in each block a right quantizer may leave."""
STANDARD_ERRORS = 4.0
"""How far chance moves the share of a right matrix: one of 16,000 is further off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldShare:
    """How much of an update quantized values contain.

    Attributes:
        share: The least-squares estimate of s: 1 is right, 0 a lost update.
        error: Its standard error.
    """

    share: float
    error: float

    @property
    def chance(self) -> float:
        """How far chance may move the share."""
        return STANDARD_ERRORS * self.error


def held_share(values: torch.Tensor, base: torch.Tensor, update: torch.Tensor) -> HeldShare:
    """Estimate how much of an update quantized values contain.

    The part of the update along the base is left out: quantizers shrink weights a little, which would look like it.
    The error is that of White (1980), since blocks differ in the size of their steps.

    Args:
        values: The quantized values, as floats, of any shape.
        base: The base's values, of the same shape.
        update: The update, not zero.
    """
    change, base, direction = (tensor.double().flatten() for tensor in (values - base, base, update))
    length = float(base @ base)
    if length:
        direction = direction - (direction @ base) / length * base
        change = change - (change @ base) / length * base
    power = float(direction @ direction)
    if power == 0:
        return HeldShare(share=0.0, error=float("inf"))
    share = float(change @ direction) / power
    residual = change - share * direction
    return HeldShare(share=share, error=float((direction * residual).norm()) / power)


def is_on_grid(values: torch.Tensor) -> bool:
    """Return whether a base's values were quantized to few bits before, as those of a GGUF file or nf4 are.

    A quantizer then finds the same steps again and rounds small updates back to the base: its error is not noise, and
    a lost update says nothing about the file. Of 32 values of 4 bits about 12 differ, of bfloat16 nearly all.

    Args:
        values: The base's values, [O, I], with rows of a multiple of 32.
    """
    blocks = values.reshape(-1, BLOCK).sort(-1).values
    distinct = (blocks.diff(dim=-1) != 0).sum(-1) + 1
    return float(distinct.double().mean()) < BLOCK * 0.75


def largest_noise(kind: str, exact: torch.Tensor) -> float | None:
    """Return the largest norm of a correct quantizer's error.

    Args:
        kind: The type's name, such as `Q4_K`.
        exact: The values before, [O, I].

    Returns:
        The norm; None for a type whose number of bits its name does not say, or rows that it cannot hold.
    """
    found = re.fullmatch(r"I?Q(\d)_\w+", kind)
    if found is None or exact.shape[-1] % BLOCK:
        return None
    steps = exact.float().reshape(-1, BLOCK).abs().amax(-1).double() / 2 ** (int(found[1]) - 1)
    return MOST_NOISE * float(steps.norm()) * (BLOCK / 12) ** 0.5
