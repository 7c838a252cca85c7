"""The base of adapters: where it is, whether several adapters have the same one, and whether they fit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from transformers import AutoConfig

from loratune.exporting.merge_weights import stored_weight
from loratune.model.quantization.kinds import PACKED
from loratune.model.safetensors_headers import read_header, stored_name, weight_files_of
from loratune.run.digest import file_sha256
from loratune.run.directory import read_json
from loratune.run.errors import RecipeError
from loratune.run.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from loratune.exporting.adapters.folder import Adapter

_FIX = "--base FOLDER, where the base's config.json and safetensors are"


def folder_of_model(name: str | Path) -> Path:
    """Return a model's folder.

    Raises:
        RecipeError: It has no weights in safetensors.
    """
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file() or not weight_files_of(folder):
        raise RecipeError(f"{name} is not a folder with config.json and safetensors", fix=_FIX)
    return folder.resolve()


def checked_base(
    adapters: Sequence[Adapter], given: str | Path | None, progress: Progress = NO_PROGRESS
) -> Path | None:
    """Return the folder of the adapters' base, which is one and the same: the one given, or one that they name.

    Args:
        adapters: The adapters.
        given: The base's folder; None to take what the adapters name.
        progress: Receives a warning if it is not known whether an adapter was trained on these weights.

    Returns:
        None if no base is on this machine.

    Raises:
        RecipeError: The adapters were trained on different weights, or on others than those; or shapes differ.
    """
    place = folder_of_model(given) if given is not None else _first_named(adapters)
    _require_one_base(adapters, place, given=given is not None)
    if place is None:
        return None
    for adapter in adapters:
        _require_shapes(adapter, place)
    unknown = {adapter.base_name for adapter in adapters if not _is_known(adapter, place)} - {""}
    for name in sorted(unknown):
        if Path(name).name != place.name:
            progress.warn(
                f"the adapter names {name} as its base; whether {place.name} has the same weights is not known"
            )
    return place


def required_base(adapter: Adapter, given: str | Path | None, progress: Progress = NO_PROGRESS) -> Path:
    """Return the folder of an adapter's base.

    Raises:
        RecipeError: It is not here, or not the adapter's; or the adapter's run multiplied with other values.
    """
    found = checked_base([adapter], given, progress)
    if found is None:
        raise RecipeError(
            f"the base that the adapter names is not a folder here: {adapter.base_name or 'none'}",
            file=adapter.path,
            fix=_FIX,
        )
    run = adapter.path.resolve().parent
    kind = _lock_of(adapter).get("recipe", {}).get("model", {}).get("quantization")
    if kind in PACKED:
        raise RecipeError(
            f"the adapter was trained on a base quantized to {kind}, whose values are not those in its files",
            file=adapter.path,
            fix=f"loratune merge {run} OUT or loratune certify {run} TARGET, which know the values of training",
        )
    return found


def fingerprint(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each weight file of a model."""
    return {path.name: file_sha256(path) for path in weight_files_of(folder)}


def is_tied(folder: Path) -> bool:
    """Tell whether a model's configuration says that head and embedding are one matrix."""
    return bool(AutoConfig.from_pretrained(folder).get_text_config().tie_word_embeddings)


def biases_of(folder: Path | None, names: set[str]) -> dict[str, torch.Tensor]:
    """Return the base's own values of biases; empty without a base."""
    found: dict[str, torch.Tensor] = {}
    for file in weight_files_of(folder) if folder is not None and names else ():
        with safe_open(file, framework="pt") as tensors:
            stored = set(tensors.keys())
            for name in names - found.keys():
                own = stored_name(name, stored)
                if own is not None:
                    found[name] = tensors.get_tensor(own)
    return found


def _named_folder(adapter: Adapter) -> Path | None:
    """Return the folder that an adapter names as its base, if it is here."""
    folder = Path(adapter.base_name or "/nowhere").expanduser()
    return folder.resolve() if (folder / "config.json").is_file() and weight_files_of(folder) else None


def _first_named(adapters: Sequence[Adapter]) -> Path | None:
    return next((folder for adapter in adapters if (folder := _named_folder(adapter)) is not None), None)


def _require_one_base(adapters: Sequence[Adapter], place: Path | None, *, given: bool) -> None:
    """Refuse adapters of different bases: by their weights where these are known, by name otherwise.

    The weights are known of a folder that is here, and of a run of loratune, whose lock names them.
    """
    wanted: dict[str, str] | None = None
    where = str(place)
    for adapter in adapters:
        found = _locked_weights(adapter)
        named = _named_folder(adapter)
        if found is None and named is not None and named != place:
            found = fingerprint(named)
        if found is None:
            continue
        if wanted is None:
            wanted, where = (found, str(adapter.path)) if place is None else (fingerprint(place), str(place))
        if found != wanted:
            raise RecipeError(
                f"the adapter was trained on other weights ({adapter.base_name}) than {where}",
                file=adapter.path,
                fix="adapters can only be added on one and the same base",
            )
    unknown = any(not _is_known(adapter, place) for adapter in adapters)
    names = {adapter.base_name for adapter in adapters} if unknown else set()
    if not given and len(names) > 1:
        raise RecipeError(
            f"the adapters name different bases: {' and '.join(sorted(name or 'none' for name in names))}",
            fix="--base FOLDER, if it is the base of all of them",
        )


def _is_known(adapter: Adapter, place: Path | None) -> bool:
    """Tell whether the weights are known that an adapter was trained on."""
    named = _named_folder(adapter)
    return _locked_weights(adapter) is not None or (named is not None and (place is None or named == place))


def _locked_weights(adapter: Adapter) -> dict[str, str] | None:
    """Return the SHA-256 of each weight file in the lock of the run that an adapter is from; None if it has none."""
    files: dict[str, str] = _lock_of(adapter).get("inputs", {}).get("model") or {}
    return {name: digest for name, digest in files.items() if name.endswith(".safetensors")} or None


def _lock_of(adapter: Adapter) -> dict[str, Any]:
    # Resolved, since the folder may be given as `.` or by a link.
    lock = adapter.path.resolve().parent / "lock.json"
    return read_json(lock) if lock.is_file() else {}


def _require_shapes(adapter: Adapter, base: Path) -> None:
    """Refuse an adapter whose matrices are of other shapes than the base's, or that has none of the base's."""
    if read_json(base / "config.json").get("quantization_config"):
        return  # whose files hold packed weights
    shapes = {name: shape for file in weight_files_of(base) for name, shape in read_header(file).items()}
    stored = {
        name: (stored_name(name, shapes) or stored_weight(name.removesuffix(".weight"), shapes), shape)
        for name, shape in _shapes_of(adapter)
    }
    for name, (own, shape) in stored.items():
        if own is None or shapes[own] == shape:
            continue
        rows = "load base and adapter with PEFT, after model.resize_token_embeddings" if name in adapter.whole else ""
        raise RecipeError(
            f"{name} is {_by(shapes[own])} in the base, and the adapter's is {_by(shape)}",
            file=adapter.path,
            fix=rows or f"--base FOLDER of {adapter.base_name or 'its own base'}",
        )
    if not any(own for own, _ in stored.values()):
        raise RecipeError(
            f"the base has none of the adapter's modules, not even {next(iter(adapter.updates))}",
            file=adapter.path,
            fix=f"--base FOLDER of {adapter.base_name or 'its own base'}",
        )


def _shapes_of(adapter: Adapter) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names of the base's tensors that an adapter changes, and their shapes by the adapter."""
    for module, update in adapter.updates.items():
        shape = update.b.shape[0], update.a.shape[1]
        yield f"{module}.weight", shape[::-1] if update.transposed else shape
    for name, tensor in adapter.biases.items():
        yield name, tuple(tensor.shape)
    for name, item in adapter.whole.items():
        if item.rows is None:
            yield name, tuple(item.values.shape)


def _by(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
