"""`loratune certify RUN TARGET`: files of any origin against a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from loratune import __main__ as cli
from loratune.exporting.adapter_matrices import LowRank
from loratune.exporting.merge_weights import write_merged
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import RecipeError
from loratune.workflows.certify_target import certify_target
from loratune.workflows.export import export, merge


def test_a_folder_that_peft_merged_is_the_same_and_the_base_is_not(finished_run: RunDir, tmp_path: Path) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(str(finished_run.adapter))
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(finished_run.adapter).save_pretrained(tmp_path / "merged")
    record = certify_target(finished_run.root, tmp_path / "merged")
    assert record["verdict"] == "same"
    assert record["distributions"]["mean_kl"] < 1e-6 < record["distributions"]["base_kl"]
    base = read_json(finished_run.lock)["inputs"]["model_path"]
    record = certify_target(finished_run.root, base)
    assert record["verdict"] == "different"
    assert any("14 of 14 matrices lack their update" in complaint for complaint in record["complaints"])


@pytest.mark.parametrize(
    "options",
    [
        {"to": "gguf"},
        pytest.param({"to": "gguf", "merged": True}, marks=pytest.mark.slow),
        pytest.param({"to": "vllm"}, marks=pytest.mark.slow),
    ],
)
def test_every_export_is_what_it_was_when_it_was_written(
    finished_run: RunDir, tmp_path: Path, options: dict[str, object]
) -> None:
    exported = export(finished_run.root, out=tmp_path / "out", **options)
    record = certify_target(finished_run.root, exported.folder)
    assert record["verdict"] == exported.certificate["verdict"] == "same"
    assert record["weights"] == exported.certificate["weights"]


def test_an_adapter_of_another_run_is_different(finished_run: RunDir, tmp_path: Path) -> None:
    folder = export(finished_run.root, to="vllm", out=tmp_path / "out").folder
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] / 2}))
    record = certify_target(finished_run.root, folder)
    assert "have a different update than the adapter's" in record["reason"]


def test_a_forgetful_merge_is_refused_and_nothing_is_kept(
    finished_run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LowRank, "applied_to", lambda _, weight: weight)
    monkeypatch.setattr("sys.argv", ["loratune", "merge", str(finished_run.root), str(tmp_path / "merged")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert "14 of 14 matrices lack their update" in shown
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_the_record_and_exits_with_1_unless_it_is_the_same(
    finished_run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = merge(finished_run.root, tmp_path / "merged").folder
    write_merged(Path(read_json(finished_run.lock)["inputs"]["model_path"]), {}, merged, dtype=torch.bfloat16)
    monkeypatch.setattr("sys.argv", ["loratune", "certify", str(finished_run.root), str(merged), "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    record = json.loads(capsys.readouterr().out)
    assert record["verdict"] == "different"
    assert record["weights"]["types"] == ["BF16"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("nothing", "no such file"), ("notes.txt", r"\.txt cannot be compared"), ("folder", "it holds neither")],
)
def test_what_cannot_be_compared_is_named(finished_run: RunDir, tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "notes.txt").write_text("milk")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RecipeError, match=words):
        certify_target(finished_run.root, tmp_path / name)
