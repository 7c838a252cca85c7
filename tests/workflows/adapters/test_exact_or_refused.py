"""What a verb cannot do exactly with an adapter is refused by name, and what it does is what PEFT does."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from loratune.exporting.adapters.folder import read_folder
from loratune.run.errors import RecipeError, RunError
from loratune.run.progress import NoProgress
from loratune.workflows.adapters.base import checked_base
from loratune.workflows.adapters.compare import certify_adapter, diff_adapters, inspect_adapter, merge_adapter
from loratune.workflows.adapters.make import combine_adapters, convert_adapter, resize_adapter
from tests.conftest import make_moe, some
from tests.workflows.adapters.conftest import MakeAdapter, change_config, load

TOKENS = torch.arange(8)[None]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:PiSSA changes the base weights of the model"),
]


class Heard(NoProgress):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=TOKENS).logits
    return found


def by_peft(base: Path, folder: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(load(base), str(folder)))


def all_verbs(adapter: Path, other: Path, out: Path) -> dict[str, Callable[[], Any]]:
    """Every verb that writes or judges, with an adapter in every place that it has."""
    return {
        "merge": lambda: merge_adapter(adapter, out),
        "combine": lambda: combine_adapters([other, adapter], out),
        "convert": lambda: convert_adapter(adapter, out),
        "resize": lambda: resize_adapter(adapter, out, rank=1),
        "diff": lambda: diff_adapters(other, adapter),
        "certify a model": lambda: certify_adapter(adapter, out),
        "certify an adapter": lambda: certify_adapter(adapter, other),
        "certify as the target": lambda: certify_adapter(other, adapter),
    }


def pissa(base: Path, folder: Path) -> tuple[Path, Path, torch.Tensor]:
    """A trained PiSSA adapter as PEFT saves it, the same converted by PEFT, and the trained model's logits."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    model: Any = get_peft_model(load(base), config)
    config.init_lora_weights = True
    model.save_pretrained(str(folder / "initial"))
    config.init_lora_weights = "pissa"
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    trained = logits(model)
    model.save_pretrained(str(folder / "pissa"))
    model.save_pretrained(str(folder / "plain"), path_initial_model_for_weight_conversion=str(folder / "initial"))
    return folder / "pissa", folder / "plain", trained


def test_an_adapter_for_the_residual_of_its_base_is_refused_by_every_verb_and_its_conversion_is_not(
    make_adapter: MakeAdapter, tiny_model: Path, tmp_path: Path
) -> None:
    changed, converted, trained = pissa(tiny_model, tmp_path)
    for name, verb in all_verbs(changed, make_adapter("one", 1, r=2), tmp_path / "out").items():
        with pytest.raises(RecipeError, match=r"initialization \(pissa\) changed its base's weights") as error:
            verb()
        assert "path_initial_model_for_weight_conversion" in error.value.fix, name
    assert inspect_adapter(changed)["kind"] == "LoRA for the residual of its base (pissa)"
    assert not (tmp_path / "out").exists()
    assert merge_adapter(converted, tmp_path / "merged", dtype="float32")["verdict"] == "same"
    assert torch.allclose(logits(load(tmp_path / "merged")), trained, atol=1e-4)


@pytest.mark.parametrize("how", ["pissa_niter_16", "OLoRA", "corda", "loftq", "lora_ga", "kasa"])
def test_every_initialization_of_peft_that_changes_the_base_is_known(
    how: str, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    one = make_adapter("one", 1, r=2)
    change_config(one, **({"kasa_config": {"beta": 1}} if how == "kasa" else {"init_lora_weights": how}))
    with pytest.raises(RecipeError, match=rf"initialization \({how}\) changed its base's weights") as error:
        merge_adapter(one, tmp_path / "out")
    assert ("quantized base" in error.value.fix) == (how == "loftq")
    change_config(one, init_lora_weights="orthogonal", kasa_config=None)  # which leaves it
    assert read_folder(one).kind == "LoRA"


MORE_THAN_MATRICES: dict[str, Any] = {
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "layer_replication": [[0, 2], [1, 2]],
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "velora_config": {"num_groups": 2},
    "arrow_config": {"top_k": 1},
}


@pytest.mark.parametrize("name", some(MORE_THAN_MATRICES, "target_parameters", "use_bdlora"))
def test_what_is_no_update_of_matrices_is_refused_by_every_verb(
    name: str, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    one, other = make_adapter("one", 1, r=2), make_adapter("other", 2, r=2)
    change_config(one, **{name: MORE_THAN_MATRICES[name]})
    for verb in all_verbs(one, other, tmp_path / "out").values():
        with pytest.raises(RecipeError, match=name):
            verb()
    assert inspect_adapter(one)["kind"] == f"LoRA with {name}"


def test_factors_of_stacked_experts_are_shown(make_adapter: MakeAdapter) -> None:
    one = make_adapter("one", 1, r=2)
    change_config(one, target_parameters=["mlp.experts.down_proj"])
    file = one / "adapter_model.safetensors"
    stack = {f"base_model.model.model.layers.0.mlp.experts.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
    plain = inspect_adapter(one)
    save_file({**load_file(file), **stack}, file)
    shown = inspect_adapter(one)
    assert shown["other"] == ["model.layers.0.mlp.experts"]
    assert shown["num_parameters"] == plain["num_parameters"] + 32


def test_factors_that_are_no_matrices_or_not_finite_are_refused(make_adapter: MakeAdapter) -> None:
    one = make_adapter("one", 1, r=2)
    file = one / "adapter_model.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    for value, words in ((tensors[name][:, :, None], "not a matrix"), (tensors[name] * torch.nan, "NaN or infinite")):
        save_file({**tensors, name: value.contiguous()}, file)
        with pytest.raises(RunError, match=words):
            inspect_adapter(one)


def test_rows_of_existing_tokens_in_any_order_are_merged_as_peft_reads_them(
    make_adapter: MakeAdapter, tiny_model: Path, tmp_path: Path
) -> None:
    rows = make_adapter("rows", 1, r=2, trainable_token_indices=[5, 3])
    file = rows / "adapter_model.safetensors"
    tensors = load_file(file)
    (name,) = (name for name in tensors if "trainable_tokens_delta" in name)
    save_file({**tensors, name: torch.randn(2, 32)}, file)
    assert merge_adapter(rows, tmp_path / "merged")["verdict"] == "same"
    merged = load(tmp_path / "merged")
    assert torch.allclose(logits(merged), by_peft(tiny_model, rows), atol=1e-4)


def test_what_only_one_of_two_tied_matrices_has_is_refused_and_both_are_merged(
    make_adapter: MakeAdapter, tiny_model: Path, tmp_path: Path
) -> None:
    for module in ("embed_tokens", "lm_head"):
        apart = make_adapter(module, 1, r=2, modules_to_save=[module])
        with pytest.raises(RecipeError, match="one of two uses of one matrix"):
            merge_adapter(apart, tmp_path / "out")
    head = make_adapter("head", 1, r=2, target_modules=["q_proj", "lm_head"])
    file = head / "adapter_model.safetensors"  # beside the factors, PEFT saves the head itself
    save_file({name: tensor for name, tensor in load_file(file).items() if "base_layer" not in name}, file)
    with pytest.raises(RecipeError, match="one of two uses of one matrix"):
        merge_adapter(head, tmp_path / "out")
    both = make_adapter("both", 1, r=2, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    file = both / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            tensors[name] = tensors[name] * 1.5
    save_file(tensors, file)
    assert merge_adapter(both, tmp_path / "merged")["verdict"] == "same"
    assert torch.allclose(logits(load(tmp_path / "merged")), by_peft(tiny_model, both), atol=1e-4)
    small = resize_adapter(both, tmp_path / "small", rank=1)  # which stays tied
    assert small["check"]["logits_difference"] < 1e-5


def test_a_base_of_other_shapes_or_names_is_refused_and_an_unknown_one_is_told(
    make_adapter: MakeAdapter, tiny_model: Path, tmp_path: Path
) -> None:
    one = make_adapter("one", 1, r=2)
    config = load(tiny_model).config
    config.head_dim, config.num_hidden_layers = 4, 1
    LlamaForCausalLM(config).save_pretrained(tmp_path / "thin")
    with pytest.raises(RecipeError, match="trained on other weights"):  # whose base is here
        resize_adapter(one, tmp_path / "out", rank=1, base=tmp_path / "thin")
    change_config(one, base_model_name_or_path="me/tiny")
    for verb in (
        lambda: resize_adapter(one, tmp_path / "out", rank=1, base=tmp_path / "thin"),
        lambda: convert_adapter(one, tmp_path / "out", base=tmp_path / "thin"),
        lambda: certify_adapter(one, one, base=tmp_path / "thin"),
        lambda: inspect_adapter(one, base=tmp_path / "thin"),
    ):
        with pytest.raises(RecipeError, match=r"q_proj.weight is 16 × 32 in the base, and the adapter's is 32 × 32"):
            verb()
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    file = other / "model.safetensors"
    tensors = load_file(file)
    save_file({name.replace("layers", "blocks"): tensor for name, tensor in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(RecipeError, match="has none of the adapter's modules"):
        convert_adapter(one, tmp_path / "out", base=other)
    heard = Heard()
    convert_adapter(one, tmp_path / "out", base=tiny_model, progress=heard)
    assert heard.warnings == [
        f"the adapter names me/tiny as its base; whether {tiny_model.name} has the same weights is not known"
    ]


def test_two_adapters_of_other_bases_are_not_certified_as_the_same(
    make_adapter: MakeAdapter, tiny_model: Path, tmp_path: Path
) -> None:
    one, two = make_adapter("one", 1, r=2), make_adapter("two", 1, r=2)
    assert certify_adapter(one, two)["verdict"] == "same"
    change_config(one, base_model_name_or_path="me/one")
    change_config(two, base_model_name_or_path="me/two")
    with pytest.raises(RecipeError, match="name different bases"):
        certify_adapter(one, two)
    assert certify_adapter(one, two, base=tiny_model)["verdict"] == "same"


def test_a_resized_vocabulary_is_refused(make_adapter: MakeAdapter, tiny_model: Path, tmp_path: Path) -> None:
    model = load(tiny_model)
    model.resize_token_embeddings(model.config.vocab_size + 3, mean_resizing=False)
    model.save_pretrained(tmp_path / "resized")
    one = make_adapter("one", 1, base=tmp_path / "resized", r=2, modules_to_save=["embed_tokens", "lm_head"])
    change_config(one, base_model_name_or_path="me/tiny")
    with pytest.raises(RecipeError, match=r"embed_tokens\.weight is .* in the base") as error:
        merge_adapter(one, tmp_path / "out", base=tiny_model)
    assert "resize_token_embeddings" in error.value.fix


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Adapter 'default'")
def test_a_bias_for_a_layer_without_one_is_summed_and_no_merge_can_hold_it(
    make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    one = make_adapter("one", 1, r=2, lora_bias=True)
    record = combine_adapters([one, make_adapter("two", 2, r=2)], tmp_path / "sum", weights=[2, 1])
    assert record["check"]["logits_difference"] < 1e-5
    with pytest.raises(RecipeError, match=r"adds a bias \(lora_bias\) to .*q_proj, which has none in the base"):
        merge_adapter(tmp_path / "sum", tmp_path / "out")


def test_a_classifier_is_compared_as_a_classifier_and_its_merge_is_refused_by_name(
    make_adapter: MakeAdapter, tiny_model: Path, tmp_path: Path
) -> None:
    one = make_adapter("one", 1, kind=AutoModelForSequenceClassification, r=4, task_type="SEQ_CLS")
    record = resize_adapter(one, tmp_path / "small", rank=2)
    assert record["check"]["logits_difference"] < 1e-5
    with pytest.raises(RecipeError, match=r"a classifier's head \(score.weight\), which is not in the base") as error:
        merge_adapter(one, tmp_path / "out")
    assert "loratune merge RUN" in error.value.fix
    change_config(one, task_type="FEATURE_EXTRACTION")
    heard = Heard()
    assert resize_adapter(one, tmp_path / "tiny", rank=1, progress=heard)["check"]["logits_difference"] is None
    assert heard.warnings == ["the logits are not compared: the adapter is for FEATURE_EXTRACTION"]


def test_an_adapter_is_found_from_inside_of_its_own_folder(
    make_adapter: MakeAdapter, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one = make_adapter("one", 1, r=2)
    change_config(one, base_model_name_or_path="me/tiny")
    run = tmp_path / "run"
    run.mkdir()
    one.rename(run / "adapter")
    (run / "lock.json").write_text('{"inputs": {"model": {"model.safetensors": "of other weights"}}}')
    (tmp_path / "link").symlink_to(run / "adapter")
    for place, name in ((run / "adapter", "."), (tmp_path, "link")):
        monkeypatch.chdir(place)
        with pytest.raises(RecipeError, match="trained on other weights"):
            checked_base([read_folder(Path(name))], tiny_model)


def test_the_base_of_a_quantized_run_is_not_the_one_on_disk(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    one = make_adapter("one", 1, r=2)
    (tmp_path / "lock.json").write_text('{"recipe": {"model": {"quantization": "nf4"}}, "inputs": {"model": {}}}')
    with pytest.raises(RecipeError, match="quantized to nf4") as error:
        merge_adapter(one, tmp_path / "out")
    assert error.value.fix.startswith(f"loratune merge {tmp_path}")


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_transposed_matrices_are_compared_as_peft_computes_them(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=128, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    one = make_adapter("one", 1, base=tmp_path / "base", r=2, target_modules=["c_attn"])
    record = resize_adapter(one, tmp_path / "small", rank=1)
    assert max(record["check"]["peft_error"], record["check"]["logits_difference"]) < 1e-5
    assert merge_adapter(one, tmp_path / "merged")["verdict"] == "same"
    assert torch.allclose(logits(load(tmp_path / "merged")), by_peft(tmp_path / "base", one), atol=1e-4)


def test_experts_that_transformers_stacks_are_merged_by_name_and_not_compared_by_logits(
    make_adapter: MakeAdapter, smollm2_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    base = make_moe(tmp_path / "base", smollm2_tokenizer)
    one = make_adapter("one", 1, base=base, r=2, target_modules=["q_proj"])
    file = one / "adapter_model.safetensors"
    expert = "base_model.model.model.layers.1.mlp.experts.2.down_proj"  # as transformers 4 named it
    factors = {f"{expert}.lora_A.weight": torch.randn(2, 24), f"{expert}.lora_B.weight": torch.randn(16, 2)}
    save_file({**load_file(file), **factors}, file)
    heard = Heard()
    record = resize_adapter(one, tmp_path / "small", rank=1, progress=heard)
    assert record["check"]["peft_error"] is None
    assert [text for text in heard.warnings if "as a part of a stack" in text]
    assert merge_adapter(one, tmp_path / "merged")["verdict"] == "same"
    stack, own = (load(folder).model.layers[1].mlp.experts.down_proj.detach() for folder in (tmp_path / "merged", base))
    update = 4 * factors[f"{expert}.lora_B.weight"] @ factors[f"{expert}.lora_A.weight"]  # alpha 8 over r 2
    assert torch.allclose((stack - own)[2], update, atol=1e-4)
    assert torch.equal(stack[:2], own[:2])
