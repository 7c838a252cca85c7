"""A merged folder computes base and adapter, in every layout of files.

Every architecture is in tests/invariants/test_families.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from loratune.exporting.adapter_matrices import read_adapter
from loratune.exporting.merge_weights import MergedWeights, copy_companions, with_stops, write_merged
from loratune.run.errors import RunError
from tests.invariants.families import COMMON

IDS = torch.tensor([[5, 9, 33, 2, 71, 8, 40, 11, 95, 6, 23, 17]])
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of transformers, on made-up configs


def with_noise(model: PeftModel) -> PeftModel:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, mean=1.0 if "magnitude" in name else 0.0, std=0.1)
    return model.eval()


def saved(tmp_path: Path, base: PreTrainedModel, **settings: Any) -> tuple[PeftModel, Path, Path]:
    """The adapted model, the base's folder, the adapter's folder."""
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(**{"r": 3, "target_modules": ["q_proj", "down_proj"], **settings})
    model = with_noise(get_peft_model(base, config))
    model.save_pretrained(str(tmp_path / "adapter"))
    return model, tmp_path / "base", tmp_path / "adapter"


def merged_logits(base: Path, adapter: Path, out: Path, dtype: torch.dtype | None = None) -> torch.Tensor:
    out.mkdir()
    write_merged(base, read_adapter(adapter), out, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert dtype is None or model.dtype == dtype
    with torch.no_grad():
        return model(IDS).logits.float()


def logits_of(model: PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"alpha_pattern": {"down_proj": 3}, "rank_pattern": {"q_proj": 5}},
        {"use_dora": True},
    ],
)
def test_every_scale_and_dora_are_merged_as_peft_computes_them(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, base, adapter = saved(tmp_path, AutoModelForCausalLM.from_config(LlamaConfig(**COMMON)), **settings)
    torch.testing.assert_close(
        merged_logits(base, adapter, tmp_path / "merged"), logits_of(model), rtol=1e-5, atol=1e-5
    )


def test_shards_stay_shards_and_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tied = AutoModelForCausalLM.from_config(LlamaConfig(**COMMON, tie_word_embeddings=True))
    model, base, adapter = saved(tmp_path, tied)
    expected = logits_of(model)
    (base / "model.safetensors").unlink()
    model.unload().save_pretrained(base, max_shard_size="20KB")
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 1
    actual = merged_logits(base, adapter, tmp_path / "merged")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors")) == shards
    names = set()
    for path in (tmp_path / "merged").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    assert "lm_head.weight" not in names
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]


def test_what_the_adapter_does_not_touch_is_copied_to_the_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base_model = AutoModelForCausalLM.from_config(LlamaConfig(**COMMON)).to(torch.bfloat16)
    _, base, adapter = saved(tmp_path, base_model)
    merged_logits(base, adapter, tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj" in name or "down_proj" in name}
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    update = read_adapter(adapter)["model.layers.0.self_attn.q_proj"]
    name = "model.layers.0.self_attn.q_proj.weight"
    exact = before[name].double() + update.scale * (update.b.double() @ update.a.double())
    assert torch.equal(after[name], exact.float().to(torch.bfloat16)), "rounded once"


def test_another_type_is_written_and_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, base, adapter = saved(tmp_path, AutoModelForCausalLM.from_config(LlamaConfig(**COMMON)))
    actual = merged_logits(base, adapter, tmp_path / "merged", torch.bfloat16)
    assert 0 < float((actual - logits_of(model)).abs().max()) < 0.2


def test_a_checkpoint_without_the_first_part_of_its_names_is_merged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, base, adapter = saved(tmp_path, AutoModelForCausalLM.from_config(LlamaConfig(**COMMON)))
    tensors = load_file(base / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    with MergedWeights(base, read_adapter(adapter)) as weights:
        merged = weights.tensor("layers.1.mlp.down_proj.weight")
    expected = model.base_model.model.model.layers[1].mlp.down_proj
    wanted = expected.base_layer.weight + expected.get_delta_weight("default")
    torch.testing.assert_close(merged, wanted.detach(), rtol=1e-6, atol=1e-6)


def test_a_quantized_base_and_a_missing_weight_are_refused_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _, base, adapter = saved(tmp_path, AutoModelForCausalLM.from_config(LlamaConfig(**COMMON)))
    (tmp_path / "out").mkdir()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(RunError, match="gptq"):
        write_merged(base, read_adapter(adapter), tmp_path / "out", dtype=None)
    (base / "config.json").write_text(json.dumps(config))
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(RunError, match=r"model\.layers\.1\.self_attn\.q_proj"):
        write_merged(base, read_adapter(adapter), tmp_path / "out", dtype=None)


def test_an_adapter_that_is_more_than_matrices_is_refused_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _, _, adapter = saved(
        tmp_path, AutoModelForCausalLM.from_config(LlamaConfig(**COMMON)), target_modules=["embed_tokens"]
    )
    with pytest.raises(RunError, match="embed_tokens"):
        read_adapter(adapter)


def test_the_generation_config_is_carried_and_stops_where_training_does(tmp_path: Path) -> None:
    assert with_stops(None, (7,)) == 7
    assert with_stops(2, (7, 2)) == [2, 7]
    assert with_stops([2, 7], (7,)) == [2, 7]
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    for folder in (base, adapter, out):
        folder.mkdir()
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": 2}))
    for name in ("adapter_config.json", "tokenizer.json", "chat_template.jinja", "README.md"):
        (adapter / name).write_text("{}")
    copy_companions(base, adapter, out, (5, 2))
    assert json.loads((out / "generation_config.json").read_text()) == {"temperature": 0.6, "eos_token_id": [2, 5]}
    assert {path.name for path in out.iterdir()} == {"generation_config.json", "tokenizer.json", "chat_template.jinja"}


@pytest.mark.parametrize(
    "left", ["shards of another model", "an index alone", "another single file", "the single file"]
)
def test_of_two_sets_of_weights_the_one_that_transformers_loads_is_merged(tmp_path: Path, left: str) -> None:
    """What an earlier save left beside the model is not the model."""
    model, base, adapter = saved(tmp_path, AutoModelForCausalLM.from_config(LlamaConfig(**COMMON)))
    own, index = load_file(base / "model.safetensors"), base / "model.safetensors.index.json"
    other = {name: tensor + 0.5 for name, tensor in own.items()}
    shard = "model-00001-of-00001.safetensors"
    match left:
        case "shards of another model":
            save_file(other, base / shard, metadata={"format": "pt"})
            index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(own, shard)}))
        case "an index alone":
            index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(own, shard)}))
        case "another single file":
            save_file(other, base / "weights.safetensors", metadata={"format": "pt"})
        case "the single file":  # config.json names the index, so the single file is what is left
            (base / "model.safetensors").rename(base / shard)
            save_file(other, base / "model.safetensors", metadata={"format": "pt"})
            index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(own, shard)}))
            settings = json.loads((base / "config.json").read_text())
            (base / "config.json").write_text(json.dumps({**settings, "transformers_weights": index.name}))
    loaded = AutoModelForCausalLM.from_pretrained(base)
    assert torch.equal(loaded.model.norm.weight, own["model.norm.weight"])
    torch.testing.assert_close(merged_logits(base, adapter, tmp_path / "merged"), logits_of(model))
