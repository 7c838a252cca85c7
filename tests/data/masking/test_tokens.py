"""Ids and offsets of one text as arrays."""

from __future__ import annotations

import numpy as np

from loratune.data.masking.tokens import Tokens


def test_offsets_are_split_into_starts_and_ends() -> None:
    tokens = Tokens.of([5, 7], [(0, 2), (2, 6)], "ab cde")
    assert tokens.ids.tolist() == [5, 7]
    assert tokens.starts.tolist() == [0, 2]
    assert tokens.ends.tolist() == [2, 6]
    assert tokens.decoded == "ab cde"


def test_a_text_without_tokens_has_empty_arrays() -> None:
    tokens = Tokens.of([], [], "")
    assert tokens.ids.dtype == tokens.starts.dtype == tokens.ends.dtype == np.int32
    assert len(tokens.ids) == len(tokens.starts) == len(tokens.ends) == 0
