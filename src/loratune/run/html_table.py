"""A small table in HTML, as notebooks show it for a value."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def html_table(title: str, rows: Sequence[Sequence[str]], *, head: Sequence[str] = ()) -> str:
    """Return a table with a title, in HTML without styles of its own.

    Args:
        title: The line above it.
        rows: The cells of each row.
        head: The names of the columns; empty for none.
    """
    lines = [f"<p><b>{escape(title)}</b></p>", "<table>"]
    if head:
        lines.append(f"<thead><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr></thead>")
    lines += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])
