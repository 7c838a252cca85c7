"""The preview of examples as training will see them: every token, and whether it is trained, from the tensors."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Group
from rich.text import Text

from loratune.data.examples import Example, LabeledExample
from loratune.data.prompts import stop_token_ids

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console, ConsoleOptions, RenderResult
    from transformers import PreTrainedTokenizerBase

MAX_TOKENS = 400
"""Maximum tokens shown of one example."""

_TRAINED, _CONTEXT = "green", "dim"
_SPECIAL, _STOP = "bold", "bold underline"
_OPEN, _CLOSE = "⟦", "⟧"

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ title }}: trained tokens</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #777; background: #fff }
h1, h2, p { color: #222 }
h1 { font-size: 1.3rem }
h2 { font-size: 1rem; margin-top: 2rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.6 ui-monospace, monospace;
      border: 1px solid #ddd; padding: .7rem }
.trained { background: #d9f2df; color: #0a4d1c }
.special { font-weight: bold }
.stop { text-decoration: underline 2px; outline: 1px solid #0a4d1c }
@media (prefers-color-scheme: dark) {
  body { color: #999; background: #161616 } h1, h2, p { color: #ddd } pre { border-color: #444 }
  .trained { background: #12391d; color: #b9f0c8 } .stop { outline-color: #b9f0c8 }
}
</style>
<h1>{{ title }}</h1>
<p><span class="trained">trained</span>, <span class="special">special token</span>,
<span class="trained special stop">trained stop token</span>; everything else is context, not trained.</p>
{% for name, pieces in examples %}
<h2>{{ name }}</h2>
<pre>
{%- for piece in pieces -%}
<span class="{{ 'trained' if piece.trained }}{{ ' special' if piece.special }}{{ ' stop' if piece.stop }}">
{{- piece.text -}}
</span>
{%- endfor -%}
</pre>
{% endfor %}
</html>
"""


class Piece(NamedTuple):
    """A run of tokens of one kind."""

    text: str
    trained: bool
    special: bool
    stop: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """A rich renderable: in color if the console has it, otherwise with ⟦brackets⟧ around trained tokens."""

    titles: tuple[str, ...]
    pieces: tuple[tuple[Piece, ...], ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render for this console."""
        if console.color_system is None or console.no_color:
            yield Text(self.plain())
        else:
            yield self.colored()

    @property
    def _trains_tokens(self) -> bool:
        """Whether any token is trained; none is in labeled texts."""
        return any(piece.trained for pieces in self.pieces for piece in pieces)

    def as_record(self) -> dict[str, Any]:
        """Return what `preview.json` holds: each example's title, and its pieces in order."""
        return {
            "examples": [
                {"title": title, "pieces": [piece._asdict() for piece in pieces]}
                for title, pieces in zip(self.titles, self.pieces, strict=True)
            ]
        }

    def colored(self) -> Group:
        """Return the preview with trained tokens green, others dim, special tokens bold, stop tokens underlined."""
        parts = [
            Text.assemble(
                (_TRAINED, _TRAINED), ": trained  ", ("gray", _CONTEXT), ": not trained  ", ("stop token", _STOP)
            )
        ][: self._trains_tokens]
        for title, pieces in zip(self.titles, self.pieces, strict=True):
            parts += [Text(f"\n{title}", style="bold"), Text.assemble(*((p.text, _style(p)) for p in pieces))]
        return Group(*parts)

    def html(self, *, title: str) -> str:
        """Return the preview as one self-contained page: no scripts, no external files, all text escaped."""
        from jinja2 import Environment

        environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        examples = zip(self.titles, self.pieces, strict=True)
        return environment.from_string(_PAGE).render(title=title, examples=list(examples))

    def plain(self) -> str:
        """Return the preview as plain text."""
        lines = [f"{_OPEN} {_CLOSE} = trained tokens, • = trained stop token"][: self._trains_tokens]
        for title, pieces in zip(self.titles, self.pieces, strict=True):
            lines += [f"\n{title}", "".join(_bracketed(pieces))]
        return "\n".join(lines)


def preview(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, count: int) -> Preview:
    """Return a preview of the first examples, token by token.

    Args:
        examples: The examples as training will use them.
        tokenizer: The tokenizer, to decode the ids.
        count: How many examples to show.
    """
    labeled = any(isinstance(example, LabeledExample) for example in examples[:count])
    stops = set() if labeled else set(stop_token_ids(tokenizer))
    specials = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(
        tokenizer.all_special_ids
    )
    shown = [(part, side) for example in examples[:count] for part, side in _sides(example)]
    return Preview(
        titles=tuple(_title(part, side) for part, side in shown),
        pieces=tuple(tuple(_pieces(part, tokenizer, specials, stops)) for part, _ in shown),
    )


def _sides(example: Example) -> Iterator[tuple[Example, str]]:
    """Yield the sequences of an example, each with what it is if there are two."""
    names = (", chosen", ", rejected") if len(example.sequences) > 1 else ("",)
    yield from zip(example.sequences, names, strict=True)


def _title(example: Example, side: str) -> str:
    length, trained = len(example.input_ids), int(example.supervised.sum())
    if isinstance(example, LabeledExample):
        return f"{example.origin}: {length} tokens, class {example.name}"
    return f"{example.origin}{side}: {length} tokens, {trained} trained ({trained / length:.0%})"


def _pieces(
    example: Example, tokenizer: PreTrainedTokenizerBase, specials: set[int], stops: set[int]
) -> Iterator[Piece]:
    tokens = zip(example.input_ids[:MAX_TOKENS].tolist(), example.supervised.tolist(), strict=False)
    # Runs, not single tokens: one character may be several tokens.
    for (trained, special, stop), run in groupby(
        tokens, key=lambda t: (t[1], t[0] in specials, t[1] and t[0] in stops)
    ):
        text = tokenizer.decode([i for i, _ in run], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        yield Piece(text=text, trained=trained, special=special, stop=stop)
    more = len(example.input_ids) - MAX_TOKENS
    if more > 0:
        yield Piece(
            text=f" … {more} more tokens, {int(example.supervised[MAX_TOKENS:].sum())} trained",
            trained=False,
            special=False,
            stop=False,
        )


def _style(piece: Piece) -> str:
    color = _TRAINED if piece.trained else _CONTEXT
    if piece.stop:
        return f"{_STOP} {color}"
    return f"{_SPECIAL} {color}" if piece.special else color


def _bracketed(pieces: Sequence[Piece]) -> Iterator[str]:
    for trained, run in groupby(pieces, key=lambda piece: piece.trained):
        text = "".join(f"{piece.text}•" if piece.stop else piece.text for piece in run)
        yield f"{_OPEN}{text}{_CLOSE}" if trained else text
