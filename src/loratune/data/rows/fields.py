"""The fields that rows of the known formats have, and what each means here.

A field is read by the format of its row, refused by a rule of `FIELDS`, or counted by name as not read. A field that
says nothing (null, an empty text, list or object) is absent: tables fill in what a row does not have.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Place = Literal["column", "message key", "call key", "tool key", "part key"]
Unread = Counter[tuple[Place, str]]
"""Place and name of a field that is not read → how many rows, messages, calls, tools or parts have it."""


def describe_value(value: Any) -> str:
    """Describe a value of a row in an error message."""
    if isinstance(value, dict):
        return f"fields {', '.join(map(str, value)) or '(none)'}"
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} that is too large or nested too deeply to show"
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


def says_nothing(value: Any) -> bool:
    """Whether a field with this value is the same as no field."""
    return value is None or (isinstance(value, str | list | dict) and not value)


Rule = Callable[[str, Any, Mapping[str, Any]], str]
"""Name and value of a field, and all fields beside it → why its row cannot be trained on; "" if it can."""


@dataclass(frozen=True, slots=True)
class Field:
    """A known field.

    Attributes:
        place: Where it stands.
        names: Its names.
        written_by: Tools and formats that write it.
        meaning: What happens to it here.
        refuse: The rule that refuses some values; None: there is none.
    """

    place: Place
    names: tuple[str, ...]
    written_by: str
    meaning: str
    refuse: Rule | None = None


# ---- rules

PAIR = "is a preference pair (chosen and rejected)"
PAIR_FIX = (
    "task=preference trains pairs; data.columns={completion: chosen}, or {messages: chosen} if chosen is a list of "
    "messages, trains the chosen ones as answers"
)


def is_preference_pair(fields: Mapping[str, Any]) -> bool:
    """Whether a row has a better and a worse answer."""
    chosen = not says_nothing(fields.get("rejected")) and not says_nothing(fields.get("chosen"))
    return chosen or any(not says_nothing(fields.get(name)) for name in ("rejected_response", "non_preferred_output"))


def _pair(name: str, value: Any, fields: Mapping[str, Any]) -> str:  # noqa: ARG001 - the signature of all rules
    return f"{PAIR}: {PAIR_FIX}" if is_preference_pair(fields) else ""


def _media(name: str, value: Any, fields: Mapping[str, Any]) -> str:  # noqa: ARG001
    return f"has {name}; only text can be trained"


def _bad_answer(name: str, value: Any, fields: Mapping[str, Any]) -> str:  # noqa: ARG001
    if value is False or (isinstance(value, str) and value.strip().lower() == "false"):
        return (
            f"has {name} false, which marks a bad answer: it would be trained as a good one; "
            "task=preference preference.loss=kto learns from good and bad ones"
        )
    return ""


def _row_weight(name: str, value: Any, fields: Mapping[str, Any]) -> str:  # noqa: ARG001
    if value in (1, "1"):
        return ""
    return (
        f"has {name} {json.dumps(value, default=str)}, and rows are not weighted, only sources are: put rows of one "
        "weight into one file, data.train=[{name: FILE, weight: …}]"
    )


def _refused(reason: str) -> Rule:
    return lambda name, value, fields: f"has {name} ({describe_value(value)}), {reason}"  # noqa: ARG005


def _channel(name: str, value: Any, fields: Mapping[str, Any]) -> str:  # noqa: ARG001
    if value == "final":
        return ""
    return f"has the channel {describe_value(value)}; write thoughts as reasoning_content, and calls as tool_calls"


_kwargs = _refused("which are not passed to the chat template")
_refusal = _refused("which is not trained; write it as content to train it")
_plan = _refused("which is not trained; write it as content or reasoning_content to train it")
_ranges = _refused("and a message is trained as a whole or, with train: false, not at all")


FIELDS: tuple[Field, ...] = (
    Field("column", ("messages", "conversations"), "OpenAI, TRL, ShareGPT, Axolotl, mlx-lm", "the conversation"),
    Field("column", ("prompt", "completion", "response"), "TRL, OpenAI, mlx-lm", "context, and what is trained"),
    Field("column", ("question", "answer"), "question answering", "as prompt and completion"),
    Field("column", ("instruction", "output"), "Alpaca, LLaMA-Factory", "as prompt and completion"),
    Field("column", ("input",), "Alpaca", "appended below the instruction or the prompt"),
    Field("column", ("history",), "Alpaca of LLaMA-Factory, ms-swift", "earlier turns, trained like all answers"),
    Field("column", ("system", "system_prompt"), "ShareGPT, Alpaca, ms-swift", "the system message"),
    Field("column", ("tools", "functions"), "OpenAI, TRL, LLaMA-Factory", "the functions that may be called"),
    Field("column", ("text",), "mlx-lm, TRL, pretraining", "plain text, if the row has no other format"),
    Field("column", ("context", "documents"), "Dolly, SQuAD, retrieval", "not read; data.columns={input: context}"),
    Field("column", ("split",), "tables with several splits", "not read"),
    Field("column", ("chosen", "rejected", "rejected_response", "non_preferred_output"), "DPO",
          "with task: preference only", _pair),
    Field("column", ("label", "kto_tag"), "KTO: TRL, ms-swift, LLaMA-Factory", "false: with kto only", _bad_answer),
    Field("column", ("weight", "sample_weight", "loss_weight"), "tables of weighted rows", "must be 1", _row_weight),
    Field("column", ("chat_template_kwargs",), "TRL, ms-swift", "refused", _kwargs),
    Field(
        "column", ("image", "images", "audio", "audios", "video", "videos"), "TRL, LLaMA-Factory, ms-swift", "refused",
        _media,
    ),
    Field("message key", ("role", "content"), "OpenAI", "who says what"),
    Field("message key", ("from", "value"), "ShareGPT", "who says what"),
    Field("message key", ("tool_calls", "function_call"), "OpenAI", "calls of an answer"),
    Field("message key", ("name", "tool_call_id", "call_id"), "OpenAI", "given to the chat template"),
    Field(
        "message key", ("reasoning_content", "reasoning", "thinking", "reasoning_details"),
        "DeepSeek, vLLM, TRL, OpenRouter", "thoughts of an answer",
    ),
    Field(
        "message key", ("train", "weight", "loss", "loss_mask", "loss_scale", "trainable", "training"),
        "Axolotl, OpenAI, ms-swift", "0 or false: context, not trained",
    ),
    Field("message key", ("masked",), "tables of masked answers", "true: context, not trained"),
    Field("message key", ("train_detail",), "Axolotl", "refused", _ranges),
    Field("message key", ("refusal",), "OpenAI", "refused", _refusal),
    Field("message key", ("tool_plan",), "Cohere", "refused", _plan),
    Field("message key", ("channel",), "gpt-oss", "must be final", _channel),
    Field("message key", ("image", "images", "audio", "audios", "video", "videos"), "ms-swift", "refused", _media),
    Field("call key", ("function", "name", "type", "id", "call_id"), "OpenAI", "the call"),
    Field("call key", ("arguments", "parameters", "input"), "OpenAI, Llama, Anthropic", "object, or its JSON text"),
    Field("tool key", ("type", "function", "name", "description", "parameters", "input_schema"), "OpenAI, Anthropic",
          "the schema"),
    Field("part key", ("type", "text", "value", "thinking", "reasoning"), "OpenAI, Anthropic, TRL", "text or thoughts"),
)  # fmt: skip
"""One line per known field. Fields without a rule that the format of their row does not read are named."""

_RULES: dict[Place, dict[str, Field]] = {}
for _field in FIELDS:
    _RULES.setdefault(_field.place, {}).update(dict.fromkeys(_field.names, _field))


def refusal(place: Place, fields: Mapping[str, Any], read: Collection[str], unread: list[tuple[Place, str]]) -> str:
    """Apply the rules to every field that was not read, and name the others.

    Args:
        place: Where the fields stand.
        fields: All fields of the row, message, call, tool or part.
        read: The names that its reader reads.
        unread: Receives what is neither read nor refused.

    Returns:
        Why the row cannot be trained on; "" if it can.
    """
    rules = _RULES[place]
    for name, value in fields.items():
        if name in read or says_nothing(value):
            continue
        rule = rules.get(name)
        if rule is not None and rule.refuse is not None and (reason := rule.refuse(name, value, fields)):
            return reason
        unread.append((place, str(name)))
    return ""


def unread_in_words(unread: Mapping[tuple[Place, str], int], shown: int = 12) -> str:
    """Describe fields that are not read: `columns context (20 rows), id (20); message keys loss_mask (1)`."""
    places: dict[Place, list[str]] = {}
    for (place, name), count in unread.items():
        places.setdefault(place, []).append(f"{name} ({count:,})")
    return "; ".join(
        f"{place}s {', '.join(names[:shown])}" + (f" and {len(names) - shown} more" if len(names) > shown else "")
        for place, names in places.items()
    )
