"""What each export target writes, and the commands that it names."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from loratune.exporting.ollama import translate
from loratune.run.directory import RunDir
from loratune.run.errors import RecipeError
from loratune.run.progress import NO_PROGRESS
from loratune.workflows.export import export
from loratune.workflows.export_gguf import GgufExport
from loratune.workflows.export_vllm import VllmExport
from loratune.workflows.finished import FinishedRun, open_finished
from loratune.workflows.merged_folder import merged_bytes, merged_dtype, write_merged_folder

OUT = Path("/exports/out")


@pytest.fixture(scope="module")
def finished(finished_run: RunDir) -> FinishedRun:
    return open_finished(finished_run.root, NO_PROGRESS)


def test_a_merged_folder_has_the_type_of_the_base_or_the_one_that_was_asked_for(
    finished: FinishedRun, tmp_path: Path
) -> None:
    assert merged_dtype(finished.prepared, "auto") is None
    assert merged_dtype(finished.prepared, "float16") is torch.float16
    assert merged_bytes(finished, "auto") == finished.base_bytes
    for name, dtype in (("as_base", "auto"), ("half", "bfloat16")):
        (tmp_path / name).mkdir()
        write_merged_folder(finished, tmp_path / name, dtype)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("as_base", "half")]
    assert sizes[0] == pytest.approx(2 * sizes[1], rel=0.01)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_commands_for_llama_cpp_and_ollama_name_model_and_adapter(
    finished: FinishedRun, smollm2_tokenizer: PreTrainedTokenizerBase
) -> None:
    adapter = GgufExport(finished=finished, target=OUT, outtype=None, template=None)
    merged = replace(adapter, outtype="q8_0")
    assert merged.usage[0] == "llama-cli -m /exports/out/tiny-q8_0.gguf --jinja"
    assert adapter.usage[0] == "llama-cli -m BASE.gguf --lora /exports/out/tiny-lora.gguf --jinja"
    on_gguf = replace(adapter, finished=replace(finished, source=Path("/models/base.gguf")))
    assert "-m /models/base.gguf --lora" in on_gguf.usage[1]
    for_ollama = replace(merged, template=translate(smollm2_tokenizer, []))
    assert for_ollama.usage == ("ollama create tiny -f /exports/out/Modelfile", "ollama run tiny")


def test_the_command_for_vllm_serves_the_adapter_on_its_base_or_the_merged_folder(
    finished: FinishedRun, tiny_model: Path
) -> None:
    adapter = VllmExport(finished=finished, target=OUT, merged=False)
    words = shlex.split(adapter.usage[0])
    assert words[:3] == ["vllm", "serve", str(tiny_model)]
    assert words[words.index("--lora-modules") + 1] == "tiny=/exports/out"
    assert words[words.index("--dtype") + 1] == "float32"
    merged = replace(adapter, merged=True)
    assert merged.usage == ("vllm serve /exports/out --served-model-name tiny",)


def test_an_unknown_program_is_refused(finished_run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot export to 'onnx'") as error:
        export(finished_run.root, to="onnx", out=tmp_path / "out")
    assert all(f"--to {program}" in error.value.fix for program in ("gguf", "ollama", "vllm"))
    assert list(tmp_path.iterdir()) == []


def test_an_outtype_is_refused_with_what_helps(finished_run: RunDir, tmp_path: Path) -> None:
    for to, merged, fix in (
        ("vllm", False, "leave it out"),
        ("mlx", True, "leave it out"),
    ):
        with pytest.raises(RecipeError, match="--outtype q8_0") as error:
            export(finished_run.root, to=to, merged=merged, outtype="q8_0", out=tmp_path / "out")
        assert error.value.fix == fix
    with pytest.raises(RecipeError, match="--outtype q9_k is not a type") as error:
        export(finished_run.root, to="gguf", outtype="q9_k", out=tmp_path / "out")
    assert all(f"{name}" in error.value.fix for name in ("q4_k_m", "q8_0", "f16"))
