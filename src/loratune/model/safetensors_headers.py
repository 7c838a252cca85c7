"""The headers of safetensors files: whether a model is complete and undamaged, without reading its weights."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

    from torch import nn

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_COPY_AGAIN = "copy or download the model again"


def check_weights(folder: Path, model: nn.Module, *, quantized: bool, without: Sequence[str] = ()) -> None:
    """Check that the files in a folder hold the weights of a model; takes milliseconds whatever its size.

    Args:
        folder: A folder with safetensors files. One without passes: a Hub model's weights are fetched later.
        model: The model as its config describes it, on the meta device.
        quantized: Whether the files hold packed weights, whose shapes differ from the model's.
        without: Modules that the files need not hold.

    Raises:
        RecipeError: A file is missing, cut short, or belongs to another model.
    """
    files = weight_files_of(folder)
    if not files:
        return
    tensors = {name: shape for file in files for name, shape in read_header(file).items()}
    if quantized:
        return
    wanted = _parameters(model, without)
    for name in tensors.keys() & wanted.keys():
        if tensors[name] != tuple(wanted[name].shape):
            raise RecipeError(
                f"{name} is {_by(tensors[name])} in the weights and {_by(wanted[name].shape)} in config.json",
                file=folder,
                fix=f"the two are of different models; {_COPY_AGAIN}",
            )
    # Compared by number, not by name: transformers renames and stacks tensors of many architectures as it loads them.
    held, described = sum(map(math.prod, tensors.values())), sum(p.numel() for p in wanted.values())
    if held < 0.999 * described:
        raise RecipeError(
            f"the weight files hold {held:,} of the {described:,} parameters that config.json describes; the rest "
            "would be random",
            file=folder,
            fix=f"files are missing; {_COPY_AGAIN}",
        )


def check_stored(stored: Mapping[str, int], model: nn.Module, *, name: str, without: Sequence[str] = ()) -> None:
    """Check by the number of parameters that weights on the Hub are complete.

    Args:
        stored: safetensors type → number of parameters on the Hub.
        model: The model as its config describes it, on the meta device.
        name: The model's Hub id.
        without: Modules that the files need not hold.

    Raises:
        RecipeError: Some parameters are missing.
    """
    held, described = sum(stored.values()), sum(p.numel() for p in _parameters(model, without).values())
    if held and set(stored) <= set(_TYPES.values()) and held < 0.999 * described:
        raise RecipeError(
            f"model.name is {name}: the Hub holds {held:,} of the {described:,} parameters that config.json describes",
            fix="use another model.revision, or another model",
        )


def _parameters(model: nn.Module, without: Sequence[str]) -> dict[str, nn.Parameter]:
    outside = tuple(f"{module}." for module in without)
    return {name: parameter for name, parameter in model.named_parameters() if not name.startswith(outside)}


def bytes_to_convert(folder: Path, dtype: str | None, *, stored: Mapping[str, int], num_parameters: int) -> int:
    """Return the bytes of weight files that are held in addition to the weights while these load.

    Args:
        folder: As in `check_weights`.
        dtype: Type of the loaded weights by name; None: they are quantized as they load.
        stored: Types of weights that are not in the folder, as safetensors names them.
        num_parameters: Parameters of the base model.

    Returns:
        0 if the files have the type of the weights already, and are mapped into memory.
    """
    files = weight_files_of(folder)
    types = set(stored) or {entry["dtype"] for file in files for entry in _header(file).values()}
    if dtype is not None and types <= {_TYPES[dtype]}:
        return 0
    return sum(file.stat().st_size for file in files) or num_parameters * (4 if "F32" in types else 2)


def stored_type(folder: Path) -> str | None:
    """Return the type by name that most of a model's parameters are stored in; None if it is not a plain one.

    Args:
        folder: As in `check_weights`.
    """
    counts: Counter[str] = Counter()
    for file in weight_files_of(folder):
        for entry in _header(file).values():
            counts[entry["dtype"]] += math.prod(entry["shape"])
    most = max(counts, key=counts.__getitem__, default="")
    return next((name for name, code in _TYPES.items() if code == most), None)


def packed_bytes(folder: Path, model: nn.Module, dtype_bytes: int) -> int | None:
    """Return the bytes in memory of a checkpoint that stays packed; None if the folder has no weight files.

    Args:
        folder: As in `check_weights`.
        model: The model before quantization, on the meta device.
        dtype_bytes: Bytes of a weight that is not packed, which is cast to the run's type.
    """
    files = weight_files_of(folder)
    plain = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    total = 0
    for file in files:
        for name, entry in _header(file).items():
            start, end = entry["data_offsets"]
            is_plain = plain.get(name) == tuple(entry["shape"]) and entry["dtype"] in _TYPES.values()
            total += math.prod(entry["shape"]) * dtype_bytes if is_plain else end - start
    return total if files else None


def stored_name(tensor: str, stored: Container[str]) -> str | None:
    """Return the name under which files store a tensor; None if they do not.

    Args:
        tensor: The tensor's name in the model.
        stored: Names of the tensors in the files.
    """
    # Checkpoints of bare decoders omit the first part of the names, or call it differently from transformers' classes.
    candidates = (tensor, tensor.partition(".")[2], f"model.{tensor}")
    return next((name for name in candidates if name in stored), None)


def read_header(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a safetensors file, by name.

    Raises:
        RecipeError: It is not a safetensors file, or is shorter than its header says.
    """
    return {name: tuple(entry["shape"]) for name, entry in _header(file).items()}


def _header(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(length)) if 0 < length <= size - 8 else {}
        header.pop("__metadata__", None)
        end = 8 + length + max(entry["data_offsets"][1] for entry in header.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RecipeError("not a safetensors file, or damaged", file=file, fix=_COPY_AGAIN) from None
    if size < end:
        raise RecipeError(f"cut short: {size:,} of {end:,} bytes", file=file, fix=_COPY_AGAIN)
    return header


def weight_files_of(folder: Path) -> list[Path]:
    """Return the files that transformers loads a model from; an empty list if they are on the Hub.

    transformers' own rule (`modeling_utils._get_resolved_checkpoint_files`): the file that `transformers_weights` of
    config.json names, else `model.safetensors`, else the files of the index. Everything that reads weights asks here,
    so that a folder with two sets of weights is one model to all.

    Raises:
        RecipeError: A file is missing, or there are safetensors files and none that transformers loads.
    """
    source = _weight_source(folder)
    if source is None:
        return []
    names = index_files(source) if source.name.endswith(".index.json") else [source.name]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise RecipeError(
            f"{len(missing)} of {len(names)} weight files are missing: {', '.join(missing[:3])}",
            file=folder,
            fix=_COPY_AGAIN,
        )
    return [folder / name for name in names]


def weight_index_of(folder: Path) -> Path | None:
    """Return the index of the files that transformers loads a model from; None if it loads one file."""
    source = _weight_source(folder)
    return source if source is not None and source.name.endswith(".index.json") else None


def weight_notes(folder: Path) -> tuple[str, ...]:
    """Return a note if the folder holds safetensors files besides those that are loaded."""
    loaded = {path.name for path in weight_files_of(folder)}
    others = sorted({path.name for path in folder.glob("*.safetensors")} - loaded)
    if not loaded or not others:
        return ()
    return (
        f"model.name: {folder} holds other weights too ({_first(others)}), which are not read; transformers loads "
        f"{_first(sorted(loaded))}",
    )


def _first(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _weight_source(folder: Path) -> Path | None:
    """Return the weight file or the index that transformers loads; None if the folder has no safetensors."""
    config = folder / "config.json"
    named = json.loads(config.read_text(encoding="utf-8")).get("transformers_weights") if config.is_file() else None
    candidates = [named] if isinstance(named, str) else [SINGLE, INDEX]
    found = [folder / name for name in candidates if Path(name).name == name and (folder / name).is_file()]
    if found or not any(folder.glob("*.safetensors")):
        return found[0] if found else None
    raise RecipeError(
        f"transformers loads {' or '.join(candidates)}, and neither is here",
        file=folder,
        fix=f"rename a single weight file to {SINGLE}; for several files, {INDEX} must be there",
    )


def index_files(index: Path) -> list[str]:
    """Return the names of the weight files in an index.

    Raises:
        RecipeError: The index is damaged, or names a file outside of its folder.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        # Merging writes files of the same names: a path here would let it write anywhere.
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, AttributeError, TypeError):
        raise RecipeError("damaged: no weight_map in it", file=index, fix=_COPY_AGAIN) from None
    if outside:
        raise RecipeError(f"it names a file outside its folder: {outside[0]}", file=index, fix=_COPY_AGAIN)
    return names


def _by(shape: Any) -> str:
    return " × ".join(map(str, shape))
