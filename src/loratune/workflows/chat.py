"""Chat with the base and the fine-tuned model in the terminal, with the template and stop tokens of training."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from loratune.data.masking.template import ChatTemplate
from loratune.data.prompts import stop_token_ids
from loratune.evaluation.generate import as_generator
from loratune.evaluation.sampling import Sampling, generation_config
from loratune.model.adapter.attach import load_adapter
from loratune.model.device import choose_device, device_here, torch_dtype
from loratune.model.load import load_model, load_tokenizer, locate_model, positions_of
from loratune.recipe.recipe import ModelSection
from loratune.recipe.tasks import require_text
from loratune.run.directory import RunDir
from loratune.run.errors import BadRow, DataError, LoratuneError, MachineError, RecipeError
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.workflows.finished import recipe_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console

BASE, TUNED = "base", "tuned"

HELP = """/tuned         the fine-tuned model answers (default)
/base          the base model answers
/both          both answer, side by side
/system TEXT   set the system message and start over; without TEXT: no system message
/set N=VALUE   set temperature, top_p, top_k, max_new_tokens or seed
/reset         start over
/save FILE     append the conversation to a JSONL file, as a row that loratune can train on
/help          show this list
/exit          quit, as does Ctrl-D; Ctrl-C stops an answer"""


@dataclass(slots=True)
class Turn:
    """A message of the user, and each model's answer."""

    user: str
    answers: dict[str, str] = field(default_factory=dict)

    def seen_by(self, side: str) -> str:
        """Return the answer in this model's history: its own, or the other model's if it was not asked."""
        return self.answers.get(side) or next(iter(self.answers.values()))


class Chat:
    """A model, or a base with its adapter, and the conversation so far.

    Args:
        model: The model; with an adapter, both the base and the fine-tuned model can be asked.
        tokenizer: The tokenizer of training, with its template.
        sampling: How the next token is chosen.
        system: The system message; empty for none.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        system: str = "",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.system = system
        self.turns: list[Turn] = []
        self.sides: tuple[str, ...] = (BASE, TUNED) if isinstance(model, PeftModel) else (TUNED,)
        self.template = ChatTemplate(tokenizer)
        self.stops = stop_token_ids(tokenizer)

    def prompt_ids(self, side: str, text: str) -> list[int]:
        """Return the conversation as this model sees it, up to where its answer begins.

        Raises:
            DataError: The text contains a special token, or the template refuses the conversation.
        """
        found = self.template.special_text.names.search(f"{self.system}\n{text}")
        if found:
            raise DataError(f"the text contains the special token {found[0]}", fix="write it differently")
        try:
            rendered = self.template.render(self.messages(side, text), prompt=True)
        except BadRow as bad:
            raise DataError(str(bad), fix="/system without a text, if the template takes no system message") from None
        ids: list[int] = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return ids

    def messages(self, side: str, text: str | None = None) -> list[dict[str, Any]]:
        """Return the conversation with this model, followed by a new message of the user."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.seen_by(side)}]
        return messages if text is None else [*messages, {"role": "user", "content": text}]

    def answer(self, side: str, text: str, on_text: Callable[[str], None]) -> str:
        """Answer a message, one piece at a time.

        Args:
            side: `base` or `tuned`.
            text: The user's message.
            on_text: Called with each new piece of the answer.

        Raises:
            DataError: As for `prompt_ids`, or the conversation is longer than the model's positions.
        """
        ids = self.prompt_ids(side, text)
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        assert isinstance(base, PreTrainedModel)
        positions = positions_of(base.config)
        room = self.sampling.max_new_tokens if positions is None else positions - len(ids)
        if room < 1:
            raise DataError(f"the conversation has {len(ids)} tokens, the model {positions} positions", fix="/reset")
        sampling = replace(self.sampling, max_new_tokens=min(room, self.sampling.max_new_tokens))
        settings = generation_config(sampling, self.stops, self.stops[0])
        streamer = _Pieces(self.tokenizer, self.stops, on_text)
        without = self.model.disable_adapter() if side == BASE and isinstance(self.model, PeftModel) else nullcontext()
        torch.manual_seed(self.sampling.seed + len(self.turns))
        # Ctrl-C ends the answer, not the conversation.
        with without, as_generator(base, settings), suppress(KeyboardInterrupt):
            tensor = torch.tensor([ids], device=base.device)
            base.generate(  # type: ignore[operator]
                tensor, attention_mask=torch.ones_like(tensor), generation_config=settings, streamer=streamer
            )
        return streamer.text

    def save(self, file: Path) -> None:
        """Append the conversation to a JSONL file, with the fine-tuned model's answers.

        Raises:
            RecipeError: There is no conversation yet.
            MachineError: The file cannot be written.
        """
        if not self.turns:
            raise RecipeError("there is no conversation yet", fix="say something first")
        try:
            with file.expanduser().open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"messages": self.messages(TUNED)}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise MachineError(f"cannot write: {error}", file=file, fix="choose another file") from error


def open_chat(root: Path, sampling: Sampling, *, progress: Progress = NO_PROGRESS, system: str = "") -> Chat:
    """Load a run's base with its adapter, or a merged folder.

    Raises:
        RecipeError: The folder is neither.
        MachineError: The base model is not on this machine.
    """
    folder = root.expanduser()
    if (folder / "config.json").is_file() and not (folder / "lock.json").is_file():
        section, device, dtype = ModelSection(name=str(folder)), choose_device("auto").value, "auto"
        adapter = None
    else:
        run = RunDir.open(folder)
        run.require_adapter()
        recipe = recipe_of(run)
        require_text(
            recipe, "loratune chat", f"loratune evaluate {root} has its classes, loratune merge {root} OUT a model"
        )
        section, device, dtype, adapter = (
            recipe.model,
            device_here(recipe.train.device),
            recipe.model.dtype,
            run.adapter,
        )
    base = locate_model(section, progress)
    progress.line(f"loading {section.name} on {device}")
    tokenizer_section = section if adapter is None else ModelSection(name=str(adapter))
    tokenizer = load_tokenizer(replace(base, path=adapter) if adapter is not None else base, tokenizer_section)
    model: Any = load_model(base, section, dtype=_dtype(dtype, base.path), device=device)
    if adapter is not None:
        model = load_adapter(model, adapter)
    return Chat(model.eval(), tokenizer, sampling, system=system)


def converse(chat: Chat, console: Console, lines: Iterator[str] | None = None) -> None:
    """Read what the user types and answer, until the input ends.

    Args:
        chat: The model and its conversation.
        console: The console to print answers to.
        lines: The user's lines; None to read them from the terminal or a pipe.
    """
    asked: tuple[str, ...] = (TUNED,)
    console.print(f"[dim]chatting with {' and '.join(chat.sides)}; /help lists the commands[/dim]")
    for line in lines if lines is not None else _typed(console):
        try:
            if line in ("exit", "quit") or line.split()[0] in ("/exit", "/quit"):
                return
            if not line.startswith("/"):
                _exchange(chat, console, asked, line)
            else:
                asked = _command(chat, console, asked, line)
        except LoratuneError as error:
            console.print(Text(str(error), style="red"))


def _exchange(chat: Chat, console: Console, asked: Sequence[str], text: str) -> None:
    turn = Turn(user=text)
    if len(asked) == 1:
        turn.answers[asked[0]] = chat.answer(asked[0], text, lambda piece: console.print(Text(piece), end=""))
        console.print()
    else:
        _answer_side_by_side(chat, console, asked, turn)
    if all(turn.answers.values()):
        chat.turns.append(turn)
    else:
        console.print("[yellow]the answer is empty; this exchange is discarded[/yellow]")


def _answer_side_by_side(chat: Chat, console: Console, asked: Sequence[str], turn: Turn) -> None:
    shown: dict[str, str] = {}
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        for side in asked:

            def show(piece: str, side: str = side) -> None:
                shown[side] = shown.get(side, "") + piece
                live.update(_columns(asked, shown), refresh=console.is_terminal)

            turn.answers[side] = chat.answer(side, turn.user, show)
        live.update(_columns(asked, turn.answers), refresh=True)
    if not console.is_terminal:
        console.print()  # `Live` ends the line on a terminal only


def _columns(sides: Sequence[str], texts: dict[str, str]) -> Table:
    table = Table(expand=True)
    for side in sides:
        table.add_column(side, ratio=1, overflow="fold")
    table.add_row(*(Text(texts.get(side, "")) for side in sides))
    return table


def _command(chat: Chat, console: Console, asked: tuple[str, ...], line: str) -> tuple[str, ...]:
    """Run a command. Return the models that answer from now on."""
    name, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    reply = ""
    if name in (BASE, TUNED, "both"):
        asked = (BASE, TUNED) if name == "both" else (name,)
        if not set(asked) <= set(chat.sides):
            raise RecipeError("a merged model has no separate base", fix="`loratune chat RUN` on the run itself")
        reply = f"{' and '.join(asked)} will answer"
    elif name == "system":
        chat.system, chat.turns = rest, []
        reply = f"{'system message set' if rest else 'no system message'}; new conversation"
    elif name == "set":
        chat.sampling = chat.sampling.changed(rest)
        reply = str(chat.sampling)
    elif name == "reset":
        chat.turns = []
        reply = "new conversation"
    elif name == "save":
        words = shlex.split(rest)
        if len(words) != 1:
            raise RecipeError("/save needs a file", fix="/save chats.jsonl")
        chat.save(Path(words[0]))
        reply = f"appended to {words[0]}"
    elif name == "help":
        console.print(Text(HELP))
    else:
        raise RecipeError(f"unknown command /{name}", fix="/help lists the commands")
    if reply:
        console.print(Text(reply, style="dim"))
    return asked


def _typed(console: Console) -> Iterator[str]:
    """Yield lines from the terminal, with a prompt and history, or from a pipe."""
    interactive = sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 - gives `input` its history and its keys
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print()
            return
        if line:
            yield line


class _Pieces(BaseStreamer):
    """Turns generated tokens into pieces of text, without the stop token and without incomplete characters."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], on_text: Callable[[str], None]
    ) -> None:
        self._tokenizer, self._stops, self._on_text = tokenizer, stops, on_text
        self._ids: list[int] | None = None
        self.text = ""

    def put(self, value: torch.Tensor) -> None:
        if self._ids is None:  # the first call brings the prompt
            self._ids = []
            return
        self._ids += [token for token in value.flatten().tolist() if token not in self._stops]
        text = self._decoded()
        if not text.endswith("�"):  # the last character needs more tokens
            self._emit(text)

    def end(self) -> None:
        self._emit(self._decoded())

    def _emit(self, text: str) -> None:
        piece, self.text = text[len(self.text) :], text
        if piece:
            self._on_text(piece)

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self._ids or [], clean_up_tokenization_spaces=False))


def _dtype(name: str, folder: Path) -> torch.dtype:
    """Return a type by its name; for `auto`, the type in the folder's configuration."""
    if name != "auto":
        return torch_dtype(name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return torch_dtype(config.get("dtype") or config.get("torch_dtype") or "float32")
