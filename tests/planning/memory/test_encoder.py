"""The bytes that a layer of an encoder is planned to save are those that autograd saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, DistilBertConfig, ModernBertConfig

from loratune.model.adapter.attach import attach_adapter, use_fast_layers
from loratune.model.adapter.targets import resolve_targets
from loratune.model.classifier import Classes
from loratune.planning.memory.encoder import encoder_layer_bytes
from loratune.planning.parameters import count_parameters
from loratune.recipe.recipe import LoraSection

EXAMPLES, TOKENS = 3, 48
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}


def config(kind: str, layers: int) -> Any:
    common: dict[str, Any] = {"vocab_size": 50, "pad_token_id": 0, "num_labels": 3}
    if kind == "distilbert":
        return DistilBertConfig(dim=64, hidden_dim=160, n_heads=4, n_layers=layers, **common)
    if kind == "modernbert":
        special = {"cls_token_id": 2, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3}
        return ModernBertConfig(
            num_hidden_layers=layers, layer_types=["full_attention"] * layers, **SIZES, **common, **special
        )
    dropout = 0.0 if kind == "bert without dropout" else 0.1
    return BertConfig(
        num_hidden_layers=layers, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **SIZES, **common
    )


def saved_bytes(kind: str, layers: int, dtype: torch.dtype, lora: LoraSection, targets: str) -> int:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config(kind, layers)).to(dtype)
    classes = Classes(names=("a", "b", "c"), pad_token_id=0, head=("classifier",), seed=0)
    adapted = attach_adapter(model, lora, resolve_targets(model, targets), base_name="tiny", seed=0, classes=classes)
    use_fast_layers(adapted)
    adapted.train()
    model.get_input_embeddings().register_forward_hook(lambda *args: args[2].requires_grad_())
    own = {parameter.untyped_storage().data_ptr() for parameter in adapted.parameters()}
    saved: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # a freed storage would lend its address to the next one

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if (storage.data_ptr() not in own and TOKENS in tensor.shape) or EXAMPLES * TOKENS in tensor.shape:
            alive.append(tensor)
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids, mask = torch.randint(5, 50, (EXAMPLES, TOKENS)), torch.ones(EXAMPLES, TOKENS, dtype=torch.long)
    mask[0, TOKENS // 2 :] = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        assert model(input_ids=ids, attention_mask=mask).logits.requires_grad
    return sum(saved.values())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bert", "bert without dropout", "distilbert", "modernbert"])
@pytest.mark.parametrize(("targets", "dropout"), [("attention", 0.1), ("complete", 0.0)])
def test_what_an_encoder_layer_is_planned_to_save_is_what_autograd_saves(
    kind: str, dtype: torch.dtype, targets: str, dropout: float
) -> None:
    lora = LoraSection(r=4, dropout=dropout)
    measured = (saved_bytes(kind, 3, dtype, lora, targets) - saved_bytes(kind, 1, dtype, lora, targets)) / 2
    own = config(kind, 3)
    model = AutoModelForSequenceClassification.from_config(own)
    matrices = count_parameters(model, resolve_targets(model, targets), lora).matrices
    layer = encoder_layer_bytes(own, dtype.itemsize, matrices, lora=lora, longest=TOKENS)
    assert layer.saved_for_backward == pytest.approx(measured / EXAMPLES / TOKENS, rel=0.02)
