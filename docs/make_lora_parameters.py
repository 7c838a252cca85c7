"""Write docs/lora-parameters.md, every number of it computed. `--check` only tests whether it is up to date."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import torch
from pages import DEFAULT_MODEL, table, write_or_check
from transformers import PreTrainedModel

from loratune.model.adapter.targets import matrix, resolve_targets
from loratune.planning.parameters import count_parameters, skeleton
from loratune.recipe.recipe import LoraSection, ModelSection
from loratune.workflows.guidance.effects import preset_rows, rank_row
from loratune.workflows.guidance.facts import AlternativeRow

PAGE = Path(__file__).parent / "lora-parameters.md"
RANKS = (4, 8, 16, 32, 64)

TEXT = """# LoRA's parameters, in numbers

<!-- Written by docs/make_lora_parameters.py, which computes every number; run `make docs` to update it. -->

All numbers are for the default model, {name}: {layers} layers of width {hidden:,}, {total:,} parameters. `loratune
explain RECIPE` computes the most important ones for your own model and data; `loratune explain RECIPE lora.r`
explains one setting in full.

## What is trained

A weight matrix W of size d×k is frozen. Two small matrices are added, B of size d×r and A of size r×k, and only
these are trained:

    h = Wx + (alpha/r)·B·A·dropout(x)

B starts at zero, so training starts from the base model. A matrix gets r·(d+k) trainable parameters. At r {r} a
1,024×1,024 matrix has {square_lora:,} instead of {square_full:,}: {square_saved:.1%} fewer.

The matrices of one layer of {name}:

{matrices}

{key_value_heads} key-value heads serve {heads} query heads, so k_proj and v_proj are small: at r {r} they get
{kv_lora:,} parameters each, q_proj and o_proj {q_lora:,}.

## `r`, the rank

The rank is the inner dimension of B·A, that is, the number of directions that the update of a matrix can have.
Twice the rank means twice the parameters. With `targets: {preset}` and alpha {alpha:g}:

{ranks}

*While training* counts 16 bytes per parameter: weight, gradient and AdamW's two moments, in float32. The frozen
base takes another {base_bf16:.1f} GiB in bfloat16, so the rank hardly affects whether a model fits in memory.
Common values are 4 to 64; the default is {r}.

## `alpha`, the scale

The update is multiplied by alpha/r, so doubling the rank at the same alpha halves the weight of each direction.
Keep alpha at twice the rank to compare ranks, or change only alpha to change the strength of the adapter:

{alphas}

With Adam, whose step size does not depend on the size of the gradient, alpha and the learning rate do different
things: alpha scales the effect of the adapter's weights, the learning rate how fast they change.

## `dropout`

This is the fraction of A's inputs that is set to zero at each training step. It affects only the adapter; W sees
all of x. At the default {dropout:g}, {dropped:,.0f} of the {hidden:,} inputs of q_proj are zero on average, and the
others are scaled by 1/(1 − {dropout:g}) = {dropout_scale:.3f}. It reduces overfitting on small data.

Which inputs are dropped is a function of `train.seed`, the step, the example, the token's position in it, the
matrix and the column, in integer arithmetic. It does not depend on `train.token_budget`, packing, the number of
processes, `train.recompute`, `train.compile`, a step repeated for lack of memory, or resuming. The same holds for
the noise of `train.neftune_noise_alpha`. If prefixes are shared (`train.share_prefixes`), equal tokens of a step
with equal tokens before them have the same mask, that of the first example that contains them. There are
exceptions:

- with `train.engine: trl`, stock TRL draws from torch's generator;
- the base model's own dropout, as in BERT and in GPT-2 as published, does not follow this rule;
- for modules whose inputs are not the tokens of the micro-batch, such as vision towers and experts that are
  separate linear modules, masks depend on what else is in the micro-batch.

On GPUs, the masks have not been compared with those of a CPU yet.

## `targets`, the adapted matrices

| projection | what it computes |
|---|---|
| query (`q_proj`) | what a token looks for in earlier tokens |
| key (`k_proj`) | what a token can be found by |
| value (`v_proj`) | what is read from a token once it is found |
| output (`o_proj`) | how the results of the heads are combined |
| feed-forward (`gate_proj`, `up_proj`, `down_proj`) | what is computed for each token separately |

The presets, at r {r}:

{presets}

`balanced`, the default, trains {balanced_of_attention:.0%} of the parameters that `attention` trains. `complete`
trains {complete_times:.1f} times as many as `balanced`, because the feed-forward matrices are the largest: at r {r}
they hold {feed_forward_share:.0%} of its parameters. Other architectures use other names; presets find the matrices
by structure, and you can also give a list of names.

## The task type

PEFT's `task_type` is `CAUSAL_LM`, a decoder that predicts the next token, or `SEQ_CLS` for a classifier
([classification](classification.md)).

## Compared with full fine-tuning

| | trainable | share | written to disk | weights, gradients and moments |
|---|---|---|---|---|
| full fine-tuning, float32 | {total:,} | 100% | {full_gib:.1f} GiB | {full_training_gib:.1f} GiB |
| LoRA, r {r}, {preset} | {trainable:,} | {share:.2%} | {adapter_mib:.1f} MiB | {training} |
"""


def page() -> str:
    """Return the page."""
    lora, model = LoraSection(), skeleton(DEFAULT_MODEL)
    assert isinstance(lora.targets, str)
    ranks = [lora.model_copy(update={"r": r}) for r in RANKS]
    names = {preset: resolve_targets(model, preset) for preset in ("balanced", "attention", "complete")}
    counts = {preset: count_parameters(model, found, lora) for preset, found in names.items()}
    chosen = counts[lora.targets]
    total = chosen.total - chosen.trainable
    layer = {
        row.matrix.name.rpartition(".")[2]: row for row in counts["complete"].per_module if ".0." in row.matrix.name
    }
    square = torch.nn.ModuleDict({"square": torch.nn.Linear(1024, 1024, bias=False, device="meta")})
    square_lora = count_parameters(square, ("square",), lora).trainable
    text = TEXT.format(
        name=ModelSection().name.rpartition("/")[2],
        layers=DEFAULT_MODEL.num_hidden_layers,
        hidden=DEFAULT_MODEL.hidden_size,
        heads=DEFAULT_MODEL.num_attention_heads,
        key_value_heads=DEFAULT_MODEL.num_key_value_heads,
        total=total,
        r=lora.r,
        alpha=lora.alpha,
        preset=lora.targets,
        dropout=lora.dropout,
        dropout_scale=1 / (1 - lora.dropout),
        dropped=lora.dropout * DEFAULT_MODEL.hidden_size,
        square_lora=square_lora,
        square_full=1024 * 1024,
        square_saved=1 - square_lora / 1024**2,
        matrices=table(_matrix_rows(model, lora.r)),
        kv_lora=layer["k_proj"].trainable,
        q_lora=layer["q_proj"].trainable,
        ranks=table([rank_row(count_parameters(model, names[lora.targets], other), other, "adamw") for other in ranks]),
        alphas=table(_alpha_rows()),
        presets=table(preset_rows(model, lora)),
        balanced_of_attention=counts["balanced"].trainable / counts["attention"].trainable,
        complete_times=counts["complete"].trainable / counts["balanced"].trainable,
        feed_forward_share=1 - counts["attention"].trainable / counts["complete"].trainable,
        trainable=chosen.trainable,
        share=chosen.trainable / chosen.total,
        adapter_mib=chosen.adapter_bytes / 2**20,
        training=f"{16 * chosen.trainable / 2**20:.1f} MiB, and {2 * total / 2**30:.1f} GiB frozen in bfloat16",
        base_bf16=2 * total / 2**30,
        full_gib=4 * total / 2**30,
        full_training_gib=16 * total / 2**30,
    )
    return "\n\n".join(map(_filled, text.strip().split("\n\n"))) + "\n"


def _filled(block: str) -> str:
    """Wrap a paragraph again after its numbers are filled in; leave anything else as it is."""
    return block if block.startswith(("#", "|", "<", " ", "- ")) else textwrap.fill(block, 118, break_on_hyphens=False)


def _matrix_rows(model: PreTrainedModel, r: int) -> list[AlternativeRow]:
    rows = []
    for name in resolve_targets(model, "complete"):
        if ".layers.0." not in name:
            continue
        shape = matrix(name, model.get_submodule(name))
        full, low = shape.d_in * shape.d_out, r * (shape.d_in + shape.d_out)
        rows.append(
            {
                "matrix": f"`{name.rpartition('.')[2]}`",
                "d×k": f"{shape.d_out:,}×{shape.d_in:,}",
                "parameters": f"{full:,}",
                f"LoRA at r {r}": f"{low:,}",
                "share": f"{low / full:.1%}",
            }
        )
    return rows


def _alpha_rows() -> list[AlternativeRow]:
    return [
        {"alpha": str(alpha), **{f"alpha/r at r {r}": f"{alpha / r:g}" for r in RANKS}}
        for alpha in (8, 16, 32, 64, 128)
    ]


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, page()))
