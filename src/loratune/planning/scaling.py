"""The same run on more devices: step time, efficiency and memory, by arithmetic on published figures.

    ddp     every rank holds everything; the adapter's gradients are added up once a step
    fsdp    the frozen base is sharded; every layer is gathered for each micro-batch, once forward and once backward

A step takes as long as its slowest rank. Which examples a rank gets is counted on the run's own steps (`rank_loads`);
what the links add is arithmetic (`hardware.communication`):

    ddp step     slowest rank's tokens × seconds of a token + all-reduce
    fsdp step    Σ over micro-batches (heaviest rank's tokens × seconds of a token + gathers that no computation hides)
                 + all-reduce

The seconds of a token are those that `estimate` plans for one device, so a cluster of one device is that plan. **No
cluster has been measured**; `docs/scaling.md` lists what the formulas do not see. Called by `prepare`: `strategy_for`
for every run, `scale` for `plan --devices`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from loratune.model.device import Choice, torch_dtype
from loratune.planning.cost import run_memory, sharded_parameters
from loratune.planning.hardware.communication import Rank, all_reduce_seconds, hiding_tokens, unhidden_gather_seconds
from loratune.planning.hardware.interconnect import LINK_EFFICIENCY, Fabric, Link
from loratune.planning.rank_loads import RankLoads, SimulatedSteps, simulate_loads
from loratune.planning.speed import EAGER_EFFICIENCY
from loratune.run.errors import MachineError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loratune.data.prepared import PreparedData
    from loratune.planning.estimate import Estimate
    from loratune.planning.hardware.cluster import Cluster
    from loratune.planning.memory.inputs import ExecutionSetup
    from loratune.planning.memory.memory import MemoryPlan
    from loratune.planning.parameters import ParameterCount
    from loratune.recipe.recipe import Recipe

Strategy = Literal["ddp", "fsdp"]

GRADIENT_BYTES = 4
"""Bytes of the gradient of one parameter of an adapter: float32."""


class EstimateAt(Protocol):
    """A function that estimates memory and time at a place, and raises `MachineError` if the run does not fit there."""

    def __call__(self, *, place: ExecutionSetup) -> Estimate: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingRow:
    """A run on a number of devices.

    Attributes:
        devices: How many devices.
        nodes: How many nodes they are on.
        strategy: ddp if each device holds everything, else fsdp.
        peak_bytes: Peak memory of each device.
        token_budget: Tokens of a micro-batch.
        rank_tokens: Mean tokens of a rank in a step.
        balance: Mean tokens of a rank over those of the slowest: the efficiency if all links were infinitely fast.
        idle: Fraction of devices without an example in a step.
        communication_seconds: Seconds of a step that no computation hides.
        step_seconds: Seconds of a step, without compilation.
        tokens_per_second: Tokens per second over all steps, compilation included, as `TimePlan` counts them.
        efficiency: Seconds of all steps on one device over devices × seconds here.
        train_seconds: Seconds of all steps, as in `TimePlan`.
        total_seconds: Seconds of the run, as in `TimePlan`; evaluation and loading take as long as on one device.
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
    """Predict a run on a number of devices.

    Args:
        steps: The steps of the run.
        loads: What the ranks have to do in them.
        rank: What a rank computes and sends.
        estimated: The run on one of these devices.
        memory: Memory of a rank.
        fabric: The devices and their links.
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
        cluster: The largest cluster: the one that was asked for.
        rows: From the fewest devices that hold the run to all of them.
        too_few: Numbers of devices that do not hold it.
        hiding_tokens: Tokens of a micro-batch above which the gathers of fsdp are hidden on the whole cluster.
        batch_size: The recipe's batch size: the most devices that a step can feed.
        simulated_steps: Steps that were simulated.
        is_epoch: Whether these are all steps of an epoch.
    """

    cluster: Cluster
    rows: tuple[ScalingRow, ...]
    too_few: tuple[int, ...]
    hiding_tokens: float
    batch_size: int
    simulated_steps: int
    is_epoch: bool

    def as_record(self) -> dict[str, Any]:
        """Return what `plan --json` prints under `scaling`."""
        fabric = self.cluster.fabric
        return {
            "device": self.cluster.device.name,
            "devices": fabric.size,
            "nodes": fabric.nodes,
            "interconnect": [asdict(link) for link in _used_links(fabric)],
            "rows": [asdict(row) for row in self.rows],
            "too_few": list(self.too_few),
            "hiding_tokens": self.hiding_tokens,
            "batch_size": self.batch_size,
            "simulated_steps": self.simulated_steps,
            "is_epoch": self.is_epoch,
            "assumptions": list(self._assumptions()),
            "is_estimate": True,
        }

    def _assumptions(self) -> Iterator[str]:
        steps = f"{self.simulated_steps:,} steps"
        yield "the formulas hold (nothing here has been measured on such machines)"
        yield "a token takes as long as on one device, whatever the size of a micro-batch"
        yield f"a device hides gathers while it computes at {EAGER_EFFICIENCY:.0%} of its published peak"
        yield f"a link reaches {LINK_EFFICIENCY:.0%} of its published peak"
        yield f"the slowest device's tokens are counted on {f'all {steps} of an epoch' if self.is_epoch else steps}"
        yield "gradients are sent only after the backward pass of the step is complete"
        yield "loading, compilation and evaluation take as long as on one device"


def _used_links(fabric: Fabric) -> list[Link]:
    """Return the links that carry anything."""
    links = [fabric.within] if fabric.devices_per_node > 1 else []
    return links + ([fabric.between] if fabric.nodes > 1 else [])


def strategy_for(
    wanted: Strategy | Literal["auto"], shards: int, place: ExecutionSetup, estimate_at: EstimateAt
) -> tuple[Strategy, Estimate]:
    """Choose what every rank holds: everything if it fits (ddp), which sends fewer bytes; else a shard (fsdp).

    Args:
        wanted: The recipe's `train.strategy`.
        shards: The number of ranks.
        place: A device that holds everything.
        estimate_at: Memory and time at a place.

    Raises:
        MachineError: The run fits neither way; or it does not fit one device, and the base cannot be sharded: a
            quantized base has no formula for its shards, and a CPU loads all of it.
    """
    if wanted != "fsdp" or shards == 1:
        try:
            return "ddp", estimate_at(place=place)
        except MachineError:
            if wanted == "ddp" or shards == 1 or place.weights_bytes is not None or place.device == "cpu":
                raise
    return "fsdp", estimate_at(place=replace(place, shards=shards))


def strategy_choice(wanted: Strategy | Literal["auto"], found: Strategy, shards: int) -> Choice:
    """Return what `train.strategy` becomes, with a reason if that needs one."""
    if wanted == "auto":
        return Choice(found, "the base does not fit one device" if found == "fsdp" else "")
    return Choice(wanted, "with one process the base is not shared" if wanted == "fsdp" and shards == 1 else "")


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
    """Predict a run on 1, 2, 4, … devices of a cluster.

    Args:
        cluster: The largest cluster.
        recipe: Its token budget and recomputed layers may be auto.
        config: The model's text configuration.
        parameters: What is trained.
        data: Training examples.
        place: One of the devices, holding everything.
        estimate_at: Memory and time of the run at a place.

    Raises:
        MachineError: Not even the whole cluster holds the run.
    """
    steps = SimulatedSteps(
        lengths=[len(example.input_ids) for example in data.train],
        num_examples=data.num_examples,
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        epochs=recipe.train.epochs,
    )
    bytes_per_weight = torch_dtype(place.dtype).itemsize
    rows, too_few = [], []
    for part in cluster.doublings():
        try:
            strategy, estimated = strategy_for(recipe.train.strategy, part.size, place, estimate_at)
        except MachineError:
            if part.size == cluster.size:
                raise
            too_few.append(part.size)
            continue
        loads = simulate_loads(steps, token_budget=estimated.memory.token_budget, world_size=part.size)
        rank = _rank(config, parameters, estimated, steps, bytes_per_weight)
        memory = _rank_memory(recipe, config, parameters, estimated, loads)
        rows.append(predict(steps, loads, rank, estimated, memory, part.fabric, strategy))
    return Scaling(
        cluster=cluster,
        rows=tuple(rows),
        too_few=tuple(too_few),
        hiding_tokens=hiding_tokens(
            cluster.fabric,
            flops_per_second=cluster.device.bf16_flops_per_second * EAGER_EFFICIENCY,
            bytes_per_weight=bytes_per_weight,
        ),
        batch_size=steps.batch_size,
        simulated_steps=loads.num_steps,
        is_epoch=loads.is_epoch,
    )


def _rank(
    config: Any, parameters: ParameterCount, estimated: Estimate, steps: SimulatedSteps, bytes_per_weight: int
) -> Rank:
    """Return what a rank computes and sends, at the speed of one device."""
    layer, _ = sharded_parameters(config, parameters)
    return Rank(
        token_seconds=(estimated.time.train_seconds - estimated.time.compile_seconds) / steps.tokens,
        num_layers=config.num_hidden_layers,
        num_recomputed=estimated.memory.num_recomputed,
        layer_bytes=bytes_per_weight * layer,
        gradient_bytes=GRADIENT_BYTES * parameters.trainable,
    )


def _rank_memory(
    recipe: Recipe, config: Any, parameters: ParameterCount, estimated: Estimate, loads: RankLoads
) -> MemoryPlan:
    """Return the memory of a rank: that of one device, but for micro-batches that hold a rank's part of a step only."""
    work = estimated.work
    if loads.is_epoch:
        work = replace(work, largest_step=int(loads.slowest.max()))
    found = {"token_budget": estimated.memory.token_budget, "recompute": estimated.memory.num_recomputed}
    train = recipe.train.model_copy(update=found)
    return run_memory(recipe.model_copy(update={"train": train}), config, parameters, work, estimated.place)
