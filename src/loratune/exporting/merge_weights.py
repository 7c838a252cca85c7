"""Adapter into base: a folder of safetensors like the base's own, written one tensor at a time.

The arithmetic is float32, each result is rounded once. Every tensor that the adapter does not touch is copied as it is;
tied embeddings stay tied, because no tensor is added.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from safetensors import safe_open

from loratune.exporting.adapter_matrices import LowRank, Replaced
from loratune.model.safetensors_headers import index_files, stored_name
from loratune.run.errors import RunError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CODES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_TYPES = {code: dtype for dtype, code in _CODES.items()}


Values = Callable[[torch.Tensor], torch.Tensor]
"""From a weight in the base's files to what training multiplied with."""


class MergedWeights:
    """The tensors of a base model with an adapter applied, read from the base's files one at a time.

    Args:
        base: A folder with safetensors.
        updates: Module name → update; none for the base as it is.
        frozen: Module name → what its weight was worth in training, where that is not what the file holds.
        replaced: Tensor name → what stands in its place.

    Raises:
        RunError: A weight that the adapter changes is not in the files.
    """

    def __init__(
        self,
        base: Path,
        updates: Mapping[str, LowRank],
        frozen: Mapping[str, Values] = MappingProxyType({}),
        replaced: Mapping[str, Replaced] = MappingProxyType({}),
    ) -> None:
        self._base = base
        self._updates = updates
        self._frozen = frozen
        self._replaced = replaced
        self._open = ExitStack()
        self.files = weight_files(base)

    def __enter__(self) -> Self:
        self._shards = {
            file: self._open.enter_context(safe_open(self._base / file, framework="pt")) for file in self.files
        }
        self._file_of = {name: file for file, shard in self._shards.items() for name in shard.keys()}  # noqa: SIM118
        self._update_of = {self._weight_of(module): update for module, update in self._updates.items()}
        self._in_place_of = self._places(self._replaced)
        self._values_of = {self._weight_of(module): values for module, values in self._frozen.items()}
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    @property
    def names(self) -> list[str]:
        """All tensors."""
        return list(self._file_of)

    def in_file(self, file: str) -> list[str]:
        """The tensors of one file."""
        return [name for name, place in self._file_of.items() if place == file]

    def metadata(self, file: str) -> dict[str, str]:
        """The file's own metadata."""
        return self._shards[file].metadata() or {}

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor, without loading it."""
        shape: list[int] = self._slice(name).get_shape()
        return self._in_place_of[name].shape(shape) if name in self._in_place_of else shape

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor in the base's files.

        Raises:
            RunError: It is quantised, or of another type that cannot be merged into.
        """
        code = self._slice(name).get_dtype()
        if code not in _TYPES:
            raise RunError(f"tensor {name} is of type {code}", file=self._base, fix="use the model before quantisation")
        return _TYPES[code]

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, with its update in float32 if it has one; else as it is."""
        weight: torch.Tensor = self._shards[self._file_of[name]].get_tensor(name)
        if name in self._values_of:
            weight = self._values_of[name](weight)
        if name in self._in_place_of:
            return self._in_place_of[name].applied_to(weight)
        update = self._update_of.get(name)
        return weight if update is None else update.applied_to(weight)

    def _slice(self, name: str) -> Any:
        return self._shards[self._file_of[name]].get_slice(name)

    def _weight_of(self, module: str) -> str:
        found = stored_name(f"{module}.weight", self._file_of) or self._only_one_like(module)
        if found is None:
            raise self._unknown(f"the adapted module {module}")
        return found

    def _only_one_like(self, module: str) -> str | None:
        """The one tensor whose name has the module's layer number and what follows it, in the language model where files
        have several towers; None where there is none or more than one."""
        parts = module.split(".")
        layer = next((place for place, part in enumerate(parts) if part.isdigit()), 0)
        if not layer:
            return None
        ending = "." + ".".join(parts[layer - 1 :]) + ".weight"
        found = [name for name in self._file_of if name.endswith(ending)]
        if len(found) > 1:
            found = [name for name in found if "language_model." in name]
        return found[0] if len(found) == 1 else None

    def _places(self, replaced: Mapping[str, Replaced]) -> dict[str, Replaced]:
        """The files' tensors that something else stands for. Of a tied pair the adapter has both, and the files perhaps one."""
        places = {name: stored_name(name, self._file_of) for name in replaced}
        for name, place in places.items():
            values = replaced[name].values
            twins = (other for other in replaced if places[other] is not None and other != name)
            if place is None and not any(torch.equal(values, replaced[other].values) for other in twins):
                raise self._unknown(name)
        return {place: replaced[name] for name, place in places.items() if place is not None}

    def _unknown(self, what: str) -> RunError:
        return RunError(
            f"the base's files hold no tensor for {what}",
            file=self._base,
            fix="this architecture stores its weights under other names; load base and adapter with PEFT",
        )


def weight_files(folder: Path) -> list[str]:
    """The names of the files with the weights: those of the index, or the one file.

    Raises:
        RunError: There are none.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return index_files(index)
    found = ["model.safetensors"] if (folder / "model.safetensors").is_file() else []
    found = found or sorted(path.name for path in folder.glob("*.safetensors"))
    if not found:
        raise RunError("no safetensors weights in the base's folder", file=folder, fix="download the model completely")
    return found


def check_not_quantised(base: Path) -> None:
    """Refuse a base whose files hold quantised weights."""
    settings = json.loads((base / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if settings:
        raise RunError(
            f"the base's weights are quantised ({settings.get('quant_method', 'unknown')}): "
            "an adapter cannot be added to them in place",
            file=base / "config.json",
            fix="loratune merge RUN OUT, which writes a whole model; or serve base and adapter side by side (loratune export --to vllm)",
        )


def write_merged(
    base: Path,
    updates: Mapping[str, LowRank],
    out: Path,
    *,
    dtype: torch.dtype | None,
    frozen: Mapping[str, Values] = MappingProxyType({}),
    replaced: Mapping[str, Replaced] = MappingProxyType({}),
    on_tensor: Callable[[], None] = lambda: None,
) -> None:
    """Write the merged weights, and `config.json` with their type.

    Args:
        base: The base's folder.
        updates: The adapter.
        out: A folder that is there.
        dtype: Of the written floating-point tensors; None: each as in the base.
        frozen: As for `MergedWeights`.
        replaced: Likewise.
        on_tensor: Called after each tensor.

    Raises:
        RunError: The base is quantised, or does not hold what the adapter changes.
    """
    check_not_quantised(base)
    with MergedWeights(base, updates, frozen, replaced) as weights:
        for file in weights.files:
            _write_file(out / file, weights, file, dtype, on_tensor)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    grown = max((item.num_rows for item in replaced.values()), default=0)
    for part in (config, config.get("text_config") or {}):
        if part.get("vocab_size", grown) < grown:
            part["vocab_size"] = grown
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    index = base / "model.safetensors.index.json"
    if index.is_file():
        record = json.loads(index.read_text(encoding="utf-8"))
        record["metadata"] = {"total_size": sum((out / file).stat().st_size for file in weights.files)}
        (out / index.name).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def copy_companions(base: Path, adapter: Path, out: Path, stop_token_ids: Sequence[int]) -> None:
    """Carry the tokenizer and template of training, the model's own code, and a generation config that stops.

    Args:
        base: The base's folder.
        adapter: The run's adapter folder, with tokenizer and template.
        out: Where to.
        stop_token_ids: What ends an answer; added to the generation config where they are missing.
    """
    for path in base.glob("*.py"):
        shutil.copyfile(path, out / path.name)
    for path in adapter.iterdir():
        if path.is_file() and not path.name.startswith("adapter_") and path.name != "README.md":
            shutil.copyfile(path, out / path.name)
    source = base / "generation_config.json"
    settings = json.loads(source.read_text(encoding="utf-8")) if source.is_file() else {}
    settings["eos_token_id"] = with_stops(settings.get("eos_token_id"), stop_token_ids)
    (out / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def with_stops(eos: int | list[int] | None, stops: Sequence[int]) -> list[int] | int | None:
    """`eos_token_id` with the missing stop tokens added."""
    known = eos if isinstance(eos, list) else [] if eos is None else [eos]
    whole = list(dict.fromkeys([*known, *stops]))
    return whole[0] if len(whole) == 1 else whole or None


def _write_file(
    path: Path, weights: MergedWeights, file: str, dtype: torch.dtype | None, on_tensor: Callable[[], None]
) -> None:
    """One safetensors file: 8 bytes with the header's length, the header as JSON, the tensors end to end."""
    types = {name: _written_as(weights.dtype(name), dtype) for name in weights.in_file(file)}
    names = sorted(types, key=lambda name: -types[name].itemsize)  # so that each is aligned to its size
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **weights.metadata(file)}}
    end = 0
    for name in names:
        shape = weights.shape(name)
        start, end = end, end + types[name].itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _CODES[types[name]], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = weights.tensor(name).to(types[name]).contiguous()
            stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            on_tensor()


def _written_as(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and own.is_floating_point else own
