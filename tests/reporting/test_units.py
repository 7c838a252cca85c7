from __future__ import annotations

from pathlib import Path

import pytest

from loratune.reporting.units import (
    as_bytes,
    as_difference,
    as_duration,
    as_interval,
    as_measure,
    as_number,
    as_path,
    as_ratio,
)
from loratune.run.records.evaluation import DifferenceRecord


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (as_bytes(1000), "1,000 B"),
        (as_bytes(1024), "1.0 KiB"),
        (as_bytes(2**20), "1.0 MiB"),
        (as_bytes(1.5 * 2**30), "1.5 GiB"),
        (as_duration(9.96), "10.0 s"),
        (as_duration(59.7), "1 min 0 s"),
        (as_duration(3599.7), "1 h 0 min"),
        (as_duration(4000), "1 h 6 min"),
        (as_ratio(95, 100), "95%"),
        (as_ratio(2000, 100), "20 ×"),
        (as_ratio(1, 0), ""),
        (as_number(123456.7), "123,457"),
        (as_number(0.00012345, "+"), "+0.0001234"),
        (as_measure("json", 0.256), "25.6%"),
        (as_measure("bleu", 25.6), "25.6"),
        (as_difference("json", -0.1), "-10.0 points"),
        (as_interval("json", DifferenceRecord(value=0.1, low=0.05, high=0.15)), "+5.0 to +15.0"),
        (as_interval("nll", DifferenceRecord(value=0.1)), ""),
    ],
)
def test_numbers_are_written_with_their_units(shown: str, expected: str) -> None:
    assert shown == expected


def test_the_home_folder_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ada"))
    assert as_path("/home/ada/runs/a") == "~/runs/a"
    assert as_path(Path("/home/ada")) == "~"
    assert as_path("/home/adam/runs") == "/home/adam/runs"
