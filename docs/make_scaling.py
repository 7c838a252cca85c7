"""Write docs/scaling.md, with every number computed by the plan's own formulas.

`--check` only checks that the page is up to date.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from statistics import NormalDist

import numpy as np
from pages import DEFAULT_MODEL, table, write_or_check
from transformers import LlamaConfig, PreTrainedModel

from loratune.data.examples import Example
from loratune.data.prepared import PreparedData
from loratune.data.rows.row import Origin
from loratune.model.adapter.targets import resolve_targets
from loratune.planning.cost import sharded_parameters
from loratune.planning.estimate import estimate
from loratune.planning.hardware.cluster import Cluster, find_cluster
from loratune.planning.hardware.communication import hiding_tokens
from loratune.planning.hardware.interconnect import CALL_SECONDS, LINK_EFFICIENCY, LINKS
from loratune.planning.hardware.measured import BANDWIDTH_EFFICIENCY, PRODUCT_EFFICIENCY
from loratune.planning.memory.inputs import ExecutionSetup
from loratune.planning.memory.memory import MAX_USEFUL_TOKENS
from loratune.planning.parameters import ParameterCount, count_parameters, skeleton
from loratune.planning.parts import RunParts
from loratune.planning.scaling import GRADIENT_BYTES, Scaling, scale
from loratune.planning.speed import EAGER_EFFICIENCY
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

> **Nothing on this page was measured.** loratune has never run on several GPUs: every number is arithmetic on
> published figures. Use them to compare machines and strategies; before you pay for a machine, measure a few steps
> there with `loratune plan --probe`.

This page shows how a run scales to several GPUs, what limits it, and when to shard the base model. For your own
recipe, data and machines, run:

    loratune plan my.yaml --devices 8xh100-80gb
    loratune plan my.yaml --devices 2x8xh100-80gb                          # two nodes of eight
    loratune plan my.yaml --devices 8xh100-80gb --interconnect pcie5       # other links than usual
    loratune plan my.yaml --devices 2x8xa100-80gb --interconnect ethernet-100g --price-per-hour 2   # per GPU

`--json` prints all of it under `scaling`.

## What must be sent

Full fine-tuning adds up a gradient of every weight at every step. LoRA computes no gradient of the frozen base, so
only two things have to be sent:

- **the adapter's gradients**, once per step, in float32: {gradient_bytes} bytes per parameter of the adapter;
- **the frozen base**, only if it is sharded (fsdp): every layer must be gathered before it is computed, once in the
  forward pass and once in the backward pass, for every micro-batch.

{volumes}

*Full fine-tuning* would send 2 bytes per weight and step. Adapters have r 16 and `targets: complete`.

## The formulas

For n ranks and B bytes per second on the slowest link, one way:

```text
all-reduce     2(n−1)/n · bytes / B + latency of 2(n−1) hops
all-gather      (n−1)/n · bytes / B + latency of n−1 hops
```

(Patarasuk & Yuan 2009; Thakur et al. 2005; NVIDIA/nccl-tests, doc/PERFORMANCE.md.) A call takes {call:.1f} µs, and
a hop takes as long as NCCL's own model of a ring assumes (src/graph/tuning.cc):

{links}

No collective operation reaches a link's peak; {share:.0%} of it is assumed, because NCCL limits its model of an
A100 to 235 of 300 GB/s. Between nodes, rings run through all ports of a node at once, so a node with a port for
each GPU has the sum of their bandwidths.

The computation takes 4 operations per frozen weight and token (2 forward, 2 for the gradient to the input; 2 more
if a layer is recomputed). Its time is the one that `plan --device` estimates: matrix products at {products:.0%} of
the published peak, and element-wise work at {copies:.0%} of the published bandwidth, with traffic counted in
generated code. To decide whether gathers are hidden, {efficiency:.0%} of the peak is assumed for both together.
Then

```text
ddp step  = tokens of the slowest rank · seconds of a token + all-reduce(adapter)
fsdp step = Σ micro-batches (tokens of the heaviest rank · seconds of a token + gathers that no computation hides)
            + all-reduce(adapter)
```

Which rank gets which examples is not estimated: the steps of an epoch are assigned to ranks by the function that
training uses, on the lengths of the recipe's own examples. `batch_size` counts the examples of a step over all
ranks, so more ranks mean fewer tokens for each, but never a different run.

## What limits it

**The step.** With {small} examples per step, the 8B model on H100s:

{small_rows}

*Balance* shows what is lost because examples are not split; it is the mean number of tokens per rank divided by
that of the slowest rank. With {large} examples per step, the same lengths are spread evenly:

{large_rows}

With fewer examples than ranks, some ranks are idle; `plan` says so, and names the smallest `batch_size` that keeps
all of them busy.

**The link** matters little with ddp, whose messages are small. With the 8B model, {large} examples per step, on two
nodes of eight H100s:

{network_rows}

## When ddp beats fsdp

If the base fits on a device, ddp sends less over any link, so `auto` chooses it. fsdp is for bases that do not fit
on a single device: a rank holds 1/n of the layers, the full embeddings and head, and two full layers (the one being
computed and the one being gathered). With the 70B model, {large} examples per step, on two nodes of eight:

{sharded_rows}

Gathers cost nothing if they are hidden behind computation. The gather of a layer with P weights of b bytes each is
hidden if

```text
(n−1)/n · b·P / B  ≤  2·P · tokens / R        R: operations per second that a device reaches
```

P cancels out, so the number of tokens in a micro-batch decides, whatever the model:

```text
tokens  ≥  (n−1)/n · b/2 · R/B
```

{crossover}

`token_budget: auto` stops at {cap:,} tokens on a GPU. So full micro-batches hide the gathers over NVLink and
InfiniBand, but not over 100 Gb/s Ethernet. Latency is left out here, but included in the tables above.

`auto` does not consider one case: if the full base leaves so little memory that layers must be recomputed (half as
many operations again), a sharded base may be faster.

## What the formulas leave out

- A GPU's speed on small micro-batches: every token is assumed to cost the same, so many ranks with few tokens each
  are slower in practice.
- The small messages by which ranks agree about a step (token counts, requests to stop). They only add latency,
  which matters if a step takes milliseconds.
- PCIe without peer-to-peer transfers, as between many GeForce cards: data goes through the host's memory, which is
  slower than assumed.
- Other traffic on the same network, and slow nodes.
- Evaluation: it is counted as if on one device, although the ranks share the held-out evaluations during training.

All tables on this page are for one epoch, not compiled, of {examples:,} examples with log-normal lengths: median
{median}, σ {sigma:g}, at most {longest:,}.
"""


def page() -> str:
    """Return the page."""
    h100 = find_cluster("2x8xh100-80gb")
    return TEXT.format(
        gradient_bytes=GRADIENT_BYTES,
        volumes=table([_volume(name) for name in MODELS]),
        call=CALL_SECONDS * 1e6,
        links=table([_link(name) for name in LINKS]),
        share=LINK_EFFICIENCY,
        efficiency=EAGER_EFFICIENCY,
        products=PRODUCT_EFFICIENCY,
        copies=BANDWIDTH_EFFICIENCY,
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
    parts = RunParts.of_configuration(model, targets, parameters, data)
    estimate_at = partial(estimate, recipe, parts, device=cluster.device)
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
            "memory each": f"{row.peak_bytes / 2**30:.1f} GiB",
            "tokens each": f"{row.rank_tokens:,.0f}",
            "step": _seconds(row.step_seconds),
            "waiting for links": _seconds(row.communication_seconds),
            "balance": f"{row.balance:.0%}",
            "tokens/s": f"{row.tokens_per_second:,.0f}",
            "efficiency": f"{row.efficiency:.0%}",
        }
        for row in scaling.rows
    ]


def _row_names() -> list[str]:
    names = ["GPUs", "strategy", "memory each", "tokens each", "step", "waiting for links"]
    return [*names, "balance", "tokens/s", "efficiency"]


def _network_rows() -> list[Row]:
    rows = []
    for name in ("infiniband-ndr", "ethernet-100g", "ethernet-10g"):
        last = _scaled("8B", find_cluster("2x8xh100-80gb", [name]), batch_size=256).rows[-1]
        rows.append(
            {
                "between nodes": name,
                "step": _seconds(last.step_seconds),
                "waiting for links": _seconds(last.communication_seconds),
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
        rate = cluster.device.bf16_flops_per_second * EAGER_EFFICIENCY
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
