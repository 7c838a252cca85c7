"""How a server is asked: what it refuses is left out, and what it says about a prompt is checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loratune.exporting.endpoint.client import Endpoint
from loratune.exporting.endpoint.reader import EndpointReader
from tests.exporting.openai_server import Served, running

LETTERS = "abcdefghijklmnopqrstuvwxyz^"


class Letters:
    """A tokenizer with a token per letter, and `^` at the beginning of texts."""

    bos_token = "^"

    def get_vocab(self) -> dict[str, int]:
        return {letter: number for number, letter in enumerate(LETTERS)}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [LETTERS.index(letter) for letter in text]}

    def decode(self, ids: int | list[int], **_: object) -> str:
        return "".join(LETTERS[token] for token in ([ids] if isinstance(ids, int) else ids))

    def batch_decode(self, rows: list[list[int]], **_: object) -> list[str]:
        return [self.decode(row) for row in rows]


class Scripted(Served):
    """A server whose model is a table: what comes next depends on the last token alone."""

    adds_bos = False

    def _logprobs(self, ids: list[int]) -> torch.Tensor:
        torch.manual_seed(0)
        return torch.randn(len(LETTERS), len(LETTERS)).log_softmax(-1)[ids]

    def _ids(self, text: str) -> list[int]:
        return super()._ids(f"^{text}" if self.adds_bos else text)


IDS = Letters()("abcbab")["input_ids"]


def asked(adds_bos: bool = False, **options: Any) -> tuple[EndpointReader, Scripted, list[dict[int, float] | None]]:
    """Ask a server about two positions; return the reader, the server, and what it said."""
    served = Scripted(model=None, tokenizer=Letters(), stops=(), **options)
    served.adds_bos = adds_bos
    tokenizer: Any = Letters()
    ids = Letters()("^")["input_ids"] + IDS[1:] if adds_bos else IDS
    with running(served) as url:
        reader = EndpointReader(Endpoint(root=url, model="tiny", timeout=5), tokenizer)
        reader.choose_way(ids, 2)
        return reader, served, reader.tops(ids, [2, 4]) if reader.way else []


@pytest.mark.parametrize(
    ("options", "way"),
    [
        ({"style": "vllm"}, "prompt_logprobs"),
        ({"style": "llama.cpp"}, "one token at a time"),
        ({"style": "openai"}, "echo"),
        ({"style": "openai", "strict": True}, "echo"),
        ({"style": "openai", "shifted": True}, "one token at a time"),
        ({"style": "openai", "adds_bos": True}, "echo"),
    ],
)
def test_each_server_is_asked_in_its_way_and_says_the_same(options: dict[str, Any], way: str) -> None:
    reader, served, tops = asked(**options)
    assert reader.way == way
    for position, top in zip((2, 4), tops, strict=True):
        wanted = served._logprobs(IDS)[position]
        assert top
        assert max(top, key=top.__getitem__) == int(wanted.argmax())
        assert all(abs(value - float(wanted[token])) < 1e-4 for token, value in top.items())
        assert len(top) >= (5 if options.get("strict") else 19)


def test_a_server_that_adds_tokens_of_its_own_is_not_believed() -> None:
    class Templated(Scripted):
        def _ids(self, text: str) -> list[int]:
            return super()._ids(f"abc{text}")

    served = Templated(model=None, tokenizer=Letters(), stops=(), style="openai")
    tokenizer: Any = Letters()
    with running(served) as url:
        reader = EndpointReader(Endpoint(root=url, model="tiny", timeout=5), tokenizer)
        reader.choose_way(IDS, 2)
    assert reader.way == ""


def test_a_server_without_log_probabilities_is_given_up_soon() -> None:
    reader, served, _ = asked(style="greedy")
    assert reader.way == ""
    assert len(served.requests) <= 12
