"""Every chat template that TRL bundles: what is trained, or why it is refused.

`template_outcomes.json` lists, for each template and each kind of conversation, the trained strings, or why the row
is rejected, or, starting with "refused:", why the run does not start. It is written by people: read a line before you
change it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import PreTrainedTokenizerBase

from loratune.data.examples import Example
from loratune.data.masking.render import Rendered
from loratune.data.rows.conversation import Conversation
from loratune.run.errors import DataError

NAMES = sorted(path.stem for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
OUTCOMES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("template_outcomes.json").read_text("utf-8"))

CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "The city."}},
                "required": ["city"],
            },
        },
    }
]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


CASES: dict[str, dict[str, Any]] = {
    "single": {"messages": [user("Hello there"), assistant("Hi you")]},
    "multi": {"messages": [user("Hello there"), assistant("Hi you"), user(" Bye "), assistant("So long ")]},
    "system": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            user("Hello"),
            assistant("Hi"),
            user("Bye"),
            assistant("Ciao"),
        ]
    },
    "tools": {
        "messages": [
            user("Weather?"),
            assistant(tool_calls=[CALL]),
            {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "18 C"},
            assistant("It is 18 C."),
        ],
        "tools": TOOLS,
    },
    "thinking": {
        "messages": [
            user("Hello there"),
            assistant("<think>\nHmm one\n</think>\n\nHi you"),
            user("Bye"),
            assistant("<think>\nHmm two\n</think>\n\nSo long"),
        ]
    },
    "reasoning_field": {
        "messages": [
            user("Hello there"),
            assistant("Hi you", reasoning_content="Hmm one"),
            user("Bye"),
            assistant("So long"),
        ]
    },
}


def test_every_template_of_trl_is_listed_here() -> None:
    assert sorted(OUTCOMES) == NAMES
    assert len(NAMES) >= 72
    assert sum(name.endswith("_training") for name in NAMES) >= 31


@pytest.mark.parametrize("name", NAMES)
def test_a_template_trains_what_is_listed_or_is_refused_as_listed(
    name: str,
    with_template: Callable[..., PreTrainedTokenizerBase],
    converse: Callable[..., Conversation],
    rendered: Callable[..., Rendered],
    trained_texts: Callable[[Example, PreTrainedTokenizerBase], list[str]],
) -> None:
    tokenizer = with_template(name)
    found = {
        case: outcome(converse(*row["messages"], tools=row.get("tools")), tokenizer, rendered, trained_texts)
        for case, row in CASES.items()
    }

    assert found == OUTCOMES[name]


def outcome(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    rendered: Callable[..., Rendered],
    trained_texts: Callable[[Example, PreTrainedTokenizerBase], list[str]],
    **settings: Any,
) -> list[str] | str:
    try:
        result = rendered([conversation], tokenizer, **settings)
    except DataError as error:
        return "refused: " + error.problem.splitlines()[0]
    if result.rejected:
        return result.rejected[0].reason
    assert result.counts["verified"] == 1
    return trained_texts(result.examples[0], tokenizer)
