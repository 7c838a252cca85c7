"""`export --llama-cpp DIR`: scripts that do what llama.cpp's do, right and wrong, behind the certificate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import PreTrainedTokenizerBase, Starcoder2Config, Starcoder2ForCausalLM

from loratune import __main__ as cli
from loratune.exporting.gguf.adapter import write_gguf_adapter
from loratune.exporting.gguf.architectures import layout_of
from loratune.exporting.gguf.converter import check_checkout, check_readable
from loratune.exporting.load_back import has_llama_cpp
from loratune.exporting.merge_weights import copy_companions, write_merged
from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir
from loratune.run.errors import MachineError, RecipeError, RunError
from loratune.run.progress import NO_PROGRESS
from loratune.workflows.certify_target import certify_target
from loratune.workflows.export import export
from loratune.workflows.finished import open_finished
from loratune.workflows.merged_folder import write_merged_folder
from loratune.workflows.train import train
from tests.conftest import conversation, write_jsonl

MODEL_SCRIPT = """
import json, shutil, struct, sys
from pathlib import Path

folder, arguments = Path(sys.argv[1]), dict(zip(sys.argv[2::2], sys.argv[3::2]))
mode = (Path(__file__).parent / "mode").read_text()
with open(folder / "model.safetensors", "rb") as file:
    header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
header.pop("__metadata__", None)
assert {tensor["dtype"] for tensor in header.values()} == {"F32"}, "rounded before it is converted"
assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= {path.name for path in folder.iterdir()}
if mode == "fails":
    print("INFO: reading", folder, file=sys.stderr)
    sys.exit("NotImplementedError: Architecture 'OtherForCausalLM' not supported!")
if mode != "nothing":
    shutil.copyfile(f"{mode}-{arguments['--outtype']}.gguf", arguments["--outfile"])
"""
ADAPTER_SCRIPT = """
import json, shutil, sys
from pathlib import Path

folder, arguments = Path(sys.argv[1]), dict(zip(sys.argv[2::2], sys.argv[3::2]))
settings = json.loads((folder / "adapter_config.json").read_text())
assert (settings["lora_alpha"], settings["use_rslora"], settings["rank_pattern"]) == (settings["r"], False, {})
assert (Path(arguments["--base"]) / "config.json").is_file() and arguments["--outtype"] == "f32"
shutil.copyfile((Path(__file__).parent / "mode").read_text() + "-lora.gguf", arguments["--outfile"])
"""
"""Stand-ins for llama.cpp's scripts: they are called as these are, and copy what was written before."""


def write_as_converter(folder: Path, file: Path, outtype: str) -> None:
    """Write a folder as llama.cpp's converter does: a Llama by our own writer, a StarCoder2 name by name."""
    from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from loratune.exporting.gguf.model import GgufSource, write_gguf_model
    from loratune.exporting.gguf.tokenizer import add_tokenizer

    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    stops = ends if isinstance(ends, list) else [ends]
    if config.model_type == "llama":
        source = GgufSource(base=folder, config=config, tokenizer=tokenizer, name="x", stop_token_ids=stops)
        write_gguf_model(source, file, outtype=outtype)
        return
    writer = GGUFWriter(str(file), "starcoder2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_eps(config.norm_epsilon)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    add_tokenizer(writer, tokenizer, vocab_size=config.vocab_size, stop_token_ids=stops)
    names = get_tensor_name_map(MODEL_ARCH.STARCODER2, config.num_hidden_layers)
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.half() if outtype == "f16" and tensor.dim() > 1 else tensor.float()
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_checkout(folder: Path) -> Path:
    """A folder with the two scripts; the file `mode` says what they do."""
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(MODEL_SCRIPT)
    (folder / "convert_lora_to_gguf.py").write_text(ADAPTER_SCRIPT)
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return make_checkout(tmp_path / "llama.cpp")


def converted(run: RunDir, folder: Path) -> dict[str, Path]:
    """Files of a run as the converter writes them, and of something else."""
    finished = open_finished(run.root, NO_PROGRESS)
    (folder / "merged").mkdir()
    write_merged_folder(finished, folder / "merged", "float32")
    write_as_converter(folder / "merged", folder / "right-f16.gguf", "f16")
    base = folder / "base"
    base.mkdir()
    write_merged(finished.base, {}, base, dtype=torch.float32)
    copy_companions(finished.base, run.adapter, base, finished.stops)
    write_as_converter(base, folder / "other-f16.gguf", "f16")
    if layout_of(finished.config) is not None:
        halved = {name: replace(update, scale=update.scale / 2) for name, update in finished.updates.items()}
        for name, updates in (("right", finished.updates), ("other", halved)):
            write_gguf_adapter(updates, finished.config, folder / f"{name}-lora.gguf", name="x")
    return {name: folder / name for name in ("right", "other")}


@pytest.fixture(scope="module")
def files(finished_run: RunDir, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return converted(finished_run, tmp_path_factory.mktemp("converted"))


def test_what_the_converter_writes_gets_the_same_certificate(
    finished_run: RunDir, checkout: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    (checkout / "mode").write_text(str(files["right"]))
    exported = export(finished_run.root, to="gguf", outtype="f16", out=tmp_path / "out", llama_cpp=checkout)
    assert exported.certificate["verdict"] == "same"
    assert "F16" in exported.certificate["weights"]["types"]
    assert {path.name for path in exported.folder.iterdir()} == {"tiny-f16.gguf", "parity.json"}
    (checkout / "convert_hf_to_gguf.py").unlink()  # an adapter needs only the other script
    adapter = export(finished_run.root, to="gguf", out=tmp_path / "adapter", llama_cpp=checkout)
    assert adapter.certificate["verdict"] == "same"
    assert adapter.certificate["weights"]["relative_error"] < 1e-6


@pytest.mark.parametrize(
    ("mode", "merged", "words", "fix"),
    [
        ("fails", True, r"ended with 1:\n.*\n?.*OtherForCausalLM' not supported", "a newer checkout"),
        pytest.param("nothing", True, r"wrote no tiny-f16\.gguf", "another checkout", marks=pytest.mark.slow),
        ("other", True, "14 of 14 matrices lack their update", "nothing was kept"),
        pytest.param("other", False, "have a different update than the adapter's", "nothing", marks=pytest.mark.slow),
    ],
)
def test_what_it_does_wrong_is_named_and_nothing_is_kept(
    finished_run: RunDir,
    checkout: Path,
    files: dict[str, Path],
    tmp_path: Path,
    mode: str,
    merged: bool,
    words: str,
    fix: str,
) -> None:
    (checkout / "mode").write_text(str(files.get(mode, mode)))
    with pytest.raises(RunError, match=words) as error:
        export(finished_run.root, to="gguf", merged=merged, out=tmp_path / "out", llama_cpp=checkout)
    assert fix in error.value.fix
    assert [path.name for path in tmp_path.iterdir()] == ["llama.cpp"]


@pytest.fixture(scope="module")
def starcoder_run(tmp_path_factory: pytest.TempPathFactory, smollm2_tokenizer: PreTrainedTokenizerBase) -> RunDir:
    """A run on a family for which loratune writes no GGUF files."""
    folder = tmp_path_factory.mktemp("starcoder")
    tokenizer: Any = smollm2_tokenizer
    torch.manual_seed(0)
    config = Starcoder2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        sliding_window=None,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    Starcoder2ForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    recipe = {
        "model": {"name": str(folder / "base"), "dtype": "float32"},
        "data": {
            "train": str(write_jsonl(folder / "train.jsonl", [conversation(number) for number in range(12)])),
            "eval": str(write_jsonl(folder / "eval.jsonl", [conversation(number) for number in range(100, 104)])),
        },
        "lora": {"dropout": 0.0, "r": 4},
        "train": {
            "output_dir": str(folder / "tiny"),
            "epochs": 4,
            "learning_rate": 2e-2,
            "batch_size": 4,
            "device": "cpu",
            "compile": False,
            "save_every": "never",
            "eval_every": "never",
        },
        "evaluate": {"metric": "none", "samples": 0},
    }
    return train(Recipe.parse(recipe)).run


@pytest.mark.slow
def test_a_family_of_the_converter_alone_is_proven_by_its_outputs(
    starcoder_run: RunDir, checkout: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="GGUF files of architecture starcoder2") as refused:
        export(starcoder_run.root, to="gguf", merged=True, out=tmp_path / "out")
    assert "--llama-cpp DIR" in refused.value.fix
    (tmp_path / "files").mkdir()
    files = converted(starcoder_run, tmp_path / "files")
    (checkout / "mode").write_text(str(files["right"]))
    exported = export(starcoder_run.root, to="gguf", merged=True, out=tmp_path / "out", llama_cpp=checkout)
    certificate = exported.certificate
    assert certificate["verdict"] == "same", certificate["reason"]
    assert certificate["weights"] is None
    assert certificate["distributions"]["mean_kl"] < certificate["distributions"]["base_kl"] / 16
    (file,) = exported.folder.glob("*.gguf")
    assert GGUFReader(file).get_field("general.architecture").contents() == "starcoder2"
    assert certify_target(starcoder_run.root, file)["verdict"] == "same"
    (checkout / "mode").write_text(str(files["other"]))
    with pytest.raises(RunError, match="the mean KL divergence is"):
        export(starcoder_run.root, to="gguf", merged=True, out=tmp_path / "other", llama_cpp=checkout)


def test_what_cannot_be_written_or_read_back_is_refused_before(
    finished_run: RunDir, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match=r"no convert_hf_to_gguf\.py in it") as error:
        check_checkout(tmp_path, merged=True)
    assert "git clone https://github.com/ggml-org/llama.cpp" in error.value.fix
    with pytest.raises(RecipeError, match="not an export --to vllm"):
        export(finished_run.root, to="vllm", merged=True, out=tmp_path / "out", llama_cpp=checkout)
    for model_type, merged in (("starcoder2", False), ("olmo2", True)):
        if not has_llama_cpp():
            config = type("Config", (), {"model_type": model_type})
            with pytest.raises(MachineError, match=rf"only llama\.cpp can read a GGUF \w+ of {model_type} back"):
                check_readable(config, merged=merged)
    check_readable(type("Config", (), {"model_type": "starcoder2"}), merged=True)
    monkeypatch.setattr(
        "sys.argv",
        ["loratune", "export", str(finished_run.root), "--outtype", "f16,q8_0", "--llama-cpp", str(checkout)],
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
