from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loratune.model.adapter.attach import attach_adapter, use_fast_layers
from loratune.model.adapter.targets import Matrix, resolve_targets
from loratune.model.kernels.attention import PACKED, register
from loratune.planning.memory.adapter import variant_bytes
from loratune.planning.memory.memory import (
    LayerBytes,
    MemoryPlan,
    TokenSizes,
    generation_bytes,
    layer_bytes,
    plan_memory,
)
from loratune.planning.parameters import count_parameters
from loratune.recipe.recipe import LoraSection, Variant

TOKENS = 192
LAYER = LayerBytes(saved_for_backward=1000, input=100, forward=400, backward=300, cache=50, attention=0)


def config(layers: int = 3) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # PEFT asks transformers by an old name.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["plain", "dora"])
@pytest.mark.parametrize(("targets", "dropout"), [("balanced", 0.1), ("complete", 0.0)])
def test_what_a_layer_keeps_is_what_autograd_saves(
    dtype: torch.dtype, targets: str, dropout: float, variant: Variant
) -> None:
    register()
    model = LlamaForCausalLM(config()).to(dtype)
    names = resolve_targets(model, targets)
    lora = LoraSection(r=4, dropout=dropout, variant=variant)
    adapted = attach_adapter(model, lora, names, base_name="tiny", seed=0)
    counted = count_parameters(LlamaForCausalLM(config()), names, lora).per_module
    use_fast_layers(adapted)
    model.set_attn_implementation(PACKED)
    adapted.train()
    model.get_input_embeddings().register_forward_hook(lambda *args: args[2].requires_grad_())
    ends = torch.tensor([0, TOKENS], dtype=torch.int32)
    saved: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # else a storage that is freed lends its address to the next one
    own = {parameter.untyped_storage().data_ptr() for parameter in adapted.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.numel() % TOKENS == 0 and not is_weight(tensor):
            alive.append(tensor)
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def is_weight(tensor: torch.Tensor) -> bool:
        """The adapter's copies in the base's type, and what DoRA makes of W."""
        return TOKENS not in tensor.shape and tensor.numel() in {
            *(item.matrix.d_in * item.matrix.d_out for item in counted),
            *(item.matrix.d_in**2 for item in counted),
        }

    def forward(layers: int) -> int:
        saved.clear()
        model.model.layers = torch.nn.ModuleList(list(all_layers)[:layers])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = model.model(
                input_ids=torch.zeros(1, TOKENS, dtype=torch.long),
                position_ids=torch.arange(TOKENS)[None],
                cu_seq_lens_q=ends,
                cu_seq_lens_k=ends,
                max_length_q=TOKENS,
                max_length_k=TOKENS,
                use_cache=False,
            )[0]
        assert out.requires_grad
        return sum(saved.values())

    all_layers = model.model.layers
    expected = layer_bytes(config(), dtype.itemsize, [item.matrix for item in counted], lora=lora, compiled=False)
    measured = (forward(3) - forward(1)) / 2 / TOKENS
    assert expected.saved_for_backward == pytest.approx(measured, rel=0.03)


def plan(**changes: Any) -> MemoryPlan:
    settings: dict[str, Any] = {
        "total_parameters": 1_100_000,
        "trainable_parameters": 100_000,
        "optimizer_bytes": 800_000,
        "stored_bytes": 0,
        "layer": LAYER,
        "num_layers": 10,
        "dtype_bytes": 2,
        "device": "cuda",
        "compiled": False,
        "loss_chunk_bytes": 1000,
        "row_logits_bytes": 4000,
        "work": TokenSizes(longest=100, largest_step=800),
        "wanted_budget": 400,
        "wanted_recomputed": None,
        "resident": 0,
        "free": 10**12,
    }
    return plan_memory(**settings | changes)


def test_the_components_are_the_formulas() -> None:
    made = plan()
    assert made.weights_bytes == 2_000_000
    assert made.adapter_bytes == 100_000 * (4 + 4 + 2)
    assert made.optimizer_bytes == 100_000 * 8
    assert made.activation_bytes == made.activation_bytes_without_recomputation == 400 * 10 * 1000
    assert made.activation_bytes_with_recomputation == 400 * (10 * 100 + 1000)
    assert made.backward_bytes == 400 * 300
    assert made.peak_bytes == made.training_bytes
    parts = made.weights_bytes + made.adapter_bytes + made.optimizer_bytes + made.activation_bytes + made.backward_bytes
    assert made.peak_bytes == parts + made.allocator_bytes + made.process_bytes


def test_what_a_variant_takes_is_in_the_peak_and_what_it_takes_is_its_formula() -> None:
    assert plan(variant_bytes=10**6).peak_bytes == plan().peak_bytes + 10**6
    matrices = [Matrix(name="a", d_in=64, d_out=32), Matrix(name="b", d_in=16, d_out=64)]
    needed = {v: variant_bytes(matrices, LoraSection(r=4, variant=v), 2) for v in ("plain", "rslora", "pissa", "dora")}
    assert needed["plain"] == needed["rslora"] == 0
    assert needed["pissa"] == 4 * 4 * (64 + 32 + 16 + 64)
    assert needed["dora"] == 4 * (64 * 32 + 16 * 64) + 4 * (64 * 64 + 4 * 64 * 32)
    without_dropout = variant_bytes(matrices, LoraSection(variant="dora", dropout=0), 2)
    assert without_dropout == 4 * (64 * 64 + 4 * 64 * 32)


def test_steps_of_many_sizes_leave_more_behind_on_a_cpu() -> None:
    def left(num_sizes: int, **changes: Any) -> int:
        work = TokenSizes(longest=100, largest_step=800, num_sizes=num_sizes)
        return plan(device="cpu", work=work, **changes).allocator_bytes

    assert left(1) < left(10) < left(28) == left(1000) == left(0) + 270 * 2**20
    assert left(1, compiled=True) < left(28, compiled=True)
    assert left(1, dtype_bytes=4) < left(28, dtype_bytes=4) < left(28)
    assert plan(work=TokenSizes(longest=100, largest_step=800, num_sizes=28)) == plan()


def test_layers_recompute_where_the_whole_does_not_fit() -> None:
    whole = plan()
    tight = plan(free=int((whole.peak_bytes - whole.activation_bytes / 2) / 0.8))
    assert 0 < tight.num_recomputed < 10
    assert tight.activation_bytes < whole.activation_bytes
    assert tight.token_budget == 400


def test_a_batch_of_answers_takes_no_more_than_training() -> None:
    work = TokenSizes(longest=100, largest_step=800, held_out=100, prompt=90, num_prompts=1000, max_new_tokens=60)
    made = plan(work=work)
    per_token = generation_bytes(LAYER, 10, 4000, work)
    assert 150 < made.generation_tokens < 16_384
    assert made.generation_tokens * per_token <= made.activation_bytes + made.working_bytes
    assert made.peak_bytes == made.training_bytes


def test_one_answer_that_takes_more_than_training_is_in_the_peak() -> None:
    made = plan(work=TokenSizes(longest=100, largest_step=800, prompt=60_000, num_prompts=1, max_new_tokens=60))
    assert made.evaluation_bytes > made.activation_bytes
    assert made.peak_bytes > made.training_bytes


def test_weights_that_are_converted_are_there_twice_while_they_load() -> None:
    made = plan(device="cpu", stored_bytes=10**9, resident=5_000_000)
    assert made.peak_bytes == made.weights_bytes + made.process_bytes + 10**9
