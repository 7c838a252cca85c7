"""Rows in the formats that other projects document: the page that shows them is what the code does."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS))
        spec = importlib.util.spec_from_file_location("make_data_compatibility", DOCS / "make_data_compatibility.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    sys.modules.pop("pages", None)
    return module


def test_the_page_is_what_the_code_does(script: ModuleType) -> None:
    assert script.page() == script.PAGE.read_text(encoding="utf-8"), "run `make docs`"


@pytest.mark.parametrize(
    ("project", "name", "form", "said"),
    [
        ("TRL", "preference", "refused", "preference pair"),
        ("TRL", "preference, chosen answers only", "prompt_completion", "**Yes.**. Not read: columns rejected (1)"),
        ("TRL", "vision", "messages, refused", "only text can be trained"),
        ("Axolotl", "chat_template", "messages", "assistant: Yes. · user: Rain? · **Yes.**"),
        (
            "LLaMA-Factory",
            "alpaca with history",
            "alpaca",
            "system: Be brief. · user: Rain? · **Yes.** · user: And now?",
        ),
        ("LLaMA-Factory", "sharegpt with calls", "sharegpt", '**rain({"city": "Oslo"})** · tool: wet · **Yes.**'),
        ("ms-swift", "agent", "messages", '**rain({"city": "Oslo"})** · tool: wet · **Yes.**'),
        ("OpenAI", "functions", "messages", '**rain({"city": "Oslo"})**'),
        ("OpenAI", "preference", "refused", "preference pair"),
        ("Anthropic", "messages with tools", "messages", '**(Look.) rain({"city": "Oslo"})** · tool: wet · **Yes.**'),
        ("Hub", "question, context, answer", "prompt_completion", "Not read: columns context (1)"),
        ("Hub", "question, context, answer, mapped", "prompt_completion", "user: Rain?⏎⏎Oslo. · **Yes.**"),
    ],
)
def test_a_documented_format_has_the_outcome_written_by_hand(
    script: ModuleType, project: str, name: str, form: str, said: str
) -> None:
    (row, columns) = next((row, columns) for case, row, columns in script.CASES[project] if case == name)
    found = script.outcome(row, columns)
    assert found[0] == form
    assert said in found[1]
