"""What each linear module of a decoder layer is for: query, key, value, output, other attention, or feed-forward.

Roles are read from the structure of the model. A candidate is a linear module inside the repeated layers of the
decoder. Below a module that is called attention, its own name says what it projects (`q_proj`, `query`, `c_attn`, …).
Everything else in a layer is feed-forward, except routers of experts, state-space mixers and the mixing coefficients of
Gemma 3n. Embeddings and the output head lie outside of the layers and have no role.

A module counts as attention by its name, or by its class where a layer's mixer has the same name whatever it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from collections.abc import Mapping

QUERY, KEY, VALUE, OUTPUT, OTHER, FEED_FORWARD = "query", "key", "value", "output", "attention", "feed-forward"

PRESET_ROLES: Mapping[str, frozenset[str]] = {
    "minimal": frozenset({QUERY}),
    "balanced": frozenset({QUERY, VALUE}),
    "attention": frozenset({QUERY, KEY, VALUE, OUTPUT}),
    "complete": frozenset({QUERY, KEY, VALUE, OUTPUT, OTHER, FEED_FORWARD}),
}

# Name of a linear module below an attention module, in lower case → what it projects. A fused matrix has several
# roles. Names with `_a_` and `_b_` are the two halves of DeepSeek's low-rank projections.
_ATTENTION_NAMES: Mapping[str, frozenset[str]] = {
    name: frozenset(roles)
    for names, roles in (
        ("q_proj query wq q_lin q_attn q_a_proj q_b_proj to_q", (QUERY,)),
        ("k_proj key wk k_lin to_k", (KEY,)),
        ("v_proj value wv v_lin to_v", (VALUE,)),
        ("kv_proj key_value wkv kv_a_proj_with_mqa kv_b_proj", (KEY, VALUE)),
        ("qkv_proj query_key_value c_attn wqkv w_pack qkv in_proj_qkv in_proj_qkvz", (QUERY, KEY, VALUE)),
        ("o_proj out_proj dense c_proj wo out_lin to_out resid_proj", (OUTPUT,)),
    )
    for name in names.split()
}


def reads_attention(name: str) -> bool:
    """Tell whether the matrix of this full name takes the attention's output as its input, not the layer's."""
    return OUTPUT in _ATTENTION_NAMES.get(name.rpartition(".")[2].lower(), frozenset())


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that an adapter can be attached to, by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def repeated_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the repeated layers of the decoder by full name; the towers of other modalities are not searched."""
    root = model
    if isinstance(model, PreTrainedModel):
        root = model.get_decoder()  # type: ignore[no-untyped-call]
    prefix = next((f"{name}." if name else "" for name, module in model.named_modules() if module is root), "")
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in root.named_modules():
        nested = any(name.startswith(f"{stack}.") for stack in stacks)
        if isinstance(module, nn.ModuleList) and not nested and linear_modules(module):
            stacks[name] = module
    if not stacks:
        return {}
    name, stack = max(stacks.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return {f"{prefix}{name}.{index}": layer for index, layer in enumerate(stack)}


def module_roles(model: nn.Module) -> dict[str, frozenset[str]]:
    """Return the roles of every linear module inside the layers, by full name; a preset adapts none without a role."""
    taken = taken_by_peft(model)
    return {
        f"{layer_name}.{name}": frozenset() if f"{layer_name}.{name}" in taken else _role(layer, name)
        for layer_name, layer in repeated_layers(model).items()
        for name in linear_modules(layer)
    }


def taken_by_peft(model: nn.Module) -> frozenset[str]:
    """Return the linear modules whose names PEFT would replace by the experts' stacked parameters.

    Adapters of mixture-of-experts models saved with transformers 4 name the experts' matrices, which are stacked in
    transformers 5. PEFT maps such names to the stacked parameters, also where a dense layer or a shared expert has a
    matrix of that name, and would then adapt the experts instead of that matrix. This asks PEFT itself, name by name.
    """
    if not isinstance(model, PreTrainedModel) or not has_fused_experts(model):
        return frozenset()
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    def is_taken(leaf: str) -> bool:
        config = LoraConfig(target_modules=[leaf])
        try:
            convert_peft_config_for_transformers(config, model=model, conversions=None)
        except ValueError:  # PEFT wants the other half of a stacked parameter too
            return True
        return leaf not in config.target_modules

    names = list(linear_modules(model))
    taken = {leaf for leaf in {name.rpartition(".")[2] for name in names} if is_taken(leaf)}
    return frozenset(name for name in names if name.rpartition(".")[2] in taken)


def _role(layer: nn.Module, name: str) -> frozenset[str]:
    """Return the roles of one linear module, by its name inside the layer, such as `self_attn.q_proj`."""
    *parents, leaf = name.lower().split(".")
    if _is_router(layer, name):
        return frozenset()
    parent = layer.get_submodule(name.rpartition(".")[0])
    if any("attn" in part or "attention" in part for part in parents) or "Attention" in type(parent).__name__:
        return _ATTENTION_NAMES.get(leaf, frozenset({OTHER}))
    if is_state_space(parent) or "altup" in parents:
        return frozenset()
    return frozenset({FEED_FORWARD})


def _is_router(layer: nn.Module, name: str) -> bool:
    """Tell whether a module routes tokens to experts: a `router`, or a `gate` (not `gate_proj`) next to experts."""
    if any(part.endswith("router") for part in name.lower().split(".")):
        return True
    parent, _, leaf = name.rpartition(".")
    siblings = [child for child, _ in layer.get_submodule(parent).named_children()]
    return leaf.endswith("gate") and any("expert" in sibling for sibling in siblings)


def is_state_space(parent: nn.Module) -> bool:
    """Tell whether a module is a Mamba mixer."""
    # Its kernels read the weights of the projections directly and would bypass adapters; PEFT refuses them too.
    return any(name == "A_log" for name, _ in parent.named_parameters(recurse=False))


def has_fused_experts(model: nn.Module) -> bool:
    return any(
        parameter.ndim == 3 and "expert" in name
        for layer in repeated_layers(model).values()
        for name, parameter in layer.named_parameters()
    )
