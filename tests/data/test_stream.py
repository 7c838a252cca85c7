from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from loratune.data.examples import Example
from loratune.data.prepare import prepare_data
from loratune.data.prepared import PreparedData
from loratune.data.rows.row import Rejected
from loratune.data.stream import can_stream, open_tables, stream_data
from loratune.recipe.recipe import DataSection
from loratune.run.errors import DataError
from loratune.run.progress import NoProgress
from tests.conftest import conversation, write_jsonl


def section(**settings: Any) -> DataSection:
    return DataSection.model_validate(settings)


def streamed(
    data: DataSection, tokenizer: PreTrainedTokenizerBase, *, max_length: int = 512, seed: int = 0
) -> PreparedData:
    tables = open_tables(data, NoProgress())
    return stream_data(data, tables, tokenizer, max_length=max_length, seed=seed, progress=NoProgress())


def made(prepared: PreparedData) -> list[Example | Rejected]:
    assert prepared.stream is not None
    return [prepared.stream[i] for i in range(len(prepared.stream))]


def tokens(item: Example | Rejected) -> tuple[list[int], list[bool], int]:
    assert isinstance(item, Example)
    return item.input_ids.tolist(), item.supervised.tolist(), item.origin.line


def test_streamed_examples_are_those_of_preparation(smollm2_tokenizer: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [conversation(i) for i in range(50)])
    data = section(train=str(path), eval="none")
    expected = prepare_data(data, smollm2_tokenizer, max_length=512, seed=0).train
    assert [tokens(item) for item in made(streamed(data, smollm2_tokenizer))] == [tokens(e) for e in expected]


def test_sources_have_their_own_formats(smollm2_tokenizer: Any, tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "one.jsonl", [conversation(i) for i in range(5)])
    two = write_jsonl(tmp_path / "two.jsonl", [{"prompt": f"ask {i}", "completion": f"say {i}"} for i in range(5)])
    data = section(train=[str(one), str(two)], eval="none")
    expected = prepare_data(data, smollm2_tokenizer, max_length=512, seed=0).train
    assert [tokens(item) for item in made(streamed(data, smollm2_tokenizer))] == [tokens(e) for e in expected]


def test_rows_that_are_held_out_and_their_copies_are_not_trained(smollm2_tokenizer: Any, tmp_path: Path) -> None:
    rows = [conversation(i) for i in range(40)]
    path = write_jsonl(tmp_path / "train.jsonl", rows + rows)
    prepared = streamed(section(train=str(path), eval=0.25), smollm2_tokenizer)
    held_out = {tuple(example.input_ids.tolist()) for example in prepared.eval}
    trained = [tuple(tokens(item)[0]) for item in made(prepared)]
    assert held_out
    assert not held_out & set(trained)
    assert len(trained) == 80 - 2 * len(held_out)
    assert prepared.report["streamed"]["copies_of_held_out_rows"] == len(held_out)
    assert prepared.report["streamed"]["duplicate_rows"] == 40


def test_the_report_counts_all_rows_and_describes_a_sample(
    smollm2_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratune.data.stream.SAMPLE_ROWS", 30)
    monkeypatch.setattr("loratune.data.stream.LEAST_OF_A_SOURCE", 10)
    path = write_jsonl(tmp_path / "train.jsonl", [conversation(i) for i in range(300)])
    prepared = streamed(section(train=str(path), eval="none"), smollm2_tokenizer)
    assert (prepared.num_examples, len(prepared.train), prepared.scale) == (300, 30, 10)
    assert prepared.report["train"]["sources"][0]["rows"] == 300
    assert prepared.report["train"]["conversations"] == 30
    assert "sample of 30" in prepared.report["notices"][0]


def bad_rows(path: Path) -> Path:
    """Row 3 has no answer, row 5 is too long, row 7 is no conversation, row 9 is no JSON."""
    rows = [json.dumps(conversation(i)) for i in range(12)]
    rows[2] = json.dumps({"messages": [{"role": "user", "content": "hello?"}]})
    rows[4] = json.dumps(
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "many words " * 400}]}
    )
    rows[6] = json.dumps({"messages": "none"})
    rows[8] = '{"messages": ['
    path.write_text("\n".join(rows))
    return path


def test_a_row_that_cannot_be_trained_on_is_left_out_or_stops(
    smollm2_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratune.data.stream._Sample._choose", lambda self, table, wanted, seed: [0, 1])
    path = bad_rows(tmp_path / "bad.jsonl")
    prepared = streamed(section(train=str(path), eval="none", on_bad_row="skip", on_long="drop"), smollm2_tokenizer)
    assert prepared.stream is not None
    reasons = {}
    for i in (0, 2, 4, 6, 8):
        item = prepared.stream[i]
        reasons[i + 1] = item.reason if isinstance(item, Rejected) else "trained"
    assert reasons[1] == "trained"
    assert "nothing to train" in reasons[3]
    assert reasons[5] == "longer than data.max_length"
    assert "messages" in reasons[7]
    assert "not JSON" in reasons[9]
    strict = streamed(section(train=str(path), eval="none", on_long="error"), smollm2_tokenizer)
    assert strict.stream is not None
    for i in (2, 4, 6, 8):
        with pytest.raises(DataError) as error:
            strict.stream[i]
        assert (error.value.file, error.value.line) == (str(path), i + 1) or i == 4


def test_what_can_be_streamed(tmp_path: Path) -> None:
    lines = write_jsonl(tmp_path / "a.jsonl", [conversation(0)])
    other = write_jsonl(tmp_path / "b.json", [conversation(0)])
    assert can_stream(section(train=str(lines)))
    assert not can_stream(section(train=str(other)))
    assert not can_stream(section(train=[str(lines), str(lines)]))
