"""A certificate never calls a wrong export the same model, and never a right one different."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from loratune.workflows.finished import FinishedRun
from tests.conftest import some
from tests.exporting.mutants import LENGTHS, MUTANTS, TYPES, Mutant, cases, finished, verdict

SHORTEST, _, LONGEST = LENGTHS
NOW = [
    ("adapter dropped", "bfloat16"),
    ("adapter halved", "gguf q8_0"),
    ("two layers swapped", "float32"),
    ("another base", "float16"),
    ("rotary positions", "bfloat16"),
    ("embeddings untied", "bfloat16"),
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
    (SHORTEST, "float32"), (SHORTEST, "bfloat16"), (LONGEST, "bfloat16"), (LONGEST, "gguf q8_0"),
]))  # fmt: skip
def test_a_right_export_is_never_different(runs: Runs, length: str, kind: str) -> None:
    record = verdict(runs(length, "bfloat16"), Mutant(), kind)
    assert record["verdict"] in ("same", "undecided")
    if kind == "float32" or length == LONGEST:
        assert record["verdict"] == "same"
    if record["verdict"] == "undecided":
        assert "left" in record["reason"]
        assert ("--dtype float32" if not kind.startswith("gguf") else "--to gguf") in record["fix"]
