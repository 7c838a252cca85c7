"""The tokenizer's chat template: rendering with it, and probing what it writes around an answer.

A probe is a short conversation whose texts are sentinels: words that occur nowhere else and survive trimming, so that
everything between them is written by the template.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from loratune.data.masking.spans import any_of
from loratune.data.masking.special_tokens import SpecialText, special_names
from loratune.data.masking.template_sandbox import compile_template, describe, render_template
from loratune.run.errors import BadRow, DataError, LoratuneError

if TYPE_CHECKING:
    from jinja2 import Template
    from transformers import PreTrainedTokenizerBase

    from loratune.data.rows.conversation import Message

Tools = Sequence[dict[str, Any]] | None

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE_USER, _PROBE_ANSWER, _PROBE_THOUGHTS, _PROBE_ARGUMENT = "Qk0uZ", "Qk1aZ", "Qk2tZ", "Qk3vZ"
_PROBE_TOOL = "qk4fz"


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: A tokenizer with a chat template.

    Raises:
        DataError: There is no chat template, or it does not write the messages it is given.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._named: dict[bool, str] = {}
        self._templates: dict[bool, Template] = {}
        self._variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        if not tokenizer.chat_template:
            raise DataError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template",
                fix="use the instruct or chat variant of the model, or train plain text: data.format=text "
                "data.train_on=all, on rows with a text field",
            )
        self._as_parts = False
        self._arguments_as_text = False
        self._content_always = False
        self._choose_content_style()

    # ---- rendering

    def render(self, messages: Sequence[Message], tools: Tools = None, *, prompt: bool = False) -> str:
        """Render a conversation.

        Args:
            messages: The messages.
            tools: Function schemas.
            prompt: Whether to end with the generation prompt for the next answer.

        Raises:
            BadRow: The template rejects these messages.
        """
        return self._run(messages, tools, add_generation_prompt=prompt)[0]

    def render_marked(self, messages: Sequence[Message], tools: Tools) -> tuple[str, list[tuple[int, int]]]:
        """Render a conversation, and return the character spans between `{% generation %}` markers.

        Not transformers' own token mask: only its spans are used, and they are verified.
        """
        text, spans = self._run(messages, tools, marked=True)
        return text, [(start, end) for start, end in spans if end > start]

    def _run(self, messages: Sequence[Message], tools: Tools, **options: bool) -> tuple[str, list[tuple[int, int]]]:
        styled = [self._styled(message) for message in messages]
        try:
            return render_template(
                self._compiled(bool(tools)),
                styled,
                tools,
                **{"add_generation_prompt": False, **self._variables, **options},
            )
        except LoratuneError:
            raise
        except Exception as error:  # noqa: BLE001 - foreign code may raise anything
            raise BadRow(f"the chat template rejects it: {describe(error)}") from None

    def _styled(self, message: Message) -> Message:
        """Return the message in the form that this template reads."""
        calls = message.get("tool_calls")
        if not calls and not self._as_parts:
            return message
        message = dict(message)
        if calls and self._arguments_as_text:
            message["tool_calls"] = [_with_text_arguments(call) for call in calls]
        if calls and self._content_always:
            message.setdefault("content", "")
        if self._as_parts and isinstance(message.get("content"), str):
            message["content"] = [{"type": "text", "text": message["content"]}]
        return message

    def _compiled(self, tools: bool) -> Template:
        if tools not in self._templates:
            self._templates[tools] = compile_template(self._source(tools))
        return self._templates[tools]

    def _source(self, tools: bool) -> str:
        if tools not in self._named:
            # A tokenizer may have several templates by name, one of them for tools.
            self._named[tools] = self._tokenizer.get_chat_template(tools=[{}] if tools else None)
        return self._named[tools]

    def probe(self, messages: Sequence[Message], tools: Tools = None, *, prompt: bool = False) -> str:
        """Render a conversation; return an empty text if the template rejects it."""
        try:
            return self.render(messages, tools, prompt=prompt)
        except BadRow:
            return ""

    def _choose_content_style(self) -> None:
        """Find out whether content must be a list of parts, as in templates of vision models."""
        chat = [_message("user", _PROBE_USER), _message("assistant", _PROBE_ANSWER)]
        for self._as_parts in (False, True):
            text = self.probe(chat)
            if _PROBE_USER in text and _PROBE_ANSWER in text:
                return
        self._as_parts = False
        problem = f"the chat template of {self._tokenizer.name_or_path!r} does not write the messages it is given"
        raise DataError(problem, fix="use a model whose tokenizer has a working chat template")

    # ---- properties

    @cached_property
    def has_markers(self) -> bool:
        """Whether the template marks answers with `{% generation %}`."""
        return _MARKER.search(self._source(tools=False)) is not None

    @cached_property
    def writes_date(self) -> bool:
        """Whether the template writes today's date, so that the same data has other tokens tomorrow."""
        return "strftime_now" in self._source(tools=False)

    @cached_property
    def control_tokens(self) -> re.Pattern[str]:
        """A pattern that matches any added token of the tokenizer."""
        return any_of([token.content for token in self._tokenizer.added_tokens_decoder.values()])

    @cached_property
    def special_text(self) -> SpecialText:
        """The tokens that structure a conversation, which no message may contain as they are."""
        return SpecialText(self._tokenizer, special_names(self._tokenizer) | set(self.stop_tokens))

    @cached_property
    def stop_tokens(self) -> tuple[str, ...]:
        """The tokens that end an answer: the one after a text, the one after tool calls, the end-of-sequence token.

        Raises:
            DataError: The template writes no token after an answer at which a model could stop.
        """
        chat = [_message("user", _PROBE_USER), _message("assistant", _PROBE_ANSWER)]
        stop = self._last_token(self.render(chat).rpartition(_PROBE_ANSWER)[2])
        if stop is None:
            raise DataError(
                f"the chat template of {self._tokenizer.name_or_path!r} ends an answer with no stop token: a model "
                "trained on it would not learn to stop",
                fix="use a tokenizer whose chat template writes its end-of-turn token after every answer (TRL bundles "
                "training variants of many templates), or data.train_on=all with format text",
            )
        stops = [stop, self._tool_stop(), self._tokenizer.eos_token]
        return tuple(dict.fromkeys(token for token in stops if isinstance(token, str) and token))

    @cached_property
    def turn_end_tokens(self) -> tuple[str, ...]:
        """The tokens that may end a message of another role: the stop tokens and the one after a final user message."""
        after_user = self._last_token(self.probe([_message("user", _PROBE_USER)]).rpartition(_PROBE_USER)[2])
        return tuple(dict.fromkeys([*self.stop_tokens, *([after_user] if after_user else [])]))

    def _last_token(self, tail: str) -> str | None:
        """Return the added token that ends the first run of non-blank text: in `<|end|>⏎<|endoftext|>`, the first."""
        run = tail.split(maxsplit=1)[:1]
        tokens = self.control_tokens.findall(run[0]) if run else []
        eos = self._tokenizer.eos_token
        if tokens and run[0].endswith(tokens[-1]):
            return tokens[-1]
        return eos if run and isinstance(eos, str) and run[0].endswith(eos) else None

    def _tool_stop(self) -> str | None:
        text = self.probe(self._tool_probe, _PROBE_TOOLS) if self.supports_tools else ""
        tail = text.rpartition(_PROBE_ARGUMENT)[2]
        tokens = self.control_tokens.findall(tail)
        return tokens[-1] if tokens and tail.rstrip().endswith(tokens[-1]) else None

    @property
    def _tool_probe(self) -> list[Message]:
        call = {
            "type": "function",
            "id": "call00001",
            "function": {"name": _PROBE_TOOL, "arguments": {"x": _PROBE_ARGUMENT}},
        }
        return [_message("user", _PROBE_USER), {"role": "assistant", "tool_calls": [call]}]

    @cached_property
    def supports_tools(self) -> bool:
        """Whether the template writes tool calls, in one of the forms that templates expect.

        Evaluating it also settles that form, so evaluate it before rendering the first conversation with tools.
        """
        # Most templates read arguments as an object, DeepSeek's as JSON text; some fail on an answer without content.
        for self._content_always in (False, True):
            for self._arguments_as_text in (False, True):
                text = self.probe(self._tool_probe, _PROBE_TOOLS)
                if _PROBE_TOOL in text and _PROBE_ARGUMENT in text.rpartition(_PROBE_TOOL)[2]:
                    return True
        self._content_always = self._arguments_as_text = False
        return False

    @cached_property
    def prompt_tail(self) -> str:
        """What the template writes between a user's text and the answer to it, as a prompt."""
        try:
            text = self.render([_message("user", _PROBE_USER)], prompt=True)
        except BadRow as bad:
            raise DataError(
                f"{bad}: a prompt of one user message",
                fix="use a model whose tokenizer has a working chat template",
            ) from None
        return text.rpartition(_PROBE_USER)[2]

    @cached_property
    def header(self) -> str:
        """The generation prompt: what the template writes to start an answer. May be empty (Mistral)."""
        without = self.probe([_message("user", _PROBE_USER)]).rpartition(_PROBE_USER)[2]
        cut = len(os.path.commonprefix([self.prompt_tail, without]))  # noqa: RUF071 - of characters
        inside = [m for m in self.control_tokens.finditer(self.prompt_tail) if m.start() < cut < m.end()]
        return self.prompt_tail[inside[0].start() if inside else cut :]

    def writes_thoughts(self, *, calls: bool) -> bool:
        """Whether the template writes the `reasoning_content` of a last answer, with tool calls or without."""
        return self._writes_thoughts_of_calls if calls else self._writes_thoughts

    @cached_property
    def _writes_thoughts(self) -> bool:
        answer = {**_message("assistant", _PROBE_ANSWER), "reasoning_content": _PROBE_THOUGHTS}
        return _PROBE_THOUGHTS in self.probe([_message("user", _PROBE_USER), answer])

    @cached_property
    def _writes_thoughts_of_calls(self) -> bool:
        if not self.supports_tools:
            return False
        user, call = self._tool_probe
        return _PROBE_THOUGHTS in self.probe([user, {**call, "reasoning_content": _PROBE_THOUGHTS}], _PROBE_TOOLS)

    @cached_property
    def opens_thoughts(self) -> bool:
        """Whether the generation prompt ends inside an open `<think>`."""
        return self.prompt_tail.rstrip().endswith("<think>")

    @cached_property
    def forbids_thoughts(self) -> bool:
        """Whether the generation prompt ends with empty thoughts."""
        return self.prompt_tail.rstrip().endswith("</think>")


_PROBE_TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": _PROBE_TOOL,
            "description": "A probe.",
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "string", "description": "A word."}},
                "required": ["x"],
            },
        },
    }
]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
