"""K LoRA adapters on one loaded base: stepped together, with batched small products, or one after the other.

python benchmarks/k_adapters.py [--model FOLDER] [--adapters 4] [--examples 4] [--tokens 128] [--rounds 5]

Each adapter has its own examples, initial values and AdamW. Together, the examples of all go through the base in one
forward, and adapter k's products see its rows only. Both ways start from the same values and take the same steps in
turns; losses and weights must agree to 1e-5, or the script fails. Without --model the base is random, in the shape of
a small Llama. Only times of a quiet machine mean anything.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

RANK, SCALE, TOLERANCE = 16, 2.0, 1e-5
TARGETS = ("q_proj", "v_proj")


class ManyLora(torch.nn.Module):
    """A frozen linear layer with K adapters; the rows of a batch belong to them in K equal parts."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a_KRI, self.b_KOR = torch.empty(0), torch.empty(0)  # set before each step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows_KTI = x.reshape(self.a_KRI.shape[0], -1, x.shape[-1])
        low_KTR = torch.bmm(rows_KTI, self.a_KRI.transpose(1, 2))
        update_KTO = torch.bmm(low_KTR, self.b_KOR.transpose(1, 2))
        out: torch.Tensor = self.base(x) + SCALE * update_KTO.reshape(*x.shape[:-1], -1)
        return out


def with_adapters(model: Any) -> list[ManyLora]:
    """Put a layer for adapters in the place of each target; return them."""
    model.requires_grad_(False)
    layers = []
    for parent in list(model.modules()):
        for name in TARGETS:
            base = getattr(parent, name, None)
            if isinstance(base, torch.nn.Linear):
                layers.append(ManyLora(base))
                setattr(parent, name, layers[-1])
    return layers


class Trained:
    """The stacked weights of some adapters, and their optimizer."""

    def __init__(self, layers: Sequence[ManyLora], weights: Sequence[torch.Tensor]) -> None:
        self.layers = layers
        self.weights = [torch.nn.Parameter(weight.clone()) for weight in weights]
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-3)

    def step(self, model: Any, ids_KBL: torch.Tensor) -> torch.Tensor:
        """Take a step of each adapter on its own examples; return their losses, [K]."""
        for i, layer in enumerate(self.layers):
            layer.a_KRI, layer.b_KOR = self.weights[2 * i], self.weights[2 * i + 1]
        ids = ids_KBL.flatten(0, 1)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        each = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        losses_K: torch.Tensor = each.view(ids_KBL.shape[0], -1).mean(1)
        self.optimizer.zero_grad()
        losses_K.sum().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return losses_K.detach()


def initial(layers: Sequence[ManyLora], number: int) -> list[torch.Tensor]:
    """Return A, uniform as PEFT draws it, and small B of each layer, stacked over the adapters."""
    weights = []
    for layer in layers:
        inputs, outputs = layer.base.in_features, layer.base.out_features
        weights.append((torch.rand(number, RANK, inputs) * 2 - 1) / inputs**0.5)
        weights.append(0.01 * torch.randn(number, outputs, RANK))
    return weights


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    for name, default in (("adapters", 4), ("examples", 4), ("tokens", 128), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.manual_seed(0)
    if given.model:
        model: Any = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    else:
        sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 9}
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_key_value_heads=3, vocab_size=4096))
    layers = with_adapters(model)
    start = initial(layers, given.adapters)
    together = Trained(layers, start)
    separate = [Trained(layers, [weight[k : k + 1] for weight in start]) for k in range(given.adapters)]
    seconds: dict[str, list[float]] = {"together": [], "separate": []}
    for round_ in range(given.rounds + 1):  # the first warms up
        ids = torch.randint(model.config.vocab_size, (given.adapters, given.examples, given.tokens))
        found = {}
        for way in ("together", "separate") if round_ % 2 else ("separate", "together"):
            began = time.perf_counter()
            if way == "together":
                found[way] = together.step(model, ids)
            else:
                found[way] = torch.cat([own.step(model, ids[k : k + 1]) for k, own in enumerate(separate)])
            seconds[way].append(time.perf_counter() - began)
        apart = float((found["together"] - found["separate"]).abs().max())
        if not apart < TOLERANCE:
            raise SystemExit(f"step {round_}: losses differ by {apart:.2g}")
    stacked = [torch.cat(parts) for parts in zip(*(own.weights for own in separate), strict=True)]
    differences = [float((a - b).detach().abs().max()) for a, b in zip(together.weights, stacked, strict=True)]
    if not max(differences) < TOLERANCE:
        raise SystemExit(f"adapters differ by {max(differences):.2g}")
    median = {way: statistics.median(times[1:]) for way, times in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["together"][1:], seconds["separate"][1:], strict=True)]
    tokens = given.adapters * given.examples * given.tokens
    threads = torch.get_num_threads()
    print(f"{given.adapters} adapters, {tokens:,} tokens a step, {threads} threads, torch {torch.__version__}")
    for way, spent in median.items():
        print(f"{way}: {spent:.3f} s, {tokens / spent:,.0f} tokens/s")
    print(f"separate / together: {min(ratios):.2f} to {max(ratios):.2f}, median {statistics.median(ratios):.2f}")
    print(f"losses and weights equal; largest difference of a weight {max(differences):.1g}")


if __name__ == "__main__":
    main()
