"""Write a Modelfile for Ollama: the model's file, its chat template in Go's template language, its stop tokens.

A chat template is translated by probing what it writes around each message. The translation is then compared with the
original on held-out conversations, and refused if the two differ.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loratune.data.masking.template import ChatTemplate
from loratune.data.rows.conversation import Conversation
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from transformers import PreTrainedTokenizerBase

# Message texts to probe a template with: found again in its output, since no template writes them itself.
_SYSTEM, _USER, _ANSWER, _AGAIN = "Qk5sZ", "Qk6uZ", "Qk7aZ", "Qk8uZ"
_FIX = "`loratune export --to gguf` writes the template unchanged, for llama.cpp"


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateParts:
    """The texts that a chat template writes around the messages of a conversation.

    Attributes:
        start: The text at the very beginning.
        default: The text that replaces a missing system message.
        system: The texts before and after the system message; None where the template takes none.
        system_in_user: Whether the system message goes inside the first user message, before its text.
        user: The texts before and after a user's message.
        assistant: The texts before and after an answer.
        prompt: The text that starts the next answer.
    """

    start: str
    default: str
    system: tuple[str, str] | None
    system_in_user: bool
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """Render a conversation as the Go template does."""
        system = next((message["content"] for message in messages if message["role"] == "system"), None)
        before, after = ("", "") if system is None or self.system is None else self.system
        head = f"{before}{system}{after}" if system is not None else self.default
        text = self.start + ("" if self.system_in_user else head)
        for number, message in enumerate(message for message in messages if message["role"] != "system"):
            before, after = self.user if message["role"] == "user" else self.assistant
            first = head if self.system_in_user and number == 0 else ""
            text += f"{before}{first}{message['content']}{after}"
        return text + self.prompt

    def as_go(self) -> str:
        """Return the template in Go's template language."""
        before, after = self.system or ("", "")
        system = (
            f"{{{{ if $.System }}}}{_go(before)}{{{{ $.System }}}}{_go(after)}"
            f"{{{{ else }}}}{_go(self.default)}{{{{ end }}}}"
        )
        first = "{{ if $first }}" + system + "{{ $first = false }}{{ end }}" if self.system_in_user else ""
        return (
            _go(self.start)
            + ("{{ $first := true }}" if self.system_in_user else system)
            + '{{ range .Messages }}{{ if eq .Role "user" }}'
            + f"{_go(self.user[0])}{first}{{{{ .Content }}}}{_go(self.user[1])}"
            + '{{ else if eq .Role "assistant" }}'
            + f"{_go(self.assistant[0])}{{{{ .Content }}}}{_go(self.assistant[1])}"
            + "{{ end }}{{ end }}"
            + _go(self.prompt)
        )


def translate(tokenizer: PreTrainedTokenizerBase, conversations: Iterable[Conversation]) -> TemplateParts:
    """Translate the chat template, and check the translation.

    Args:
        tokenizer: The tokenizer of training, with its template.
        conversations: Held-out conversations that the translation must render like the template.

    Raises:
        RecipeError: Ollama's template language cannot express the template, or Ollama would add a token of its own.
    """
    template = ChatTemplate(tokenizer)
    parts = _probe_parts(template)
    if parts is None:
        raise RecipeError("this chat template cannot be translated for Ollama", fix=_FIX)
    probes = [
        Conversation(messages=messages, tools=None, text=None, origin=None)  # type: ignore[arg-type]
        for messages in _probes(with_system=parts.system is not None)
    ]
    for conversation in [*probes, *conversations]:
        _check_same(parts, template, conversation)
    return _without_bos(parts, tokenizer)


def modelfile(model: str, adapter: str | None, parts: TemplateParts, stops: Sequence[str]) -> str:
    """Return the text of the Modelfile.

    Args:
        model: The path of the model's GGUF file, absolute or relative to the Modelfile.
        adapter: The path of the GGUF LoRA file; None for a merged model.
        parts: The translated template.
        stops: The texts of the tokens that end an answer.

    Raises:
        RecipeError: The template cannot be quoted.
    """
    go = parts.as_go()
    if '"""' in go:
        raise RecipeError('the chat template contains """, which a Modelfile cannot quote', fix=_FIX)
    lines = [f"FROM {model}"]
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    lines.append(f'TEMPLATE """{go}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"


def _probe_parts(template: ChatTemplate) -> TemplateParts | None:
    """Find the parts of a template; None where it does not write the same around every message."""
    user, answer, again = _message("user", _USER), _message("assistant", _ANSWER), _message("user", _AGAIN)
    start_default_user, asked, tail = template.probe([user]).partition(_USER)
    chat = template.probe([user, answer, again], prompt=True)
    between_user_and_answer = chat.partition(_USER)[2].partition(_ANSWER)[0]
    after_answer = template.probe([user, answer]).rpartition(_ANSWER)[2]
    before_again, found, prompt_tail = chat.partition(_ANSWER)[2].partition(_AGAIN)
    if not asked or not found or not before_again.startswith(after_answer) or not prompt_tail.startswith(tail):
        return None
    before_user = before_again[len(after_answer) :]
    if not between_user_and_answer.startswith(tail) or not start_default_user.endswith(before_user):
        return None
    first = start_default_user[: len(start_default_user) - len(before_user)]
    with_system = template.probe([_message("system", _SYSTEM), user])
    before_system, has_system, after_system = with_system.partition(_USER)[0].partition(_SYSTEM)
    own_turn = bool(has_system) and after_system.endswith(before_user)
    start = ""
    if has_system:
        shared = [a == b for a, b in zip(before_system, first, strict=False)]
        start = first[: shared.index(False) if False in shared else len(shared)] if own_turn else first
        before_system = before_system[len(start) + (0 if own_turn else len(before_user)) :]
        after_system = after_system[: len(after_system) - len(before_user)] if own_turn else after_system
    return TemplateParts(
        start=start if has_system else first,
        default=first[len(start) :] if has_system else "",
        system=(before_system, after_system) if has_system else None,
        system_in_user=bool(has_system) and not own_turn,
        user=(before_user, tail),
        assistant=(between_user_and_answer[len(tail) :], after_answer),
        prompt=prompt_tail[len(tail) :],
    )


def _probes(*, with_system: bool) -> list[tuple[dict[str, Any], ...]]:
    chat = (_message("user", _USER), _message("assistant", _ANSWER), _message("user", _AGAIN))
    system = _message("system", _SYSTEM)
    probes = [chat[:1], chat]
    return [*probes, *((system, *probe) for probe in probes)] if with_system else probes


def _check_same(parts: TemplateParts, template: ChatTemplate, conversation: Conversation) -> None:
    """Refuse a conversation that template and translation render differently."""
    messages = list(conversation.messages)
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    if not messages:
        return
    if conversation.tools or any("content" not in message or message["role"] == "tool" for message in messages):
        raise RecipeError("conversations with tools cannot be translated for Ollama", fix=_FIX)
    wanted = template.probe(messages, prompt=True)
    actual = parts.render(messages)
    if wanted != actual:
        start = next(
            (i for i, (a, b) in enumerate(zip(wanted, actual, strict=False)) if a != b), min(len(wanted), len(actual))
        )
        origin = conversation.origin
        raise RecipeError(
            "Ollama's template language cannot express this chat template: it writes "
            f"{wanted[start : start + 40]!r} where the translation has {actual[start : start + 40]!r}",
            file=origin.file if origin else None,
            line=origin.line if origin else None,
            fix=_FIX,
        )


def _without_bos(parts: TemplateParts, tokenizer: PreTrainedTokenizerBase) -> TemplateParts:
    """Remove the begin-of-sequence token where Ollama adds it itself, as the tokenizer does."""
    bos = tokenizer.bos_token
    adds = isinstance(bos, str) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if not adds:
        return parts
    assert isinstance(bos, str)
    if not parts.start.startswith(bos):
        raise RecipeError(f"Ollama would start prompts with {bos}, which the chat template does not", fix=_FIX)
    return replace(parts, start=parts.start.removeprefix(bos))


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _go(text: str) -> str:
    """Quote text for a Go template."""
    return text.replace("{{", '{{ "{{" }}')
