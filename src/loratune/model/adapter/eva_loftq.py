"""Initialization of A and B from data or from a quantized base: `lora.variant` eva and loftq.

Both are plain adapters afterwards.

EVA (Paischer et al. 2024, arXiv 2410.07170): the rows of A are the directions in which the inputs of the matrix vary
most on the run's own data, from PEFT's incremental SVD; B is zero. Ranks are not redistributed (rho 1), so that the
planned number of parameters is exact.

LoftQ (Li et al. 2023, arXiv 2310.08659), with one iteration, since the base is already quantized: B·A starts as the
best approximation of rank r of the quantization error W - Q(W). PEFT's `replace_lora_weights_loftq` does this on CUDA
only, and only for a scale of 1: with another alpha/r its initial values are wrong by that factor.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from peft import EvaConfig, PeftModel, initialize_lora_eva_weights
from peft.tuners.lora.layer import LoraLayer
from safetensors import safe_open

from loratune.model.quantization.quantize import as_multiplied
from loratune.model.safetensors_headers import stored_name, weight_files_of
from loratune.run.errors import RecipeError, RunError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

ITERATIONS = 16
"""Subspace iterations that find the largest singular values, as for PiSSA."""

OVERSAMPLING = 8
"""Directions beyond the rank that the subspace iteration follows, and drops."""

Batch = dict[str, torch.Tensor]


def batches_for_eva(examples: Sequence[Sequence[int]], *, r: int, batch_size: int, device: Any) -> list[Batch]:
    """Return padded batches of token ids with their attention mask.

    Each has at least `2 * r` tokens: the inputs of fewer than r tokens have fewer than r directions.

    Args:
        examples: Token ids of each example.
        r: Rank of the adapter.
        batch_size: Examples of a batch; more if they are short.
        device: Where the batches go.

    Raises:
        RecipeError: All examples together are shorter.
    """
    groups: list[list[Sequence[int]]] = [[]]
    for example in examples:
        if len(groups[-1]) >= batch_size and sum(map(len, groups[-1])) >= 2 * r:
            groups.append([])
        groups[-1].append(example)
    if sum(map(len, groups[-1])) < 2 * r and len(groups) > 1:
        last = groups.pop()
        groups[-1] += last
    if sum(map(len, groups[-1])) < 2 * r:
        raise RecipeError(
            f"lora.variant is eva, which needs {2 * r} tokens for rank {r}, but the training data has "
            f"{sum(map(len, groups[-1]))}",
            fix="lora.variant=plain, a smaller lora.r, or more data",
        )
    return [_padded(group, device) for group in groups]


def _padded(group: Sequence[Sequence[int]], device: Any) -> Batch:
    width = max(map(len, group))
    ids, mask = torch.zeros(len(group), width, dtype=torch.long), torch.zeros(len(group), width, dtype=torch.long)
    for row, example in enumerate(group):
        ids[row, : len(example)] = torch.as_tensor(example, dtype=torch.long)
        mask[row, : len(example)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def init_eva(model: PeftModel, batches: Sequence[Batch]) -> None:
    """Initialize A with PEFT's EVA."""
    # PEFT changes the configuration to match; the saved one must be that of a plain adapter.
    config: Any = model.peft_config["default"]
    before = copy.copy(config)
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=1.0, use_label_mask=False)
    initialize_lora_eva_weights(model, list(batches), gather_distributed_inputs=False, show_progress_bar=False)
    config.target_modules = before.target_modules
    config.rank_pattern, config.alpha_pattern = before.rank_pattern, before.alpha_pattern
    config.init_lora_weights, config.eva_config = True, None


def init_loftq(model: PeftModel, base: Path, *, seed: int) -> None:
    """Initialize B·A with the best approximation of the quantization error of nf4.

    Args:
        model: A base in nf4 with a fresh adapter.
        base: The folder with the weights before quantization.
        seed: Seed of the subspace iteration.

    Raises:
        RunError: The base's files lack an adapted weight.
    """
    layers = {
        name.removeprefix("base_model.model."): m for name, m in model.named_modules() if isinstance(m, LoraLayer)
    }
    dtype = model.get_base_model().dtype
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for name, weight in _weights(base, list(layers)):
            layer: Any = layers[name]
            error = weight.float() - as_multiplied(weight, "nf4", dtype)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            r = a.shape[0]
            # With q = r the result depends on the random start: 0.3 % from the best approximation on one processor,
            # less than 0.1 % on another. More directions remove that (Halko et al. 2011, arXiv 0909.4061, section 1.3).
            u, s, v = torch.svd_lowrank(error.to(a.device), q=min(r + OVERSAMPLING, *error.shape), niter=ITERATIONS)
            u, s, v = u[:, :r], s[:r].sqrt(), v[:, :r]
            a.copy_((v * s).T)
            b.copy_(u * s / layer.scaling["default"])


def _weights(folder: Path, modules: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield module names and weights, one at a time."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(file, framework="pt")) for file in weight_files_of(folder)]
        places = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no mapping
        for module in modules:
            found = stored_name(f"{module}.weight", places)
            if found is None:
                raise RunError(f"the base's files hold no tensor for {module}", file=folder, fix="lora.variant=plain")
            yield module, places[found].get_tensor(found)
