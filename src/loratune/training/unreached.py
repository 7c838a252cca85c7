"""Trained parts that the data does not reach: they get no gradient, and are saved as they were initialized."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft.tuners.lora.layer import ParamWrapper

from loratune.model.adapter.patterns import module_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from torch import nn

_SHOWN = 4
"""Names that a message shows."""


def without_gradient(model: nn.Module) -> list[str]:
    """Return the trained modules that the backward pass of a step left without a gradient, by their names in the base.

    A stack of experts (`lora.target_parameters`) is listed expert by expert, as `model.layers.0.mlp.experts[3]`.

    Args:
        model: The adapted model, with the gradients of one or more whole steps.
    """
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, ParamWrapper)}
    reached: dict[str, bool] = {}
    for name, weight in model.named_parameters():
        # Rows of new tokens are left out: a step need not have any, and the plan names those that no example has.
        if weight.requires_grad and ".token_adapter." not in name:
            # One of the two matrices is enough: while B is zero, A's gradient is zero as well.
            for part, has_gradient in _parts(name, weight, stacks.get(name.partition(".lora_")[0])):
                reached[part] = reached.get(part, False) or has_gradient
    return [part for part, has_gradient in reached.items() if not has_gradient]


def _parts(name: str, weight: nn.Parameter, stack: ParamWrapper | None) -> Iterator[tuple[str, bool]]:
    """Yield the trained parts that a parameter belongs to, and whether it has a gradient there."""
    module, gradient = module_of(name), weight.grad
    if stack is None or stack.num_experts == 1:
        yield module, gradient is not None and bool(gradient.any())
        return
    for number in range(stack.num_experts):
        yield f"{module}[{number}]", gradient is not None and bool(_of_expert(gradient, name, stack, number).any())


def _of_expert(gradient: torch.Tensor, name: str, stack: ParamWrapper, number: int) -> torch.Tensor:
    """Return one expert's share of the gradient of A, [E·r, d_in], or of B, [d_out, r·E]: the layout of PEFT."""
    if ".lora_A." in name:
        return gradient.reshape(stack.num_experts, -1, gradient.shape[-1])[number]
    return gradient.reshape(gradient.shape[0], -1, stack.num_experts)[..., number]


def unreached_in_words(names: Sequence[str]) -> str:
    """Return a warning that these parts got no gradient in a run's first step, and what to do about it."""
    more = len(names) - _SHOWN
    shown = ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
    ways = ["adapt only what the data reaches: a preset of lora.targets, or lora.layers"]
    if any(name.endswith("]") for name in names):
        ways.append("an expert may still be reached by later examples; more, and more varied, rows reach more of them")
    return (
        f"no gradient in the first step, so the data of that step does not reach: {shown}; what no data ever reaches "
        f"is saved as it began\n  fix: {'; '.join(ways)}"
    )
