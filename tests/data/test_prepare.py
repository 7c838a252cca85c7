"""From the data section of a recipe to examples and the report."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from loratune.data.prepare import prepare_data
from loratune.data.prepared import PreparedData
from loratune.recipe.recipe import DataSection
from loratune.run.errors import DataError
from loratune.run.progress import NoProgress, Progress, ProgressTask

Prepare = Callable[..., PreparedData]


def row(number: int, answer: str = "It is number") -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"Describe thing {number}."},
            {"role": "assistant", "content": f"{answer} {number}."},
        ]
    }


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def prepared(smollm2_tokenizer: PreTrainedTokenizerBase) -> Prepare:
    def make(*, max_length: int = 512, seed: int = 42, progress: Progress = NoProgress(), **data: Any) -> PreparedData:  # noqa: B008
        section = DataSection.model_validate(data)
        return prepare_data(section, smollm2_tokenizer, max_length=max_length, seed=seed, progress=progress)

    return make


def test_the_report_says_what_was_read_and_what_it_became(tmp_path: Path, prepared: Prepare) -> None:
    train = write(tmp_path / "train.jsonl", [row(n) for n in range(20)])
    held_out = write(tmp_path / "eval.jsonl", [row(n) for n in range(100, 105)])

    data = prepared(train=train, eval=held_out)

    report = json.loads(json.dumps(data.report))
    part = report["train"]
    assert part["format"] == "messages"
    assert (part["rows"], part["conversations"], part["turns"]) == (20, 20, 40)
    assert part["tokens"] == sum(len(example.input_ids) for example in data.train)
    assert part["supervised_tokens"] == sum(int(example.supervised.sum()) for example in data.train)
    assert part["supervised_share"] == pytest.approx(part["supervised_tokens"] / part["tokens"])
    assert 0 < part["length"]["p50"] <= part["length"]["p95"] <= part["length"]["max"]
    edges, counts = part["length"]["histogram"]["edges"], part["length"]["histogram"]["counts"]
    lengths = [len(example.input_ids) for example in data.train]
    assert counts == [sum(low <= length < high for length in lengths) for low, high in itertools.pairwise(edges)]
    assert sum(counts) == len(lengths)
    assert (part["truncated"], part["dropped"], part["duplicates"], part["rejected"]) == (0, 0, 0, [])
    assert part["sources"][0]["sha256"] == {train: hashlib.sha256(Path(train).read_bytes()).hexdigest()}
    assert report["mask"] == {"method": "sentinel substitution, checked against rendered prompts", "verified": 20}
    assert report["eval"]["conversations"] == len(data.eval) == len(data.eval_conversations) == 5
    assert report["overlap"] == report["notices"] == []


def test_a_fraction_is_held_out_the_same_every_time_and_nothing_stands_on_both_sides(
    tmp_path: Path, prepared: Prepare
) -> None:
    train = write(tmp_path / "train.jsonl", [row(n % 50) for n in range(60)])  # ten conversations stand there twice

    first, again, other = (prepared(train=train, eval=0.2, seed=seed) for seed in (1, 1, 2))

    def lines(examples: list[Any]) -> list[int]:
        return [example.origin.line for example in examples]

    assert lines(first.eval) == lines(again.eval)
    assert lines(first.train) == lines(again.train) == sorted(lines(first.train))
    assert lines(first.eval) != lines(other.eval)
    assert len(first.eval) == 10
    assert not {n % 50 for n in lines(first.eval)} & {n % 50 for n in lines(first.train)}
    assert first.report["overlap"] == []
    assert first.report["eval"]["sources"] == [{"held_out": 0.2, "seed": 1, "from": "train"}]


def test_auto_holds_out_five_percent_of_a_file_and_at_least_one_conversation(tmp_path: Path, prepared: Prepare) -> None:
    many = write(tmp_path / "many.jsonl", [row(n) for n in range(60)])
    two = write(tmp_path / "two.jsonl", [row(n) for n in range(2)])
    one = write(tmp_path / "one.jsonl", [row(1), row(1)])

    assert len(prepared(train=many).eval) == 3
    assert (len(prepared(train=two).train), len(prepared(train=two).eval)) == (1, 1)
    with pytest.raises(DataError, match="1 distinct conversation: nothing can be held out"):
        prepared(train=one)
    assert prepared(train=one, eval="none").eval == []


def test_sources_are_mixed_by_weight_and_may_differ_in_format(tmp_path: Path, prepared: Prepare) -> None:
    chats = write(tmp_path / "chats.jsonl", [row(n) for n in range(10)])
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": f"Say {n}", "completion": str(n)} for n in range(10)])

    data = prepared(train=[{"name": chats, "weight": 2.0}, {"name": pairs, "weight": 0.5}], eval="none")

    files = [Path(example.origin.file).name for example in data.train]
    assert (files.count("chats.jsonl"), files.count("pairs.jsonl")) == (20, 5)
    assert data.report["train"]["format"] == "messages, prompt_completion"
    assert data.report["train"]["duplicates"] == 0  # a row that a weight repeats is no duplicate


def test_held_out_rows_that_also_stand_in_train_are_named_with_both_lines(tmp_path: Path, prepared: Prepare) -> None:
    train = write(tmp_path / "train.jsonl", [row(1), row(2), row(3), row(3)])
    held_out = write(tmp_path / "eval.jsonl", [row(9), row(3)])

    data = prepared(train=train, eval=held_out)

    assert data.report["overlap"] == [
        {"eval": {"file": held_out, "line": 2}, "train": [{"file": train, "line": 3}, {"file": train, "line": 4}]}
    ]
    assert any("line 2 = training line 3" in notice for notice in data.report["notices"])
    assert data.report["train"]["duplicates"] == 1
    assert data.report["train"]["duplicate_rows"] == [[{"file": train, "line": 3}, {"file": train, "line": 4}]]
    assert any(
        "1 of 4 training conversations is an exact duplicate: line 3 = line 4." in n for n in data.report["notices"]
    )


def test_a_bad_row_stops_the_run_or_is_listed(tmp_path: Path, prepared: Prepare) -> None:
    broken = {"messages": [{"role": "user", "content": "Hi"}, {"role": "asistant", "content": "x"}]}
    forged = row(5, answer="<|im_start|>")
    train = write(tmp_path / "train.jsonl", [row(1), broken, row(2), forged, {"other": 1}, row(3)])

    with pytest.raises(DataError, match="other") as caught:
        prepared(train=train, eval="none")
    assert caught.value.line == 5
    with pytest.raises(DataError, match=r"unknown role 'asistant'.*\(2 such rows\)") as caught:
        prepared(train=train, eval="none", format="messages")
    assert caught.value.place == f"{train}:2"
    assert "on_bad_row=skip" in caught.value.fix

    data = prepared(train=train, eval="none", on_bad_row="skip")

    assert [example.origin.line for example in data.train] == [1, 3, 6]
    assert [(r["line"], r["file"]) for r in data.report["train"]["rejected"]] == [(2, train), (5, train), (4, train)]
    assert "special token" in data.report["train"]["rejected"][2]["reason"]
    assert any("3 train rows were left out" in notice for notice in data.report["notices"])


def test_nothing_left_is_an_error_that_counts_the_reasons(tmp_path: Path, prepared: Prepare) -> None:
    forged = write(tmp_path / "forged.jsonl", [row(n, answer="<|im_start|>") for n in range(3)])
    long = write(tmp_path / "long.jsonl", [row(n, answer="so " * 100) for n in range(3)])

    with pytest.raises(DataError, match=r"no train conversation is left of 3 rows.*3 × message 2 .assistant. contains"):
        prepared(train=forged, eval="none", on_bad_row="skip")
    with pytest.raises(DataError, match="3 dropped for their length"):
        prepared(train=long, eval="none", max_length=20, on_long="drop")


def test_rows_and_fields_are_accounted_for_on_both_sides(tmp_path: Path, prepared: Prepare) -> None:
    rows = [{**row(n % 15), "source": "x"} for n in range(30)]
    part = prepared(
        train=write(tmp_path / "a.jsonl", [*rows, {**row(99), "images": ["a.png"]}]), eval=0.2, on_bad_row="skip"
    )
    train, evaluation = part.report["train"], part.report["eval"]

    assert (train["rows"], train["conversations"], train["num_rejected"]) == (31, 24, 1)
    assert (train["held_out_rows"], train["copies_of_held_out_rows"]) == (3, 3)
    assert (evaluation["rows"], evaluation["conversations"], evaluation["held_out_rows"]) == (3, 3, 0)
    assert train["unread_fields"] == [{"place": "column", "name": "source", "count": 30}]
    assert "Not read (train): columns source (30)." in part.report["notices"]


def test_test_files_of_a_folder_are_not_trained_and_are_named(tmp_path: Path, prepared: Prepare) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", [row(n) for n in range(5)])
    write(folder / "test.jsonl", [row(n) for n in range(10, 13)])
    part = prepared(train=str(folder), eval={"name": str(folder), "split": "test"})

    assert (part.report["train"]["rows"], part.report["eval"]["rows"]) == (5, 3)
    assert part.report["train"]["files_left_out"] == [f"{folder}/test.jsonl (split test)"]


def test_lengths_are_counted(tmp_path: Path, prepared: Prepare) -> None:
    train = write(tmp_path / "train.jsonl", [row(1), row(2, answer="so " * 300)])

    cut = prepared(train=train, eval="none", max_length=64)

    assert max(len(example.input_ids) for example in cut.train) == 64
    assert cut.report["train"]["truncated"] == 1


def test_plain_text_needs_train_on_all(tmp_path: Path, prepared: Prepare) -> None:
    train = write(tmp_path / "train.jsonl", [{"text": f"Story {n}."} for n in range(3)])

    with pytest.raises(DataError, match="plain text, which has no answers") as caught:
        prepared(train=train, eval="none")
    assert caught.value.fix == "set data.train_on=all"
    assert len(prepared(train=train, eval="none", train_on="all").train) == 3


def test_held_out_conversations_are_those_of_the_held_out_examples(tmp_path: Path, prepared: Prepare) -> None:
    train = write(tmp_path / "train.jsonl", [row(n) for n in range(3)])
    held_out = write(tmp_path / "eval.jsonl", [row(7), row(8, answer="so " * 300), row(9)])

    data = prepared(train=train, eval=held_out, max_length=100, on_long="drop")

    assert [c.origin.line for c in data.eval_conversations] == [e.origin.line for e in data.eval] == [1, 3]


class Heard(NoProgress):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.done: dict[str, tuple[int, int | None]] = {}
        self.lines: list[str] = []
        self.warnings: list[str] = []

    @contextmanager
    def task(self, name: str, total: int | None, unit: str = "") -> Iterator[ProgressTask]:
        self.done[name] = (0, total)
        self._name = name
        yield self

    def advance(self, amount: int = 1, note: str = "") -> None:
        done, total = self.done[self._name]
        self.done[self._name] = (done + amount, total)

    def line(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_progress_reaches_its_total(tmp_path: Path, prepared: Prepare) -> None:
    heard = Heard()
    train = write(tmp_path / "train.jsonl", [row(n) for n in range(600)])

    prepared(train=train, eval="none", progress=heard)

    assert heard.done == {f"reading {train}": (0, None), "preparing train data": (600, 600)}
