"""Proofs for adapters made from others: the written files against the closed form, in weights and in logits.

The closed form is a dense float64 matrix for each module, computed from the sources by `Σ weight · scale · B · A`. The
files are read by PEFT, so that a scale, a pattern or a name that PEFT interprets differently shows: in each update,
however small, and in the logits as a share of what the adapter does to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from loratune.exporting.adapter_matrices import LowRank
from loratune.exporting.adapters.algebra import dense
from loratune.exporting.weights_proof import same_values
from loratune.run.errors import RunError

if TYPE_CHECKING:
    from pathlib import Path

    from loratune.exporting.adapters.folder import Adapter

WEIGHTS_TOLERANCE = 1e-6
"""The largest relative error of a written update: that of float32, in which its factors are written."""

LOGITS_TOLERANCE = 1e-4
"""The largest difference of two logits that float32 sums in another order explain, as a share of the largest logit."""

ARITHMETIC = 1e-5
"""The difference of two logits, as a share of the largest, below which float32 tells nothing."""

SHARE_OF_EFFECT = 0.01
"""The largest difference of two logits as a share of what the adapter changes, where that is more than arithmetic."""

_TOKENS = 64
_CLASSES: Mapping[str, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
}
"""PEFT's `task_type` → the class that loads its base, of the tasks whose models have logits for tokens alone."""

_BUG = "this is a bug: please report it with the adapters' configurations"

ClosedForm = Mapping[str, Sequence[tuple[float, LowRank]]]
"""Module → the updates, each with its weight, whose sum its update should be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ByPeft:
    """What PEFT makes of a written adapter, against the closed form.

    Attributes:
        relative_error: That of its updates, as `check_updates` returns it.
        logits_difference: The largest difference of a logit, as a share of the largest.
        logits_change: The same between base and closed form.
    """

    relative_error: float
    logits_difference: float
    logits_change: float


def closed_form(adapter: Adapter) -> ClosedForm:
    """Return the updates of an adapter."""
    return weighted_closed_form([adapter], [1.0])


def weighted_closed_form(adapters: Sequence[Adapter], weights: Sequence[float]) -> ClosedForm:
    """Return Σ weight · update of several adapters."""
    modules = sorted({module for adapter in adapters for module in adapter.updates})
    return {
        module: [
            (weight, adapter.updates[module])
            for weight, adapter in zip(weights, adapters, strict=True)
            if module in adapter.updates
        ]
        for module in modules
    }


def check_updates(written: Adapter, wanted: ClosedForm) -> float:
    """Compare the updates of a written adapter, as this package reads them, with the closed form.

    Returns:
        ‖written - closed form‖ over the norm of the updates that were added, over all matrices. If these cancel, what
        is left of them is not a measure.

    Raises:
        RunError: A matrix differs by more than float32 rounds, or other matrices were written.
    """
    found = {module: partial(dense, update) for module, update in written.updates.items()}
    return _compare(found, wanted, "the written update of {} is {:.2g} off the closed form", written.path)


def _compare(found: Mapping[str, Callable[[], torch.Tensor]], wanted: ClosedForm, problem: str, path: Path) -> float:
    """Compare dense updates with the closed form, one matrix in memory at a time; return the error of all of them."""
    if found.keys() != wanted.keys():
        other = min(found.keys() ^ wanted.keys())
        raise RunError(f"the written adapter does not have the matrices that it should: {other}", file=path, fix=_BUG)
    error = size = 0.0
    for module, parts in wanted.items():
        off = float((found[module]() - _sum(parts)).norm())
        norms = [abs(weight) * float(dense(update).norm()) for weight, update in parts]
        # Each factor is rounded once, and what the factors of an update share may cancel in their product.
        most = WEIGHTS_TOLERANCE * sum(_norm_without_cancelling(weight, update) for weight, update in parts)
        if not off <= most:
            raise RunError(
                f"{problem.format(module, off / sum(norms) if sum(norms) else off)}; float32 explains "
                f"{WEIGHTS_TOLERANCE:g}",
                file=path,
                fix=_BUG,
            )
        error, size = error + off**2, size + sum(norms) ** 2
    return float((error / size) ** 0.5) if size else float(error**0.5)


def _sum(parts: Sequence[tuple[float, LowRank]]) -> torch.Tensor:
    return torch.stack([weight * dense(update) for weight, update in parts]).sum(0)


def _norm_without_cancelling(weight: float, update: LowRank) -> float:
    return abs(weight * update.scale) * float((update.b.double().abs() @ update.a.double().abs()).norm())


def check_by_peft(base: Path, written: Path, wanted: ClosedForm, adapter: Adapter) -> ByPeft | str:
    """Compare base and written adapter, as PEFT loads them, with the base to which the closed form is added.

    Args:
        base: The base's folder.
        written: The written adapter's folder.
        wanted: The closed form of its updates.
        adapter: The written adapter, for its biases and whole tensors.

    Returns:
        The differences; or, in words, why they cannot be computed.

    Raises:
        RunError: An update, a bias or a tensor is another than it should be, or the logits differ.
    """
    task = str(adapter.config.get("task_type") or "CAUSAL_LM")
    if task not in _CLASSES:
        return f"the adapter is for {task}"
    model: Any = _CLASSES[task].from_pretrained(base, dtype=torch.float32, **_classes_of(adapter))
    names = {name for name, _ in model.named_modules()}
    if unknown := sorted(wanted.keys() - names):
        return f"transformers loads {unknown[0]} under another name, or as a part of a stack"
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    tokens = torch.arange(1, _TOKENS + 1)[None] * 7919 % vocabulary  # any tokens do: both sides read the same ones
    alone = _logits(model, tokens)
    adapted: Any = PeftModel.from_pretrained(model, str(written))
    by_peft = _logits(adapted, tokens)
    error = _check_updates_of(adapted, wanted, adapter, written)
    model = adapted.unload()
    _check_replaced(model, adapter, written)
    _add_closed_form(model, wanted, adapter)
    exact = _logits(model, tokens)
    largest = float(exact.abs().max())
    difference, change = (float((exact - other).abs().max()) / largest for other in (by_peft, alone))
    if not difference <= logits_limit(change):
        raise RunError(
            f"the logits of base and written adapter, as PEFT loads them, are {difference:.2g} off those of the closed "
            f"form, which the adapter changes by {change:.2g}; float32 explains {logits_limit(change):.2g}",
            file=written,
            fix=_BUG,
        )
    return ByPeft(relative_error=error, logits_difference=difference, logits_change=change)


def logits_limit(change: float) -> float:
    """Return the largest difference of two logits that float32 explains, where an adapter changes them by so much."""
    return min(LOGITS_TOLERANCE, max(SHARE_OF_EFFECT * change, ARITHMETIC))


def _classes_of(adapter: Adapter) -> dict[str, int]:
    """Return the number of classes of a classifier's adapter, as `from_pretrained` takes it."""
    if adapter.config.get("task_type") not in ("SEQ_CLS", "TOKEN_CLS"):
        return {}
    heads = (item.values for name, item in adapter.whole.items() if name in ("score.weight", "classifier.weight"))
    return {"num_labels": next((int(head.shape[0]) for head in heads), 2)}


def _check_updates_of(adapted: Any, wanted: ClosedForm, adapter: Adapter, written: Path) -> float:
    """Compare the updates that PEFT computes from a written adapter with what they should be, as `check_updates`."""
    layers = {
        name: layer
        for name, layer in adapted.get_base_model().named_modules()
        if "default" in getattr(layer, "lora_A", ())
    }
    found = {name: partial(_delta, layer, transposed=layer.fan_in_fan_out) for name, layer in layers.items()}
    error = _compare(found, wanted, "the update of {}, as PEFT loads it, is {:.2g} off the closed form", written)
    for name, tensor in adapter.added_biases.items():
        layer = layers[name]
        if not same_values(tensor, layer.scaling["default"] * layer.lora_B["default"].bias):
            raise _other_values(f"{name}.lora_B.bias", written)
    return error


def _delta(layer: Any, *, transposed: bool) -> torch.Tensor:
    layer.lora_A.double()
    layer.lora_B.double()
    delta: torch.Tensor = layer.get_delta_weight("default").detach()
    return delta.T if transposed else delta


def _check_replaced(model: Any, adapter: Adapter, written: Path) -> None:
    """Compare the tensors that PEFT replaced in a model with those of the adapter."""
    replaced = {**adapter.biases, **{name: item.values for name, item in adapter.whole.items()}}
    for name, tensor in replaced.items():
        if not same_values(tensor, model.get_parameter(name).detach()):
            raise _other_values(name, written)


def _other_values(name: str, written: Path) -> RunError:
    return RunError(f"{name}, as PEFT loads it, has other values than it should", file=written, fix=_BUG)


def _add_closed_form(model: Any, wanted: ClosedForm, adapter: Adapter) -> None:
    """Give a model the closed form of an adapter."""
    with torch.no_grad():
        for name, tensor in adapter.biases.items():
            model.get_parameter(name).copy_(tensor)
        for name, item in adapter.whole.items():
            model.get_parameter(name).copy_(item.applied_to(model.get_parameter(name)))
        for module, parts in wanted.items():
            layer = model.get_submodule(module)
            update = _sum(parts).float()
            layer.weight += update.T if adapter.updates[module].transposed else update
        for module, tensor in adapter.added_biases.items():
            layer = model.get_submodule(module)
            layer.bias = torch.nn.Parameter(tensor if layer.bias is None else layer.bias + tensor)


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=tokens).logits.double()
    return logits
