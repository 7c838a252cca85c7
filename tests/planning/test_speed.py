from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from loratune.planning.probe import probe
from loratune.planning.speed import (
    COMPILED_TIME_FRACTION,
    EAGER_EFFICIENCY,
    LAUNCHES,
    PASSES,
    GpuRates,
    LayerTimings,
    StepProbe,
    TimePlan,
    WorkAmounts,
    plan_time,
    rates_by_arithmetic,
    with_probe,
)
from loratune.recipe.recipe import LoraSection

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

RATES = LayerTimings(train=1.0, forward=0.25, decode=2.0, head_train=10.0, head_forward=4.0, head_decode=3.0)


def timed(*, compile_seconds: float | None = None, launch: float = 0.0, **changes: int) -> TimePlan:
    amounts = {
        "num_layers": 5,
        "num_recomputed": 0,
        "tokens": 100,
        "supervised": 10,
        "micro_batches": 4,
        "held_out_tokens": 40,
        "held_out_supervised": 4,
        "evaluations": 3,
        "prompt_tokens": 8,
        "decode_steps": 6,
        "load_bytes": 0,
    }
    return plan_time(
        WorkAmounts(**amounts | changes),
        replace(RATES, launch=launch),
        compile_seconds=compile_seconds,
        flops=1.0,
        flops_per_second=1.0,
        source="a test",
    )


def test_seconds_are_those_of_layers_and_head() -> None:
    made = timed()
    assert made.train_seconds == 100 * 5 + 10 * 10
    assert made.evaluate_seconds == 3 * (40 * 5 / 4 + 4 * 4) + 2 * 8 * 5 / 4 + 6 * (5 * 2 + 3)
    assert made.total_seconds > made.train_seconds + made.evaluate_seconds
    assert timed(load_bytes=3 * 10**9).total_seconds == pytest.approx(made.total_seconds + 3)
    assert timed(evaluations=0, prompt_tokens=0, decode_steps=0).evaluate_seconds == 0


def test_recomputed_layers_take_another_forward() -> None:
    assert timed(num_recomputed=2).train_seconds == timed().train_seconds + 100 * 2 * 0.25


GPU = GpuRates(products=8e14, copies=9e10, launch_seconds=3e-6)


def test_a_gpu_decodes_no_faster_than_it_reads_weights_or_launches() -> None:
    one = {"layer_parameters": 10**8, "head_parameters": 10**8, "flops_per_second": 1e15}
    elsewhere = rates_by_arithmetic(num_answers=1, **one)
    on_gpu = rates_by_arithmetic(num_answers=1, gpu=GPU, **one)
    assert elsewhere.decode == pytest.approx(2e8 / (1e15 * EAGER_EFFICIENCY))
    assert on_gpu.decode == on_gpu.head_decode == pytest.approx(2e8 / 9e10)
    assert on_gpu.train == elsewhere.train
    many = rates_by_arithmetic(num_answers=10_000, gpu=GPU, **one)
    assert many.decode == pytest.approx(10_000 * elsewhere.decode)
    small = rates_by_arithmetic(10**5, 10**5, 1, 1e15, gpu=GPU)
    assert small.decode == LAUNCHES["decode"] * 3e-6
    assert small.launch == LAUNCHES["train"] * 3e-6
    assert elsewhere.launch == 0
    in_float32 = rates_by_arithmetic(num_answers=1, gpu=GPU, weight_bytes=4, **one)
    assert in_float32.decode == 2 * on_gpu.decode


def test_element_wise_work_takes_the_time_of_its_traffic_on_a_gpu() -> None:
    made = rates_by_arithmetic(10**8, 10**8, 1, 1e15, gpu=GPU, layer_outputs=20_000)
    assert made.train == pytest.approx(4e8 / 8e14 + PASSES["train"] * 20_000 * 2 / 9e10)
    assert made.forward == pytest.approx(2e8 / 8e14 + PASSES["forward"] * 20_000 * 2 / 9e10)
    assert rates_by_arithmetic(10**8, 10**8, 1, 1e15, layer_outputs=20_000).train == pytest.approx(
        4e8 / (1e15 * EAGER_EFFICIENCY)
    )


def test_small_micro_batches_take_as_long_as_the_host_needs_to_launch_them() -> None:
    assert timed(launch=20.0).train_seconds == timed().train_seconds == 600
    assert timed(launch=40.0).train_seconds == 4 * 5 * 40
    assert timed(launch=40.0, micro_batches=1).train_seconds == 600


def test_compiling_costs_its_seconds_and_saves_its_share() -> None:
    made = timed(compile_seconds=15)
    assert made.compile_seconds == 15
    assert made.train_seconds == COMPILED_TIME_FRACTION * 600 + 15


def test_real_steps_replace_the_formula() -> None:
    steps = StepProbe(num_tokens=50, first_step_seconds=9.0, step_seconds=2.0, peak_bytes=1)
    made = with_probe(timed(compile_seconds=15), steps, 100)
    assert made.train_seconds == 100 / 25 + 7
    assert made.compile_seconds == 7
    assert made.evaluate_seconds == timed().evaluate_seconds
    assert made.total_seconds == pytest.approx(timed(compile_seconds=15).total_seconds - 465 + 11)


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=63,
    )


def test_two_layers_stand_for_the_model_and_draw_no_random_number_of_the_run() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    rates = probe(
        config(),
        LoraSection(r=2, dropout=0.1),
        ("model.layers.3.self_attn.q_proj", "model.layers.0.mlp.down_proj"),
        layer_parameters=10_000,
        dtype=torch.float32,
        device="cpu",
        length=20,
        num_answers=4,
    )
    assert rates is not None
    assert 0 < rates.forward < rates.train
    assert min(rates.decode, rates.head_train, rates.head_forward, rates.head_decode) > 0
    assert torch.equal(torch.rand(3), expected)


def test_layers_that_are_too_large_to_try_are_not_tried() -> None:
    assert (
        probe(
            config(),
            LoraSection(),
            ("model.layers.0.self_attn.q_proj",),
            layer_parameters=10**10,
            dtype=torch.bfloat16,
            device="cpu",
            length=20,
            num_answers=1,
        )
        is None
    )
