"""Write docs/hardware.md and the line about memory in the recipes of published models, all computed by the plan.

`--check` only checks that page and recipes are up to date.
"""

from __future__ import annotations

import re
import sys
import textwrap
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from pages import table, write_or_check
from transformers import PreTrainedModel

from loratune.model.adapter.targets import resolve_targets
from loratune.planning.cost import run_memory
from loratune.planning.hardware.devices import DEVICES
from loratune.planning.memory.inputs import ExecutionSetup, TokenSizes
from loratune.planning.memory.memory import MIN_EFFICIENT_TOKENS, PLANNABLE_FRACTION
from loratune.planning.memory.quantized import quantized_setup
from loratune.planning.parameters import count_parameters, skeleton
from loratune.recipe.recipe import Recipe
from loratune.run.errors import MachineError
from tests.recipe.published import PUBLISHED

PAGE = Path(__file__).parent / "hardware.md"
RECIPES = Path(__file__).parents[1] / "recipes"
LENGTHS = (1024, 4096)
NO_BREAK = "\u00a0"
KINDS = (("none", "LoRA"), ("nf4", "QLoRA"))
SIZES = sorted({device.memory_bytes for device in DEVICES.values()})
"""Bytes of the GPUs in the plan's table."""

TEXT = """# Which hardware for which model

<!-- Written by docs/make_hardware.py, which computes every number; run `make docs` to update it. -->

What matters most is the memory of the GPU. `loratune plan` says how much a recipe needs, even on a machine without a
GPU; it downloads only the model's configuration and tokenizer:

    loratune plan my.yaml                          # here
    loratune plan my.yaml --device rtx4090         # on a GPU that is not here
    loratune plan my.yaml --devices 4xa100-80gb    # on several

## Models people use

> **Planned, not measured**: no model of these sizes has been trained, and no GPU has run loratune. The numbers come
> from the formulas behind `loratune plan`, for the recipes of these names (`loratune init llama-3.1-8b` writes one):
> r 16 on every linear layer (gpt-oss: on the attention), AdamW.

The first table shows the least GPU memory, in GiB, with which a recipe can train, and the smallest GPU that has it, for
two lengths of the longest example. Every layer recomputes its activations (gradient checkpointing), and each
micro-batch is a single example. A fifth of the memory is left free. QLoRA is the same recipe with
`model.quantization=nf4`.

{least}

Less recomputation is faster, and `plan` chooses as little as memory allows. Without any gradient checkpointing, and
with micro-batches of {efficient:,} tokens, training takes:

{fast}

These are the GPUs that `plan` knows, by memory:

{devices}

Memory depends on the longest example, not on the number of rows: rows take disk space and time, but no GPU memory. So
if a run does not fit, look at `data.max_length` first, then at `model.quantization`, then at a smaller model. A model
that does not fit on one GPU at all can be sharded over several ([bigger than memory](bigger-than-memory.md)).

## What was measured

On CPUs, planned and actual peak memory were compared: they are within 5 % of each other in 17 of 19 cases of 135 to 494
million parameters, and 12 and 13 % apart in the others ([results](results/memory.md)). These are two runs on two Zen 4
cores:

- the quickstart, 135 million parameters, 400 examples and 100 answers of both models: 2.2 GiB, 251 s
  ([results](results/quickstart.md));
- 1.78 billion parameters in bfloat16, random weights: 7.1 GiB, 50 tokens/s ([results](results/qwen2-1.5b-cpu.md)).

So a CPU can train models of up to a few hundred million parameters in minutes, and larger ones only on little data:
three epochs of a thousand examples of 200 tokens are 600,000 tokens, which at 50 tokens/s take more than three hours.

## Which data type

`model.dtype: auto` measures on the machine which data type is faster. NVIDIA GPUs since Ampere (A100, A10, RTX 30) and
CPUs with AVX512-BF16 or AMX multiply bfloat16 quickly; other CPUs are faster in float32, which takes twice the memory
for the base. `model.quantization` is refused on Apple GPUs.
"""


def needed_bytes(name: str, quantization: str, length: int, *, recompute: bool) -> int:
    """Return the memory of the smallest GPU on which a recipe's plan accepts a run, to a MiB.

    Args:
        name: The recipe's name.
        quantization: `model.quantization`.
        length: Tokens of the longest example.
        recompute: Whether every layer may be recomputed; otherwise none is, in micro-batches of an efficient size.
    """
    tokens = length if recompute else max(length, MIN_EFFICIENT_TOKENS["cuda"])
    recipe = Recipe.load(
        RECIPES / f"{name}.yaml",
        [f"train.recompute={'auto' if recompute else 0}", f"model.quantization={quantization}", "model.dtype=bfloat16"],
    )
    model = _model(recipe.model.name)
    parameters = count_parameters(model, resolve_targets(model, recipe.lora.targets), recipe.lora)
    quantized = quantized_setup(quantization, Path(), model, "bfloat16") if quantization != "none" else {}
    work = TokenSizes(longest=tokens, largest_step=recipe.train.batch_size * tokens, held_out=length)

    def fits(mebibytes: int) -> bool:
        place = ExecutionSetup(
            device="cuda", dtype="bfloat16", compiled=False, free_bytes=mebibytes * 2**20, **quantized
        )
        try:
            run_memory(recipe, model.config.get_text_config(), parameters, work, place)
        except MachineError:
            return False
        return True

    low, high = 0, 2**20
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high * 2**20


@cache
def _model(name: str) -> PreTrainedModel:
    return skeleton(PUBLISHED[name].config())


def names() -> list[str]:
    """Return the names of the recipes of published models, smallest model first."""
    found = {path.stem: Recipe.load(path).model.name for path in RECIPES.glob("*.yaml")}
    return sorted(
        (name for name, model in found.items() if model in PUBLISHED), key=lambda n: PUBLISHED[found[n]].parameters
    )


def kinds(name: str) -> list[str]:
    """Return the quantizations that a recipe's base can have: none for weights that are stored quantized."""
    return ["none"] if PUBLISHED[Recipe.load(RECIPES / f"{name}.yaml").model.name].quantization else ["none", "nf4"]


def smallest_gpu(needed: int) -> str:
    """Return the memory of the smallest GPU of the table that has so many bytes, as makers write it."""
    size = next((size for size in SIZES if size >= needed), None)
    return f"{size / 1e9:.0f} GB" if size else "none"


def head_line(name: str) -> str:
    """Return what a recipe's head says about memory."""
    parts = []
    for kind in kinds(name):
        needed = needed_bytes(name, kind, 4096, recompute=True)
        parts.append(f"{'LoRA' if kind == 'none' else 'QLoRA'} from {needed / 2**30:.1f} GiB ({smallest_gpu(needed)})")
    return (
        "Planned, not measured, for examples of up to 4,096 tokens, by the GPU's memory: " + ", ".join(parts) + ". "
        "See docs/hardware.md."
    )


def with_head_line(text: str, line: str) -> str:
    """Return a recipe with this line in place of the one that begins with `# Planned`."""
    wrapped = "\n".join(textwrap.wrap(line, 118, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False))
    changed, number = re.subn(r"^# Planned.*?(?=\n#\n)", wrapped, text, count=1, flags=re.MULTILINE | re.DOTALL)
    assert number == 1, "a recipe without its line"
    return changed


def page() -> str:
    """Return the page."""
    least, fast = [], []
    for name in names():
        first = {"recipe": f"`{name}`"}
        least.append(first | {f"{word}, {n:,} tokens": _cell(name, kind, n) for kind, word in KINDS for n in LENGTHS})
        fast.append(first | {word: _cell(name, kind, LENGTHS[0], recompute=False) for kind, word in KINDS})
    by_size = [
        {
            "memory": f"{size / 1e9:.0f} GB ({size / 2**30:.1f} GiB)",
            "`--device`": ", ".join(f"`{d.name}`" for d in DEVICES.values() if d.memory_bytes == size),
        }
        for size in SIZES
    ]
    assert PLANNABLE_FRACTION == 0.8, "the page says that a fifth stays free"
    return TEXT.format(
        least=table(least), fast=table(fast), devices=table(by_size), efficient=MIN_EFFICIENT_TOKENS["cuda"]
    )


def _cell(name: str, kind: str, length: int, *, recompute: bool = True) -> str:
    if kind not in kinds(name):
        return "no"
    needed = needed_bytes(name, kind, length, recompute=recompute)
    return f"{needed / 2**30:.1f} → {smallest_gpu(needed)}".replace(" ", NO_BREAK)


def main() -> int:
    """Write or check the page and the recipes' heads."""
    code = write_or_check(PAGE, page())
    for name in names():
        path = RECIPES / f"{name}.yaml"
        old = path.read_text(encoding="utf-8")
        new = with_head_line(old, head_line(name))
        if "--check" not in sys.argv:
            path.write_text(new, encoding="utf-8")
        elif new != old:
            print(f"recipes/{name}.yaml is out of date: run `make docs`", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
