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
Other families may work as well: `loratune plan` resolves the presets on your model, and before a run the loss is
compared with the model's own.

{rows}

- *minimal, balanced, attention, complete*: number of matrices that each preset of `lora.targets` adapts in the tiny
  model, which has two layers, or three or four if the family needs them to show all kinds of layers.
- *left out by `complete`*: matrices in the layers that stay frozen. Routers always do. The experts of transformers
  5 are stacked, one three-dimensional tensor for all experts of a layer (`experts.…`), and are not linear modules.
  If `gate_proj`, `up_proj` and `down_proj` of dense layers and shared experts are left out too, PEFT would take
  these names for the stacked experts and adapt those instead; naming them is refused. Mamba's projections are read
  directly by its kernels, bypassing any adapter.
- *examples*: packed into one forward pass, or one forward pass each, with the reason that the run prints. The
  latter is slower on small examples, with the same mathematics. Packing always means that sliding windows, soft
  caps, sinks, scaled and capped logits, attention over shared keys and position-dependent temperatures give the
  loss and every gradient of separate examples.
- *fast = plain*: the fast engine's loss and the gradient of each adapter matrix are those of the model's own
  forward pass, to float32 rounding. `pytest -m slow tests/invariants/test_families.py` trains each family with both
  engines, and compares all losses and the final adapter with stock TRL; TRL itself cannot train Llama 4, and
  `engine: trl` says so.
- *merged = adapter*: the folder that `loratune merge` writes, loaded by transformers, has the logits of the adapter
  on its base. For models with image towers (Gemma 3 and 4, Llama 4, Qwen3.5) the language model is trained and
  merged into the complete folder.
- *GGUF*: `loratune export --to gguf`, the adapter alone or the full model. *adapter in vLLM*: `loratune export --to
  vllm`. If it says no, `loratune merge` writes a folder for their own converters, if these know the architecture.

## Beyond short examples

The comparison before a run uses 24 tokens of two examples. What it cannot see on so few is decided from the model's
structure:

- A convolution or a recurrence over tokens (Mamba, gated delta nets, LFM 2) passes state from token to token: one
  example at a time.
- A window or chunk that exists only in the attention mask, which packed attention does not have (Phi 3.5 MoE, Qwen2
  MoE with `use_sliding_window`): micro-batches with an example longer than the window run one example at a time.
- Rotary positions of type `longrope` and `dynamic` depend on the longest example of a forward pass: beyond
  `original_max_position_embeddings`, one example at a time, so that each gets the frequencies it will have when the
  model is served. Stock TRL pads a batch to its longest example and rotates all alike, so there the engines differ.
- Dropout inside attention (GPT-2 as published): one example at a time, with the model's own attention.

## Mixtures of experts

Stock TRL 1.16 adds the routers' load-balancing loss with the model's own `router_aux_loss_coef`. loratune leaves it
out, in both engines and in the script of `loratune eject`, and `plan` says so: it is a product of means over the
examples that share a batch, so it would change with the token budget and the number of devices, and the routers it
is meant for are frozen. Routers of Phi 3.5 MoE sample randomly during training; `plan` says that too.
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
