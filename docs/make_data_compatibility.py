"""Write docs/data-compatibility.md from rows in other projects' formats. `--check` tests whether it is up to date."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from pages import write_or_check

from loratune.data.rows.fields import FIELDS, Unread, unread_in_words
from loratune.data.rows.formats import FORMATS, detect_format, rename_columns, to_conversations
from loratune.data.rows.row import Row
from loratune.run.errors import DataError

PAGE = Path(__file__).parent / "data-compatibility.md"

CALL = {"name": "rain", "arguments": {"city": "Oslo"}}
TOOL = {"name": "rain", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
USER, ANSWER = {"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "Yes."}

Case = tuple[str, dict[str, Any], dict[str, str]]
"""What it is, a row, and `data.columns`."""

CASES: dict[str, list[Case]] = {
    "TRL": [
        ("language modeling", {"text": "It rains."}, {}),
        ("conversational", {"messages": [USER, ANSWER]}, {}),
        ("prompt-completion", {"prompt": "Rain?", "completion": "Yes."}, {}),
        ("conversational prompt-completion", {"prompt": [USER], "completion": [ANSWER]}, {}),
        ("tool calling", {"messages": [USER, {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]}], "tools": [{"type": "function", "function": TOOL}]}, {}),  # noqa: E501
        ("preference", {"prompt": "Rain?", "chosen": "Yes.", "rejected": "No."}, {}),
        ("preference, chosen answers only", {"prompt": "Rain?", "chosen": "Yes.", "rejected": "No."}, {"completion": "chosen"}),  # noqa: E501
        ("unpaired preference", {"prompt": "Rain?", "completion": "No.", "label": False}, {}),
        ("vision", {"images": ["a.png"], "messages": [USER, ANSWER]}, {}),
    ],
    "Axolotl": [
        ("chat_template", {"messages": [USER, {**ANSWER, "training": False}, USER, ANSWER]}, {}),
        ("chat_template with train_detail", {"messages": [USER, {**ANSWER, "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}]}, {}),  # noqa: E501
        ("alpaca", {"instruction": "Rain?", "input": "In Oslo.", "output": "Yes."}, {}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Rain?"}, {"from": "gpt", "value": "Yes.", "weight": 1}]}, {}),  # noqa: E501
        ("completion", {"text": "It rains."}, {}),
        ("alpaca_chat.load_qa", {"question": "Rain?", "answer": "Yes."}, {}),
    ],
    "LLaMA-Factory": [
        ("alpaca with history", {"instruction": "And now?", "input": "", "output": "No.", "system": "Be brief.", "history": [["Rain?", "Yes."]]}, {}),  # noqa: E501
        ("sharegpt with calls", {"conversations": [{"from": "human", "value": "Rain?"}, {"from": "function_call", "value": json.dumps(CALL)}, {"from": "observation", "value": "wet"}, {"from": "gpt", "value": "Yes."}], "tools": json.dumps([TOOL])}, {}),  # noqa: E501
        ("sharegpt preference", {"conversations": [{"from": "human", "value": "Rain?"}], "chosen": {"from": "gpt", "value": "Yes."}, "rejected": {"from": "gpt", "value": "No."}}, {}),  # noqa: E501
        ("KTO", {"messages": [USER, ANSWER], "label": True}, {}),
    ],
    "ms-swift": [
        ("messages with loss", {"messages": [USER, {**ANSWER, "loss": False}, USER, {**ANSWER, "loss": True}]}, {}),
        ("agent", {"messages": [USER, {"role": "tool_call", "content": json.dumps(CALL)}, {"role": "tool_response", "content": "wet"}, ANSWER]}, {}),  # noqa: E501
        ("RLHF", {"messages": [USER, ANSWER], "rejected_response": "No."}, {}),
        ("query-response", {"query": "Rain?", "response": "Yes."}, {"prompt": "query", "completion": "response"}),
    ],
    "Unsloth": [
        ("conversations", {"conversations": [USER, ANSWER]}, {}),
        ("text of a notebook's formatting function", {"text": "<|im_start|>user\nRain?<|im_end|>"}, {}),
    ],
    "mlx-lm": [
        ("chat", {"messages": [USER, ANSWER]}, {}),
        ("tools", {"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "rain", "arguments": '{"city": "Oslo"}'}}]}], "tools": [{"type": "function", "function": TOOL}]}, {}),  # noqa: E501
        ("completions", {"prompt": "Rain?", "completion": "Yes."}, {}),
    ],
    "OpenAI": [
        ("chat with weights", {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]}, {}),
        ("functions", {"messages": [USER, {"role": "assistant", "function_call": {"name": "rain", "arguments": '{"city": "Oslo"}'}}], "functions": [TOOL]}, {}),  # noqa: E501
        ("answers of the API", {"messages": [USER, {**ANSWER, "refusal": None, "annotations": []}]}, {}),
        ("Responses API", {"messages": [USER, {"type": "function_call", "call_id": "1", "name": "rain", "arguments": '{"city": "Oslo"}'}, {"type": "function_call_output", "call_id": "1", "output": "wet"}, ANSWER]}, {}),  # noqa: E501
        ("preference", {"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [ANSWER]}, {}),  # noqa: E501
    ],
    "Anthropic": [
        ("messages with tools", {"system": "Be brief.", "messages": [USER, {"role": "assistant", "content": [{"type": "thinking", "thinking": "Look.", "signature": "x"}, {"type": "tool_use", "id": "1", "name": "rain", "input": {"city": "Oslo"}}]}, {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "wet"}]}, ANSWER]}, {}),  # noqa: E501
    ],
    "Hub": [
        ("Dolly", {"instruction": "Rain?", "context": "Oslo.", "response": "Yes.", "category": "qa"}, {"output": "response", "input": "context"}),  # noqa: E501
        ("question, context, answer", {"question": "Rain?", "context": "Oslo.", "answer": "Yes."}, {}),
        ("question, context, answer, mapped", {"question": "Rain?", "context": "Oslo.", "answer": "Yes."}, {"input": "context"}),  # noqa: E501
        ("other columns", {"Q": "Rain?", "A": "Yes."}, {}),
    ],
}  # fmt: skip

TEXT = """# Data of other projects

<!-- Written by docs/make_data_compatibility.py, which reads every row on this page; run `make docs` to update it. -->

This page shows rows in the formats that other projects document (with made-up content), how loratune reads them, what
it trains with `train_on: assistant`, and why it refuses some. **Bold** messages are trained. [data.md](data.md)
explains the rules.

{projects}

## Files and folders

A file, a folder with splits as on the Hub, a folder written by `save_to_disk`, and compressed files are described in
[data.md](data.md#where-rows-come-from).

## Every known field

A field whose value is null or an empty text, list or object counts as absent. Fields that are not in this table, and
fields that the format of their row does not read, are listed in the plan, the report and `data.json`.

{fields}
"""


def outcome(row: dict[str, Any], columns: dict[str, str]) -> tuple[str, str]:
    """Return the format of a row, and what is trained of it or why it is refused."""
    rows = rename_columns([Row(file="rows.jsonl", line=1, value=row)], columns)  # type: ignore[arg-type]
    try:
        form = detect_format(rows)
    except DataError as error:
        return "refused", f"{error.problem}. {error.fix.partition(';')[0]}."
    unread: Unread = Counter()
    conversations, rejected = to_conversations(rows, form, unread)
    if rejected:
        return f"{form}, refused", f"{rejected[0].reason}."
    (conversation,) = conversations
    said = [
        shown(message, trained=message["role"] == "assistant" and number not in conversation.excluded)
        for number, message in enumerate(conversation.messages)
    ]
    left = f". Not read: {unread_in_words(unread)}" if unread else ""
    return form, (" · ".join(said) or "**the text** (`train_on: all`)") + left


def shown(message: dict[str, Any], *, trained: bool) -> str:
    """Return a message in a few words."""
    calls = [
        f"{c['function']['name']}({json.dumps(c['function']['arguments'])})" for c in message.get("tool_calls", ())
    ]
    thoughts = f"({message['reasoning_content']}) " if "reasoning_content" in message else ""
    text = thoughts + " ".join([*([message["content"]] if message.get("content") else []), *calls]).replace("\n", "⏎")
    return f"**{text}**" if trained else f"{message['role']}: {text}"


def page() -> str:
    """Return the page."""
    parts = []
    for project, cases in CASES.items():
        lines = [f"## {project}", "", "| format | a row | read as | messages |", "|---|---|---|---|"]
        for name, row, columns in cases:
            form, said = outcome(row, columns)
            mapped = f" with `data.columns: {json.dumps(columns)}`" if columns else ""
            text = json.dumps(row, ensure_ascii=False).replace("|", "\\|")
            lines.append(f"| {name}{mapped} | `{text}` | {form} | {said} |".replace("<|", "<\\|").replace("|>", "\\|>"))
        parts.append("\n".join(lines))
    fields = ["| place | field | written by | here |", "|---|---|---|---|"]
    for field in FIELDS:
        names = ", ".join(f"`{name}`" for name in field.names)
        fields.append(f"| {field.place} | {names} | {field.written_by} | {field.meaning} |")
    assert set(FORMATS) <= {outcome(row, columns)[0] for cases in CASES.values() for _, row, columns in cases}
    return TEXT.format(projects="\n\n".join(parts), fields="\n".join(fields))


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, page()))
