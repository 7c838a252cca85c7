"""Write docs/adapters.md, every number of it computed. `--check` only tests whether it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

from pages import DEFAULT_MODEL, table, write_or_check

from loratune.model.adapter.targets import resolve_targets
from loratune.model.adapter.variants import PISSA_ITERATIONS, saved_rank, scale_of
from loratune.planning.memory.adapter import saved_bytes, variant_bytes
from loratune.planning.parameters import count_parameters, skeleton
from loratune.recipe.recipe import VARIANTS, LoraSection, ModelSection, Variant
from loratune.workflows.guidance.facts import AlternativeRow, bytes_in_words

PAGE = Path(__file__).parent / "adapters.md"
WHERE: dict[str, tuple[str, str]] = {
    "plain": ("the default, and the baseline for the others", "PEFT, transformers, vLLM, llama.cpp, Ollama"),
    "rslora": ("ranks of 64 and more, where alpha/r makes the update too small", "as plain"),
    "dora": ("small ranks, where quality per parameter matters more than speed", "PEFT; others after merging"),
    "pissa": ("a faster start at the same cost per step", "as plain, with twice the rank"),
    "olora": ("like PiSSA, with a cheaper initialization", "as plain, with twice the rank"),
    "eva": ("a faster start on data unlike the base's, at the cost of some forward passes in advance", "as plain"),
    "loftq": (
        "with nf4: the adapter starts by compensating for the quantization error",
        "as plain, on the nf4 base; others after merging",
    ),
}
TEXT = """# Adapter variants

<!-- Written by docs/make_adapters.py, which computes every number; run `make docs` to update it. -->

`lora.variant` selects a variant. All of them are PEFT's own, and the saved adapter loads in stock PEFT on the
original base model. For each variant, `tests/invariants/test_variants.py` compares the logits, the two engines, a
resumed run and the merged model.

| `lora.variant` | when to use it, according to its authors | what serves the saved adapter |
|---|---|---|
{when}

On {name} with `targets: {targets}`, r {r} and alpha {alpha:g}:

{counted}

This is the extra memory while training in bfloat16 with dropout {dropout:g}, on top of the weights, gradients and
optimizer state of the trained parameters:

{memory}

`loratune plan RECIPE` shows parameters and memory for your model.

## Only some layers

`lora.layers` is `all`, `first N`, `last N`, or a list of layer numbers counted from 0; it works with any variant.
Layers below the first adapted one get no gradient and keep nothing for the backward pass; the plan's memory and
time count them as if they did, so both are upper bounds.

## Ranks and scales for single matrices

`lora.rank_pattern` and `lora.alpha_pattern` work as in PEFT: they map a regular expression, which must match the
last parts or the full name of a module, to a rank or an alpha. The first match counts, and a pattern that has no
effect is refused.

    lora:
      r: 16
      alpha: 32
      rank_pattern: {{o_proj: 4, 'layers.0.mlp.*': 64}}
      alpha_pattern: {{o_proj: 8, 'layers.0.mlp.*': 128}}

The update of a matrix is scaled by its own alpha over its own rank, so changing only the rank also changes the
scale. This works with every variant. vLLM reads one rank and one alpha for all matrices: `loratune export --to
vllm` pads lower ranks with zeros and multiplies the scales into B, which is the same adapter.

## Fully trained modules

`lora.modules_to_save` lists modules, by their last dotted name parts, that are fully trained in addition to the
adapter and saved with it: `[embed_tokens, lm_head]`, `[norm]` (only the last norm, whereas PEFT would take every
module whose name ends in `norm`), `[input_layernorm]`. PEFT keeps the original module and trains a copy; `plan`
counts the copy, its gradient and the optimizer state, and, for a head or an embedding, a second gradient of the
full table, which exists while that of a micro-batch is computed. Three details matter:

- A head that is tied to the embedding stays tied: one matrix is trained for both (PEFT's `ensure_weight_tying`),
  saved under both names as PEFT does, and counted once. PEFT's default would train only the head, and leave two
  different matrices, which no file format expects.
- If the base is 16-bit, the copies are float32, like the adapter, and are cast to 16 bits for computation. Stock
  PEFT, which loads them into such a base, computes the same.
- The fast loss uses the trained head, and its gradient is that of the stock forward pass
  (`tests/invariants/test_modules_trained_in_full.py`).

`merge` and merged exports include them; GGUF adapters and vLLM cannot represent them. Matrices inside the layers
cannot be fully trained together with `model.quantization`; embedding, head and norms can. `loratune eject` refuses
them if the base is 16-bit, because PEFT would train the copies in 16 bits.

## New tokens

`lora.new_tokens: ["<|tool|>", "<|end_tool|>"]` adds tokens to the tokenizer and trains only their rows of the
embedding and the output head (PEFT's `trainable_token_indices`), which are a few thousand parameters instead of the
full table. If embedding and head are tied, there is one row per token, otherwise two. The new tokens are ordinary,
not special: they are recognized in texts and visible in answers. The embedding grows if it has no spare rows, and
new rows are initialized with the mean of the others. `plan` warns about tokens that no training example contains.

The run's adapter folder contains the rows and the tokenizer. `AutoPeftModelForCausalLM` loads it directly; to load
the base yourself:

    tokenizer = AutoTokenizer.from_pretrained("RUN/adapter")
    base = AutoModelForCausalLM.from_pretrained(BASE)
    base.resize_token_embeddings(max(len(tokenizer), base.get_input_embeddings().num_embeddings))
    model = PeftModel.from_pretrained(base, "RUN/adapter")

`loratune merge` writes the enlarged embedding, its size in `config.json`, and the tokenizer. GGUF adapters, vLLM
adapters and `transformers serve` do not support such rows: merge first. New tokens cannot be combined with
`lora.start_from`, nor with an embedding or head in `lora.modules_to_save`. PEFT's own forward pass copies the full
table at each step and computes the gradient of the copy; the fast engine looks the rows up separately
(`model/kernels/trained_rows.py`), with the same values and gradients.

## Stacked experts

`lora.target_parameters: [mlp.experts.gate_up_proj, mlp.experts.down_proj]` adapts parameters that do not belong to
a linear module, as in PEFT: each expert gets its own A and B, and all are counted. If a name matches nothing, the
error lists the names in your model. PEFT adds the update to a copy of the full stack while the layer runs, and so
do both engines: `plan` counts the copies, which are kept for the backward pass, and a message at the start says
that these modules do not use the fast forward pass; layers run uncompiled. Dropout must be 0, the variant `plain`
or `rslora`, and the base unquantized. `merge` loads the model in float32 and lets PEFT and transformers write it,
because files name single experts in many ways; GGUF, vLLM adapters and `transformers serve` are refused: merge
first. Both engines leave out the routers' load-balancing loss
([architectures](architectures.md#mixtures-of-experts)).

## Starting from a saved adapter

`lora.start_from` names a folder in PEFT's format or a Hub id, with weights in safetensors. Rank, alpha, variant and
adapted matrices must match the recipe; dropout may differ. Optimizer and learning-rate schedule start over
(`loratune resume` and `extend` continue them). The adapter is copied to `RUN/start`, and the evaluation compares
with it: the column is called `before` instead of `base`, and the verdict says "than where it began". Without that
copy, the comparison is with the base alone, and says so. PiSSA and OLoRA adapters made by `loratune train` are
plain adapters of rank 2r and are continued as such.

## LoRA+

`train.lora_plus_ratio` gives B a higher learning rate than A (Hayou et al. 2024, arXiv 2402.12354; they propose
about 16). Tune it together with `train.learning_rate`, which is A's. It works with every variant and optimizer; the
logged learning rate is A's.

## Learning rates for single modules

`train.learning_rate_pattern: {{embed_tokens: 1e-5, 'layers.0.*': 1e-4}}` gives modules their own peak learning
rates; the learning-rate schedule applies to each, and LoRA+ multiplies B's. The first matching pattern counts, and
a pattern that has no effect is refused. The logged learning rate is `train.learning_rate`.

## rsLoRA

The update is scaled by alpha/√r instead of alpha/r (Kalajdzievski 2023, arXiv 2312.03732). With the same alpha, the
update is √r times as large: lower alpha or the learning rate accordingly.

## DoRA

Each output of an adapted matrix gets a trained magnitude, and W + s·B·A is scaled to it (Liu et al. 2024, arXiv
2402.09353). The adapted matrices use PEFT's own forward pass, which computes their full update at every step;
`plan` says so and measures the speed. vLLM, llama.cpp and Ollama cannot represent the magnitudes: use `loratune
merge` or `loratune export --merged`.

## PiSSA and OLoRA

A and B are initialized with a part of W itself: from its largest singular values for PiSSA (Meng et al. 2024, arXiv
2404.02948; found by {iterations} steps of a subspace iteration), or from the first columns of its QR decomposition
for OLoRA (Büyükakyüz 2024, arXiv 2406.01775). That part is subtracted from W during training. The saved adapter is
s·(B·A - B₀·A₀), a plain adapter of twice the rank for the original W; base and fine-tuned model are evaluated with
it after the base is loaded again. `r` is at most the smaller side of an adapted matrix. If the base is in bfloat16,
W - s·B₀·A₀ is rounded to bfloat16, as in PEFT, and the saved adapter differs from the trained one by that rounding.
A run resumed on another machine repeats the decomposition, which gives the same result up to float rounding.

They need unquantized weights, so they cannot be combined with `model.quantization`.

## EVA

The rows of A are initialized with the directions along which the matrix's inputs vary most on the run's own data
(Paischer et al. 2024, arXiv 2410.07170), and B is zero, so the base is unchanged and the adapter is a plain one.
PEFT runs forward passes on the training examples in batches of `train.batch_size` until the directions converge;
every token counts, and matrices with the same input start with the same A. Ranks are not redistributed between
matrices (PEFT's `rho` is 1), so the plan's counts hold; `lora.rank_pattern` cannot be combined with it.

## LoftQ

For `model.quantization: nf4`: B·A is initialized with the best rank-r approximation of the quantization error of W
(Li et al. 2023, arXiv 2310.08659, one step). PEFT's `replace_lora_weights_loftq` does this only on CUDA, and
ignores alpha/r; loratune does it on any device, and divides B by the scale. The adapter is a plain one for the nf4
base; `loratune merge` writes a model that does not need nf4.
"""


def page() -> str:
    """Return the page."""
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
        "adapter file": bytes_in_words(count.adapter_bytes),
    }


def _memory(variant: Variant, lora: LoraSection) -> AlternativeRow:
    model, other = skeleton(DEFAULT_MODEL), lora.model_copy(update={"variant": variant})
    count = count_parameters(model, resolve_targets(model, lora.targets), other)
    matrices = [item.matrix for item in count.per_module]
    return {
        "variant": variant,
        "for the run": bytes_in_words(variant_bytes(matrices, other, 2)),
        "for each token of a micro-batch": bytes_in_words(saved_bytes(matrices, other, 2)),
    }


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, page()))
