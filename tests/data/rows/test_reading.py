"""From sources to items: formats by source, held-out rows, and a Hub that may not answer."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

from loratune.data.rows.files import READERS, parse_line
from loratune.data.rows.hub import hub_answers
from loratune.data.rows.messages import read_message, read_sharegpt_message
from loratune.data.rows.reading import Reader, held_out_sources, hold_out
from loratune.data.rows.sources import SUFFIXES
from loratune.data.rows.tools import read_tools
from loratune.recipe.recipe import DataSection
from loratune.run.errors import BadRow, DataError
from loratune.run.progress import NO_PROGRESS


def read(tmp_path: Path, numbers: list[int]) -> Reader:
    rows = [{"prompt": f"Thing {n}?", "completion": f"It is {n}."} for n in numbers]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Reader(DataSection.model_validate({"train": str(path), "eval": 0.25}), 1, NO_PROGRESS)


def test_copies_of_a_conversation_go_to_the_same_side(tmp_path: Path) -> None:
    reader = read(tmp_path, [1, 2, 3, 4, 5, 6, 7, 8] * 2)
    side = reader(reader.data.train)
    train, held_out = hold_out(side, 0.25, seed=1)
    assert not set(train.keys) & set(held_out.keys)
    assert (len(train.items), len(held_out.items)) == (12, 2), "of a held-out conversation one copy is enough"
    assert train.num_held_out_copies == 2, "the other copies are in neither side, and counted"
    assert len(train.items) + len(held_out.items) + train.num_held_out_copies == 16
    assert hold_out(side, 0.25, seed=1)[1].items == held_out.items
    assert hold_out(side, 0.25, seed=2)[1].items != held_out.items
    assert held_out.sources == [{"held_out": 0.25, "seed": 1, "from": "train"}]
    assert held_out_sources(reader.data) == 0.25


def test_one_conversation_cannot_be_split(tmp_path: Path) -> None:
    reader = read(tmp_path, [1, 1, 1])
    with pytest.raises(DataError, match="1 distinct conversation: nothing can be held out"):
        hold_out(reader(reader.data.train), 0.5, seed=1)


def test_every_suffix_has_a_reader() -> None:
    assert set(READERS) == set(SUFFIXES)


def test_a_line_of_json_lines_is_named_when_it_is_cut(tmp_path: Path) -> None:
    assert parse_line(tmp_path, 1, '{"a": 1}') == {"a": 1}
    with pytest.raises(DataError, match=r":7: not JSON: .* at column") as error:
        parse_line(tmp_path / "rows.jsonl", 7, '{"a": ')
    assert error.value.line == 7


def test_a_hub_that_does_not_answer_is_known_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert not hub_answers(0.2)


def test_messages_are_checked_one_by_one() -> None:
    assert read_message({"role": "developer", "content": "Be brief."}, 1) == {"role": "system", "content": "Be brief."}
    assert read_sharegpt_message({"from": "gpt", "value": "Hi"}, 2) == {"role": "assistant", "content": "Hi"}
    assert read_tools("[]") is None
    for turn, problem in (
        ({"role": "robot", "content": "x"}, "unknown role 'robot'"),
        ({"role": "assistant", "content": " "}, "is empty"),
        ({"role": "user", "content": "\ud800"}, "not valid Unicode"),
    ):
        with pytest.raises(BadRow, match=problem):
            read_message(turn, 1)
