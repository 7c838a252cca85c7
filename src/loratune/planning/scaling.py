"""What more devices make of a run: step time, efficiency and memory, by arithmetic and by dealing out the run's own steps.

    ddp     every rank holds everything; the adapter's gradients are added up once a step
    fsdp    the frozen base is sharded; every layer is gathered for each micro-batch, once forward and once backward

A step takes as long as its slowest rank. Which examples a rank gets is no guess: the steps of an epoch are dealt out as
training deals them (`loratune.data.steps.deal`), and the slowest rank's tokens are counted.

    ddp step     slowest rank's tokens × seconds of a token + all-reduce
    fsdp step    Σ over micro-batches (heaviest rank's tokens × seconds of a token + what of the gathers no computing hides)
                 + all-reduce

The seconds of a token are those of the plan for one device, so a cluster of one is that plan. LoRA has no gradients of the
base, so nothing of its size is ever reduced, which is what limits full training (`docs/scaling.md`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from loratune.data.prepare import PreparedData
from loratune.data.steps import EpochPlan, num_steps
from loratune.model.device import Choice, torch_dtype
from loratune.planning.cost import ExecutionSetup, run_memory, sharded_parameters
from loratune.planning.estimate import Estimate
from loratune.planning.hardware.cluster import Cluster
from loratune.planning.hardware.interconnect import SHARE, Fabric, Link
from loratune.planning.memory.memory import MemoryPlan
from loratune.planning.parameters import ParameterCount
from loratune.planning.speed import EFFICIENCY
from loratune.recipe.recipe import Recipe
from loratune.run.errors import MachineError

Strategy = Literal["ddp", "fsdp"]


class EstimateAt(Protocol):
    """Memory and time of a run at a place; raises `MachineError` where it does not fit."""

    def __call__(self, *, place: ExecutionSetup) -> Estimate: ...


SIMULATED_STEPS = 2000
"""The most steps of the first epoch that are dealt out; an epoch is shuffled, so these stand for the others."""

GRADIENT_BYTES = 4
"""Of an adapter's parameter: float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedSteps:
    """The steps of a run, as far as their lengths are known.

    Attributes:
        lengths: Tokens of each training example; of streamed data, of a sample.
        num_examples: Of the training data.
        batch_size, seed, epochs: Of the recipe.
    """

    lengths: Sequence[int]
    num_examples: int
    batch_size: int
    seed: int
    epochs: float

    @property
    def count(self) -> int:
        """Optimizer steps of the run."""
        return num_steps(self.num_examples, self.batch_size, self.epochs)

    @property
    def tokens(self) -> float:
        """Of the run."""
        return self.epochs * self.num_examples / len(self.lengths) * sum(self.lengths)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankLoads:
    """What the ranks of a cluster have to do in the steps of an epoch, in tokens.

    Attributes:
        num_steps: That were dealt out.
        is_epoch: Whether these are all of an epoch.
        tokens: Of these steps.
        slowest: Of each step, the tokens of the rank that has the most.
        heaviest: Of each micro-batch, the tokens of the rank that has the most in it.
        idle: The share of ranks that have nothing to do in a step.
    """

    num_steps: int
    is_epoch: bool
    tokens: int
    slowest: np.ndarray
    heaviest: np.ndarray
    idle: float


def deal_out(steps: SimulatedSteps, *, token_budget: int, world_size: int) -> RankLoads:
    """Deal out the steps of the first epoch, `SIMULATED_STEPS` at most."""
    plan = EpochPlan(
        lengths=steps.lengths,
        batch_size=steps.batch_size,
        seed=steps.seed,
        epoch=0,
        token_budget=token_budget,
        world_size=world_size,
    )
    count = min(len(plan), SIMULATED_STEPS)
    slowest, heaviest, tokens, idle = [], [], 0, 0
    for number in range(count):
        ranks = np.array(
            [[sum(steps.lengths[i] for i in batch) for batch in rank] for rank in plan[number].ranks], dtype=np.int64
        )
        slowest.append(int(ranks.sum(axis=1).max()))
        heaviest += ranks.max(axis=0).tolist()
        idle += int((ranks.sum(axis=1) == 0).sum())
        tokens += int(ranks.sum())
    return RankLoads(
        num_steps=count,
        is_epoch=count == len(plan),
        tokens=tokens,
        slowest=np.array(slowest),
        heaviest=np.array(heaviest),
        idle=idle / (count * world_size),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """What one rank computes and moves.

    Attributes:
        token_seconds: Of a token forward and backward, recomputing included.
        num_layers: Of the model.
        num_recomputed: Of them, whose forward runs once more on the way back.
        layer_bytes: Of the frozen weights of a layer.
        gradient_bytes: Of the adapter's gradients.
    """

    token_seconds: float
    num_layers: int
    num_recomputed: int
    layer_bytes: int
    gradient_bytes: int

    @property
    def forward_share(self) -> float:
        """Of a token's seconds, before the way back: 2 of 4 operations a weight, and 2 more where it is recomputed."""
        return 2 / (4 + 2 * self.num_recomputed / self.num_layers)


def all_reduce_seconds(rank: Rank, fabric: Fabric) -> float:
    """Of adding up the adapter's gradients, once a step. Nothing hides it: the last gradient is there when the step is done."""
    return fabric.all_reduce_seconds(rank.gradient_bytes)


def unhidden_gather_seconds(tokens: np.ndarray, rank: Rank, fabric: Fabric) -> np.ndarray:
    """Seconds that micro-batches of so many tokens wait for the frozen base.

    While a layer computes, the next is gathered (PyTorch's notes on FSDP; Zhao et al. 2023, arXiv 2304.11277, section 3.3), so
    a layer waits for what its gather takes longer. The first layer of each way is waited for in full. The output head's computing is counted as if spread over the layers.

    Args:
        tokens: [M], of the heaviest rank in each micro-batch.
        rank: What a rank computes and moves.
        fabric: The links.

    Returns:
        Seconds, [M].
    """
    if fabric.size == 1:
        return np.zeros(len(tokens))
    gather = fabric.all_gather_seconds(rank.layer_bytes)
    compute = tokens * rank.token_seconds / rank.num_layers
    forward = compute * rank.forward_share
    waits = np.maximum(0, gather - forward) + np.maximum(0, gather - (compute - forward))
    return 2 * gather + (rank.num_layers - 1) * waits


def hiding_tokens(fabric: Fabric, *, flops_per_second: float, bytes_per_weight: float) -> float:
    """Tokens of a micro-batch from which on computing a layer forward takes longer than gathering the next.

    2·P operations a token at R a second, against (n−1)/n · b·P bytes at B a second: P, the layer's parameters, cancels.

        tokens = (n−1)/n · b/2 · R/B

    Latency is left out, and backward takes as long as forward (or longer, where layers are recomputed).

    Args:
        fabric: n ranks and B.
        flops_per_second: R, what a device reaches.
        bytes_per_weight: b, of the frozen base.
    """
    n = fabric.size
    return (n - 1) / n * bytes_per_weight / 2 * flops_per_second / fabric.bytes_per_second


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingRow:
    """A run on a number of devices.

    Attributes:
        devices, nodes: How many.
        strategy: ddp where a device holds everything, else fsdp.
        peak_bytes: Of memory on each device.
        token_budget: Tokens of a micro-batch.
        rank_tokens: Tokens of a rank in a step, on average.
        balance: Mean tokens of a rank over those of the slowest: the efficiency if all links were infinitely fast.
        idle: The share of devices that have nothing to do in a step.
        communication_seconds: Of a step that no computing hides.
        step_seconds: Of a step, without compiling.
        tokens_per_second: Of all steps, compiling included, as the plan counts them.
        efficiency: Seconds of steps on one device over devices × seconds here.
        train_seconds, total_seconds: As in `TimePlan`; evaluation and loading as on one device.
    """

    devices: int
    nodes: int
    strategy: Strategy
    peak_bytes: int
    token_budget: int
    rank_tokens: float
    balance: float
    idle: float
    communication_seconds: float
    step_seconds: float
    tokens_per_second: float
    efficiency: float
    train_seconds: float
    total_seconds: float


def predict(
    steps: SimulatedSteps,
    loads: RankLoads,
    rank: Rank,
    estimated: Estimate,
    memory: MemoryPlan,
    fabric: Fabric,
    strategy: Strategy,
) -> ScalingRow:
    """A run on a number of devices.

    Args:
        steps: Of the run.
        loads: What the ranks have to do in them.
        rank: What a rank computes and moves.
        estimated: On one of these devices.
        memory: Of a rank.
        fabric: The devices and links.
        strategy: What every rank holds.
    """
    clock = estimated.time
    alone = clock.train_seconds - clock.compile_seconds
    waits = all_reduce_seconds(rank, fabric) * loads.num_steps
    if strategy == "ddp":
        busiest = int(loads.slowest.sum())
    else:
        busiest = int(loads.heaviest.sum())
        waits += float(unhidden_gather_seconds(loads.heaviest, rank, fabric).sum())
    communication = waits / loads.num_steps
    more = alone * (busiest / loads.tokens - 1) + communication * steps.count
    together = alone + more
    return ScalingRow(
        devices=fabric.size,
        nodes=fabric.nodes,
        strategy=strategy,
        peak_bytes=memory.peak_bytes,
        token_budget=memory.token_budget,
        rank_tokens=loads.tokens / loads.num_steps / fabric.size,
        balance=loads.tokens / fabric.size / busiest,
        idle=loads.idle,
        communication_seconds=communication,
        step_seconds=together / steps.count,
        tokens_per_second=steps.tokens / (clock.train_seconds + more),
        efficiency=alone / (fabric.size * together),
        train_seconds=clock.train_seconds + more,
        total_seconds=clock.total_seconds + more,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """A run on more and more devices.

    Attributes:
        cluster: The one that was asked for.
        rows: From the fewest devices that hold the run to all of them.
        too_few: Numbers of devices that do not hold it.
        hiding_tokens: Of a micro-batch, from which on the gathers of fsdp hide on the whole cluster.
        batch_size: Of the recipe: the most devices that a step can feed.
        simulated_steps: That were dealt out.
        is_epoch: Whether these are all of an epoch.
    """

    cluster: Cluster
    rows: tuple[ScalingRow, ...]
    too_few: tuple[int, ...]
    hiding_tokens: float
    batch_size: int
    simulated_steps: int
    is_epoch: bool

    def as_record(self) -> dict[str, Any]:
        """For `plan --json`."""
        fabric = self.cluster.fabric
        return {
            "device": self.cluster.device.name,
            "devices": fabric.size,
            "nodes": fabric.nodes,
            "interconnect": [asdict(link) for link in _links(fabric)],
            "rows": [asdict(row) for row in self.rows],
            "too_few": list(self.too_few),
            "hiding_tokens": self.hiding_tokens,
            "batch_size": self.batch_size,
            "simulated_steps": self.simulated_steps,
            "is_epoch": self.is_epoch,
            "assumptions": list(self._assumptions()),
            "is_estimate": True,
        }

    def _assumptions(self) -> tuple[str, ...]:
        steps = (
            f"all {self.simulated_steps:,} steps of an epoch" if self.is_epoch else f"{self.simulated_steps:,} steps"
        )
        return (
            f"a device computes at {EFFICIENCY[False]:.0%} of its published peak, whatever the size of a micro-batch",
            f"a link carries {SHARE:.0%} of its published peak",
            f"tokens of the slowest device: {steps} dealt out",
            "no gradient is sent before the step's last one is there",
            "loading, compiling and evaluation take as long as on one device",
        )


def _links(fabric: Fabric) -> list[Link]:
    """Those that carry anything."""
    links = [fabric.within] if fabric.devices_per_node > 1 else []
    return links + ([fabric.between] if fabric.nodes > 1 else [])


def strategy_for(
    wanted: Strategy | Literal["auto"], shards: int, place: ExecutionSetup, estimate_at: EstimateAt
) -> tuple[Strategy, Estimate]:
    """What every rank holds: everything where it fits (ddp), for that moves fewer bytes; else a shard of the base (fsdp).

    Args:
        wanted: The recipe's `train.strategy`.
        shards: The ranks.
        place: A device that holds everything.
        estimate_at: Memory and time at a place.

    Raises:
        MachineError: It does not fit either way; or not on one device, and the base is quantised, for whose shards there is no
            formula, or the device is a CPU, which loads all of it.
    """
    if wanted != "fsdp" or shards == 1:
        try:
            return "ddp", estimate_at(place=place)
        except MachineError:
            if wanted == "ddp" or shards == 1 or place.weights_bytes is not None or place.device == "cpu":
                raise
    return "fsdp", estimate_at(place=replace(place, shards=shards))


def strategy_choice(wanted: Strategy | Literal["auto"], found: Strategy, shards: int) -> Choice:
    """What `train.strategy` becomes, and why, where that needs a word."""
    if wanted == "auto":
        return Choice(found, "no device holds the base alone" if found == "fsdp" else "")
    return Choice(wanted, "one process has nobody to share the base with" if wanted == "fsdp" and shards == 1 else "")


def scale(
    cluster: Cluster,
    recipe: Recipe,
    config: Any,
    parameters: ParameterCount,
    *,
    data: PreparedData,
    place: ExecutionSetup,
    estimate_at: EstimateAt,
) -> Scaling:
    """A run on 1, 2, 4, … devices of a cluster.

    Args:
        cluster: The largest.
        recipe: Its token budget and recomputed layers may be auto.
        config: The model's text configuration.
        parameters: What is trained.
        data: Training examples.
        place: One of the devices, holding everything.
        estimate_at: Memory and time of the run at a place.

    Raises:
        MachineError: Not even the whole cluster holds it.
    """
    steps = SimulatedSteps(
        lengths=[len(example.input_ids) for example in data.train],
        num_examples=data.num_examples,
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        epochs=recipe.train.epochs,
    )
    bytes_per_weight = torch_dtype(place.dtype).itemsize
    layer, _ = sharded_parameters(config, parameters)
    rows, too_few = [], []
    for smaller in cluster.smaller():
        try:
            strategy, estimated = strategy_for(recipe.train.strategy, smaller.size, place, estimate_at)
        except MachineError:
            if smaller.size == cluster.size:
                raise
            too_few.append(smaller.size)
            continue
        chosen = estimated.memory
        loads = deal_out(steps, token_budget=chosen.token_budget, world_size=smaller.size)
        work = replace(estimated.work, largest_step=int(loads.slowest.max())) if loads.is_epoch else estimated.work
        settings = {"token_budget": chosen.token_budget, "recompute": chosen.num_recomputed}
        same = recipe.model_copy(update={"train": recipe.train.model_copy(update=settings)})
        rank = Rank(
            token_seconds=(estimated.time.train_seconds - estimated.time.compile_seconds) / steps.tokens,
            num_layers=config.num_hidden_layers,
            num_recomputed=chosen.num_recomputed,
            layer_bytes=bytes_per_weight * layer,
            gradient_bytes=GRADIENT_BYTES * parameters.trainable,
        )
        memory = run_memory(same, config, parameters, work, estimated.place)
        rows.append(predict(steps, loads, rank, estimated, memory, smaller.fabric, strategy))
    return Scaling(
        cluster=cluster,
        rows=tuple(rows),
        too_few=tuple(too_few),
        hiding_tokens=hiding_tokens(
            cluster.fabric,
            flops_per_second=cluster.device.bf16_flops_per_second * EFFICIENCY[False],
            bytes_per_weight=bytes_per_weight,
        ),
        batch_size=steps.batch_size,
        simulated_steps=loads.num_steps,
        is_epoch=loads.is_epoch,
    )
