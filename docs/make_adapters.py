"""Write docs/adapters.md, every number of it computed. `--check` only says whether it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

from pages import DEFAULT_MODEL, table, write_or_check

from loratune.model.adapter.targets import resolve_targets
from loratune.model.adapter.variants import PISSA_ITERATIONS, saved_rank, scale_of
from loratune.planning.memory.adapter import kept_bytes, variant_bytes
from loratune.planning.parameters import count_parameters, skeleton
from loratune.recipe.recipe import VARIANTS, LoraSection, ModelSection, Variant
from loratune.workflows.guidance.facts import AlternativeRow, size

PAGE = Path(__file__).parent / "adapters.md"
WHERE: dict[str, tuple[str, str]] = {
    "plain": ("the default; the others are measured against it", "PEFT, transformers, vLLM, llama.cpp, Ollama"),
    "rslora": ("ranks of 64 and more, whose update alpha/r makes too small", "as plain"),
    "dora": (
        "small ranks, where the quality of each parameter counts more than speed",
        "PEFT; the others after merging",
    ),
    "pissa": ("a faster start, at the same cost a step", "as plain, with twice the rank"),
    "olora": ("as PiSSA, with a cheaper beginning", "as plain, with twice the rank"),
    "eva": ("a faster start on data unlike what the base knows, for some forward passes beforehand", "as plain"),
    "loftq": ("nf4, whose error the adapter begins with taking back", "as plain, on the base in nf4; merged elsewhere"),
}
TEXT = """# The adapter's variants

<!-- Written by docs/make_adapters.py, which computes every number; `make docs` writes it anew. -->

`lora.variant` chooses one. All are PEFT's own, and what is saved loads in stock PEFT on the base as everybody has it;
`tests/invariants/test_variants.py` compares the logits, the two engines, a resumed run and the merged model for each of them.

| `lora.variant` | when, by its authors | what serves the saved adapter |
|---|---|---|
{when}

On {name} with `targets: {targets}`, r {r} and alpha {alpha:g}:

{counted}

Memory while training in bfloat16, beside weights, gradients and moments of the trained parameters, dropout {dropout:g}:

{memory}

`loratune explain RECIPE lora.variant` computes the first table for your model, `loratune plan RECIPE` the memory.

## Only some layers

`lora.layers` is `all`, `first N`, `last N` or a list of numbers from 0 on, and goes with every variant. Layers below the first adapted
one get no gradient and keep nothing for the way back; the plan's memory and time count them as if they did, so both are upper bounds then.

## Other ranks and scales for single matrices

`lora.rank_pattern` and `lora.alpha_pattern` are PEFT's: a regular expression of a module's last parts or whole name, and its rank or
alpha; of several that match, the first counts, and one that decides about nothing is refused.

    lora:
      r: 16
      alpha: 32
      rank_pattern: {{o_proj: 4, 'layers.0.mlp.*': 64}}
      alpha_pattern: {{o_proj: 8, 'layers.0.mlp.*': 128}}

The update of a matrix is scaled by its own alpha over its own rank, so a rank without an alpha changes both. They go with every
variant. vLLM reads one rank and one alpha for all: `loratune export --to vllm` fills lower ranks up with zeros and multiplies the
scales into B, which is the same adapter.

## Modules that are trained whole

`lora.modules_to_save` names modules that are trained whole beside the adapter and saved with it, by their last dotted parts:
`[embed_tokens, lm_head]`, `[norm]` (the last norm alone, where PEFT would take every module whose name ends so), `[input_layernorm]`.
PEFT keeps the module as it was and trains a copy; `plan` counts the copy, its gradient and the optimizer's state, and for a head or an
embedding the gradients of the whole table while a micro-batch's are made. Three things are done with care:

- A head that is tied to the embedding stays tied: one matrix is trained for both (PEFT's `ensure_weight_tying`), saved under both
  names as PEFT does, and counted once. PEFT's default would train the head alone and leave two models that no file format expects.
- In a base of 16 bits the copies are float32, as the adapter is, and computed with in 16 bits. What stock PEFT loads into such a base computes
  the same.
- The fast loss takes the trained head, and its gradient is that of the stock forward (`tests/invariants/test_whole.py`).

`merge` and merged exports put them in; GGUF adapters and vLLM have no place for them. Matrices inside of the layers cannot be trained whole
with `model.quantization`; embedding, head and norms can. `loratune eject` refuses them in 16 bits, where PEFT alone would train
the copies in 16 bits.

## New tokens

`lora.new_tokens: ["<|tool|>", "<|end_tool|>"]` adds tokens to the tokenizer and trains their rows of embedding and output head by their
number (PEFT's `trainable_token_indices`), some thousand parameters in place of the whole table. Of a tied pair one row a token is
trained for both, of others two. They are ordinary tokens, not special ones: texts are read with them, and answers show them. The embedding
grows where it has no rows to spare, and new rows begin as the mean of the others. `plan` warns of a token that no training example has.

The run's adapter folder has the rows and the tokenizer. `AutoPeftModelForCausalLM` loads it as it is; with the base loaded by hand:

    tokenizer = AutoTokenizer.from_pretrained("RUN/adapter")
    base = AutoModelForCausalLM.from_pretrained(BASE)
    base.resize_token_embeddings(max(len(tokenizer), base.get_input_embeddings().num_embeddings))
    model = PeftModel.from_pretrained(base, "RUN/adapter")

`loratune merge` writes the grown embedding, its size in `config.json`, and the tokenizer. GGUF and vLLM adapters and
`transformers serve` have no place for rows: merge first. They do not go with `lora.start_from`, nor with an embedding or head in
`lora.modules_to_save`. PEFT's own forward copies the whole table at each step and gets the gradient of the copy; the fast engine looks
rows up beside the table (`kernels/new_rows.py`), with the same values and gradients.

## Experts that are stacked in one parameter

`lora.target_parameters: [mlp.experts.gate_up_proj, mlp.experts.down_proj]` adapts parameters that no linear module has, as PEFT does: each expert
gets an A and a B of its own, and each counts. `plan` names those of your model where a name matches nothing. PEFT adds the update to a
copy of the whole stack while the layer runs, and so do both engines: `plan` counts the copies, which are kept for the way back, and a
line says at the start that these do not run the fast forward; layers run uncompiled. Dropout must be 0, the variant `plain` or
`rslora`, and the base not quantised. `merge` loads the model in float32 and lets PEFT and transformers write it, since files name experts one
by one in many ways; GGUF, vLLM adapters and `transformers serve` refuse: merge first. `train.engine: trl` adds the router's
auxiliary loss where the model's configuration has one (`router_aux_loss_coef`), the fast engine does not.

## Going on from a saved adapter

`lora.start_from` names a folder in PEFT's format or a hub id, safetensors only. Rank, alpha, variant and adapted matrices must be the
recipe's; dropout may differ. Optimizer and schedule begin anew (`loratune resume` goes on with them). Base against tuned still means the
base without any adapter. PiSSA and OLoRA adapters of `loratune train` are plain ones of rank 2r and go on as such.

## LoRA+

`train.lora_plus_ratio` lets B learn faster than A (Hayou et al. 2024, arXiv 2402.12354, who propose about 16; tune it with
`train.learning_rate`, which is A's). It goes with every variant and optimizer; the logged rate is A's.

## Rates of single modules

`train.learning_rate_pattern: {{embed_tokens: 1e-5, 'layers.0.*': 1e-4}}` gives modules highest rates of their own; the schedule goes on
from each, and LoRA+ multiplies B's. Of several patterns that match, the first counts, and one that decides about nothing is refused.
The logged rate is `train.learning_rate`.

## rsLoRA

The update is scaled by alpha/√r in place of alpha/r (Kalajdzievski 2023, arXiv 2312.03732). With the default alpha it is
√r times as large: lower alpha or the learning rate with it.

## DoRA

Each output of the adapted matrix has a trained magnitude, and W + s·B·A is scaled to it (Liu et al. 2024, arXiv 2402.09353). The adapted
matrices run PEFT's own forward, which makes their whole update at every step; `plan` says so, and its speed is measured
with it. vLLM, llama.cpp and Ollama have no place for the magnitudes: `loratune merge`, or `loratune export --merged`.

## PiSSA and OLoRA

A and B begin as a part of W itself, the largest singular values (Meng et al. 2024, arXiv 2404.02948; {iterations} steps of a
subspace iteration find them) or the first columns of its QR decomposition (Büyükakyüz 2024, arXiv 2406.01775), and that part is
taken out of W while it trains. What is saved is s·(B·A - B₀·A₀), a plain adapter of twice the rank, for W as it was; base
against tuned are evaluated with it after the base is loaded again. `r` is at most the smaller side of an adapted
matrix. Where the base is in bfloat16, W - s·B₀·A₀ is rounded to it, as PEFT does, and the saved adapter differs from the
trained one by that rounding. A run that is resumed on another machine makes the decomposition again, to float noise.

They need the weights as they are, so they do not go with `model.quantization`.

## EVA

The rows of A begin as the directions along which the inputs of the matrix vary most on the run's own data (Paischer et al. 2024, arXiv
2410.07170), and B is zero, so the base is not changed and the adapter is a plain one. PEFT runs the training examples forward, a batch
of `train.batch_size` after another, until the directions stand still; every token counts, and matrices with one input begin alike. Ranks are
not moved between matrices (PEFT's `rho` is 1), so that the plan's counts hold; `lora.rank_pattern` does not go with it.

## LoftQ

For `model.quantization: nf4`: B·A begins as the nearest matrix of rank r to what quantisation took away from W (Li et al. 2023, arXiv
2310.08659, with one step). PEFT's `replace_lora_weights_loftq` does that on CUDA alone and forgets alpha/r; here it is computed on any
device, and B is divided by the scale. The adapter is a plain one, for the base in nf4; `loratune merge` writes a model that needs no
nf4.
"""


def page() -> str:
    """The whole page."""
    lora = LoraSection()
    return TEXT.format(
        when="\n".join(f"| `{variant}` | {WHERE[variant][0]} | {WHERE[variant][1]} |" for variant in VARIANTS),
        name=ModelSection().name.rpartition("/")[2],
        targets=lora.targets,
        r=lora.r,
        alpha=lora.alpha,
        dropout=lora.dropout,
        counted=table([_variant_row(variant, lora) for variant in VARIANTS]),
        memory=table([_memory(variant, lora) for variant in VARIANTS]),
        iterations=PISSA_ITERATIONS,
    )


def _variant_row(variant: Variant, lora: LoraSection) -> AlternativeRow:
    model, other = skeleton(DEFAULT_MODEL), lora.model_copy(update={"variant": variant})
    count = count_parameters(model, resolve_targets(model, lora.targets), other)
    return {
        "variant": variant,
        "trainable": f"{count.trainable:,}",
        f"scale at alpha {lora.alpha:g}": f"{scale_of(other):.4g}",
        "saved rank": str(saved_rank(other)),
        "adapter file": size(count.adapter_bytes),
    }


def _memory(variant: Variant, lora: LoraSection) -> AlternativeRow:
    model, other = skeleton(DEFAULT_MODEL), lora.model_copy(update={"variant": variant})
    count = count_parameters(model, resolve_targets(model, lora.targets), other)
    matrices = [item.matrix for item in count.per_module]
    return {
        "variant": variant,
        "for the run": size(variant_bytes(matrices, other, 2)),
        "for each token of a micro-batch": size(kept_bytes(matrices, other, 2)),
    }


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, page()))
