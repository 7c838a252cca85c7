"""The table that notebooks show."""

from __future__ import annotations

from loratune.run.html_table import html_table


def test_a_table_escapes_what_it_shows() -> None:
    page = html_table("a <title>", [("x & y", "1")], head=("name", "number"))
    assert "<b>a &lt;title&gt;</b>" in page
    assert "<tr><td>x &amp; y</td><td>1</td></tr>" in page
    assert "<th>name</th><th>number</th>" in page
    assert "thead" not in html_table("t", [("a",)])
