"""Every export of a run, from the command's functions to the files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from loratune.run.directory import RunDir, read_json
from loratune.run.errors import RecipeError, RunError
from loratune.workflows.export import export, merge


def test_a_merged_folder_answers_as_the_adapter_on_its_base(finished_run: RunDir, tmp_path: Path) -> None:
    exported = merge(finished_run.root, tmp_path / "merged")
    certificate = json.loads((tmp_path / "merged" / "parity.json").read_text())
    assert certificate == exported.certificate
    assert repr(exported) == f"Exported({str(exported.folder)!r}: {exported.summary})"
    assert len(repr(exported)) < 500
    assert certificate["passed"]
    assert certificate["template"]["same_token_ids"] == certificate["template"]["num_prompts"] == 6
    assert certificate["distributions"]["mean_kl"] < 1e-6
    assert certificate["distributions"]["top1_agreement"] == 1
    assert certificate in read_json(finished_run.parity)
    log = [line[21:] for line in finished_run.log.read_text(encoding="utf-8").splitlines()]
    assert exported.summary in log[log.index(f"merge into {tmp_path / 'merged'}") :]
    page = finished_run.report.read_text()
    assert all(words in page for words in ("Exports", "6 of 6", certificate["checked_with"]))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = AutoPeftModelForCausalLM.from_pretrained(str(finished_run.adapter))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer("<|im_start|>user\nDescribe thing 7<|im_end|>\n", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-5, atol=1e-5)
        base_logits = adapted.get_base_model()
        with adapted.disable_adapter():
            assert float((base_logits(ids).logits - merged(ids).logits).abs().max()) > 0.1


def test_a_certificate_that_fails_leaves_nothing(finished_run: RunDir, tmp_path: Path) -> None:
    """The adapter's template is not that of training, so the merged model would get different prompts."""
    run = RunDir(Path(shutil.copytree(finished_run.root, tmp_path / "run")))
    template = run.adapter / "chat_template.jinja"
    template.write_text(template.read_text().replace("user", "human").replace("assistant", "robot"))
    template.write_text(template.read_text().replace("+ message['role'] +", "+ 'human' +"))
    with pytest.raises(RunError, match="6 of 6 prompts have different token ids"):
        merge(run.root, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not run.parity.exists() or all(Path(c["path"]) != tmp_path / "merged" for c in read_json(run.parity))


def test_a_folder_with_something_in_it_is_never_touched(finished_run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("ten years of work")
    with pytest.raises(RecipeError, match="already exists"):
        merge(finished_run.root, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_base_that_changed_since_the_run_is_refused(finished_run: RunDir, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(finished_run.root, tmp_path / "run")))
    lock = json.loads(run.lock.read_text())
    lock["inputs"]["model"]["model.safetensors"] = "0" * 64
    run.lock.write_text(json.dumps(lock))
    with pytest.raises(RecipeError, match=r"changed since the run: inputs\.model\.model\.safetensors"):
        merge(run.root, tmp_path / "merged")


@pytest.mark.parametrize("merged", [False, True])
def test_gguf_files_pass_with_whatever_reads_them_here(finished_run: RunDir, tmp_path: Path, merged: bool) -> None:
    exported = export(finished_run.root, to="gguf", merged=merged, out=tmp_path / "out", num_answers=4)
    assert exported.certificate["passed"]
    files = {path.name for path in exported.folder.iterdir()}
    assert files == {"tiny-f16.gguf" if merged else "tiny-lora.gguf", "parity.json"}
    if "llama.cpp in" in exported.certificate["checked_with"]:
        assert exported.certificate["answers"]["num_prompts"] == 4
        assert exported.certificate["answers"]["same_text"] >= 3
        assert exported.certificate["answers"]["share"] >= 0.75


def test_a_merged_q8_file_for_ollama_has_the_template_and_the_stops(finished_run: RunDir, tmp_path: Path) -> None:
    exported = export(finished_run.root, to="ollama", merged=True, outtype="bf16", out=tmp_path / "out")
    text = (exported.folder / "Modelfile").read_text()
    assert text.startswith("FROM ./tiny-bf16.gguf\nTEMPLATE ")
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert exported.certificate["passed"]


def test_vllm_gets_the_adapter_with_template_and_stops_and_the_command(finished_run: RunDir, tmp_path: Path) -> None:
    exported = export(finished_run.root, to="vllm", out=tmp_path / "out")
    script = (exported.folder / "serve.sh").read_text()
    assert "--max-lora-rank 8" in script
    log = [line[21:] for line in finished_run.log.read_text(encoding="utf-8").splitlines()]
    assert exported.summary in log[log.index(f"export for vllm into {tmp_path / 'out'}") :]
    assert f"--lora-modules tiny={tmp_path / 'out'}" in script
    assert {"adapter_config.json", "chat_template.jinja", "generation_config.json"} <= {
        path.name for path in exported.folder.iterdir()
    }
    assert exported.certificate["distributions"]["mean_kl"] < 1e-6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "ollama"}, "base of this run is not a GGUF file"),
        ({"to": "vllm", "merged": True, "outtype": "f16"}, "is a type of GGUF files"),
        ({"to": "gguf", "out": "model.gguf"}, "a folder is written"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is(
    finished_run: RunDir, options: dict[str, object], words: str
) -> None:
    def written() -> set[Path]:
        return set(finished_run.exports.glob("*"))

    before = written()
    with pytest.raises(RecipeError, match=words):
        export(finished_run.root, **options)
    assert written() == before


def test_the_target_has_a_default_only_where_the_base_is_a_gguf_file(
    finished_run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match="the base is not a GGUF file") as error:
        export(finished_run.root)
    assert error.value.fix == "--to gguf, --to ollama, --to vllm or --to mlx"
    run = RunDir(Path(shutil.copytree(finished_run.root, tmp_path / "run")))
    lock = read_json(run.lock)
    lock["recipe"]["model"]["name"] = str(tmp_path / "base.gguf")
    run.lock.write_text(json.dumps(lock))
    (tmp_path / "base.gguf").write_text("GGUF")
    with pytest.raises(RecipeError, match="but a folder is written"):
        export(run.root, out="adapter.gguf")  # so it is gguf that was chosen
