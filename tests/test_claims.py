"""docs/claims.md: every promise has evidence that exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "claims.md"
COLUMNS = ["promise", "page", "evidence", "ran on", "last result"]
NOTHING_PROMISED = {"claims.md", "decisions.md"}
"""Pages that make no promise of their own."""


def rows(text: str) -> list[dict[str, str]]:
    """Return the lines of the tables with these columns."""
    found, inside = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")] if line.startswith("| ") else []
        if cells == COLUMNS:
            inside = True
        elif cells and inside:
            found.append(dict(zip(COLUMNS, cells, strict=True)))
        elif not line.startswith("|"):
            inside = False
    return found


@cache
def named_tests(file: Path) -> dict[str, bool]:
    """Return the tests of a file, and whether all of a test's cases are slow."""
    functions = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)]
    return {
        node.name: any(ast.unparse(mark) == "pytest.mark.slow" for mark in node.decorator_list)
        for node in functions
        if node.name.startswith("test_")
    }


def problems_of(row: dict[str, str]) -> list[str]:
    """Return what is wrong with a line, in words."""
    found = [f"no {name}" for name in COLUMNS if not row[name]]
    cited = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row["evidence"])
    measured = re.findall(r"\]\((results/[\w.-]+)\)", row["evidence"])
    if not cited and not measured:
        found.append("no evidence")
    slow = False
    for name, test in cited:
        file = ROOT / name
        if not file.is_file():
            found.append(f"no {name}")
        elif test and test not in named_tests(file):
            found.append(f"no {test} in {name}")
        slow |= file.is_file() and named_tests(file).get(test, False)
    found += [f"no docs/{name}" for name in measured if not (ROOT / "docs" / name).is_file()]
    dated = re.search(r"\d{4}-\d\d-\d\d", row["last result"]) is not None
    if slow and not dated:
        found.append("a slow test without the date of its last run")
    if not cited and not dated:
        found.append("a measurement without a date")
    if cited and not dated and row["last result"] != "every commit":
        found.append(f"{row['last result']!r} is neither a date nor every commit")
    pages = re.findall(r"\]\(([^)#]+)", row["page"])
    return (
        found + [f"no page {page}" for page in pages if not (PAGE.parent / page).is_file()] + ["no page"] * (not pages)
    )


def test_every_line_has_evidence_that_exists() -> None:
    lines = rows(PAGE.read_text(encoding="utf-8"))
    assert len(lines) > 50
    wrong = {line["promise"]: found for line in lines if (found := problems_of(line))}
    assert not wrong


def test_every_page_has_its_promises_listed() -> None:
    text = PAGE.read_text(encoding="utf-8")
    listed = {Path(page).name for line in rows(text) for page in re.findall(r"\]\(([^)#]+)", line["page"])}
    pages = {page.name for page in PAGE.parent.glob("*.md")} | {"README.md"}
    assert pages - listed - NOTHING_PROMISED == set(), "what does it promise, and what holds that?"


def test_what_has_not_run_is_not_promised() -> None:
    """Words that would promise what docs/claims.md lists as never run."""
    for page in [ROOT / "README.md", *PAGE.parent.glob("*.md")]:
        if page.name not in NOTHING_PROMISED:
            text = " ".join(page.read_text(encoding="utf-8").split())
            for words in ("any machine", "any GPU", "never the result", "on every GPU"):
                assert words not in text, f"{page.name}: {words}"
    assert "**No GPU has run loratune yet.**" in (ROOT / "README.md").read_text(encoding="utf-8")


GOOD = dict(
    zip(COLUMNS, ("it works", "[README](../README.md)", "`tests/test_claims.py`", "a CPU", "every commit"), strict=True)
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"evidence": "we tried"}, "no evidence"),
        ({"evidence": "`tests/test_nothing.py`"}, "no tests/test_nothing.py"),
        ({"evidence": "`tests/test_claims.py::test_nothing`"}, "no test_nothing in tests/test_claims.py"),
        ({"evidence": "[results](results/nothing.md)"}, "no docs/results/nothing.md"),
        ({"evidence": "[results](results/bench.md)"}, "a measurement without a date"),
        (
            {"evidence": "`tests/exporting/test_mutants.py::test_a_wrong_export_is_never_the_same`"},
            "a slow test without",
        ),
        ({"last result": "fine"}, "'fine' is neither"),
        ({"ran on": ""}, "no ran on"),
        ({"page": "[gone](gone.md)"}, "no page gone.md"),
        ({"page": "somewhere"}, "no page"),
    ],
)
def test_a_line_without_evidence_is_found(change: dict[str, str], words: str) -> None:
    assert problems_of(GOOD) == []
    assert any(problem.startswith(words) for problem in problems_of({**GOOD, **change}))
