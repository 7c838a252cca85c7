"""Rows that look wrong, found before they are trained on, each with its file and line.

None of these stops a run: rows that cannot be trained on are rejected elsewhere. These can be trained on, but probably
should not be.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loratune.data.masking.policy import trained_turns
from loratune.data.masking.template import ChatTemplate
from loratune.data.prompts import stop_token_ids
from loratune.recipe.roles import TrainOn, trained_roles

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from loratune.data.examples import Example
    from loratune.data.rows.conversation import Conversation, Message
    from loratune.data.rows.row import Origin

KINDS = {
    "think_tags": "answers with unbalanced think tags",
    "no_words": "answers of punctuation only",
    "repeats_prompt": "answers that repeat the prompt",
    "unknown_tool": "calls to tools without a schema",
    "broken_text": "messages with U+FFFD, a sign of wrong decoding",
    "cut": "conversations truncated at max_length",
    "dropped": "conversations dropped for their length",
}
"""Kind of finding → its description."""

_SHOWN = 5
_LONG_PROMPT = 40
"""Minimum characters of a prompt for an answer that starts with it to be suspicious; short prompts are often quoted."""
_PUNCTUATION_ONLY = re.compile(r"[\s.…,;:!?*_~–—-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One row that looks wrong.

    Attributes:
        kind: A key of `KINDS`.
        origin: Where the row was read.
        what: What is wrong with it, with the value.
    """

    kind: str
    origin: Origin
    what: str

    def as_record(self) -> dict[str, Any]:
        """Return the finding as `data.json` holds it."""
        return {"kind": self.kind, **self.origin.as_record(), "what": self.what}


def check_conversations(conversations: Iterable[Conversation], tokenizer: PreTrainedTokenizerBase) -> list[Finding]:
    """Find what looks wrong in the texts, in the order of the rows.

    Args:
        conversations: Validated conversations. A row that a weight repeats is reported once.
        tokenizer: The tokenizer; its chat template decides whether answers may start inside their thoughts.
    """
    opened = bool(tokenizer.chat_template) and ChatTemplate(tokenizer).opens_thoughts
    found = dict.fromkeys(
        Finding(kind=kind, origin=conversation.origin, what=what)
        for conversation in conversations
        for kind, what in _suspicions(conversation, opened=opened)
    )
    return list(found)


def check_lengths(
    examples: Sequence[Example],
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_on: TrainOn,
    report: dict[str, Any],
    side: str,
) -> list[Finding]:
    """Find the conversations that `max_length` truncated or dropped.

    Args:
        examples: The examples made of the conversations.
        conversations: All valid conversations.
        tokenizer: The tokenizer, for the stop tokens.
        train_on: The recipe's `data.train_on`.
        report: The data report, with the number of truncated and dropped conversations.
        side: `train` or `eval`.
    """
    part, max_length = report[side], report["max_length"]
    found: list[Finding] = []
    if part["truncated"]:
        full = [example for example in examples if len(example.input_ids) == max_length]
        stops = np.array(stop_token_ids(tokenizer))
        answers = {c.origin: _num_answers(c, train_on) for c in conversations}
        surely = len(full) == part["truncated"]
        found += [
            Finding(kind="cut", origin=example.origin, what=what)
            for example in full
            if (what := _cut(example, stops, answers[example.origin], train_on, surely=surely))
        ]
    if part["dropped"]:
        accounted = {(example.origin.file, example.origin.line) for example in examples}
        accounted |= {(row["file"], row["line"]) for row in part["rejected"]}
        what = f"over {max_length:,} tokens, or nothing to train in the first {max_length:,}"
        found += [
            Finding(kind="dropped", origin=c.origin, what=what)
            for c in conversations
            if (c.origin.file, c.origin.line) not in accounted
        ]
    return list(dict.fromkeys(found))


def findings_in_words(findings: Sequence[Finding], side: str) -> list[str]:
    """Return one line per kind: how many, what, and where the first were read."""
    by_kind: dict[str, list[Finding]] = {}
    for finding in findings:
        by_kind.setdefault(finding.kind, []).append(finding)
    return [
        f"{side}: {KINDS[kind]} ({len(found)}): {places([finding.origin for finding in found])} ({found[0].what})"
        for kind, found in by_kind.items()
    ]


def places(origins: Sequence[Origin], shown: int = _SHOWN) -> str:
    """Return the first places in short form: `chats.jsonl:3, :8 and 4 more`."""
    parts, file = [], None
    for origin in origins[:shown]:
        parts.append(f":{origin.line}" if origin.file == file else str(origin))
        file = origin.file
    more = f" and {len(origins) - shown} more" if len(origins) > shown else ""
    return ", ".join(parts) + more


# ---- one conversation


def _suspicions(conversation: Conversation, *, opened: bool) -> Iterator[tuple[str, str]]:
    known = {tool["function"]["name"] for tool in conversation.tools or ()}
    asked = ""
    for number, message in enumerate(conversation.messages, start=1):
        content, role = message.get("content") or "", message["role"]
        where = f"message {number} ({role})"
        if "\ufffd" in content:
            yield "broken_text", f"{where} has U+FFFD at character {content.index(chr(0xFFFD)) + 1}"
        if role == "user":
            asked = content
        if role != "assistant":
            continue
        if "think>" in content and (problem := _unbalanced(content, opened=opened)):
            yield "think_tags", f"{where} {problem}"
        if _PUNCTUATION_ONLY.fullmatch(content):
            yield "no_words", f"{where} is only {content.strip()!r}"
        if asked and _repeats(content, asked):
            yield "repeats_prompt", f"{where} {'is' if _same(content, asked) else 'starts with'} the prompt"
        yield from _unknown_tools(message, where, known)


def _unbalanced(content: str, *, opened: bool) -> str:
    """Describe what is wrong with the tags; empty if nothing is."""
    opening, closing = content.count("<think>"), content.count("</think>")
    if (opening, closing) == (0, 1) and opened:  # the template's prompt opens the thoughts
        return ""
    if opening != closing:
        return f"has {opening} <think> and {closing} </think>"
    return "has </think> before <think>" if content.find("</think>") < content.find("<think>") else ""


def _repeats(answer: str, asked: str) -> bool:
    start = asked.strip()
    return _same(answer, asked) or (len(start) >= _LONG_PROMPT and answer.lstrip().startswith(start))


def _same(answer: str, asked: str) -> bool:
    return len(answer) - len(asked) < 100 and answer.strip().casefold() == asked.strip().casefold()


def _unknown_tools(message: Message, where: str, known: set[str]) -> Iterator[tuple[str, str]]:
    for call in message.get("tool_calls") or ():
        name = call["function"]["name"]
        if name not in known:
            among = f"the row's tools are {', '.join(sorted(known))}" if known else "the row has no tools"
            yield "unknown_tool", f"{where} calls {name}; {among}"


def _num_answers(conversation: Conversation, train_on: TrainOn) -> int:
    return len(trained_turns(conversation.messages, train_on, conversation.excluded))


def _cut(example: Example, stops: np.ndarray, num_answers: int, train_on: TrainOn, *, surely: bool) -> str:
    """Describe what is missing from an example of exactly `max_length` tokens; empty if nothing is."""
    ends = example.supervised & np.isin(example.input_ids, stops)
    length = f"truncated at {len(example.input_ids):,} tokens"
    if train_on == "all" or trained_roles(train_on) != ("assistant",):  # other messages may end without a stop token
        return length if surely else f"{length}, or exactly that long"
    inside = bool(example.supervised[-1] and not ends[-1])
    missing = num_answers - int(ends.sum())
    if inside:
        return f"{length}, inside an answer, which loses its stop token"
    return f"{length}: {missing} of {num_answers} answers are missing" if missing > 0 else ""
