"""The data report counts rows that are alike, and says where they are."""

from __future__ import annotations

import numpy as np

from loratune.data.examples import Example
from loratune.data.report import overlap_report, places_by_key, row_notices, row_report, size_report
from loratune.data.rows.reading import ReadSide
from loratune.data.rows.row import Origin, Rejected


def at(line: int, file: str = "a.jsonl") -> Origin:
    return Origin(file=file, line=line)


def example(length: int) -> Example:
    return Example(input_ids=np.zeros(length, np.int32), supervised=np.ones(length, np.bool_), origin=at(1))


def test_a_row_that_a_weight_repeats_is_no_duplicate() -> None:
    places = places_by_key(["x", "y", "x", "x"], [at(1), at(2), at(1), at(3)])
    assert places == {"x": [at(1), at(3)], "y": [at(2)]}
    report = row_report(places, [Rejected(origin=at(4), reason="empty")])
    assert report["duplicates"] == 1
    assert report["duplicate_rows"] == [[{"file": "a.jsonl", "line": 1}, {"file": "a.jsonl", "line": 3}]]
    assert report["rejected"] == [{"file": "a.jsonl", "line": 4, "reason": "empty"}]


def test_overlap_names_the_held_out_row_and_all_training_rows() -> None:
    overlap = overlap_report({"x": [at(1), at(3)]}, {"z": [at(1, "b")], "x": [at(2, "b"), at(5, "b")]})
    assert overlap == [{"eval": {"file": "b", "line": 2}, "train": [at(1).as_record(), at(3).as_record()]}]


def test_sizes_are_in_tokens() -> None:
    side: ReadSide[str] = ReadSide(sources=[], format="text", num_rows=4, items=["x"] * 3, keys=[1, 2, 3], rejected=[])
    report = size_report(side, [example(2), example(4), example(6)], num_turns=9, num_supervised=6)
    assert (report["rows"], report["conversations"], report["turns"], report["tokens"]) == (4, 3, 9, 12)
    assert (report["supervised_share"], report["length"]) == (0.5, {"p50": 4, "p95": 5, "max": 6})


def test_notices_name_ten_lines_and_count_the_rest() -> None:
    groups = [[at(n).as_record(), at(n + 100).as_record()] for n in range(12)]
    report = {
        "overlap": [{"eval": {"file": "b", "line": 2}, "train": [at(1).as_record()]}],
        "train": {"duplicates": 12, "duplicate_rows": groups, "num_rejected": 1},
        "eval": None,
    }
    overlap, duplicates, rejected = row_notices(report, 30, kind="text", measure="the accuracy")
    assert overlap == (
        "1 held-out text also occurs in the training data, which makes the accuracy too optimistic: "
        "line 2 = training line 1."
    )
    assert duplicates.startswith("12 of 30 training texts are exact duplicates: line 0 = line 100; line 1 = line 101;")
    assert duplicates.endswith("line 9 = line 109 and 2 more.")
    assert rejected == "1 train row was left out; data.json lists them with their reasons."
