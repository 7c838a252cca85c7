"""A certificate never calls a wrong export the same model, and never a right one different."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from loratune import __main__ as cli
from loratune.run.directory import read_json
from loratune.workflows.export import merge
from loratune.workflows.finished import FinishedRun
from tests.conftest import some
from tests.exporting.mutants import LENGTHS, MUTANTS, TYPES, Mutant, cases, finished, verdict

SHORTEST, SHORT, _, LONGEST = LENGTHS
NOW = [
    ("adapter dropped", "bfloat16"),
    ("adapter halved", "gguf q8_0"),
    ("another base", "float16"),
    ("rotary positions", "bfloat16"),
]

Runs = Callable[[str, str], FinishedRun]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs by length and the base's type, each trained once."""
    return cache(lambda length, dtype: finished(tmp_path_factory.mktemp(dtype), length, dtype))


@pytest.mark.parametrize(("name", "kind"), some(cases(), *NOW))
def test_a_wrong_export_of_a_short_run_is_never_the_same(runs: Runs, name: str, kind: str) -> None:
    """Also where rounding is a hundred times the update."""
    assert verdict(runs(SHORTEST, "bfloat16"), MUTANTS[name], kind)["verdict"] != "same"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("name", "kind"), cases())
def test_a_wrong_export_is_never_the_same(runs: Runs, length: str, dtype: str, name: str, kind: str) -> None:
    assert verdict(runs(length, dtype), MUTANTS[name], kind)["verdict"] != "same"


@pytest.mark.parametrize(("length", "kind"), some([(one, kind) for one in LENGTHS for kind in TYPES], *[
    (SHORTEST, "float32"), (SHORTEST, "bfloat16"),
]))  # fmt: skip
def test_a_right_export_is_never_different(runs: Runs, length: str, kind: str) -> None:
    record = verdict(runs(length, "bfloat16"), Mutant(), kind)
    assert record["verdict"] in ("same", "undecided")
    if kind == "float32" or length == LONGEST:
        assert record["verdict"] == "same"
    if record["verdict"] == "undecided":
        assert "left" in record["reason"]
        assert ("--dtype float32" if not kind.startswith("gguf") else "--to gguf") in record["fix"]


def test_an_undecided_merge_is_kept_and_says_so(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs(SHORTEST, "bfloat16").run
    monkeypatch.setattr("sys.argv", ["loratune", "merge", str(run.root), str(tmp_path / "merged")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    shown = capsys.readouterr()
    assert "UNDECIDED whether the same model" in shown.out
    assert "--dtype float32" in shown.err
    record = json.loads((tmp_path / "merged" / "parity.json").read_text())
    assert (record["verdict"], record["passed"]) == ("undecided", False)
    assert record in read_json(run.parity)
    assert merge(run.root, tmp_path / "all-digits", dtype="float32").certificate["verdict"] == "same"
