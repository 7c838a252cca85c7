"""Write docs/scaling.md, computed by the plan's own formulas. `--check` only tests whether it is up to date."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from statistics import NormalDist

import numpy as np
from pages import DEFAULT_MODEL, table, write_or_check
from transformers import LlamaConfig, PreTrainedModel

from loratune.data.examples import Example
from loratune.data.prepare import PreparedData
from loratune.data.rows.conversation import Origin
from loratune.model.adapter.targets import resolve_targets
from loratune.planning.cost import ExecutionSetup, sharded_parameters
from loratune.planning.estimate import estimate
from loratune.planning.hardware.cluster import Cluster, find_cluster
from loratune.planning.hardware.interconnect import CALL_SECONDS, LINKS, SHARE
from loratune.planning.memory.memory import MAX_USEFUL_TOKENS
from loratune.planning.parameters import ParameterCount, count_parameters, skeleton
from loratune.planning.scaling import GRADIENT_BYTES, Scaling, hiding_tokens, scale
from loratune.planning.speed import EFFICIENCY
from loratune.recipe.recipe import Recipe

PAGE = Path(__file__).parent / "scaling.md"
LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "tie_word_embeddings": False}
MODELS = {
    "1.5B": DEFAULT_MODEL,
    "8B": LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=14336, **LLAMA),
    "70B": LlamaConfig(
        hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, intermediate_size=28672, **LLAMA
    ),
}
"""Shapes of the default model, Llama 3.1 8B and Llama 3.1 70B."""

NUM_EXAMPLES, MEDIAN, SIGMA, LONGEST = 4096, 400, 0.8, 4096
ORIGIN = Origin(file="docs/make_scaling.py", line=0)

Row = dict[str, str]

TEXT = """# More GPUs

<!-- Written by docs/make_scaling.py, which computes every number; run `make docs` to update it. -->

What several GPUs do for a run, what limits it, and when to shard the base model. Everything here is **arithmetic on
published figures**: nothing on this page was measured. For your own recipe, data and machines:

    loratune plan my.yaml --devices 8xh100-80gb
    loratune plan my.yaml --devices 2x8xh100-80gb                          # two nodes of eight
    loratune plan my.yaml --devices 8xh100-80gb --interconnect pcie5       # other links than usual
    loratune plan my.yaml --devices 2x8xa100-80gb --interconnect ethernet-100g --price-per-hour 2   # per GPU

`--json` has everything under `scaling`.

## What must be sent

Full fine-tuning adds up a gradient for every weight at every step. LoRA computes no gradients for the frozen base,
so two things remain:

- **the adapter's gradients**, once per step, in float32: {gradient_bytes} bytes per adapter parameter;
- **the frozen base**, only if it is sharded (fsdp): every layer must be gathered before it computes, once in the
  forward and once in the backward pass, for every micro-batch.

{volumes}

*Full fine-tuning* would send 2 bytes per weight and step. Adapters: r 16, `targets: complete`.

## The formulas

For n ranks and B bytes per second on the slowest link, one way:

    all-reduce     2(n−1)/n · bytes / B + latency of 2(n−1) hops
    all-gather      (n−1)/n · bytes / B + latency of n−1 hops

(Patarasuk & Yuan 2009; Thakur et al. 2005; NVIDIA/nccl-tests, doc/PERFORMANCE.md.) A call takes {call:.1f} µs, and
a hop what NCCL's own model of a ring assumes (src/graph/tuning.cc):

{links}

No link reaches its peak: {share:.0%} of it is assumed, the 235 of 300 GB/s to which NCCL limits its model of an
A100. Between nodes, rings use all ports of a node at once, so a node with one port per GPU has their sum.

Computing takes 4 operations per frozen weight and token (2 forward, 2 for the gradient to the input; 2 more in a
layer with gradient checkpointing), at {efficiency:.0%} of the published peak: the share that `plan --device`
assumes. Then

    ddp step  = tokens of the slowest rank · seconds per token + all-reduce(adapter)
    fsdp step = Σ micro-batches (tokens of the largest rank · seconds per token + gathers not hidden by computing)
                + all-reduce(adapter)

Which rank gets which examples is not estimated: the steps of an epoch are assigned as training assigns them, using
the recipe's own example lengths. `batch_size` counts a step's examples over all ranks, so more ranks mean fewer
tokens per rank, never a different run.

## What limits it

**The step.** With {small} examples per step, the 8B model on H100s:

{small_rows}

*Balance* is what is lost because examples are not split: mean tokens per rank over those of the slowest rank. With
{large} examples per step the same lengths balance well:

{large_rows}

With less than one example per rank, ranks are idle: `plan` says so, and names the smallest `batch_size` that keeps
all busy.

**The link** matters little to ddp, whose message is small. The 8B model, {large} examples per step, two nodes of
eight H100s:

{network_rows}

## When ddp beats fsdp

If a device can hold the base, ddp sends less, whatever the link; `auto` chooses it. fsdp is for bases that no
device can hold: a rank keeps 1/n of the layers, all of the embeddings and head, and two complete layers (the one
that computes and the next one). The 70B model, {large} examples per step, on two nodes of eight:

{sharded_rows}

Gathering costs nothing while computing hides it. A layer of P weights with b bytes each is hidden if

    (n−1)/n · b·P / B  ≤  2·P · tokens / R        R: operations per second that a device reaches

P cancels, so the tokens of a micro-batch decide, whatever the model:

    tokens  ≥  (n−1)/n · b/2 · R/B

{crossover}

`token_budget: auto` stops at {cap:,} tokens on a GPU. Full micro-batches therefore hide the gathers over NVLink and
InfiniBand, but not over 100 Gb/s Ethernet. Latency, ignored here, is included in the tables above.

`auto` does not consider one case: if the full base leaves so little memory that gradient checkpointing is needed
(half as many operations again), a sharded base may be faster.

## What the formulas leave out

- A GPU's speed on small micro-batches: every token is assumed to cost the same, so many ranks with few tokens each
  are slower than shown.
- The small messages by which ranks agree on a step (token counts, requests to stop). They are pure latency, and
  matter if a step takes milliseconds.
- PCIe without peer-to-peer, as between many GeForce cards: data goes through host memory, which is slower than
  shown.
- Other traffic on the same network, and slow nodes.
- Evaluation: counted as on one device, although held-out losses during training are divided among the ranks.

Example lengths on this page: {examples:,} examples, log-normal with median {median} and σ {sigma:g}, at most
{longest:,}; one epoch, not compiled.
"""


def page() -> str:
    """Return the page."""
    h100 = find_cluster("2x8xh100-80gb")
    return TEXT.format(
        gradient_bytes=GRADIENT_BYTES,
        volumes=table([_volume(name) for name in MODELS]),
        call=CALL_SECONDS * 1e6,
        links=table([_link(name) for name in LINKS]),
        share=SHARE,
        efficiency=EFFICIENCY[False],
        small=16,
        large=256,
        small_rows=table(_rows(_scaled("8B", h100, batch_size=16))),
        large_rows=table(_rows(_scaled("8B", h100, batch_size=256))),
        network_rows=table(_network_rows()),
        sharded_rows=table(_rows(_scaled("70B", h100, batch_size=256))),
        crossover=table(_crossover_rows()),
        cap=MAX_USEFUL_TOKENS["cuda"],
        examples=NUM_EXAMPLES,
        median=MEDIAN,
        sigma=SIGMA,
        longest=LONGEST,
    )


def _model(name: str) -> tuple[PreTrainedModel, tuple[str, ...], ParameterCount]:
    model = skeleton(MODELS[name])
    targets = resolve_targets(model, "complete")
    return model, targets, count_parameters(model, targets, _recipe(1).lora)


def _recipe(batch_size: int) -> Recipe:
    return Recipe.parse(
        {
            "model": {"dtype": "bfloat16"},
            "data": {"train": "none.jsonl", "eval": "none"},
            "lora": {"dropout": 0.0, "targets": "complete"},
            "train": {"batch_size": batch_size, "epochs": 1, "compile": False},
            "evaluate": {"metric": "none"},
        }
    )


def _data() -> PreparedData:
    normal = NormalDist(np.log(MEDIAN), SIGMA)
    quantiles = [normal.inv_cdf((i + 0.5) / NUM_EXAMPLES) for i in range(NUM_EXAMPLES)]
    lengths = [min(LONGEST, max(8, round(float(np.exp(quantile))))) for quantile in quantiles]
    train = [
        Example(input_ids=np.zeros(length, np.int32), supervised=np.arange(length) >= length // 2, origin=ORIGIN)
        for length in lengths
    ]
    return PreparedData(train=train, eval=[], eval_conversations=[], report={})


def _scaled(name: str, cluster: Cluster, *, batch_size: int) -> Scaling:
    model, targets, parameters = _model(name)
    config, recipe, data = MODELS[name], _recipe(batch_size), _data()
    place = ExecutionSetup(device="cuda", dtype="bfloat16", compiled=False, free_bytes=cluster.device.memory_bytes)
    estimate_at = partial(
        estimate,
        recipe,
        config,
        model,
        targets,
        parameters,
        data=data,
        prompts=(),
        longest_answer=0,
        device=cluster.device,
    )
    return scale(cluster, recipe, config, parameters, data=data, place=place, estimate_at=estimate_at)


def _rows(scaling: Scaling) -> list[Row]:
    missing: list[Row] = [
        dict.fromkeys(_row_names(), "") | {"GPUs": str(number), "strategy": "does not fit"}
        for number in scaling.too_few
    ]
    return missing + [
        {
            "GPUs": f"{row.nodes}×{row.devices // row.nodes}" if row.nodes > 1 else str(row.devices),
            "strategy": row.strategy,
            "memory per GPU": f"{row.peak_bytes / 2**30:.1f} GiB",
            "tokens per GPU": f"{row.rank_tokens:,.0f}",
            "step": _seconds(row.step_seconds),
            "communication": _seconds(row.communication_seconds),
            "balance": f"{row.balance:.0%}",
            "tokens/s": f"{row.tokens_per_second:,.0f}",
            "efficiency": f"{row.efficiency:.0%}",
        }
        for row in scaling.rows
    ]


def _row_names() -> list[str]:
    names = ["GPUs", "strategy", "memory per GPU", "tokens per GPU", "step", "communication"]
    return [*names, "balance", "tokens/s", "efficiency"]


def _network_rows() -> list[Row]:
    rows = []
    for name in ("infiniband-ndr", "ethernet-100g", "ethernet-10g"):
        last = _scaled("8B", find_cluster("2x8xh100-80gb", [name]), batch_size=256).rows[-1]
        rows.append(
            {
                "between nodes": name,
                "step": _seconds(last.step_seconds),
                "communication": _seconds(last.communication_seconds),
                "efficiency": f"{last.efficiency:.0%}",
            }
        )
    return rows


def _volume(name: str) -> Row:
    _, _, parameters = _model(name)
    layer, outside = sharded_parameters(MODELS[name], parameters)
    frozen = parameters.total - parameters.trainable
    return {
        "model": name,
        "full fine-tuning, per step": _size(2 * frozen),
        "adapter, per step": _size(GRADIENT_BYTES * parameters.trainable),
        "sharded base, per micro-batch": _size(2 * (2 * layer * MODELS[name].num_hidden_layers + outside)),
    }


def _link(name: str) -> Row:
    link = LINKS[name]
    return {
        "`--interconnect`": f"`{name}`",
        "connects": "nodes" if link.scope == "nodes" else "devices in a node",
        "GB/s, one way": f"{link.bytes_per_second / 1e9:g} per {'node' if link.shared else 'GPU'}",
        "hop": f"{link.hop_seconds * 1e6:g} µs",
        "source": link.source,
    }


def _crossover_rows() -> list[Row]:
    rows = []
    for spec, links in (
        ("8xb200", ()),
        ("8xh100-80gb", ()),
        ("8xa100-80gb", ()),
        ("8xh100-pcie", ()),
        ("8xl4", ()),
        ("2x8xh100-80gb", ()),
        ("2x8xh100-80gb", ("ethernet-100g",)),
    ):
        cluster = find_cluster(spec, links)
        fabric = cluster.fabric
        rate = cluster.device.bf16_flops_per_second * EFFICIENCY[False]
        name = fabric.between.name if fabric.nodes > 1 else fabric.within.name
        tokens = {b: hiding_tokens(fabric, flops_per_second=rate, bytes_per_weight=b) for b in (2, 0.5)}
        rows.append(
            {
                "GPUs": spec,
                "slowest link": name,
                "B": f"{fabric.bytes_per_second / 1e9:,.0f} GB/s",
                "R": f"{rate / 1e12:,.0f} TFLOP/s",
                "tokens, bfloat16 base": f"{tokens[2]:,.0f}",
                "tokens, 4-bit base": f"{tokens[0.5]:,.0f}",
            }
        )
    return rows


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f} GB"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.2f} ms"


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, page()))
