from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from loratune.cli.output import add_cost, print_json, show_service


def test_the_cost_is_time_times_price_and_number_of_devices() -> None:
    one = {"scaling": None, "time": {"total_seconds": 7200}}
    add_cost(one, 2.5)
    assert one["cost"] == {"price_per_hour": 2.5, "cost": 5.0}
    rows = [{"total_seconds": 7200, "devices": 1}, {"total_seconds": 1800, "devices": 8}]
    several = {"scaling": {"rows": rows}, "time": {"total_seconds": 7200}}
    add_cost(several, 2.5)
    assert [row["cost"] for row in rows] == [5.0, 10.0]
    assert several["cost"]["cost"] == 10.0


def test_json_keeps_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"text": "Grüße"})
    out = capsys.readouterr().out
    assert "Grüße" in out
    assert json.loads(out) == {"text": "Grüße"}


def test_a_server_shows_its_models_and_how_to_call_it(capsys: pytest.CaptureFixture[str]) -> None:
    service = SimpleNamespace(
        url="http://127.0.0.1:8000/v1", server="vllm", models=("base", "mine"), curl="curl …", python="client"
    )
    show_service(service, as_json=False)  # type: ignore[arg-type]
    assert "serves mine and base with vllm" in capsys.readouterr().out
    show_service(service, as_json=True)  # type: ignore[arg-type]
    assert json.loads(capsys.readouterr().out)["models"] == ["base", "mine"]
