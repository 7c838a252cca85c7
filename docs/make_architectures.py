"""Write docs/architectures.md, each row of it found out with a tiny model; tests/invariants/test_families.py compares it."""

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

<!-- Written by docs/make_architectures.py, which examines a tiny model of each family; `make docs` writes it anew. -->

Each row was found out with a tiny random model in float32, and `tests/invariants/test_families.py` finds it out again. A family that is
not here may work as well: `loratune plan` resolves the presets on your model, and before a run the loss is compared with the
model's own.

{rows}

- *minimal, balanced, attention, complete*: the matrices that each preset of `lora.targets` adapts in the tiny model, which has two layers,
  three or four where the family needs them to show all its kinds.
- *left out by `complete`*: matrices of the layers that stay frozen. Routers do, always. The experts of transformers 5 are stacked, one
  tensor of three axes for all experts of a layer (`experts.…`), and no linear modules. Where `gate_proj`, `up_proj` and `down_proj` of dense
  layers and shared experts are left out too, PEFT takes these names for the stacked experts and would adapt them instead; naming them
  is refused. Mamba's projections are read by its kernels, past any adapter.
- *examples*: packed into one forward, or one forward each, with the reason that the run prints. That is slower on small examples, and the
  same mathematics. Packed always means: sliding windows, soft caps, sinks, scaled and capped logits, attention over shared keys
  and temperatures by position give the loss and every gradient of separate examples.
- *fast = plain*: the fast engine's loss and the gradient of each adapter matrix are those of the model's own forward, to float32's rounding.
  `pytest -m slow tests/invariants/test_families.py` trains each family with both engines, and compares all losses and the final
  adapter with stock TRL's; TRL itself cannot train Llama 4, and `engine: trl` says so.
- *merged = adapter*: the folder that `loratune merge` writes, loaded by transformers, has the logits of the adapter on its base. Of models
  with towers for images (Gemma 3 and 4, Llama 4, Qwen3.5) the language model is trained, and merged into the whole folder.
- *GGUF*: `loratune export --to gguf`, the adapter alone or the whole model. *adapter in vLLM*: `loratune export --to vllm`. Where it says no,
  `loratune merge` writes a folder that their own tools take, if they know the architecture.

## Beyond short examples

The comparison before a run takes 24 tokens of two examples. What it cannot see on so few is decided from the model's structure:

- A convolution or a recurrence over tokens (Mamba, gated delta nets, LFM 2) hands a state from token to token: one example at a time.
- A window or chunk that stands in the attention mask only, which packed attention has none of (Phi 3.5 MoE, Qwen2 MoE with
  `use_sliding_window`): micro-batches with an example longer than the window are run one example at a time.
- Rotary positions of type `longrope` and `dynamic` change for the whole forward with its longest example: beyond
  `original_max_position_embeddings`, one example at a time, so that each has the frequencies that it has when the model serves. Stock TRL
  pads a batch to its longest example and rotates all alike, so there the engines differ.
- Dropout inside attention (GPT-2 as published): one example at a time, with the model's own attention.

## Mixtures of experts

Stock TRL 1.16 adds the routers' load-balancing loss with the model's own `router_aux_loss_coef`. loratune leaves it out, in both engines
and in the script of `loratune eject`, and `plan` says so: it is a product of means over whatever shares a batch, so it would change
with the token budget and the number of devices, and the routers that it is for are frozen. Routers of Phi 3.5 MoE draw at random
while training; `plan` says that too.
"""


def page(rows: list[dict[str, str]]) -> str:
    """The whole page."""
    return TEXT.format(rows=table(rows))


def _row(name: str) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        return examine(name, Path(folder))


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sys.exit(write_or_check(PAGE, page([_row(name) for name in CONFIGS])))
