"""Parameters that learn at rates of their own: LoRA+'s matrices B, and modules that a pattern names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from loratune.model.adapter.patterns import module_of, pattern_of


def scale_b_learning_rate(optimizer: Any, model: nn.Module, ratio: float) -> None:
    """Move the adapter's matrices B into groups of their own, with `ratio` times the learning rate (Hayou et al. 2024, arXiv
    2402.12354).

    The schedule multiplies the rate that each group has when it is made, so this comes before it. The groups of A stay in
    front: the first one's rate is what is logged.

    Args:
        optimizer: Fresh, with groups as transformers makes them.
        model: With the adapter.
        ratio: Of the learning rates.
    """
    matrices_b = {id(weight) for name, weight in model.named_parameters() if ".lora_B." in name}
    for group in list(optimizer.param_groups):
        chosen = [weight for weight in group["params"] if id(weight) in matrices_b]
        if chosen:
            group["params"] = [weight for weight in group["params"] if id(weight) not in matrices_b]
            optimizer.add_param_group({**group, "params": chosen, "lr": ratio * group["lr"]})


def apply_learning_rate_pattern(optimizer: Any, model: nn.Module, rates: Mapping[str, float]) -> None:
    """Move the parameters of modules that a pattern names into groups of their own, with its learning rate.

    This comes before `scale_b_learning_rate`, which multiplies each group's rate, and before the schedule. The groups of the others stay in
    front, empty where a pattern takes them all: the first one's rate is what is logged.

    Args:
        optimizer: Fresh, with groups as transformers makes them.
        model: With the adapter.
        rates: Pattern → learning rate.
    """
    wanted = {id(weight): pattern_of(rates, module_of(name)) for name, weight in model.named_parameters()}
    for group in list(optimizer.param_groups):
        everything = list(group["params"])
        group["params"] = [weight for weight in everything if wanted[id(weight)] not in rates]
        for pattern, rate in rates.items():
            chosen = [weight for weight in everything if wanted[id(weight)] == pattern]
            if chosen:
                optimizer.add_param_group({**group, "params": chosen, "lr": rate})
