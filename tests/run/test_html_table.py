"""The table that notebooks show."""

from __future__ import annotations

from loratune.run.html_table import ShownList, html_table


def test_a_table_escapes_what_it_shows() -> None:
    page = html_table("a <title>", [("x & y", "1")], head=("name", "number"))
    assert "<b>a &lt;title&gt;</b>" in page
    assert "<tr><td>x &amp; y</td><td>1</td></tr>" in page
    assert "<th>name</th><th>number</th>" in page
    assert "thead" not in html_table("t", [("a",)])


def test_a_list_is_shown_as_a_table_and_stays_a_list() -> None:
    numbers = ShownList([1, 2], title="numbers", columns={"number": lambda n: n, "square": lambda n: n * n})
    assert numbers == [1, 2]
    page = numbers._repr_html_()
    assert "<th>number</th><th>square</th>" in page
    assert "<tr><td>2</td><td>4</td></tr>" in page
