"""The matrices that an adapter is attached to: a preset, or names, resolved against the modules of the actual model."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loratune.model.adapter.module_roles import (
    FEED_FORWARD,
    KEY,
    OTHER,
    OUTPUT,
    PRESET_ROLES,
    QUERY,
    VALUE,
    has_fused_experts,
    is_state_space,
    linear_modules,
    module_roles,
    repeated_layers,
    taken_by_peft,
)
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One adapted or adaptable weight matrix of d_out × d_in, or a stack of `count` of them in one parameter."""

    name: str
    d_in: int
    d_out: int
    count: int = 1


def matrix(name: str, module: nn.Module) -> Matrix:
    """Return the name and shape of a linear module.

    Raises:
        TypeError: The module is neither `Linear` nor `Conv1D`.
    """
    if isinstance(module, Conv1D):  # GPT-2, whose weight is stored transposed, d_in × d_out
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
        layers: `all`, `first N`, `last N`, or the numbers of decoder layers, counted from 0.

    Returns:
        The full names of the modules, sorted.

    Raises:
        RecipeError: A preset or a name matches nothing, or a module that is not a linear matrix, or a layer does not
            exist.
    """
    found = _resolve_preset(model, targets) if isinstance(targets, str) else _resolve_names(model, targets)
    return found if layers == "all" else in_chosen_layers(model, found, layers)


def in_chosen_layers(model: nn.Module, names: tuple[str, ...], layers: str | tuple[int, ...]) -> tuple[str, ...]:
    """Return the modules that lie in the chosen layers.

    Raises:
        RecipeError: A layer does not exist, or the layers contain none of the modules.
    """
    all_layers = repeated_layers(model)
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
    """Describe the modules that `resolve_targets` finds: `q_proj, v_proj in 28 layers`."""
    chosen = set(resolve_targets(model, targets, layers))
    all_layers = repeated_layers(model)
    layers_by_leaf: dict[str, set[str]] = {}
    for name in linear_modules(model):
        if name in chosen:
            layers_by_leaf.setdefault(_short_name(name, all_layers), set()).add(_layer_of(name, all_layers))
    leaves_by_count: dict[int, list[str]] = {}
    for leaf, found in layers_by_leaf.items():
        leaves_by_count.setdefault(len(found - {""}), []).append(leaf)
    return "; ".join(
        _in_layers(leaves, count, len(all_layers)) for count, leaves in sorted(leaves_by_count.items())[::-1]
    )


def target_notes(model: nn.Module, targets: str | tuple[str, ...], stacked: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return notes on what a user may not expect: router losses and, for a preset, fused matrices and frozen experts.

    Args:
        model: The base model.
        targets: As in `resolve_targets`; a list of names gets no notes of its own.
        stacked: The recipe's `lora.target_parameters`.

    Returns:
        One sentence each, without a full stop.

    Raises:
        RecipeError: `targets` is text, but not a preset.
    """
    notes = _model_notes(model) if isinstance(model, PreTrainedModel) else []
    if not isinstance(targets, str):
        return tuple(notes)
    wanted = _roles_of_preset(targets)
    roles = module_roles(model)
    fused_experts = FEED_FORWARD in wanted and has_fused_experts(model)
    fused = {name.rsplit(".", 1)[-1]: found for name, found in roles.items() if found & wanted and found - wanted}
    for leaf, found in sorted(fused.items()):
        asked, more = _list(found & wanted), _list(found - wanted)
        notes.append(f"fused {leaf}: {asked} cannot be adapted without {more}, so all of the matrix is adapted")
    missing = wanted - {OTHER} - frozenset().union(*roles.values())
    if fused_experts:
        if not stacked:
            notes.append(
                "the experts' weights are stacked in one tensor per layer, not linear modules, and stay frozen; "
                "lora.target_parameters adapts them"
            )
        missing -= {FEED_FORWARD}
    taken = _unique(name.rpartition(".")[2] for name in taken_by_peft(model)) if FEED_FORWARD in wanted else []
    if taken:
        notes.append(
            f"{', '.join(taken)} outside the experts stay frozen too: PEFT applies these names to the stacked experts"
        )
    if missing:
        notes.append(f"this model has no {_list(missing)} matrix inside its layers")
    return tuple(notes)


def unreached_notes(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Return a note on trained modules outside of the text decoder, such as a vision tower's, which text never reaches.

    Args:
        model: The base model. It may be on the meta device.
        names: Full names of the modules that are adapted, or trained in full.
    """
    if not isinstance(model, PreTrainedModel):
        return ()
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    # A tower is a model of its own beside the decoder; what is not (a head, a projection of text) may be reached.
    towers = [
        name
        for name, module in model.named_modules()
        if name and isinstance(module, PreTrainedModel) and not f"{prefix}.".startswith(f"{name}.")
        and not f"{name}.".startswith(f"{prefix}.")
    ]  # fmt: skip
    found: dict[str, int] = {}
    for name in names:
        tower = next((tower for tower in towers if prefix and name.startswith(f"{tower}.")), None)
        if tower is not None:
            found[tower] = found.get(tower, 0) + 1
    if not found:
        return ()
    where = ", ".join(f"{count} modules of {tower}" for tower, count in found.items())
    return (
        f"the recipe also trains {where}, which text alone never reaches: they get no gradient and are saved as they "
        f"began; a preset such as lora.targets=attention, lora.layers='first {len(repeated_layers(model))}', or full "
        "names leave them out",
    )


def _model_notes(model: PreTrainedModel) -> list[str]:
    """Return notes on the model itself, whatever is adapted."""
    notes, config = [], model.config
    coefficient = router_loss(config)
    if coefficient:
        notes.append(
            f"the routers' load-balancing loss, which TRL adds by default (router_aux_loss_coef {coefficient:g}), is "
            "left out in both engines: it is not a sum over tokens, and the routers are frozen"
        )
    jitter = getattr(config.get_text_config(), "router_jitter_noise", None)
    if jitter:
        notes.append(
            f"its routers are random in training (router_jitter_noise {jitter:g}), so engine and token budget change "
            "which experts a token reaches"
        )
    mixers = sorted({type(module).__name__ for module in model.modules() if is_state_space(module)})
    if mixers:
        notes.append(f"planned memory and time do not include {', '.join(mixers)}: leave headroom")
    return notes


def _roles_of_preset(preset: str) -> frozenset[str]:
    if preset not in PRESET_ROLES:
        presets = ", ".join(PRESET_ROLES)
        raise RecipeError(f"lora.targets is {preset!r}", fix=f"give one of {presets}, or a list of names: [{preset}]")
    return PRESET_ROLES[preset]


def _resolve_preset(model: nn.Module, preset: str) -> tuple[str, ...]:
    wanted = _roles_of_preset(preset)
    names = tuple(sorted(name for name, roles in module_roles(model).items() if roles & wanted))
    if not names:
        what = _list(wanted - {OTHER})
        raise RecipeError(
            f"lora.targets is {preset}, but {type(model).__name__} has no {what} matrix that loratune recognizes",
            fix=f"name the modules, for example {_examples(model)}",
        )
    return names


def _resolve_names(model: nn.Module, targets: tuple[str, ...]) -> tuple[str, ...]:
    if not targets:
        raise RecipeError("lora.targets is an empty list", fix=f"name modules, for example {_examples(model)}")
    linear = linear_modules(model)
    matches = {target: [name for name in linear if _matches(name, target)] for target in targets}
    missing = [target for target, names in matches.items() if not names]
    if missing:
        raise _no_match(model, linear, missing)
    found = tuple(sorted({name for names in matches.values() for name in names}))
    head = _output_head(model)
    taken = sorted(set(found) & taken_by_peft(model))
    if taken:
        raise RecipeError(
            f"lora.targets names {taken[0]}, but PEFT would adapt {type(model).__name__}'s stacked experts instead",
            fix=f"leave {', '.join(_unique(name.rpartition('.')[2] for name in taken))} out",
        )
    for name in found:
        # The loss reads the head's weight directly, so an adapter on it would do nothing.
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


def _output_head(model: nn.Module) -> nn.Module | None:
    if not isinstance(model, PreTrainedModel):
        return None
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head


def router_loss(config: PretrainedConfig) -> float:
    """Return the coefficient of the routers' load-balancing loss that stock TRL adds for this model; 0 for none."""
    text_config = config.get_text_config()
    has_it = hasattr(text_config, "output_router_logits")  # TRL 1.16 checks this, whatever the value
    return float(getattr(text_config, "router_aux_loss_coef", None) or 0.0) if has_it else 0.0


def _layer_of(name: str, layers: Mapping[str, nn.Module]) -> str:
    return next((layer for layer in layers if name.startswith(f"{layer}.")), "")


def _short_name(name: str, layers: Mapping[str, nn.Module]) -> str:
    """Return the last part of a name, with its parent if a layer has it twice (`mlp.c_proj`)."""
    layer = _layer_of(name, layers)
    if not layer:
        return name
    inside = name[len(layer) + 1 :]
    leaf = inside.rpartition(".")[2]
    siblings = [other for other in linear_modules(layers[layer]) if other.rpartition(".")[2] == leaf]
    parts = [part for part in inside.split(".") if not part.isdigit()]
    return ".".join(parts[-2:]) if len(siblings) > 1 else leaf


def _in_layers(leaves: list[str], num_layers: int, num_all: int) -> str:
    if num_layers == 0:
        return ", ".join(leaves)
    where = f"{num_layers}" if num_layers == num_all else f"{num_layers} of {num_all}"
    return f"{', '.join(leaves)} in {where} layer{'s' if num_all > 1 else ''}"


def _examples(model: nn.Module) -> str:
    """Return the distinct last parts of the linear modules' names, inside the layers if there are any."""
    sources = list(repeated_layers(model).values()) or [model]
    return ", ".join(_unique(name.rpartition(".")[2] for layer in sources for name in linear_modules(layer)))


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _list(words: frozenset[str]) -> str:
    """List roles in the order of an attention layer: `query, key and value`."""
    order = (QUERY, KEY, VALUE, OUTPUT, OTHER, FEED_FORWARD)
    first, last = [word for word in order if word in words][:-1], [word for word in order if word in words][-1:]
    return " and ".join([", ".join(first), *last]) if first else "".join(last)
