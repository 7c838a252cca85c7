from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from loratune.data.batch import collate, num_supervised
from loratune.data.examples import LabeledExample, labels_fingerprint
from loratune.data.prepared import PreparedData
from loratune.recipe.recipe import DataSection
from loratune.run.errors import DataError
from loratune.workflows.tasks.classification.data import prepare_classified
from tests.classifiers import intent, tokenizer, write_rows


def prepared(folder: Path, rows: list[dict[str, Any]], max_length: int = 32, **settings: Any) -> PreparedData:
    file = write_rows(folder / "rows.jsonl", rows)
    section = DataSection.model_validate({"train": str(file), "eval": "none", **settings})
    return prepare_classified(section, tokenizer(encoder=True, types=True), max_length=max_length, seed=1)


def test_labels_are_sorted_and_counted(tmp_path: Path) -> None:
    data = prepared(tmp_path, [intent(n) for n in range(10)])
    assert data.report["labels"] == ["music", "timer", "weather"]
    assert data.report["train"]["labels"] == {"music": 4, "timer": 3, "weather": 3}
    first = data.train[0]
    assert isinstance(first, LabeledExample)
    assert (first.label, first.name) == (0, "music")
    assert num_supervised(first) == 1
    assert data.report["train"]["supervised_tokens"] == 10


def test_integers_are_sorted_as_numbers(tmp_path: Path) -> None:
    data = prepared(tmp_path, [{"text": "play", "label": n} for n in (10, 9, 2, 10)])
    assert data.report["labels"] == ["2", "9", "10"]
    assert [example.label for example in data.train if isinstance(example, LabeledExample)] == [2, 1, 0, 2]


def test_pairs_have_token_types_and_other_columns(tmp_path: Path) -> None:
    rows = [{"a": "play the song", "b": "louder please", "y": "yes"}, {"a": "rain", "b": "alarm now today", "y": "no"}]
    data = prepared(tmp_path, rows, columns={"sentence1": "a", "sentence2": "b", "label": "y"})
    tokens = tokenizer(encoder=True, types=True)("play the song", "louder please")
    first = data.train[0]
    assert isinstance(first, LabeledExample)
    assert first.token_types is not None
    assert first.input_ids.tolist() == tokens["input_ids"]
    assert first.token_types.tolist() == tokens["token_type_ids"] == [0, 0, 0, 0, 0, 1, 1, 1]
    batch = collate(data.train)
    assert batch.token_types is not None
    assert batch.token_types.shape == batch.input_ids.shape
    assert data.report["train"]["format"] == "sentence1, sentence2 and label"
    cut = prepared(tmp_path, rows, 6, columns={"sentence1": "a", "sentence2": "b", "label": "y"})
    assert [len(example.input_ids) for example in cut.train] == [6, 6]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "play"}, "no label among its fields text"),
        ({"sentence1": "play", "label": 1}, "no sentence2"),
        ({"text": "", "label": 1}, "text is empty"),
        ({"text": 3, "label": 1}, "text is int 3, not text"),
        ({"text": "play", "label": None}, "label is NoneType None"),
        ({"text": "play", "label": True}, "label is bool True"),
        ({"text": "play", "label": 1.0}, "label is float 1.0"),
        ({"text": "play [SEP] now", "label": 1}, r"special token \[SEP\]"),
        ({"text": "half \ud800", "label": 1}, "not valid Unicode"),
    ],
)
def test_a_wrong_row_is_named_or_left_out(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    rows = [{"text": "rain", "label": 0}, {"text": "song", "label": 1}, row]
    with pytest.raises(DataError, match=words) as wrong:
        prepared(tmp_path, rows)
    assert "rows.jsonl:3" in str(wrong.value)
    data = prepared(tmp_path, rows, on_bad_row="skip")
    assert len(data.train) == 2
    assert data.report["train"]["rejected"][0]["line"] == 3


def test_labels_of_two_kinds_or_one_class_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="label is '1', but that of") as wrong:
        prepared(tmp_path, [{"text": "rain", "label": 1}, {"text": "song", "label": "1"}])
    assert "rows.jsonl:2" in str(wrong.value)
    with pytest.raises(DataError, match="all training texts have the label 1"):
        prepared(tmp_path, [{"text": "rain", "label": 1}, {"text": "song", "label": 1}])


def test_held_out_texts_are_drawn_class_by_class(tmp_path: Path) -> None:
    rows = [
        {"text": f"play {word}", "label": "often"}
        for word in ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p", "q", "r", "s", "t"]
    ]
    rows += [{"text": "rain", "label": "rare"}, {"text": "rain", "label": "rare"}]
    data = prepared(tmp_path, rows, eval=0.2)
    assert data.report["train"]["labels"] == {"often": 16, "rare": 2}
    assert data.report["eval"]["labels"] == {"often": 4, "rare": 0}
    assert not data.report["overlap"]
    again = prepared(tmp_path, rows, eval=0.2)
    assert [e.origin for e in again.eval] == [e.origin for e in data.eval]


def test_long_texts_are_cut_dropped_or_refused(tmp_path: Path) -> None:
    rows = [{"text": "play " * 9, "label": 0}, {"text": "rain now", "label": 0}, {"text": "song", "label": 1}]
    cut = prepared(tmp_path, rows, 6)
    assert [len(example.input_ids) for example in cut.train] == [6, 4, 3]
    assert cut.train[0].input_ids[-1] == 3  # [SEP] is kept
    assert cut.report["train"]["truncated"] == 1
    dropped = prepared(tmp_path, rows, 6, on_long="drop")
    assert [example.origin.line for example in dropped.train] == [2, 3]
    with pytest.raises(DataError, match="longer than max_length 6"):
        prepared(tmp_path, rows, 6, on_long="error")
    with pytest.raises(DataError, match="no text of the class 0 is left"):
        prepared(tmp_path, [rows[0], rows[2]], 6, on_long="drop")


def test_what_looks_wrong_is_said(tmp_path: Path) -> None:
    rows = [intent(n) for n in range(36)] + [{"text": "rain", "label": "odd"}, {"text": "rain", "label": "weather"}]
    rows += [rows[0]]
    notices = "\n".join(prepared(tmp_path, rows).report["notices"])
    assert "1 training text has several labels" in notices
    assert "odd has 1 training text," in notices
    assert "exact duplicate" in notices


def test_the_fingerprint_has_the_classes(tmp_path: Path) -> None:
    rows = [intent(n) for n in range(6)]
    one = labels_fingerprint(prepared(tmp_path, rows).train)
    rows[0] = {**rows[0], "label": rows[1]["label"]}
    rows[1] = {**rows[1], "label": rows[3]["label"]}
    other = prepared(tmp_path, rows)
    assert Counter(e.label for e in other.train if isinstance(e, LabeledExample)) == {0: 2, 1: 2, 2: 2}
    assert one != labels_fingerprint(other.train)


def test_integers_of_a_hub_data_set_have_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "topic": datasets.ClassLabel(names=["sun", "tune"])}
    )
    rows = {"text": ["rain", "song", "play"], "topic": [0, 1, -1]}
    table = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr("loratune.data.rows.hub._require_hub", lambda source: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: table)
    settings = {"train": "someone/topics", "eval": "none", "columns": {"label": "topic"}, "on_bad_row": "skip"}
    data = prepare_classified(
        DataSection.model_validate(settings), tokenizer(encoder=True, types=True), max_length=32, seed=1
    )
    assert data.report["labels"] == ["sun", "tune"]
    assert "label is -1" in data.report["train"]["rejected"][0]["reason"]
