"""Rows that look wrong, found before they are trained on, each with its file and line.

None of these stops a run: a row that cannot be trained on is refused elsewhere. These can be trained on, and probably
should not be.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loratune.data.examples import Example
from loratune.data.masking.render import Thinking, trained_turns
from loratune.data.masking.template import ChatTemplate
from loratune.data.prompts import render_prompts, stop_token_ids
from loratune.data.rows.conversation import Conversation, Message, Origin
from loratune.recipe.recipe import DataSection
from loratune.recipe.roles import TrainOn, trained_roles
from loratune.run.errors import plural

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = {
    "think_tags": "answers with unbalanced think tags",
    "no_words": "answers without a word",
    "repeats_prompt": "answers that repeat the prompt",
    "unknown_tool": "calls of tools that have no schema",
    "broken_text": "messages with U+FFFD, which a wrong decoding leaves",
    "cut": "conversations cut by max_length",
    "dropped": "conversations left out for their length",
}
"""What is looked for → in words, for people."""

PROMPTS_CHECKED = 64
"""Conversations whose prompt is compared with what was trained, spread over the data."""

_SHOWN = 5
_LONG_PROMPT = 40
"""Characters from which on an answer that starts with its whole prompt is suspicious; short ones are quoted for good reason."""
_PUNCTUATION_ONLY = re.compile(r"[\s.…,;:!?*_~–—-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One row that looks wrong.

    Attributes:
        kind: A key of `KINDS`.
        origin: Where it stands.
        what: What is wrong with it, with the value.
    """

    kind: str
    origin: Origin
    what: str

    def as_record(self) -> dict[str, Any]:
        """For `data.json`."""
        return {"kind": self.kind, "file": self.origin.file, "line": self.origin.line, "what": self.what}


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCheck:
    """The tokens before trained answers against those that a server would send.

    Attributes:
        checked: Conversations compared.
        header: Those that differ in what starts the answer.
        history: Those that differ earlier, such as in the thoughts of earlier answers.
        boundary: Those of the same text in other tokens: the tokenizer joins the prompt's end with the answer's start.
        origin: The first that differs in text.
        trained: What stands there in training, from the first difference on.
        served: What a server would send instead.
    """

    checked: int = 0
    header: int = 0
    history: int = 0
    boundary: int = 0
    origin: Origin | None = None
    trained: str = ""
    served: str = ""

    def as_record(self) -> dict[str, Any]:
        """For `data.json`."""
        place = {} if self.origin is None else {"file": self.origin.file, "line": self.origin.line}
        counts = {
            "checked": self.checked,
            "header_differs": self.header,
            "history_differs": self.history,
            "boundary_differs": self.boundary,
        }
        return {**counts, **place, "trained": self.trained, "served": self.served}


def add_checks(
    report: dict[str, Any],
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train: tuple[Sequence[Example], Sequence[Conversation]],
    evaluation: tuple[Sequence[Example], Sequence[Conversation]],
) -> None:
    """Add to the data report: histograms, scripts, findings, shared prompts, and the comparison of prompts.

    Args:
        report: The data report; its notices get a line for each kind of finding.
        section: Of the recipe.
        tokenizer: Of the base model.
        train: The examples, and all valid conversations, also those that became no example.
        evaluation: The same of the held-out data; empty where there is none.
    """
    for side, (examples, conversations) in (("train", train), ("eval", evaluation)):
        if not examples:
            continue
        findings = check_conversations(conversations, tokenizer)
        findings += check_lengths(
            examples, conversations, tokenizer, train_on=section.train_on, report=report, side=side
        )
        part = report[side]
        part["length"] = {**part["length"], "histogram": histogram([len(example.input_ids) for example in examples])}
        part["scripts"] = scripts(conversations)
        part["findings"] = [finding.as_record() for finding in findings]
        report["notices"] += findings_in_words(findings, side)
    shared = shared_prompts(train[1], evaluation[1])
    report["shared_prompts"] = [{"eval": _place(one), "train": _place(other)} for one, other in shared]
    if shared:
        report["notices"].append(
            f"{plural(len(shared), 'held-out conversation has', 'held-out conversations have')} the same prompt as a training conversation, with another answer: "
            f"{places([one for one, _ in shared])}."
        )
    asks = section.train_on == "all" or "assistant" in trained_roles(section.train_on)
    check = check_prompts(*train, tokenizer, thinking=section.thinking) if asks else PromptCheck()
    report["prompts"] = check.as_record()


def check_conversations(conversations: Iterable[Conversation], tokenizer: PreTrainedTokenizerBase) -> list[Finding]:
    """What looks wrong in the texts, in the order of the rows.

    Args:
        conversations: Validated conversations. A row that a weight repeats is named once.
        tokenizer: Whose chat template says whether answers may start inside their thoughts.
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
    """Which conversations `max_length` cut or left out.

    Args:
        examples: What became of the conversations.
        conversations: All of them.
        tokenizer: Knows the stop tokens.
        train_on: Of the recipe.
        report: Of `prepare_data`; says how many there are. Where there are none, nothing is looked for.
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


def shared_prompts(train: Sequence[Conversation], evaluation: Sequence[Conversation]) -> list[tuple[Origin, Origin]]:
    """Held-out conversations whose messages before the last answer also stand in the training data, and where.

    Those that stand there with their answer are left out: `report["overlap"]` has them.
    """
    if not evaluation:
        return []
    prompts: dict[str, tuple[Origin, set[str]]] = {}
    for conversation in train:
        if conversation.messages:
            prompt, answer = _prompt_and_answer(conversation)
            prompts.setdefault(prompt, (conversation.origin, set()))[1].add(answer)
    shared = []
    for conversation in evaluation:
        if conversation.messages:
            prompt, answer = _prompt_and_answer(conversation)
            origin, answers = prompts.get(prompt, (None, set[str]()))
            if origin is not None and answer not in answers:
                shared.append((conversation.origin, origin))
    return shared


def check_prompts(
    examples: Sequence[Example],
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    thinking: Thinking,
) -> PromptCheck:
    """Whether the model will be asked in the way in which it was trained to answer.

    The prompt of the last answer, as the template writes it for a server, must be what training has before that answer,
    token for token. A sample of conversations is compared.
    """
    by_origin = {example.origin: example for example in examples}
    asked = [c for c in conversations if c.messages and c.messages[-1]["role"] == "assistant" and c.origin in by_origin]
    asked = asked[:: max(1, len(asked) // PROMPTS_CHECKED)][:PROMPTS_CHECKED]
    if not asked:
        return PromptCheck()
    header = len(tokenizer(ChatTemplate(tokenizer).header, add_special_tokens=False)["input_ids"])
    checked, counts, first = 0, Counter[str](), PromptCheck()
    for prompt in render_prompts(asked, tokenizer, thinking=thinking):
        trained, served = by_origin[prompt.origin].input_ids, np.array(prompt.input_ids)
        if len(trained) <= len(served):  # cut before its last answer
            continue
        checked += 1
        differs = np.flatnonzero(trained[: len(served)] != served)
        if not len(differs):
            continue
        at = int(differs[0])
        shown = slice(max(0, at - 1), at + 12)
        texts = str(tokenizer.decode(trained[shown])), str(tokenizer.decode(served[shown]))
        if texts[0].startswith(texts[1]) and not texts[1].rstrip().endswith("<think>"):
            counts["boundary"] += 1
            continue
        if first.origin is None:
            first = PromptCheck(origin=prompt.origin, trained=texts[0], served=texts[1])
        counts["header" if at >= len(served) - header else "history"] += 1
    return replace(
        first, checked=checked, header=counts["header"], history=counts["history"], boundary=counts["boundary"]
    )


def histogram(lengths: Sequence[int], *, most: int = 12) -> dict[str, list[int]]:
    """How many lengths lie from each edge up to, not including, the next.

    The bins are of one width: 1, 2 or 5 times a power of ten.

    Args:
        lengths: Tokens of each example.
        most: The most bins.
    """
    shortest, longest = min(lengths), max(lengths)
    widths = (digit * 10**power for power in range(12) for digit in (1, 2, 5))
    width = next(width for width in widths if longest // width - shortest // width < most)
    first = shortest // width
    counts = np.bincount(np.asarray(lengths) // width - first)
    return {"edges": [(first + n) * width for n in range(len(counts) + 1)], "counts": counts.tolist()}


def scripts(conversations: Sequence[Conversation]) -> dict[str, float]:
    """The share of each script among the letters of all messages, the largest first; under 0.1 % is left out.

    A script is the first word of a letter's Unicode name: `LATIN`, `CYRILLIC`, `CJK`, `HIRAGANA`, `ARABIC`, …
    """
    counts = np.zeros(0x110000, np.int64)
    for start in range(0, len(conversations), 256):
        text = "".join(_all_text(conversations[start : start + 256]))
        codes = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)
        chunk = np.bincount(codes)
        counts[: len(chunk)] += chunk
    letters: Counter[str] = Counter()
    for code in np.flatnonzero(counts):
        character = chr(code)
        if character.isalpha():
            letters[unicodedata.name(character, "UNNAMED").partition(" ")[0]] += int(counts[code])
    total = letters.total()
    return {name: round(n / total, 4) for name, n in letters.most_common() if n >= total / 1000}


def findings_in_words(findings: Sequence[Finding], side: str) -> list[str]:
    """A line for each kind: how many, what, and where the first stand."""
    by_kind: dict[str, list[Finding]] = {}
    for finding in findings:
        by_kind.setdefault(finding.kind, []).append(finding)
    return [
        f"{side}: {KINDS[kind]} ({len(found)}): {places([finding.origin for finding in found])} ({found[0].what})"
        for kind, found in by_kind.items()
    ]


def places(origins: Sequence[Origin], shown: int = _SHOWN) -> str:
    """`chats.jsonl:3, :8 and 4 more`."""
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
    """What is wrong with the tags. A lone `</think>` is right where the template's prompt opens the thoughts."""
    opening, closing = content.count("<think>"), content.count("</think>")
    if (opening, closing) == (0, 1) and opened:
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
    """What is missing of an example of exactly `max_length` tokens; empty where it is whole."""
    ends = example.supervised & np.isin(example.input_ids, stops)
    length = f"cut at {len(example.input_ids):,} tokens"
    if train_on == "all" or trained_roles(train_on) != ("assistant",):  # others may end without a stop token
        return length if surely else f"{length}, or exactly that long"
    inside = bool(example.supervised[-1] and not ends[-1])
    missing = num_answers - int(ends.sum())
    if inside:
        return f"{length}, inside an answer, which loses its stop token"
    return f"{length}: {missing} of {num_answers} answers are missing" if missing > 0 else ""


def _all_text(conversations: Sequence[Conversation]) -> Iterator[str]:
    for conversation in conversations:
        yield conversation.text or ""
        for message in conversation.messages:
            yield message.get("content") or ""


def _prompt_and_answer(conversation: Conversation) -> tuple[str, str]:
    *prompt, answer = conversation.messages
    return repr([(message["role"], message.get("content")) for message in prompt]), repr(answer)


def _place(origin: Origin) -> dict[str, Any]:
    return {"file": origin.file, "line": origin.line}
