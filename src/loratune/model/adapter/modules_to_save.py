"""Modules that are trained in full, in addition to the adapter: `lora.modules_to_save`.

PEFT keeps the original module, trains a copy of it, and saves the copy. Three things are different here:

    names    PEFT takes every module whose name ends in the given letters (`norm` also means `input_layernorm`); here
             the last dotted parts must be equal, and PEFT gets full names
    tied     an output head that is tied to the embedding stays tied: one matrix is trained for both (PEFT's
             `ensure_weight_tying`)
    types    PEFT's copies have the base's type, in which small updates vanish; here they are float32 and cast to the
             base's type to compute, so that a base of that type with the saved adapter computes the same
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from loratune.model.adapter.new_tokens import FastRows, numbers_of
from loratune.model.kernels.cross_entropy import Head
from loratune.model.patching import replace_class
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from peft import PeftModel

    from loratune.recipe.recipe import LoraSection


@dataclass(frozen=True, slots=True, kw_only=True)
class FullyTrained:
    """A module trained in full (PEFT `modules_to_save`), or the rows of new tokens in one.

    Attributes:
        name: The module's full name.
        shapes: Shapes of its trained tensors.
        saved: Name and shape of each saved tensor; a tied embedding is saved under the head's name too.
        is_head: Whether it computes logits.
        is_embedding: Whether it is the input embedding.
        is_rows: Whether only the rows of new tokens are trained.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    saved: tuple[tuple[str, tuple[int, ...]], ...]
    is_head: bool = False
    is_embedding: bool = False
    is_rows: bool = False

    @property
    def trainable(self) -> int:
        """Number of trained parameters."""
        return sum(map(_numel, self.shapes))

    @property
    def num_saved(self) -> int:
        """Number of parameters in the adapter's file."""
        return sum(_numel(shape) for _, shape in self.saved)


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def fully_trained_modules(model: nn.Module, lora: LoraSection, targets: Sequence[str]) -> tuple[FullyTrained, ...]:
    """Return the modules that the recipe trains in full, ordered by name, then the rows of new tokens.

    Args:
        model: The base model, without an adapter. It may be on the meta device.
        lora: The recipe's section, with `modules_to_save` and `new_tokens`.
        targets: Full names of the adapted modules.

    Raises:
        RecipeError: A name matches nothing, or a module without weights, or one that is adapted as well.
    """
    if not lora.modules_to_save and not lora.new_tokens:
        return ()
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {name for asked in lora.modules_to_save for name in _matching(modules, asked)}
    embedding, head = _ends(model, modules)
    tied = bool(embedding and head and modules[embedding].weight is modules[head].weight)
    if tied and found & {embedding, head}:
        found = (found | {embedding}) - {head}
    for name in sorted(found):
        _check(name, modules, found, targets)
    full = tuple(
        _fully_trained(
            name,
            modules[name],
            is_head=name in (head, embedding if tied else head),
            is_embedding=name == embedding,
            tied_head=head if tied else "",
        )
        for name in sorted(found)
    )
    if not lora.new_tokens:
        return full
    if clash := found & {embedding, head}:
        raise RecipeError(
            f"lora.modules_to_save trains all of {min(clash)}, and lora.new_tokens only some of its rows",
            fix="leave one of them out",
        )
    return full + _new_token_rows(modules, embedding, head, len(lora.new_tokens), tied=tied)


def head_modules(model: nn.Module, names: Sequence[str], targets: Sequence[str]) -> tuple[FullyTrained, ...]:
    """Return a classifier's head, which is always trained in full.

    Args:
        model: The base model, without an adapter. It may be on the meta device.
        names: Full names of the head's modules.
        targets: Full names of the adapted modules.

    Raises:
        RecipeError: A module of the head is adapted as well.
    """
    inside = [(target, name) for target in targets for name in names if _overlap(target, name)]
    if inside:
        raise RecipeError(
            f"lora.targets adapts {inside[0][0]}, but {inside[0][1]} is part of the head, which is trained in full",
            fix="leave it out of lora.targets",
        )
    return tuple(
        _fully_trained(name, model.get_submodule(name), is_head=True, is_embedding=False, tied_head="")
        for name in names
    )


def _new_token_rows(
    modules: dict[str, nn.Module], embedding: str, head: str, count: int, *, tied: bool
) -> tuple[FullyTrained, ...]:
    """Return the rows of new tokens in the embedding, and in the head unless it is tied to the embedding."""
    if not embedding or not head or getattr(modules[head], "bias", None) is not None:
        raise RecipeError(
            "lora.new_tokens: PEFT trains single rows only of an output head without bias, which this model lacks",
            fix="lora.new_tokens=[]",
        )
    table: Any = modules[embedding].weight
    width = int(table.shape[1])
    return tuple(
        FullyTrained(
            name=name,
            shapes=((count, width),),
            saved=((f"{name}.token_adapter.trainable_tokens_delta", (count, width)),),
            is_head=tied or name == head,
            is_embedding=name == embedding,
            is_rows=True,
        )
        for name in ([embedding] if tied else [embedding, head])
    )


def _fully_trained(name: str, module: nn.Module, *, is_head: bool, is_embedding: bool, tied_head: str) -> FullyTrained:
    shapes = {part: tuple(tensor.shape) for part, tensor in module.named_parameters()}
    saved = [(f"{name}.{part}", tuple(tensor.shape)) for part, tensor in module.state_dict().items()]
    if is_embedding and tied_head:
        saved += [(f"{tied_head}.{part}", shape) for part, shape in shapes.items()]
    return FullyTrained(
        name=name, shapes=tuple(shapes.values()), saved=tuple(saved), is_head=is_head, is_embedding=is_embedding
    )


def _ends(model: nn.Module, modules: dict[str, nn.Module]) -> tuple[str, str]:
    """Return the names of the input embedding and the output head; empty strings where there is none."""
    if not isinstance(model, PreTrainedModel):
        return "", ""
    ends: tuple[Any, Any] = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    embedding, head = (next((name for name, module in modules.items() if module is end), "") for end in ends)
    return embedding, head


def _matching(modules: dict[str, nn.Module], asked: str) -> list[str]:
    names = [name for name in modules if name == asked or name.endswith(f".{asked}")]
    if names:
        return names
    leaves = sorted({name.rpartition(".")[2] for name in modules if name and not name.rpartition(".")[2].isdigit()})
    near = difflib.get_close_matches(asked, leaves, n=3)
    raise RecipeError(
        f"lora.modules_to_save: {asked} matches no module",
        fix=f"did you mean {', '.join(near)}?" if near else f"known here: {', '.join(leaves)}",
    )


def _check(name: str, modules: dict[str, nn.Module], found: set[str], targets: Sequence[str]) -> None:
    module = modules[name]
    if isinstance(module, nn.ModuleList | nn.ModuleDict) or next(module.parameters(), None) is None:
        raise RecipeError(
            f"lora.modules_to_save: {name} is a {type(module).__name__}, which has no weights of its own",
            fix=f"leave out {name.rpartition('.')[2]}, or name modules inside it",
        )
    inside = [target for target in targets if _overlap(target, name)]
    if inside:
        raise RecipeError(
            f"lora.modules_to_save trains all of {name}, but lora.targets adapts {inside[0]}",
            fix="leave one of them out",
        )
    nested = [other for other in found if other != name and _overlap(other, name)]
    if nested:
        raise RecipeError(
            f"lora.modules_to_save names {name} and {nested[0]}, one inside the other", fix="name only one of them"
        )
    alike = [other for other in modules if other.endswith(name) and other != name]
    if alike:
        raise RecipeError(f"lora.modules_to_save: PEFT cannot tell {name} from {alike[0]}", fix="leave it out")


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def modules_to_save_arguments(full: Sequence[FullyTrained], new_tokens: Sequence[int] = ()) -> dict[str, Any]:
    """Return the arguments of PEFT's `LoraConfig`.

    Args:
        full: What `fully_trained_modules` returned.
        new_tokens: Token ids of `lora.new_tokens`.
    """
    modules = [item for item in full if not item.is_rows]
    arguments: dict[str, Any] = {"modules_to_save": [item.name for item in modules]} if modules else {}
    if any(item.is_head and item.is_embedding for item in modules):
        arguments["ensure_weight_tying"] = True
    if new_tokens:
        arguments["trainable_token_indices"] = {item.name: list(new_tokens) for item in full if item.is_rows}
    return arguments


def fully_trained_in_words(full: Sequence[FullyTrained]) -> str:
    """Describe what is trained in full: `lm_head, norm`, `2 rows of embed_tokens`."""
    leaf = {item: item.name.rpartition(".")[2] for item in full}
    return ", ".join(
        dict.fromkeys(f"{item.shapes[0][0]} rows of {leaf[item]}" if item.is_rows else leaf[item] for item in full)
    )


# ---- on a model


def keep_in_float32(model: PeftModel) -> None:
    """Convert the copies that are trained in full to float32, and have them compute in the type that they had."""
    # The old parameter is held too: once freed, its id could be given to another.
    known: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for wrapper in model.modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        module: Any = wrapper.modules_to_save["default"]
        dtype = next(module.parameters()).dtype
        if dtype not in (torch.bfloat16, torch.float16):
            continue
        for owner in module.modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                if id(parameter) not in known:
                    known[id(parameter)] = nn.Parameter(parameter.detach().float()), parameter
                setattr(owner, name, known[id(parameter)][0])
        module.computes_in = dtype
        kind: Any = type(module)
        replace_class(module, _float32_class(kind))


@cache
def _float32_class(kind: Any) -> Any:
    """Return a subclass of a module's class with float32 weights that computes in the type `computes_in`."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        dtype = self.computes_in
        parameters = dict(self.named_parameters())
        if next(iter(parameters.values())).dtype == dtype:
            return kind.forward(self, *args, **kwargs)
        narrow = {name: parameter.to(dtype) for name, parameter in parameters.items()}
        return torch.func.functional_call(self, narrow, args, kwargs)

    return type(f"Float32{kind.__name__}", (kind,), {"forward": forward})


def head_weights(layer: nn.Module) -> Head | None:
    """Return the weights of an output head as they are now: with the adapter on, the trained ones.

    Returns:
        A `Head` without scale and soft cap; None if the layer is not linear or carries an adapter of another kind.
    """
    if isinstance(layer, ModulesToSaveWrapper):
        off = layer.disable_adapters or not layer.active_adapters
        layer = layer.original_module if off else layer.modules_to_save[layer.active_adapters[0]]
        return Head(layer.weight, layer.bias) if isinstance(layer, nn.Linear) else None
    if isinstance(layer, TrainableTokensWrapper):
        adapter: Any = layer.token_adapter
        base, off = adapter.base_layer, adapter.disable_adapters or not layer.active_adapters
        if not isinstance(base, nn.Linear) or base.bias is not None:
            return None
        if off:
            return Head(base.weight)
        numbers = adapter.numbers if isinstance(adapter, FastRows) else numbers_of(adapter)
        return Head(base.weight, None, adapter.trainable_tokens_delta["default"], numbers)
    if not isinstance(layer, nn.Linear) or layer.weight.requires_grad:
        return None
    return Head(layer.weight, layer.bias)


def without_copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return each tensor once, under its first name: a tied head and its embedding share one."""
    return {name: tensors[name] for name, first in _first_names(tensors).items() if first == name}


def with_copies(tensors: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors under all their names again, which PEFT requires to load them.

    Args:
        tensors: What `without_copies` returned.
        own: The model's own tensors, under all their names.
    """
    return {name: tensors[first] for name, first in _first_names(own).items() if first in tensors}


def _first_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Map each name to the first name of the same tensor."""
    seen: dict[tuple[int, torch.Size], str] = {}
    return {name: seen.setdefault((tensor.data_ptr(), tensor.shape), name) for name, tensor in tensors.items()}
