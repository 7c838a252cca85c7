"""Proofs for adapters that were made of others: the written files against the closed form, in weights and in logits.

The closed form is a dense float64 matrix for each module, computed from the sources by `Σ weight · scale · B · A`. The
files are read by PEFT, so that a scale, a pattern or a name that PEFT takes otherwise shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loratune.exporting.adapters.algebra import dense
from loratune.run.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from loratune.exporting.adapters.folder import Adapter

WEIGHTS_TOLERANCE = 1e-6
"""The largest relative error of a written update: that of float32, in which its factors are written."""

LOGITS_TOLERANCE = 1e-4
"""The largest difference of two logits that float32 sums in another order explain, as a share of the largest logit."""

_TOKENS = 64

ClosedForm = Mapping[str, Callable[[], torch.Tensor]]
"""Module → its update as it should be, float64 [d_out, d_in]."""


def closed_form(adapter: Adapter) -> ClosedForm:
    """Return the updates of an adapter, dense."""
    return {module: partial(dense, update) for module, update in adapter.updates.items()}


def weighted_closed_form(adapters: Sequence[Adapter], weights: Sequence[float]) -> ClosedForm:
    """Return Σ weight · update of several adapters, dense."""
    modules = sorted({module for adapter in adapters for module in adapter.updates})

    def total(module: str) -> torch.Tensor:
        parts = [
            weight * dense(adapter.updates[module])
            for weight, adapter in zip(weights, adapters, strict=True)
            if module in adapter.updates
        ]
        return torch.stack(parts).sum(0)

    return {module: partial(total, module) for module in modules}


def check_updates(written: Adapter, wanted: ClosedForm) -> float:
    """Return ‖written - closed form‖ / ‖closed form‖ over all matrices of a written adapter.

    Raises:
        RunError: They differ by more than float32 rounds, or are of other matrices.
    """
    if written.updates.keys() != wanted.keys():
        other = min(written.updates.keys() ^ wanted.keys())
        raise RunError(f"the written adapter does not have the matrices that it should: {other}", file=written.path)
    error = size = 0.0
    worst = (-1.0, "")
    for module, make in wanted.items():
        exact = make()
        off = float((dense(written.updates[module]) - exact).square().sum())
        error, size = error + off, size + float(exact.square().sum())
        worst = max(worst, (off, module))
    relative = (error / size) ** 0.5 if size else error**0.5
    if not relative <= WEIGHTS_TOLERANCE:
        raise RunError(
            f"the written updates are {relative:.2g} off the closed form, most in {worst[1]}; float32 explains "
            f"{WEIGHTS_TOLERANCE:g}",
            file=written.path,
            fix="this is a bug: please report it with the adapters' configurations",
        )
    return relative


def check_logits(base: Path, written: Path, wanted: ClosedForm, adapter: Adapter) -> tuple[float, float]:
    """Compare two models by their logits: base with adapter, as PEFT loads it, and base with the closed form added.

    Args:
        base: The base's folder.
        written: The written adapter's folder.
        wanted: The closed form of its updates.
        adapter: The written adapter, for its biases and whole tensors.

    Returns:
        The largest difference as a share of the largest logit, and the same between base and closed form.

    Raises:
        RunError: The logits differ by more than float32 explains.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    tokens = torch.arange(1, _TOKENS + 1)[None] * 7919 % vocabulary  # any tokens do: both sides read the same ones
    alone = _logits(model, tokens)
    adapted: Any = PeftModel.from_pretrained(model, str(written))
    by_peft = _logits(adapted, tokens)
    model = adapted.unload()
    with torch.no_grad():
        for name, tensor in adapter.biases.items():
            model.get_parameter(name).copy_(tensor)
        for name, item in adapter.whole.items():
            model.get_parameter(name).copy_(item.applied_to(model.get_parameter(name)))
        for module, make in wanted.items():
            layer = model.get_submodule(module)
            update = make().float()
            layer.weight += update.T if adapter.updates[module].transposed else update
            if module in adapter.added_biases:
                layer.bias += adapter.added_biases[module]
    exact = _logits(model, tokens)
    largest = float(exact.abs().max())
    difference, change = (float((exact - other).abs().max()) / largest for other in (by_peft, alone))
    if not difference <= LOGITS_TOLERANCE:
        raise RunError(
            f"the logits of base and written adapter, as PEFT loads them, are {difference:.2g} off those of the closed "
            f"form; float32 explains {LOGITS_TOLERANCE:g}",
            file=written,
            fix="this is a bug: please report it with the adapters' configurations",
        )
    return difference, change


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=tokens).logits.double()
    return logits
