"""Build a page's sections, each by itself: what a file lacks costs the section that needs it, not the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from loratune.reporting.blocks import Block, Items, Paragraph, Section

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
