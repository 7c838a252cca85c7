"""Write docs/architectures.md, each row determined with a tiny model; tests/invariants/test_families.py compares it."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from pages import table, write_or_check
from transformers.utils import logging

from tests.invariants.families import CONFIGS, examine

PAGE = Path(__file__).parent / "architectures.md"
TEXT = """# Architectures

<!-- Written by docs/make_architectures.py, which examines a tiny model per family; run `make docs` to update it. -->

Each row was determined with a tiny random model in float32, and `tests/invariants/test_families.py` verifies it.
Other families may work as well: `loratune plan` resolves the presets for your model, and before a run, the loss is
compared with that of the model's own forward pass.

{rows}

- *minimal, balanced, attention, complete*: the number of matrices that each preset of `lora.targets` adapts in the
  tiny model, which has two layers, or three or four if the family has more kinds of layers.
- *left out by `complete`*: matrices in the layers that stay frozen. Routers always do. In transformers 5, the
  experts of a layer are stacked in one three-dimensional tensor (`experts.…`), and are not linear modules. Where
  `gate_proj`, `up_proj` and `down_proj` of dense layers and shared experts are left out too, PEFT would take these
  names to mean the stacked experts and adapt those instead; naming them is refused. Mamba's kernels read its
  projections directly and would bypass any adapter.
- *examples*: packed into one forward pass, or one at a time, with the reason that the run prints. The latter has
  the same mathematics, but is slower on short examples. If examples are packed, the loss and every gradient are
  those of separate examples, even with sliding windows, soft caps, sinks, scaled and capped logits, attention over
  shared keys, and position-dependent temperatures.
- *fast = plain*: the fast engine's loss and the gradient of each adapter matrix are those of the model's own
  forward pass, up to float32 rounding. `pytest -m slow tests/invariants/test_families.py` trains each family with
  both engines, and compares all losses and the final adapter with stock TRL; TRL itself cannot train Llama 4, and
  `engine: trl` says so.
- *merged = adapter*: the folder that `loratune merge` writes, loaded by transformers, gives the logits of the
  adapter on its base. For models with image towers (Gemma 3 and 4, Llama 4, Qwen3.5), the language model is
  trained, and merged into the complete folder.
- *GGUF*: `loratune export --to gguf`, the adapter alone or the full model. *adapter in vLLM*: `loratune export --to
  vllm`. Where it says no, `loratune merge` writes a folder that their own converters can read, if they support the
  architecture.

## Beyond short examples

The comparison before a run uses 24 tokens of two examples. Whatever so few tokens cannot show is decided from the
model's structure:

- A convolution or a recurrence over tokens (Mamba, gated delta nets, LFM 2) passes state from token to token, so
  these run one example at a time.
- Some windows or chunks exist only in the attention mask, which packed attention does not use (Phi 3.5 MoE, Qwen2
  MoE with `use_sliding_window`). There, micro-batches with an example longer than the window run one example at a
  time.
- Rotary positions of type `longrope` and `dynamic` depend on the longest example of a forward pass. Beyond
  `original_max_position_embeddings`, examples run one at a time, so that each gets the frequencies it will have
  when the model is served. Stock TRL pads a batch to its longest example and rotates all examples with the same
  frequencies, so in this case the engines differ.
- With dropout inside attention (GPT-2 as published), examples run one at a time, with the model's own attention.

## Mixtures of experts

Stock TRL 1.16 adds the routers' load-balancing loss with the model's own `router_aux_loss_coef`. loratune leaves it
out, in both engines and in the script of `loratune eject`, and `plan` says so: this loss is a product of means over
the examples that share a batch, so it would change with the token budget and the number of devices, and the routers
it is meant for are frozen. Routers of Phi 3.5 MoE sample randomly during training; `plan` says that too.
"""


def page(rows: list[dict[str, str]]) -> str:
    """Return the page."""
    return TEXT.format(rows=table(rows))


def _row(name: str) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        return examine(name, Path(folder))


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sys.exit(write_or_check(PAGE, page([_row(name) for name in CONFIGS])))
