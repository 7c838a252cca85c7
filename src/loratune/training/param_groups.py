"""Parameter groups with their own learning rate: LoRA+'s matrices B, and modules named by a pattern."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratune.model.adapter.patterns import module_of, pattern_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn


def scale_b_learning_rate(optimizer: Any, model: nn.Module, ratio: float) -> None:
    """Move the adapter's matrices B into their own groups, with `ratio` times the learning rate (LoRA+).

    Source: Hayou et al. 2024, arXiv 2402.12354. Call it before the learning-rate schedule is created, which scales the
        rate
    that each group then has.

    Args:
        optimizer: A fresh optimizer, with transformers' groups.
        model: The adapted model.
        ratio: Learning rate of B over that of A.
    """
    # New groups go to the end: transformers logs the rate of the first one, which stays A's.
    matrices_b = {id(weight) for name, weight in model.named_parameters() if ".lora_B." in name}
    for group in list(optimizer.param_groups):
        chosen = [weight for weight in group["params"] if id(weight) in matrices_b]
        if chosen:
            group["params"] = [weight for weight in group["params"] if id(weight) not in matrices_b]
            optimizer.add_param_group({**group, "params": chosen, "lr": ratio * group["lr"]})


def apply_learning_rate_pattern(optimizer: Any, model: nn.Module, rates: Mapping[str, float]) -> None:
    """Move the parameters of modules that a pattern matches into their own groups, with its learning rate.

    Call it before `scale_b_learning_rate`, which multiplies each group's rate, and before the schedule is created.

    Args:
        optimizer: A fresh optimizer, with transformers' groups.
        model: The adapted model.
        rates: Pattern → learning rate.
    """
    # The old groups stay in front even if patterns leave them empty: transformers logs the rate of the first one.
    wanted = {id(weight): pattern_of(rates, module_of(name)) for name, weight in model.named_parameters()}
    for group in list(optimizer.param_groups):
        everything = list(group["params"])
        group["params"] = [weight for weight in everything if wanted[id(weight)] not in rates]
        for pattern, rate in rates.items():
            chosen = [weight for weight in everything if wanted[id(weight)] == pattern]
            if chosen:
                optimizer.add_param_group({**group, "params": chosen, "lr": rate})
