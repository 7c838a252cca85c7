"""preview.json: the first training examples, token by token."""

from __future__ import annotations

from loratune.run.records.base import FileRecord, Part


class PreviewPiece(Part):
    """Neighboring tokens of one kind."""

    text: str
    """Their text."""
    trained: bool
    """Whether they are trained."""
    special: bool
    """Whether they are special tokens."""
    stop: bool
    """Whether it is a stop token that is trained."""


class PreviewExample(Part):
    """A training example."""

    title: str
    """Its file, line and length."""
    pieces: tuple[PreviewPiece, ...]
    """Its tokens, in order."""


class PreviewRecord(FileRecord):
    """`preview.json`: the first training examples."""

    examples: tuple[PreviewExample, ...]
    """The examples."""
