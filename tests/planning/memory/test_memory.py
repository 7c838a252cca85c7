"""Planned bytes against what autograd saves, and against the formulas by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loratune.model.adapter.attach import attach_adapter, use_fast_layers
from loratune.model.adapter.targets import Matrix, resolve_targets
from loratune.model.kernels.attention import PACKED, register
from loratune.planning.memory.adapter import variant_bytes
from loratune.planning.memory.decoder import decoder_layer_bytes
from loratune.planning.memory.inputs import TokenSizes
from loratune.planning.memory.memory import generation_bytes
from loratune.planning.memory.overhead import COMPILER_BYTES, CONTEXT_BYTES, RUNNING_BYTES, TRAINER_BYTES
from loratune.planning.parameters import count_parameters
from loratune.recipe.recipe import LoraSection, Variant
from tests.planning.memory.records import MODEL, plan

TOKENS = 192


def config(layers: int = 3) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT uses transformers' old name
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["plain", "dora"])
@pytest.mark.parametrize(("targets", "dropout"), [("balanced", 0.1), ("complete", 0.0)])
def test_what_a_decoder_layer_is_planned_to_save_is_what_autograd_saves(
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
    alive: list[torch.Tensor] = []  # a freed storage would lend its address to the next one
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
    expected = decoder_layer_bytes(
        config(), dtype.itemsize, [item.matrix for item in counted], lora=lora, compiled=False
    )
    measured = (forward(3) - forward(1)) / 2 / TOKENS
    assert expected.saved_for_backward == pytest.approx(measured, rel=0.03)


def test_the_components_are_the_formulas() -> None:
    made = plan()
    assert made.weights_bytes == 2_000_000
    assert made.adapter_bytes == 100_000 * (4 + 4 + 2)
    assert made.optimizer_bytes == 100_000 * 8
    assert made.activation_bytes == made.activation_bytes_without_recomputation == 400 * 10 * 1000
    assert made.activation_bytes_with_recomputation == 400 * (10 * 100 + 1000)
    assert made.backward_bytes == 400 * 300
    assert made.loss_bytes == 2 * 1000 + 1000 // 2, "the float32 logits and their gradient, and the product in 16 bits"
    assert made.peak_bytes == made.training_bytes
    parts = made.weights_bytes + made.adapter_bytes + made.optimizer_bytes + made.activation_bytes + made.backward_bytes
    assert made.peak_bytes == parts + made.allocator_bytes + made.process_bytes


def test_a_large_vocabulary_counts_its_working_copies_in_the_peak() -> None:
    chunk = 10**9  # more than a layer's gradients, so the loss decides the peak
    assert plan(loss_chunk_bytes=chunk).loss_bytes == 2.5 * chunk
    assert plan(loss_chunk_bytes=chunk, dtype_bytes=4).loss_bytes == 3 * chunk
    grown = plan(loss_chunk_bytes=chunk).peak_bytes - plan(loss_chunk_bytes=2 * chunk).peak_bytes
    assert grown == -2.5 * chunk


def test_the_bytes_of_a_variant_are_its_formula_and_part_of_the_peak() -> None:
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
        return plan(device="cpu", num_sizes=num_sizes, **changes).allocator_bytes

    assert left(1) < left(10) < left(28) == left(1000) == left(0) + 270 * 2**20
    assert left(1, compiled=True) < left(28, compiled=True)
    assert left(1, dtype_bytes=4) < left(28, dtype_bytes=4) < left(28)
    assert plan(num_sizes=28) == plan()


def test_layers_recompute_if_not_all_activations_fit() -> None:
    roomy = plan()
    tight = plan(free_bytes=int((roomy.peak_bytes - roomy.activation_bytes / 2) / 0.8))
    assert 0 < tight.num_recomputed < 10
    assert tight.activation_bytes < roomy.activation_bytes
    assert tight.token_budget == 400


def test_a_batch_of_answers_takes_no_more_than_training() -> None:
    sizes = {"held_out": 100, "prompt": 90, "num_prompts": 1000, "max_new_tokens": 60}
    made = plan(**sizes)
    per_token = generation_bytes(MODEL, TokenSizes(longest=100, largest_step=800, **sizes))
    assert 150 < made.generation_tokens < 16_384
    assert made.generation_tokens * per_token <= made.activation_bytes + made.working_bytes
    assert made.peak_bytes == made.training_bytes


def test_one_answer_that_takes_more_than_training_is_in_the_peak() -> None:
    made = plan(prompt=60_000, num_prompts=1, max_new_tokens=60)
    assert made.evaluation_bytes > made.activation_bytes
    assert made.peak_bytes > made.training_bytes


def test_weights_that_are_converted_are_in_memory_twice_while_they_load() -> None:
    made = plan(device="cpu", stored_bytes=10**9, resident_bytes=5_000_000)
    assert made.peak_bytes == made.weights_bytes + made.process_bytes + 10**9


def test_a_process_on_a_cpu_counts_what_it_holds_and_one_on_a_gpu_its_context() -> None:
    def process(device: str, **changes: Any) -> int:
        return plan(device=device, resident_bytes=10**9, **changes).process_bytes

    on_cpu = process("cpu")
    assert 10**9 + RUNNING_BYTES <= on_cpu <= 10**9 + RUNNING_BYTES + TRAINER_BYTES
    assert process("cpu", compiled=True) == on_cpu + COMPILER_BYTES
    assert process("cuda") == process("cuda", compiled=True) == CONTEXT_BYTES["cuda"]
