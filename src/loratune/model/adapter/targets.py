"""Which matrices an adapter is attached to: a preset, or names, resolved against the modules of the actual model.

Roles are found by structure. A candidate is a linear module inside the repeated layers of the decoder. Below a module
that is called attention, its own name says what it projects (`q_proj`, `query`, `c_attn`, …); everything else in a
layer, except routers of experts, state-space mixers and the mixing coefficients of Gemma 3n, is feed-forward. Embeddings and
the output head lie outside the layers and are never candidates of a preset. A module counts as attention by its name or,
where a layer has its mixer under one name whatever it is, by its class.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loratune.run.errors import RecipeError

QUERY, KEY, VALUE, OUTPUT, OTHER, FEED_FORWARD = "query", "key", "value", "output", "attention", "feed-forward"

PRESET_ROLES: Mapping[str, frozenset[str]] = {
    "minimal": frozenset({QUERY}),
    "balanced": frozenset({QUERY, VALUE}),
    "attention": frozenset({QUERY, KEY, VALUE, OUTPUT}),
    "complete": frozenset({QUERY, KEY, VALUE, OUTPUT, OTHER, FEED_FORWARD}),
}

# What a linear module below an attention module projects, by its own name in lower case. A fused matrix has several
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One adapted or adaptable weight matrix of d_out × d_in, or a stack of `count` of them in one parameter."""

    name: str
    d_in: int
    d_out: int
    count: int = 1


def reads_attention(name: str) -> bool:
    """Whether the matrix of this full name takes the attention's output, not what its neighbours take."""
    return OUTPUT in _ATTENTION_NAMES.get(name.rpartition(".")[2].lower(), frozenset())


def matrix(name: str, module: nn.Module) -> Matrix:
    """The shape of a linear module. GPT-2's `Conv1D` stores its weight as d_in × d_out, transposed.

    Raises:
        TypeError: The module is neither `Linear` nor `Conv1D`.
    """
    if isinstance(module, Conv1D):
        return Matrix(name=name, d_in=module.weight.shape[0], d_out=module.weight.shape[1])
    if isinstance(module, nn.Linear):
        return Matrix(name=name, d_in=module.in_features, d_out=module.out_features)
    raise TypeError(f"{name} is a {type(module).__name__}, not a linear module")


def resolve_targets(
    model: nn.Module, targets: str | tuple[str, ...], layers: str | tuple[int, ...] = "all"
) -> tuple[str, ...]:
    """Find the modules to adapt.

    Args:
        model: The base model, without an adapter. It may be on the meta device.
        targets: A preset (`minimal`, `balanced`, `attention`, `complete`), or names. A name matches a module's full
            name or its last dotted parts, as in PEFT: `q_proj`, `mlp.gate_proj`.
        layers: `all`, `first N`, `last N`, or the numbers of the decoder layers from 0 on.

    Returns:
        The full names of the modules, sorted.

    Raises:
        RecipeError: A preset or a name matches nothing, or matches a module that is no linear matrix, or a layer does not
            exist.
    """
    found = _resolve_preset(model, targets) if isinstance(targets, str) else _resolve_names(model, targets)
    return found if layers == "all" else in_chosen_layers(model, found, layers)


def in_chosen_layers(model: nn.Module, names: tuple[str, ...], layers: str | tuple[int, ...]) -> tuple[str, ...]:
    """Those of the modules that lie in the chosen layers."""
    all_layers = _layers(model)
    known = list(all_layers)
    if isinstance(layers, str):
        where, _, number = layers.partition(" ")
        count = int(number)
        numbers = tuple(range(count) if where == "first" else range(len(known) - count, len(known)))
    else:
        numbers = layers
    odd = [number for number in numbers if not 0 <= number < len(known)]
    if odd or not numbers:
        shown = layers if isinstance(layers, str) else list(layers)
        raise RecipeError(
            f"lora.layers is {shown}, but {type(model).__name__} has {len(known)} layers",
            fix=f"numbers from 0 to {len(known) - 1}, or first or last and at most {len(known)}",
        )
    chosen = {known[number] for number in numbers}
    inside = tuple(name for name in names if _layer_of(name, all_layers) in chosen)
    if not inside:
        raise RecipeError("lora.layers leaves none of the modules of lora.targets", fix="choose other layers")
    return inside


def describe_targets(model: nn.Module, targets: str | tuple[str, ...], layers: str | tuple[int, ...] = "all") -> str:
    """What `targets` became, in words: `q_proj, v_proj in 28 layers`.

    Raises:
        RecipeError: As `resolve_targets`.
    """
    chosen = set(resolve_targets(model, targets, layers))
    all_layers = _layers(model)
    layers_by_leaf: dict[str, set[str]] = {}
    for name in _linear_modules(model):
        if name in chosen:
            layers_by_leaf.setdefault(_short_name(name, all_layers), set()).add(_layer_of(name, all_layers))
    leaves_by_count: dict[int, list[str]] = {}
    for leaf, found in layers_by_leaf.items():
        leaves_by_count.setdefault(len(found - {""}), []).append(leaf)
    return "; ".join(
        _in_layers(leaves, count, len(all_layers)) for count, leaves in sorted(leaves_by_count.items())[::-1]
    )


def target_notes(model: nn.Module, targets: str | tuple[str, ...], stacked: tuple[str, ...] = ()) -> tuple[str, ...]:
    """What a user would not expect on this model: the routers' loss, and of a preset fused matrices, missing roles, frozen
    experts.

    Args:
        model: The base model.
        targets: As for `resolve_targets`; names get no notes of their own.
        stacked: `lora.target_parameters`.

    Returns:
        One sentence each, without a full stop.

    Raises:
        RecipeError: `targets` is text, but no preset.
    """
    notes = _model_notes(model) if isinstance(model, PreTrainedModel) else []
    if not isinstance(targets, str):
        return tuple(notes)
    wanted = _roles_of_preset(targets)
    roles = _roles(model)
    fused_experts = FEED_FORWARD in wanted and _has_fused_experts(model)
    fused = {name.rsplit(".", 1)[-1]: found for name, found in roles.items() if found & wanted and found - wanted}
    for leaf, found in sorted(fused.items()):
        asked, more = _list(found & wanted), _list(found - wanted)
        notes.append(f"fused {leaf}: {asked} cannot be adapted without {more}, so the whole matrix is adapted")
    missing = wanted - {OTHER} - frozenset().union(*roles.values())
    if fused_experts:
        if not stacked:
            notes.append(
                "the experts' weights are stacked in one tensor a layer, not linear modules, and stay frozen; "
                "lora.target_parameters adapts them"
            )
        missing -= {FEED_FORWARD}
    taken = _unique(name.rpartition(".")[2] for name in _taken_by_peft(model)) if FEED_FORWARD in wanted else []
    if taken:
        notes.append(
            f"{', '.join(taken)} beside the experts stay frozen too: PEFT takes these names for the stacked experts here"
        )
    if missing:
        notes.append(f"this model has no {_list(missing)} matrix inside its layers")
    return tuple(notes)


def _model_notes(model: PreTrainedModel) -> list[str]:
    notes, config = [], model.config
    coefficient = router_loss(config)
    if coefficient:
        notes.append(
            f"TRL would add the routers' load-balancing loss (router_aux_loss_coef {coefficient:g}); it is left out, in both "
            "engines: it is no sum over tokens, and the routers are frozen"
        )
    jitter = getattr(config.get_text_config(), "router_jitter_noise", None)
    if jitter:
        notes.append(
            f"its routers draw at random in training (router_jitter_noise {jitter:g}), so engine and token budget change which "
            "experts a token sees"
        )
    mixers = sorted({type(module).__name__ for module in model.modules() if _is_state_space(module)})
    if mixers:
        notes.append(f"the planned memory and time know nothing of what {', '.join(mixers)} keeps and does: leave room")
    return notes


def _roles_of_preset(preset: str) -> frozenset[str]:
    if preset not in PRESET_ROLES:
        presets = ", ".join(PRESET_ROLES)
        raise RecipeError(f"lora.targets is {preset!r}", fix=f"give one of {presets}, or a list of names: [{preset}]")
    return PRESET_ROLES[preset]


def _resolve_preset(model: nn.Module, preset: str) -> tuple[str, ...]:
    wanted = _roles_of_preset(preset)
    names = tuple(sorted(name for name, roles in _roles(model).items() if roles & wanted))
    if not names:
        what = _list(wanted - {OTHER})
        raise RecipeError(
            f"lora.targets is {preset}, but {type(model).__name__} has no {what} matrix that loratune recognises",
            fix=f"name the modules, for example {_examples(model)}",
        )
    return names


def _resolve_names(model: nn.Module, targets: tuple[str, ...]) -> tuple[str, ...]:
    if not targets:
        raise RecipeError("lora.targets is an empty list", fix=f"name modules, for example {_examples(model)}")
    linear = _linear_modules(model)
    matches = {target: [name for name in linear if _matches(name, target)] for target in targets}
    missing = [target for target, names in matches.items() if not names]
    if missing:
        raise _no_match(model, linear, missing)
    found = tuple(sorted({name for names in matches.values() for name in names}))
    head = _output_head(model)
    taken = sorted(set(found) & _taken_by_peft(model))
    if taken:
        raise RecipeError(
            f"lora.targets names {taken[0]}, but PEFT would adapt {type(model).__name__}'s stacked experts in its place",
            fix=f"leave {', '.join(_unique(name.rpartition('.')[2] for name in taken))} out",
        )
    for name in found:
        # The loss reads the head's weight directly and takes it as frozen, so an adapter there would do nothing.
        if linear[name] is head:
            raise RecipeError(
                f"lora.targets names {name}, the output head, which cannot be adapted", fix="leave it out"
            )
    return found


def _no_match(model: nn.Module, linear: Mapping[str, nn.Module], missing: list[str]) -> RecipeError:
    for target in missing:
        for name, module in model.named_modules():
            if not _matches(name, target):
                continue
            inside = _unique(part[len(name) + 1 :] for part in linear if part.startswith(f"{name}."))
            fix = f"name the matrices inside it: {', '.join(inside)}" if inside else "leave it out"
            kind = type(module).__name__
            return RecipeError(f"lora.targets: {name} is a {kind}; only Linear and Conv1D can be adapted", fix=fix)
    known = _unique(".".join(name.split(".")[-depth:]) for name in linear for depth in (1, 2))
    near = _unique(hit for target in missing for hit in difflib.get_close_matches(target, known, n=3))
    fix = f"did you mean {', '.join(near)}?" if near else f"known here: {_examples(model)}"
    verb = "matches" if len(missing) == 1 else "match"
    return RecipeError(f"lora.targets: {', '.join(missing)} {verb} no module of {type(model).__name__}", fix=fix)


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def _output_head(model: nn.Module) -> nn.Module | None:
    if not isinstance(model, PreTrainedModel):
        return None
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated layers of the decoder by name. The towers of other modalities are not searched."""
    root = model
    if isinstance(model, PreTrainedModel):
        root = model.get_decoder()  # type: ignore[no-untyped-call]
    prefix = next((f"{name}." if name else "" for name, module in model.named_modules() if module is root), "")
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in root.named_modules():
        nested = any(name.startswith(f"{stack}.") for stack in stacks)
        if isinstance(module, nn.ModuleList) and not nested and _linear_modules(module):
            stacks[name] = module
    if not stacks:
        return {}
    name, stack = max(stacks.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return {f"{prefix}{name}.{index}": layer for index, layer in enumerate(stack)}


def _roles(model: nn.Module) -> dict[str, frozenset[str]]:
    """The roles of every linear module inside the layers; no role: a preset never adapts it."""
    taken = _taken_by_peft(model)
    return {
        f"{layer_name}.{name}": frozenset() if f"{layer_name}.{name}" in taken else _role(layer, name)
        for layer_name, layer in _layers(model).items()
        for name in _linear_modules(layer)
    }


def router_loss(config: PretrainedConfig) -> float:
    """The coefficient with which stock TRL adds the routers' load-balancing loss to this model's; 0 where it adds none."""
    text_config = config.get_text_config()
    has_it = hasattr(text_config, "output_router_logits")  # as in TRL 1.16, whatever its value
    return float(getattr(text_config, "router_aux_loss_coef", None) or 0.0) if has_it else 0.0


def _taken_by_peft(model: nn.Module) -> frozenset[str]:
    """The linear modules whose names PEFT takes for something else.

    Adapters of mixture-of-experts models of transformers 4 name the experts' matrices, which are stacked in transformers 5.
    PEFT turns such names into the stacked parameters, also where a dense layer or a shared expert has a matrix of that name,
    and would then adapt the experts and not that matrix. It is asked itself, name by name.
    """
    if not isinstance(model, PreTrainedModel) or not _has_fused_experts(model):
        return frozenset()
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    def is_taken(leaf: str) -> bool:
        config = LoraConfig(target_modules=[leaf])
        try:
            convert_peft_config_for_transformers(config, model=model, conversions=None)
        except ValueError:  # it is one half of a stacked parameter
            return True
        return leaf not in config.target_modules

    names = list(_linear_modules(model))
    taken = {leaf for leaf in _unique(name.rpartition(".")[2] for name in names) if is_taken(leaf)}
    return frozenset(name for name in names if name.rpartition(".")[2] in taken)


def _role(layer: nn.Module, name: str) -> frozenset[str]:
    """The roles of one linear module, by its name inside the layer, such as `self_attn.q_proj`."""
    *parents, leaf = name.lower().split(".")
    if _is_router(layer, name):
        return frozenset()
    parent = layer.get_submodule(name.rpartition(".")[0])
    if any("attn" in part or "attention" in part for part in parents) or "Attention" in type(parent).__name__:
        return _ATTENTION_NAMES.get(leaf, frozenset({OTHER}))
    if _is_state_space(parent) or "altup" in parents:
        return frozenset()
    return frozenset({FEED_FORWARD})


def _is_router(layer: nn.Module, name: str) -> bool:
    """Whether a module decides which experts see a token: a `router`, or a `gate` (not `gate_proj`) beside experts."""
    if any(part.endswith("router") for part in name.lower().split(".")):
        return True
    parent, _, leaf = name.rpartition(".")
    siblings = [child for child, _ in layer.get_submodule(parent).named_children()]
    return leaf.endswith("gate") and any("expert" in sibling for sibling in siblings)


def _is_state_space(parent: nn.Module) -> bool:
    """Mamba's kernels read the weights of their projections directly and pass adapters by; PEFT refuses them too."""
    return any(name == "A_log" for name, _ in parent.named_parameters(recurse=False))


def _has_fused_experts(model: nn.Module) -> bool:
    return any(
        parameter.ndim == 3 and "expert" in name
        for layer in _layers(model).values()
        for name, parameter in layer.named_parameters()
    )


def _layer_of(name: str, layers: Mapping[str, nn.Module]) -> str:
    return next((layer for layer in layers if name.startswith(f"{layer}.")), "")


def _short_name(name: str, layers: Mapping[str, nn.Module]) -> str:
    """The leaf, with its parent where a layer has that leaf twice (`mlp.c_proj`), or the whole name outside layers."""
    layer = _layer_of(name, layers)
    if not layer:
        return name
    inside = name[len(layer) + 1 :]
    leaf = inside.rpartition(".")[2]
    siblings = [other for other in _linear_modules(layers[layer]) if other.rpartition(".")[2] == leaf]
    parts = [part for part in inside.split(".") if not part.isdigit()]
    return ".".join(parts[-2:]) if len(siblings) > 1 else leaf


def _in_layers(leaves: list[str], num_layers: int, num_all: int) -> str:
    if num_layers == 0:
        return ", ".join(leaves)
    where = f"{num_layers}" if num_layers == num_all else f"{num_layers} of {num_all}"
    return f"{', '.join(leaves)} in {where} layer{'s' if num_all > 1 else ''}"


def _examples(model: nn.Module) -> str:
    """Distinct leaf names, those of the layers when there are layers."""
    layers = _layers(model)
    sources: Iterator[nn.Module] | list[nn.Module] = iter(layers.values()) if layers else [model]
    return ", ".join(_unique(name.rpartition(".")[2] for layer in sources for name in _linear_modules(layer)))


def _unique(names: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _list(words: frozenset[str]) -> str:
    """Roles in the order of an attention layer: `query, key and value`."""
    order = (QUERY, KEY, VALUE, OUTPUT, OTHER, FEED_FORWARD)
    first, last = [word for word in order if word in words][:-1], [word for word in order if word in words][-1:]
    return " and ".join([", ".join(first), *last]) if first else "".join(last)
