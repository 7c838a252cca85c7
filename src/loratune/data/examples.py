"""An example: the tokens of one row, and which of them carry loss or which class the row has."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from loratune.data.rows.row import Origin


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Example:
    """One tokenized conversation."""

    input_ids: npt.NDArray[np.int32]
    """[T]"""
    supervised: npt.NDArray[np.bool_]
    """[T] Whether token t carries loss. It is predicted from the tokens before it, so token 0 never does."""
    origin: Origin


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelledExample(Example):
    """One tokenized text and its class. The class carries loss, none of the tokens does."""

    label: int
    """Index of the class."""
    name: str
    """Name of the class."""
    token_types: npt.NDArray[np.int8] | None
    """[T] 0 and 1 for the two texts of a pair, if the tokenizer distinguishes them."""
    texts: tuple[str, ...]
    """The text, or the two texts of a pair."""


def labels_fingerprint(examples: Sequence[Example]) -> str:
    """Return the SHA-256 of all classes and token types; empty if no example is labelled."""
    labelled = [example for example in examples if isinstance(example, LabelledExample)]
    digest = hashlib.sha256()
    for example in labelled:
        types = b"" if example.token_types is None else example.token_types.tobytes()
        digest.update(example.label.to_bytes(4, "little") + len(types).to_bytes(8, "little") + types)
    return digest.hexdigest() if labelled else ""
