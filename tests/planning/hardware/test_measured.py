from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loratune.planning.hardware import measured
from loratune.planning.hardware.devices import DEVICES
from loratune.planning.hardware.measured import (
    BANDWIDTH_EFFICIENCY,
    LAUNCH_SECONDS,
    PRODUCT_EFFICIENCY,
    from_results,
    gpu_rates,
    measured_device,
)

RESULTS = {
    "commit": "abc123",
    "results": [
        {"machine": "NVIDIA H200", "capability": [9, 0], "versions": {"torch": "2.11.0+cu130"}},
        {
            "rates": True,
            "matmul_flops_per_second": 7.9e14,
            "copied_bytes_per_second": 4.1e12,
            "launch_seconds": 3.5e-6,
        },
        {"step": "machine", "exit": "0", "seconds": 9},
    ],
}


def test_every_line_of_the_table_is_a_device_of_the_plan() -> None:
    assert all(measured_device(name) is None or measured_device(name).device == name for name in DEVICES)  # type: ignore[union-attr]
    named = [json.loads(line)["device"] for line in measured.TABLE.read_text().splitlines()]
    assert set(named) <= set(DEVICES)


def test_a_device_that_nobody_measured_has_published_figures_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "TABLE", tmp_path / "table.jsonl")
    measured.TABLE.write_text("")
    device = DEVICES["h200"]
    rates, source = gpu_rates(device)
    assert rates.products == device.bf16_flops_per_second * PRODUCT_EFFICIENCY
    assert rates.copies == device.memory_bytes_per_second * BANDWIDTH_EFFICIENCY
    assert rates.launch_seconds == LAUNCH_SECONDS
    assert source == "published figures of h200, on which loratune has never been measured"


def test_a_line_of_results_replaces_the_published_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "TABLE", tmp_path / "table.jsonl")
    older = from_results("h200", {**RESULTS, "commit": None})
    assert older.commit == "unknown"
    measured.TABLE.write_text(older.as_line() + from_results("h200", RESULTS).as_line())
    found = measured_device("h200")
    assert found is not None
    assert found.commit == "abc123", "the last line"
    rates, source = gpu_rates(DEVICES["h200"])
    assert (rates.products, rates.copies, rates.launch_seconds) == (7.9e14, 4.1e12, 3.5e-6)
    assert source == ("rates of products, copies and launches measured on NVIDIA H200 with torch 2.11.0+cu130")
    assert "never been measured" in gpu_rates(DEVICES["l4"])[1]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "lack the step `machine`"),
        (RESULTS["results"][:1], "lack the step `machine`"),
        (
            [{**RESULTS["results"][0], "machine": "CPU", "capability": None}, RESULTS["results"][1]],
            "a dry run on a CPU",
        ),  # type: ignore[dict-item]
    ],
)
def test_results_without_a_gpu_are_refused(lines: list[dict[str, object]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        from_results("h200", {"commit": "x", "results": lines})


def test_the_script_refuses_an_unknown_device(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    results.write_text(json.dumps(RESULTS))
    script = Path(__file__).parents[3] / "benchmarks" / "gpu" / "add_device.py"
    before = measured.TABLE.read_text()
    done = subprocess.run(
        [sys.executable, str(script), str(results), "h2000"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "did you mean h200" in done.stderr
    assert measured.TABLE.read_text() == before
