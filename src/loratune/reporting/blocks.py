"""What a page is made of. Everything here is text, escaped when the page is written; only a chart brings markup."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, TypeVar

if TYPE_CHECKING:
    from markupsafe import Markup

    from loratune.reporting.word_diff import Piece


@dataclass(frozen=True, slots=True, kw_only=True)
class Paragraph:
    """A sentence or two; `tone` is `plain`, `note` or `warning`."""

    kind: ClassVar[str] = "paragraph"
    text: str
    tone: str = "plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """A list of lines."""

    kind: ClassVar[str] = "items"
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows whose first cell is their header; without `columns`, of names and values."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...]
    numeric: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A drawing, with what it shows in words, and a legend of (series number, name)."""

    kind: ClassVar[str] = "chart"
    title: str
    svg: Markup
    caption: str = ""
    legend: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Charts:
    """Charts beside each other where there is room."""

    kind: ClassVar[str] = "charts"
    charts: tuple[Chart, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one model said, in pieces; `verdict` is `right`, `wrong` or nothing."""

    title: str
    pieces: tuple[Piece, ...]
    verdict: str = ""
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A prompt and answers to it, side by side."""

    kind: ClassVar[str] = "sample"
    title: str
    prompt: str
    asked: str = "prompt"
    """What that is called."""
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRun:
    """Text of neighbouring tokens of one kind: its CSS class is `trained` or `context`, with `special` or `stop`."""

    text: str
    style: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """One example as training sees it."""

    kind: ClassVar[str] = "tokens"
    title: str
    runs: tuple[TokenRun, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """Text to copy."""

    kind: ClassVar[str] = "code"
    title: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """Blocks behind a line that opens them."""

    kind: ClassVar[str] = "fold"
    title: str
    blocks: tuple[Block, ...]


Block = Paragraph | Items | Table | Chart | Charts | Sample | Tokens | Code | Fold


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of a page with a heading; `name` is its anchor."""

    name: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A number that everyone looks for first."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A whole page."""

    title: str
    lead: str
    badge: str = ""
    tone: str = "plain"
    figures: tuple[Figure, ...] = ()
    sections: tuple[Section, ...] = field(default=())
    footer: str


UNEXPECTED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
"""What becomes of reading a file that holds something else than this version writes."""


Subject = TypeVar("Subject")


def build_sections(
    parts: Sequence[tuple[str, str, Callable[[Subject], Iterator[Block]]]], subject: Subject, complaints: Iterable[str]
) -> tuple[Section, ...]:
    """Sections in order; one in front says what is missing.

    Args:
        parts: Anchor, title, and what makes the blocks; without blocks there is no section.
        subject: What the page is about.
        complaints: What is known to be missing.
    """
    missing, sections = list(complaints), []
    for name, title, build in parts:
        try:
            blocks = tuple(build(subject))
        except UNEXPECTED as error:
            missing.append(
                f"“{title}” is left out: a file holds something else than expected ({type(error).__name__}: {error})."
            )
            continue
        if blocks:
            sections.append(Section(name=name, title=title, blocks=blocks))
    if missing:
        note = Paragraph(text="This page shows what could be read. Missing:", tone="warning")
        sections.insert(0, Section(name="missing", title="What is missing", blocks=(note, Items(lines=tuple(missing)))))
    return tuple(sections)
