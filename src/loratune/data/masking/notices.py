"""What the user should know about the chat template and this data, as sentences of the data report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratune.recipe.roles import TrainOn, trained_roles
from loratune.run.errors import plural

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterator, Mapping

    from loratune.data.masking.template import ChatTemplate


UNWRITTEN = "unwritten tool key "
"""A count's name begins with it, and a key of tools that the chat template does not write follows."""


def template_notices(counts: Counter[str], template: ChatTemplate, train_on: TrainOn) -> list[str]:
    """Return the notices about rendered conversations.

    Args:
        counts: What a `Renderer` counted.
        template: The chat template.
        train_on: The policy.
    """
    return [
        *_thought_notices(counts, template, train_on),
        *_turn_notices(counts, train_on),
        *_token_notices(counts, template),
    ]


def _thought_notices(counts: Counter[str], template: ChatTemplate, train_on: TrainOn) -> Iterator[str]:
    if counts["thoughts_restored"]:
        yield (
            f"The chat template drops the thoughts of {plural(counts['thoughts_restored'], 'answer')}. They were put "
            "back and are trained (data.thinking=keep); data.thinking=strip trains without them."
        )
    if number := counts["thoughts_as_tags"]:
        yield (
            f"The chat template has no place for thoughts: those of {plural(number, 'answer')} are trained as "
            "<think>…</think> at the start of the text; data.thinking=strip trains without them."
        )
    thoughtless = counts["answers"] - counts["thoughts"]
    if template.opens_thoughts and thoughtless and train_on != "all":
        yield (
            f"The chat template's generation prompt opens <think>, but {thoughtless} of {counts['answers']} trained "
            "answers have no thoughts: in use, the model is prompted for thoughts it was not trained to have."
        )
    if (number := counts["empty_thoughts"]) and train_on != "all":
        yield (
            f"The chat template writes empty thoughts (<think></think>) at the start of {number} of "
            f"{plural(counts['answers'], 'trained answer')}, and they are trained: the model learns to answer without "
            "thinking first."
        )
    if template.forbids_thoughts and counts["thoughts"]:
        have = plural(counts["thoughts"], "trained answer has", "trained answers have")
        yield (
            f"The chat template's generation prompt ends with empty thoughts, but {have} some: in use, the model is "
            "prompted to answer without them."
        )


def _turn_notices(counts: Counter[str], train_on: TrainOn) -> Iterator[str]:
    if number := counts["answers_not_trained"]:
        what = "answer" if trained_roles(train_on) == ("assistant",) else "message"
        yield plural(
            number, f"{what} has train: false and is not trained.", f"{what}s have train: false and are not trained."
        )
    if (number := counts["answers_in_prompts"]) and train_on != "all":
        yield plural(
            number,
            "answer is part of a prompt and is not trained.",
            "answers are parts of prompts and are not trained.",
        )
    if number := counts["unanswered"]:
        ends = plural(number, "conversation ends", "conversations end")
        yield f"{ends} with a message that has no answer."
    without_stop_token = {
        role: number for role in trained_roles(train_on) if (number := counts[f"without_stop_token {role}"])
    }
    if without_stop_token:
        which = " and ".join(
            plural(n, f"message of {role}", f"messages of {role}") for role, n in without_stop_token.items()
        )
        yield (
            f"The chat template writes {which} without a stop token of their own: the texts are trained, but not where "
            "they end."
        )


def unwritten_keys(counts: Mapping[str, int]) -> dict[str, int]:
    """Return the keys of tools that the chat template does not write → conversations that have them."""
    return {name.removeprefix(UNWRITTEN): number for name, number in counts.items() if name.startswith(UNWRITTEN)}


def _token_notices(counts: Counter[str], template: ChatTemplate) -> Iterator[str]:
    if unwritten := unwritten_keys(counts):
        keys = ", ".join(f"{name} ({number:,})" for name, number in unwritten.items())
        yield f"The chat template does not write everything that the tools say: {keys}."
    if template.writes_date:
        yield "The chat template writes today's date into every conversation: tomorrow's tokens will differ."
    if counts["straddling"]:
        both = "both text of the chat template and the start of a trained text;"
        one, many = f"token contains {both} it is not trained.", f"tokens contain {both} they are not trained."
        yield plural(counts["straddling"], one, many)


def split_notices(number: int) -> list[str]:
    """Return the notice about texts that are longer than an example.

    Args:
        number: How many there are.
    """
    return [f"{plural(number, 'text continues', 'texts continue')} in further examples."] if number else []


def special_token_notices(number: int, *, as_text: bool) -> list[str]:
    """Return the notices about special tokens in texts.

    Args:
        number: Conversations whose texts contain the names of special tokens.
        as_text: Whether these are trained as ordinary text.
    """
    if not number:
        return []
    if as_text:
        have = plural(number, "conversation has", "conversations have")
        return [
            f"{have} the names of special tokens in their texts. They are trained as ordinary text "
            "(data.special_tokens_in_text=as_text). Most servers read them as special tokens."
        ]
    return [
        f"{plural(number, 'text has', 'texts have')} the names of special tokens in them. In chats such rows are "
        "rejected, in plain text they are read as these tokens; data.special_tokens_in_text=as_text reads them as text."
    ]
