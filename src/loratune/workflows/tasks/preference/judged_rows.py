"""Rows with one answer and a label that says whether it is good → judged conversations (KTO).

Such a row is a conversation of any format of supervised fine-tuning, with `label` or `kto_tag` beside it. What is
judged, and trained, is everything after the last message of the user; earlier answers are context.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loratune.data.rows.conversation import has_text
from loratune.data.rows.fields import Unread, describe_value, is_preference_pair, says_nothing
from loratune.data.rows.formats import detect_format, to_conversations
from loratune.data.rows.reading import Converted, Reader, ReadSide
from loratune.data.rows.row import Origin, Rejected, Row
from loratune.run.errors import BadRow, DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from loratune.data.rows.conversation import Conversation
    from loratune.recipe.recipe import Source

LABELS = ("label", "kto_tag")
"""Fields that say whether the answer is good; the first that says something counts."""

_JUDGEMENTS = {True: 1, False: 0, "true": 1, "false": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One validated row: a conversation whose last answer is good or bad."""

    conversation: Conversation
    label: int
    """1: the answer is good, 0: it is bad."""
    origin: Origin

    @property
    def sides(self) -> tuple[Conversation]:
        """The conversation, as the only one of its row."""
        return (self.conversation,)

    @property
    def key(self) -> int:
        """A key that is equal for rows with the same content."""
        text = json.dumps([self.conversation.messages, self.conversation.tools, self.label], sort_keys=True)
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest())


def read_judged(read: Reader, sources: Sequence[Source]) -> ReadSide[Judged]:
    """Read the rows of sources as judged conversations.

    Raises:
        DataError: A row is not one, and `data.on_bad_row` is `error`.
    """

    def convert(source: Source, rows: list[Row]) -> Converted[Judged]:  # noqa: ARG001 - the signature of all readers
        return to_judged(rows)

    return read.read(sources, convert, lambda judged: judged.key)


def to_judged(rows: Iterable[Row]) -> Converted[Judged]:
    """Read rows as judged conversations; give the reason for each that is not one."""
    found: list[Judged] = []
    rejected: list[Rejected] = []
    forms: dict[str, None] = {}
    unread: Unread = Counter()
    for row in rows:
        origin = Origin(file=row.file, line=row.line)
        try:
            name, label = _judgement(row.value)
            conversation, form = _conversation(row, unread)
            found.append(Judged(conversation=_last_answer(conversation), label=label, origin=origin))
        except BadRow as bad:
            rejected.append(Rejected(origin=origin, reason=str(bad)))
        else:
            forms[f"{form} and {name}"] = None
    return Converted(format=", ".join(forms), items=found, rejected=rejected, unread=unread)


def is_judged(value: Any) -> bool:
    """Whether a row has a label that says whether its answer is good."""
    return isinstance(value, dict) and any(not says_nothing(value.get(name)) for name in LABELS)


def _judgement(value: Any) -> tuple[str, int]:
    """Return the field that says whether the answer is good, and 1 or 0."""
    if not isinstance(value, dict):
        raise BadRow(f"a row must be an object with fields, but this is {describe_value(value)}")
    if is_preference_pair(value):
        raise BadRow(
            "the row is a pair (chosen and rejected), and preference.loss kto learns from single answers with a label: "
            "preference.loss=dpo learns from pairs"
        )
    given = {name: value[name] for name in LABELS if not says_nothing(value.get(name))}
    if not given:
        raise BadRow(f"no label among {describe_value(value)}: kto needs to know whether an answer is good")
    found: dict[str, int] = {}
    for name, said in given.items():
        plain = said.strip().lower() if isinstance(said, str) else said
        if not isinstance(plain, bool | int | float | str) or plain not in _JUDGEMENTS:  # 1 equals True, 0 False
            raise BadRow(f"{name} is {describe_value(said)}, neither true (a good answer) nor false (a bad one)")
        found[name] = _JUDGEMENTS[plain]
    if len(set(found.values())) > 1:
        raise BadRow(f"{' and '.join(found)} say different things")
    return next(iter(found.items()))


def _conversation(row: Row, unread: Unread) -> tuple[Conversation, str]:
    """Read a row without its label as a conversation; return its format too."""
    plain = replace(row, value={name: part for name, part in row.value.items() if name not in LABELS})
    try:
        form = detect_format([plain])
    except DataError:
        raise BadRow(f"no prompt with an answer among {describe_value(plain.value)}") from None
    if form == "text":
        raise BadRow("the row is a text with a label, not an answer: task=sequence_classification learns such labels")
    conversations, rejected = to_conversations([plain], form, unread)
    if rejected:
        raise BadRow(rejected[0].reason)
    return conversations[0], form


def _last_answer(conversation: Conversation) -> Conversation:
    """Make all but what follows the last message of the user context."""
    messages = conversation.messages
    asked = [number for number, message in enumerate(messages) if message["role"] == "user"]
    if not asked:
        raise BadRow("no message of the user, to which the answer could be one")
    first = asked[-1] + 1
    answers = [message for message in messages[first:] if message["role"] == "assistant"]
    if not any(has_text(message) or message.get("tool_calls") for message in answers):
        raise BadRow("no answer after the last message of the user")
    before = tuple(number for number in range(first) if messages[number]["role"] == "assistant")
    return replace(
        conversation,
        given=tuple(sorted({*conversation.given, *before})),
        excluded=tuple(sorted({*conversation.excluded, *before})),
        forced_trained=tuple(number for number in conversation.forced_trained if number >= first),
    )
