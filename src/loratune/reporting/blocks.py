"""The blocks of a page. Everything here is text, escaped when the page is written; only a chart brings markup."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from markupsafe import Markup

    from loratune.reporting.word_diff import DiffPiece


@dataclass(frozen=True, slots=True, kw_only=True)
class Paragraph:
    """A paragraph; `tone` is `plain`, `note` or `warning`."""

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
    """A table whose rows begin with their header; without `columns`, names and values."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...]
    numeric: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A drawing with a caption, and a legend of (series number, name)."""

    kind: ClassVar[str] = "chart"
    title: str
    svg: Markup
    caption: str = ""
    legend: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Charts:
    """Charts side by side where there is room."""

    kind: ClassVar[str] = "charts"
    charts: tuple[Chart, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerText:
    """One model's answer in pieces; `verdict` is `correct`, `wrong` or empty."""

    title: str
    pieces: tuple[DiffPiece, ...]
    verdict: str = ""
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A prompt and the answers to it, side by side."""

    kind: ClassVar[str] = "sample"
    title: str
    prompt: str
    prompt_label: str = "prompt"
    answers: tuple[AnswerText, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRun:
    """Neighboring tokens of one kind; `style` is `trained` or `context`, then `special` and `stop` if they apply."""

    text: str
    style: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenText:
    """A training example, token by token."""

    kind: ClassVar[str] = "tokens"
    title: str
    runs: tuple[TokenRun, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """Code to copy."""

    kind: ClassVar[str] = "code"
    title: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """Blocks that are folded away until the reader opens them."""

    kind: ClassVar[str] = "fold"
    title: str
    blocks: tuple[Block, ...]


Block = Paragraph | Items | Table | Chart | Charts | Sample | TokenText | Code | Fold


@dataclass(frozen=True, slots=True, kw_only=True)
class PageSection:
    """A section with a heading; `name` is its anchor."""

    name: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A headline number."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A page."""

    title: str
    lead: str
    badge: str = ""
    tone: str = "plain"
    figures: tuple[Figure, ...] = ()
    sections: tuple[PageSection, ...] = field(default=())
    footer: str


UNEXPECTED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError)
"""Errors of code that reads a record which is damaged, missing, or of another version."""


Subject = TypeVar("Subject")


def build_sections(
    parts: Sequence[tuple[str, str, Callable[[Subject], Iterator[Block]]]], subject: Subject, complaints: Iterable[str]
) -> tuple[PageSection, ...]:
    """Build the sections in order, after one that says what is missing, if anything is.

    Args:
        parts: Anchor, title, and the function that yields the blocks; without blocks there is no section.
        subject: The run or runs of the page.
        complaints: What is known to be missing, in words.
    """
    missing, sections = list(complaints), []
    for name, title, build in parts:
        try:
            blocks = tuple(build(subject))
        except UNEXPECTED as error:
            missing.append(
                f"“{title}” is left out: a file is damaged or of another version ({type(error).__name__}: {error})."
            )
            continue
        if blocks:
            sections.append(PageSection(name=name, title=title, blocks=blocks))
    if missing:
        note = Paragraph(text="This page shows what could be read. Missing or damaged:", tone="warning")
        sections.insert(
            0, PageSection(name="missing", title="Missing data", blocks=(note, Items(lines=tuple(missing))))
        )
    return tuple(sections)
