"""Predictions for several devices, against limits and numbers computed by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig

from loratune.data.examples import Example
from loratune.data.prepared import PreparedData
from loratune.data.rows.row import Origin
from loratune.data.steps import assign_to_ranks, epoch_order
from loratune.model.adapter.targets import resolve_targets
from loratune.planning import rank_loads
from loratune.planning.cost import resident_parameters, sharded_parameters
from loratune.planning.estimate import Estimate, estimate
from loratune.planning.hardware import interconnect
from loratune.planning.hardware.cluster import Cluster, find_cluster
from loratune.planning.hardware.communication import Rank, hiding_tokens, unhidden_gather_seconds
from loratune.planning.hardware.interconnect import LINK_EFFICIENCY, LINKS, Fabric
from loratune.planning.memory.inputs import ExecutionSetup
from loratune.planning.parameters import count_parameters, skeleton
from loratune.planning.parts import RunParts
from loratune.planning.rank_loads import SimulatedSteps, simulate_loads
from loratune.planning.scaling import Scaling, ScalingRow, predict, scale, strategy_for
from loratune.recipe.recipe import LoraSection, Recipe
from loratune.run.errors import MachineError

CONFIG = LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=16,
    num_key_value_heads=4,
    tie_word_embeddings=False,
    pad_token_id=0,
)
LENGTHS = np.random.default_rng(0).integers(20, 600, 203).tolist()
EVERYTHING_FITS = 80 * 10**9
TOO_SMALL = 42 * 10**8
"""Bytes of a device that cannot hold both the base and the rest of a run."""


def run(
    cluster: Cluster, *, batch_size: int = 16, free_bytes: int = EVERYTHING_FITS, lengths: Sequence[int] = LENGTHS
) -> tuple[Scaling, Any]:
    """What is predicted, and the estimate at a place."""
    model = skeleton(CONFIG)
    targets = resolve_targets(model, "balanced")
    parameters = count_parameters(model, targets, LoraSection(r=16))
    recipe = Recipe.parse(
        {
            "model": {"dtype": "bfloat16"},
            "data": {"train": "none.jsonl", "eval": "none"},
            "train": {"batch_size": batch_size, "epochs": 2, "compile": False},
            "evaluate": {"metric": "none"},
        }
    )
    train = [
        Example(input_ids=np.zeros(n, np.int32), supervised=np.ones(n, bool), origin=Origin(file="x", line=1))
        for n in lengths
    ]
    data = PreparedData(train=train, eval=[], eval_conversations=[], report={})
    place = ExecutionSetup(device="cuda", dtype="bfloat16", compiled=False, free_bytes=free_bytes)
    device = cluster.device
    estimate_at = partial(estimate, recipe, RunParts.of_configuration(model, targets, parameters, data), device=device)
    made = scale(cluster, recipe, CONFIG, parameters, data=data, place=place, estimate_at=estimate_at)
    return made, partial(estimate_at, place=place)


def rows(spec: str, *links: str, **changes: Any) -> tuple[ScalingRow, ...]:
    return run(find_cluster(spec, links), **changes)[0].rows


def infinitely_fast(cluster: Cluster) -> Cluster:
    fabric = cluster.fabric
    within = replace(fabric.within, bytes_per_second=float("inf"), hop_seconds=0.0)
    between = replace(fabric.between, bytes_per_second=float("inf"), hop_seconds=0.0)
    return replace(cluster, fabric=replace(fabric, within=within, between=between))


def test_one_device_is_the_plan_to_the_bit() -> None:
    made, estimate_one = run(find_cluster("4xh100-80gb"))
    one, alone = made.rows[0], estimate_one()
    assert one.devices == 1
    assert (one.train_seconds, one.total_seconds) == (alone.time.train_seconds, alone.time.total_seconds)
    assert (one.peak_bytes, one.token_budget) == (alone.memory.peak_bytes, alone.memory.token_budget)
    assert (one.efficiency, one.balance, one.communication_seconds, one.idle) == (1.0, 1.0, 0.0, 0.0)


@pytest.mark.parametrize("free_bytes", [EVERYTHING_FITS, TOO_SMALL])
def test_between_infinitely_fast_links_only_the_imbalance_is_left(
    free_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interconnect, "CALL_SECONDS", 0.0)
    made, _ = run(infinitely_fast(find_cluster("2x4xh100-80gb")), free_bytes=free_bytes)
    last = made.rows[-1]
    assert last.strategy == ("ddp" if free_bytes == EVERYTHING_FITS else "fsdp")
    assert last.communication_seconds == 0.0
    assert last.efficiency == pytest.approx(last.balance, rel=1e-12)
    assert 0.5 < last.balance < 1


def test_slower_links_and_more_devices_never_help_efficiency() -> None:
    for free_bytes in (EVERYTHING_FITS, TOO_SMALL):
        times = [
            rows("2x8xh100-80gb", link, free_bytes=free_bytes)[-1].train_seconds
            for link in ("infiniband-ndr", "infiniband-hdr", "ethernet-100g", "ethernet-10g")
        ]
        assert times == sorted(times)
    made = rows("8xl4", batch_size=64, lengths=[100] * 256)
    assert [row.efficiency for row in made] == sorted((row.efficiency for row in made), reverse=True)
    assert [row.communication_seconds for row in made] == sorted(row.communication_seconds for row in made)
    assert all(later.tokens_per_second > earlier.tokens_per_second for earlier, later in itertools.pairwise(made))


def test_a_base_that_no_device_holds_is_sharded() -> None:
    made, _ = run(find_cluster("8xh100-80gb"), free_bytes=TOO_SMALL)
    assert 1 in made.too_few
    assert {row.strategy for row in made.rows} == {"fsdp"}
    peaks = [row.peak_bytes for row in made.rows]
    assert max(peaks) < TOO_SMALL
    with pytest.raises(MachineError, match="tokens needs"):
        run(find_cluster("2xh100-80gb"), free_bytes=25 * 10**8)


def test_what_a_rank_holds_of_a_sharded_base() -> None:
    parameters = count_parameters(skeleton(CONFIG), (), LoraSection(r=1))
    layer, outside = sharded_parameters(CONFIG, parameters)
    assert outside == 2 * 32000 * 2048
    assert layer == pytest.approx(2048 * (2 * 2048 + 2 * 512) + 3 * 2048 * 8192, rel=1e-3)
    assert resident_parameters(CONFIG, parameters, 1) == parameters.total
    assert resident_parameters(CONFIG, parameters, 8) == -(-(parameters.total - outside) // 8) + outside + 2 * layer


def test_the_slowest_rank_is_found_by_assigning_the_steps_as_training_does() -> None:
    steps = SimulatedSteps(lengths=LENGTHS, num_examples=len(LENGTHS), batch_size=16, seed=3, epochs=1)
    loads = simulate_loads(steps, token_budget=1000, world_size=4)
    order = epoch_order(len(LENGTHS), seed=3, epoch=0)
    first = assign_to_ranks({int(i): LENGTHS[i] for i in order[:16]}, 1000, 4)
    tokens = [[sum(LENGTHS[i] for i in batch) for batch in rank] for rank in first]
    assert loads.is_epoch
    assert loads.num_steps == len(loads.slowest) == 13
    assert loads.tokens == sum(LENGTHS)
    assert loads.slowest[0] == max(map(sum, tokens))
    assert loads.heaviest[: len(tokens[0])].tolist() == [max(column) for column in zip(*tokens, strict=True)]


def test_a_long_epoch_is_simulated_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_loads, "MAX_SIMULATED_STEPS", 5)
    made, _ = run(find_cluster("2xl4"))
    assert (made.simulated_steps, made.is_epoch) == (5, False)
    assert made.rows[0].efficiency == 1.0
    assumptions = made.as_record()["assumptions"]
    assert any("5 steps" in line for line in assumptions)
    assert any("nothing here has been measured" in line for line in assumptions)


def test_fewer_examples_than_devices_leave_devices_idle() -> None:
    made = rows("16xl4", batch_size=8, lengths=[100] * 64)
    assert [row.idle for row in made] == [0, 0, 0, 0, 0.5]
    assert made[-1].balance == pytest.approx(0.5)
    assert made[-1].tokens_per_second < made[-2].tokens_per_second, "more to wait for, with no more work to share"


def by_hand(strategy: str, fabric: Fabric) -> tuple[ScalingRow, Estimate]:
    """Eight examples of 100 tokens in two steps of four, 10 ms a token, on two devices: a micro-batch of 200 each."""
    _, estimate_one = run(find_cluster("2xh100-80gb"))
    made = estimate_one()
    made = replace(made, time=replace(made.time, train_seconds=8.0, compile_seconds=0.0, total_seconds=20.0))
    steps = SimulatedSteps(lengths=[100] * 8, num_examples=8, batch_size=4, seed=0, epochs=1)
    loads = simulate_loads(steps, token_budget=1000, world_size=2)
    rank = Rank(
        token_seconds=0.01,
        num_layers=10,
        num_recomputed=0,
        layer_bytes=10**9,
        gradient_bytes=10**8,
    )
    return predict(steps, loads, rank, made, made.memory, fabric, strategy), made  # type: ignore[arg-type]


def slow_link(bytes_per_second: float) -> Fabric:
    """Two devices over a link that reaches so many bytes a second, without latency."""
    link = replace(LINKS["pcie4"], bytes_per_second=bytes_per_second / LINK_EFFICIENCY, hop_seconds=0.0)
    return Fabric(nodes=1, devices_per_node=2, within=link, between=LINKS["ethernet-100g"])


def test_two_devices_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interconnect, "CALL_SECONDS", 0.0)
    # 10^8 bytes, of which each rank sends 2·1/2, at 10^9 a second: 0.1 s a step, besides 200 tokens of 10 ms.
    row, _ = by_hand("ddp", slow_link(1e9))
    assert row.communication_seconds == pytest.approx(0.1)
    assert row.step_seconds == pytest.approx(2.1)
    assert row.train_seconds == pytest.approx(4.2)
    assert row.total_seconds == pytest.approx(20 - 8 + 4.2)
    assert row.tokens_per_second == pytest.approx(800 / 4.2)
    assert row.efficiency == pytest.approx(8 / (2 * 4.2))
    # A layer gathers 1/2·10^9 bytes in 0.5 s and computes 0.1 s forward and 0.1 s backward. Nine layers of each pass
    # wait 0.4 s, the first of each pass 0.5 s.
    row, _ = by_hand("fsdp", slow_link(1e9))
    assert row.communication_seconds == pytest.approx(0.1 + 2 * 0.5 + 9 * (0.4 + 0.4))
    # At 10^10 bytes a second a layer's 0.05 s hide behind 0.1 s.
    row, _ = by_hand("fsdp", slow_link(1e10))
    assert row.communication_seconds == pytest.approx(0.01 + 2 * 0.05)


def test_recomputation_hides_more_of_the_backward_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interconnect, "CALL_SECONDS", 0.0)
    rank = Rank(token_seconds=0.012, num_layers=10, num_recomputed=10, layer_bytes=10**9, gradient_bytes=0)
    assert rank.forward_fraction == pytest.approx(1 / 3)
    # 100 tokens: a layer computes 0.04 s forward and 0.08 s backward, and is gathered in 0.1 s.
    waits = unhidden_gather_seconds(np.array([100]), rank, slow_link(5e9))
    assert waits == pytest.approx([2 * 0.1 + 9 * (0.06 + 0.02)])


def test_gathers_hide_from_the_crossing_on_whatever_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interconnect, "CALL_SECONDS", 0.0)
    fabric, rate = slow_link(1e10), 1e14
    tokens = hiding_tokens(fabric, flops_per_second=rate, bytes_per_weight=2)
    assert tokens == pytest.approx(0.5 * 1e14 / 1e10)
    for parameters in (10**6, 10**9):
        rank = Rank(
            token_seconds=4 * parameters * 10 / rate,
            num_layers=10,
            num_recomputed=0,
            layer_bytes=2 * parameters,
            gradient_bytes=0,
        )
        first_layers = 2 * fabric.all_gather_seconds(rank.layer_bytes)
        waits = unhidden_gather_seconds(np.array([0.99 * tokens, 1.01 * tokens]), rank, fabric)
        assert waits[0] > first_layers * 1.01
        assert waits[1] == pytest.approx(first_layers, rel=1e-9)


def test_ddp_is_taken_where_a_device_holds_everything() -> None:
    calls = []

    def estimate_at(*, place: ExecutionSetup) -> Estimate:
        calls.append(place.shards)
        if place.shards < 4:
            raise MachineError("too large")
        return "fits"  # type: ignore[return-value]

    place = ExecutionSetup(device="cuda", dtype="bfloat16", compiled=False)
    assert strategy_for("auto", 4, place, estimate_at) == ("fsdp", "fits")
    assert calls == [1, 4]
    calls.clear()
    assert strategy_for("fsdp", 4, place, estimate_at) == ("fsdp", "fits")
    assert calls == [4]
    for wanted, shards in (("auto", 1), ("fsdp", 1), ("auto", 2), ("ddp", 4)):
        with pytest.raises(MachineError):
            strategy_for(wanted, shards, place, estimate_at)  # type: ignore[arg-type]
    for other in (replace(place, weights_bytes=10), replace(place, device="cpu")):
        calls.clear()
        with pytest.raises(MachineError):
            strategy_for("auto", 4, other, estimate_at)
        assert calls == [1], "a quantized base has no formula for its shards, and a CPU loads all of it"
