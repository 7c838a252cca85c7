"""A Modelfile for Ollama: where the model is, its template in Ollama's language, and what ends an answer.

Ollama's templates are Go's, not Jinja. A chat template is translated by finding out what it writes around each message;
the translation is then compared with it, and refused where the two differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratune.data.masking.template import ChatTemplate
from loratune.data.rows.conversation import Conversation
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM, _USER, _ANSWER, _AGAIN = "Qk5sZ", "Qk6uZ", "Qk7aZ", "Qk8uZ"
_FIX = "`loratune export --to gguf` keeps the template as it is, and llama.cpp reads it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """What a template writes around the texts of a conversation.

    Attributes:
        start: At the very beginning.
        default: In the place of a system message, where there is none.
        system: Before and after the system message; None where the template takes none.
        system_in_user: The system message stands inside the first user message, between its start and its text.
        user: Before and after a user's message.
        assistant: Before and after an answer.
        prompt: What starts the answer that is wanted.
    """

    start: str
    default: str
    system: tuple[str, str] | None
    system_in_user: bool
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """What the Go template writes."""
        system = next((message["content"] for message in messages if message["role"] == "system"), None)
        around = ("", "") if system is None or self.system is None else self.system
        inside = f"{around[0]}{system}{around[1]}" if system is not None else self.default
        text = self.start + ("" if self.system_in_user else inside)
        for number, message in enumerate(message for message in messages if message["role"] != "system"):
            before, after = self.user if message["role"] == "user" else self.assistant
            first = inside if self.system_in_user and number == 0 else ""
            text += f"{before}{first}{message['content']}{after}"
        return text + self.prompt

    def as_go(self) -> str:
        """The template in Ollama's language."""
        before, after = self.system or ("", "")
        system = f"{{{{ if $.System }}}}{_go(before)}{{{{ $.System }}}}{_go(after)}{{{{ else }}}}{_go(self.default)}{{{{ end }}}}"
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


def translate(tokenizer: PreTrainedTokenizerBase, conversations: Iterable[Conversation]) -> Turns:
    """The chat template as `Turns`.

    Args:
        tokenizer: Of training.
        conversations: Held-out ones, on which the translation has to write the same text as the template.

    Raises:
        RecipeError: Ollama's template language cannot express it, or Ollama would add a token of its own.
    """
    template = ChatTemplate(tokenizer)
    turns = _found_by_probing(template)
    if turns is None:
        raise RecipeError("this chat template cannot be translated for Ollama", fix=_FIX)
    probes = [
        Conversation(messages=messages, tools=None, text=None, origin=None)  # type: ignore[arg-type]
        for messages in _probes(with_system=turns.system is not None)
    ]
    for conversation in [*probes, *conversations]:
        _check_same(turns, template, conversation)
    return _without_bos(turns, tokenizer)


def modelfile(model: str, adapter: str | None, turns: Turns, stops: Sequence[str]) -> str:
    """The text of the Modelfile.

    Args:
        model: The GGUF file of the model, as Ollama finds it.
        adapter: The GGUF LoRA file, if it is apart.
        turns: The template.
        stops: The texts of the tokens that end an answer.

    Raises:
        RecipeError: The template cannot be quoted.
    """
    go = turns.as_go()
    if '"""' in go:
        raise RecipeError('the chat template writes """, which a Modelfile cannot quote', fix=_FIX)
    lines = [f"FROM {model}"]
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    lines.append(f'TEMPLATE """{go}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"


def _found_by_probing(template: ChatTemplate) -> Turns | None:
    user, answer, again = _message("user", _USER), _message("assistant", _ANSWER), _message("user", _AGAIN)
    start_default_user, asked, tail = template.probe([user]).partition(_USER)
    whole = template.probe([user, answer, again], prompt=True)
    between_user_and_answer = whole.partition(_USER)[2].partition(_ANSWER)[0]
    after_answer = template.probe([user, answer]).rpartition(_ANSWER)[2]
    before_again, found, prompt_tail = whole.partition(_ANSWER)[2].partition(_AGAIN)
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
    return Turns(
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


def _check_same(turns: Turns, template: ChatTemplate, conversation: Conversation) -> None:
    messages = list(conversation.messages)
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    if not messages:
        return
    if conversation.tools or any("content" not in message or message["role"] == "tool" for message in messages):
        raise RecipeError("conversations with tools cannot be translated for Ollama", fix=_FIX)
    wanted = template.probe(messages, prompt=True)
    actual = turns.render(messages)
    if wanted != actual:
        place = next(
            (i for i, (a, b) in enumerate(zip(wanted, actual, strict=False)) if a != b), min(len(wanted), len(actual))
        )
        origin = conversation.origin
        raise RecipeError(
            "Ollama's template language cannot express this chat template: it writes "
            f"{wanted[place : place + 40]!r} where the translation has {actual[place : place + 40]!r}",
            file=origin.file if origin else None,
            line=origin.line if origin else None,
            fix=_FIX,
        )


def _without_bos(turns: Turns, tokenizer: PreTrainedTokenizerBase) -> Turns:
    """Ollama puts the begin-of-sequence token first by itself where the tokenizer does."""
    bos = tokenizer.bos_token
    adds = isinstance(bos, str) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if not adds:
        return turns
    assert isinstance(bos, str)
    if not turns.start.startswith(bos):
        raise RecipeError(f"Ollama would put {bos} first, which the chat template does not write", fix=_FIX)
    values = {name: getattr(turns, name) for name in Turns.__dataclass_fields__}
    return Turns(**{**values, "start": turns.start.removeprefix(bos)})


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _go(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')
