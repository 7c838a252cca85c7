"""Small tables in HTML, as notebooks show them for a value."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

T = TypeVar("T")


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


class ShownList(list[T]):
    """A list that a notebook shows as a table with a row for each item.

    Args:
        items: The items.
        title: The line above the table.
        columns: The name of each column, and what it shows of an item.
    """

    def __init__(self, items: Iterable[T], *, title: str, columns: Mapping[str, Callable[[T], object]]) -> None:
        super().__init__(items)
        self._title, self._columns = title, columns

    def _repr_html_(self) -> str:
        rows = [[str(show(item)) for show in self._columns.values()] for item in self]
        return html_table(self._title, rows, head=list(self._columns))
