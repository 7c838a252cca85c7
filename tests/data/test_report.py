"""The data report counts rows that are alike, and says where they are."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from loratune.data.examples import Example
from loratune.data.report import (
    account_for_rows,
    overlap_report,
    places_by_key,
    row_notices,
    row_report,
    size_report,
    unread_notices,
    unread_report,
)
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


SIDE: ReadSide[str] = ReadSide(
    sources=[], format="text", num_rows=20, items=[], keys=[], rejected=[], num_held_out=3, num_held_out_copies=2,
    unread=Counter({("column", "context"): 20, ("message key", "id"): 2}), left_out=["data/test.jsonl (split test)"],
)  # fmt: skip


def test_rows_add_up_or_the_run_stops() -> None:
    rows = {"held_out_rows": 3, "copies_of_held_out_rows": 2}
    assert account_for_rows(SIDE, 10, num_rejected=4, num_dropped=1) == rows
    for wrong in ((11, 4, 1), (10, 3, 1), (10, 4, 0)):
        with pytest.raises(AssertionError, match="20 rows, but"):
            account_for_rows(SIDE, wrong[0], num_rejected=wrong[1], num_dropped=wrong[2])
    with pytest.raises(AssertionError):
        account_for_rows(replace(SIDE, num_held_out_copies=0), 10, num_rejected=4, num_dropped=1)


def test_what_is_not_read_is_listed_and_said() -> None:
    assert unread_report(SIDE, {"strict": 5}) == {
        "unread_fields": [
            {"place": "column", "name": "context", "count": 20},
            {"place": "message key", "name": "id", "count": 2},
            {"place": "tool key", "name": "strict", "count": 5},
        ],
        "files_left_out": ["data/test.jsonl (split test)"],
    }
    assert list(unread_notices(SIDE, "train")) == [
        "Not read (train): columns context (20); message keys id (2). data.columns='{input: context}' writes context "
        "below the prompt.",
        "Not read (train): data/test.jsonl (split test).",
    ]
    assert not list(unread_notices(replace(SIDE, unread=Counter(), left_out=[]), "train"))
