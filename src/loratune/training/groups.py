"""LoRA+: the matrices B learn faster than A."""

from __future__ import annotations

from typing import Any

from torch import nn


def let_b_learn_faster(optimizer: Any, model: nn.Module, ratio: float) -> None:
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
