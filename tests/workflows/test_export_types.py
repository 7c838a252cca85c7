"""Several types of one model: each with its certificate, and the one that is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from loratune import __main__ as cli
from loratune.evaluation.gates import parse_gate
from loratune.exporting.load_back import has_llama_cpp
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import RecipeError, RunError
from loratune.run.records.base import parse
from loratune.run.records.outputs import ExportOutput
from loratune.workflows.export_types import _as_bytes, _holds, export_types


@pytest.fixture
def run(finished_run: RunDir, tmp_path: Path) -> RunDir:
    """A run with nothing exported yet."""
    copied = RunDir(
        Path(shutil.copytree(finished_run.root, tmp_path / "tiny", ignore=shutil.ignore_patterns("exports")))
    )
    copied.parity.unlink(missing_ok=True)
    return copied


def test_each_type_has_a_certificate_and_the_largest_that_fits_can_be_kept(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.argv",
        [*["loratune", "export", "--to", "gguf", "--outtype", "f16,Q8_0", "--answers", "3", "--json"], str(run.root)],
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    record = json.loads(capsys.readouterr().out)
    parse(ExportOutput, record)
    assert [(row["outtype"], row["kept"], row["verdict"]) for row in record["types"]] == [
        ("q8_0", True, "same"),
        ("f16", True, "same"),
    ]
    folder = run.exports / "gguf-merged"
    assert record["folder"] == str(folder)
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")} == {
        "q8_0/tiny-q8_0.gguf", "q8_0/parity.json", "f16/tiny-f16.gguf", "f16/parity.json",
    }  # fmt: skip
    assert [row["file_bytes"] for row in record["types"]] == [
        (folder / name / f"tiny-{name}.gguf").stat().st_size for name in ("q8_0", "f16")
    ]
    assert {Path(one["path"]).name for one in read_json(run.parity)} == {"q8_0", "f16"}
    assert f"llama-cli -m {folder / 'q8_0' / 'tiny-q8_0.gguf'} --jinja" in record["usage"]
    if has_llama_cpp():
        assert all(row["tokens_per_second"] > 0 and row["num_prompts"] == 3 for row in record["types"])
    fit = f"{(record['types'][1]['file_bytes'] - 1) / 1000:.3f}KB"
    found = export_types(run.root, ["q8_0", "f16"], to="gguf", fit=fit, out=folder.with_name("fits"), num_answers=1)
    assert [(row["outtype"], row["kept"]) for row in found.rows] == [("f16", False), ("q8_0", True)]
    assert {path.name for path in found.folder.iterdir()} == {"q8_0"}
    assert [Path(one["path"]).parent.name for one in read_json(run.parity)] == ["gguf-merged", "gguf-merged", "fits"]


def test_if_no_type_fits_nothing_is_kept(run: RunDir) -> None:
    with pytest.raises(RunError, match=r"no type fits into 1e-06 GB: f16 .* GB, q8_0 .* GB"):
        export_types(run.root, ["f16", "q8_0"], to="gguf", fit="1KB")
    assert not (run.exports / "gguf-merged").exists()
    assert not run.parity.exists()


def test_what_cannot_decide_is_refused_before_anything_is_written(run: RunDir) -> None:
    for options, words in (
        ({"fit": "4"}, "--fit 4: not a size"),
        ({"keep": "exact_match"}, "--keep 'exact_match' is not a threshold"),
        ({"keep": "bleu>=30"}, "--keep bleu>=30: no number bleu is reported"),
    ):
        with pytest.raises(RecipeError, match=words):
            export_types(run.root, ["q8_0"], to="gguf", **options)
    with pytest.raises(RecipeError, match="no --outtype to choose from"):
        export_types(run.root, [], to="gguf", fit="4GB")
    assert not run.exports.exists()


def test_a_type_holds_what_its_answers_reach() -> None:
    row = {
        "metric": "json",
        "scores": {"score": 0.8, "run_score": 0.82, "difference": {"value": -0.02, "low": -0.06, "high": 0.02}},
    }
    assert _holds(row, None)
    for text, holds in (
        ("json>=0.78", True),
        ("json>=0.81", False),
        ("difference.json>=-0.03", True),
        ("difference.json.low>=-0.05", False),
    ):
        assert _holds(row, parse_gate(text)) is holds
    with pytest.raises(RecipeError, match=r"llama\.cpp answered no prompts"):
        _holds({"metric": None, "scores": None}, parse_gate("json>=0.5", option="--keep"))


def test_sizes_are_read_in_both_kinds_of_units() -> None:
    assert [_as_bytes(text) for text in ("4GB", "900 MB", "3.5GiB", "1kb")] == [
        4 * 10**9,
        900 * 10**6,
        3758096384,
        1000,
    ]


@pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-python is not installed")
def test_the_smallest_type_that_keeps_the_metric_is_kept(run: RunDir) -> None:
    found = export_types(run.root, ["f16", "q8_0", "q4_k_m"], to="gguf", keep="exact_match>=0", num_answers=3)
    assert [(row["outtype"], row["kept"]) for row in found.rows] == [("q4_k_m", True)]
    shutil.rmtree(run.exports)
    with pytest.raises(RunError, match=r"no type holds exact_match>1: q8_0 .* exact_match .*, f16 .* exact_match"):
        export_types(run.root, ["f16", "q8_0"], to="gguf", keep="exact_match>1", num_answers=3)
    assert not (run.exports / "gguf-merged").exists()
