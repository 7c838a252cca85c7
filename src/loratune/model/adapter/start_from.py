"""A saved adapter as the starting point of training, instead of a fresh one: `lora.start_from`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from loratune.model.adapter.patterns import rank_of
from loratune.model.adapter.variants import initialization_that_changes_base
from loratune.model.hub import explain_hub_errors
from loratune.model.weight_facts import first_not_finite
from loratune.run.digest import file_sha256
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.model.adapter.modules_to_save import FullyTrained
    from loratune.model.adapter.targets import Matrix
    from loratune.recipe.recipe import LoraSection

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_UNKNOWN = (
    *("target_parameters", "trainable_token_indices"),
    *("layer_replication", "lora_bias", "use_qalora", "alora_invocation_tokens", "arrow_config"),
)
"""Settings of PEFT's `LoraConfig` without a field in the recipe: an adapter that uses one would train differently."""

_IN_MEMORY = {"_orig_mod.": "from a compiled model", "default.": "with the names that PEFT has in memory"}
"""Parts of names that a saved adapter lacks, and where they come from."""


def locate_adapter(name: str) -> Path:
    """Return the folder of a saved adapter; one on the Hub is fetched into the cache.

    Raises:
        RecipeError: There is no such folder or hub adapter, or its weights are not safetensors.
        MachineError: The Hub cannot be reached, and the adapter is not in the cache.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
            raise RecipeError(
                f"lora.start_from is {name}: no such folder", fix="give the folder of an adapter, or a Hub id"
            )
        folder = _download(name)
    missing = [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]
    if missing:
        raise RecipeError(
            f"lora.start_from is {name}: no {missing[0]} in it",
            fix="give an adapter in PEFT's format with safetensors: other formats can run code and are not loaded",
        )
    return folder.resolve()


def check_adapter(
    folder: Path, lora: LoraSection, matrices: Sequence[Matrix], full: Sequence[FullyTrained] = ()
) -> None:
    """Check that an adapter is the one that the recipe describes, by its configuration and the shapes in its header.

    Args:
        folder: What `locate_adapter` returned.
        lora: The recipe's section, with rank, scale and variant.
        matrices: The matrices that the recipe adapts.
        full: The modules that the recipe trains in full.

    Raises:
        RecipeError: The adapter differs, and in what; or it has weights that are NaN or infinite.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            names = list(file.keys())
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (OSError, ValueError, SafetensorError) as error:
        raise RecipeError(f"lora.start_from: the adapter cannot be read: {error}", file=folder) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise RecipeError("lora.start_from: not a LoRA adapter", file=folder / CONFIG)
    if used := [name for name in _UNKNOWN if config.get(name)]:
        raise RecipeError(
            f"lora.start_from: the adapter uses {used[0]}, which the recipe has no setting for", file=folder / CONFIG
        )
    if config.get("bias", "none") != "none":
        raise RecipeError("lora.start_from: the adapter trains biases (bias), which loratune does not", file=folder)
    theirs = {"r": config.get("r"), "alpha": config.get("lora_alpha"), "variant": _variant(config)}
    theirs |= {name: config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for field, value in theirs.items():
        if value != getattr(lora, field):
            raise RecipeError(
                f"lora.{field} is {getattr(lora, field)}, but the adapter of lora.start_from has {value}",
                file=folder / CONFIG,
                fix=f"lora.{field}={value}",
            )
    wanted = _expected(lora, matrices) | {f"{_PREFIX}{name}": shape for item in full for name, shape in item.saved}
    _check_shapes(shapes, wanted, folder)
    if (name := first_not_finite(folder / WEIGHTS)) is not None:
        raise RecipeError(
            f"lora.start_from: the adapter has weights that are NaN or infinite, the first in "
            f"{name.removeprefix(_PREFIX)}",
            file=folder / WEIGHTS,
            fix="start from an earlier checkpoint of it, or leave lora.start_from out",
        )


def base_notes(folder: Path, bases: Sequence[str]) -> tuple[str, ...]:
    """Return a note if the adapter names a different base than this run's, with the same shapes.

    Args:
        folder: The folder of an adapter that `check_adapter` accepted.
        bases: The names of this run's base: in the recipe, and its folder.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    theirs = str(config.get("base_model_name_or_path") or "")
    if not theirs or Path(theirs).name in {Path(base).name for base in bases}:
        return ()
    return (f"lora.start_from: the adapter says that it was trained on {theirs}, not on {bases[0]}",)


def adapter_fingerprint(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the adapter's files: file name → hexadecimal digits."""
    return {name: file_sha256(folder / name) for name in (CONFIG, WEIGHTS)}


def load_weights_into(model: PeftModel, folder: Path) -> None:
    """Load the weights of an adapter that `check_adapter` accepted into a fresh one, as float32."""
    loaded = set_peft_model_state_dict(model, load_file(folder / WEIGHTS, device=str(model.device)))
    assert not loaded.unexpected_keys, f"the model has no place for {loaded.unexpected_keys[0]}"


def _variant(config: dict[str, Any]) -> str:
    """Return the recipe's variant that continues an adapter; for one that no variant continues, its initialization."""
    initialization = initialization_that_changes_base(config)
    if initialization is not None:
        return initialization
    if config.get("use_dora"):
        return "dora+rslora" if config.get("use_rslora") else "dora"
    return "rslora" if config.get("use_rslora") else "plain"


def _expected(lora: LoraSection, matrices: Sequence[Matrix]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for matrix in matrices:
        name = f"{_PREFIX}{matrix.name}"
        r = rank_of(lora, matrix.name)
        shapes[f"{name}.lora_A.weight"] = (r, matrix.d_in)
        shapes[f"{name}.lora_B.weight"] = (matrix.d_out, r)
        if lora.variant == "dora":
            shapes[f"{name}.lora_magnitude_vector"] = (matrix.d_out,)
    return shapes


def _check_shapes(found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], folder: Path) -> None:
    def fail(problem: str, fix: str = "lora.targets and lora.layers as it was trained with") -> RecipeError:
        return RecipeError(
            f"lora.start_from: the adapter {problem}", file=folder / WEIGHTS, fix=f"{fix}, and its own base model"
        )

    for part, origin in _IN_MEMORY.items():
        renamed = {name.replace(part, "") for name in found}
        if renamed != set(found) and renamed == set(wanted):
            raise RecipeError(
                f"lora.start_from: the adapter was saved {origin}: its tensors have {part} in their names",
                file=folder / WEIGHTS,
                fix=f"load it with safetensors.torch.load_file, take {part} out of every name, save it with save_file",
            )
    if missing := [name for name in wanted if name not in found]:
        raise fail(f"lacks {missing[0].removeprefix(_PREFIX)}, which the recipe trains")
    more = [name.removeprefix(_PREFIX) for name in found if name not in wanted]
    if whole := [name for name in more if ".lora_" not in name]:
        raise fail(
            f"has {whole[0]}, trained in full, which the recipe does not train",
            "merge it (`loratune merge`) and train the merged model without lora.start_from; or "
            "lora.modules_to_save as it was trained with",
        )
    if more:
        raise fail(f"has {more[0]}, which the recipe does not train")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise fail(f"has {name.removeprefix(_PREFIX)} of {found[name]}, the model's is {shape}")


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    with explain_hub_errors(
        "lora.start_from",
        name,
        "adapter",
        fix="check the id; for a gated adapter run `hf auth login`; or give a local folder",
        offline_fix="connect, or give the folder of an adapter",
    ):
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
