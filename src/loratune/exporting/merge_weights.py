"""Merge an adapter into its base: a folder of safetensors laid out like the base's own, written one tensor at a time.

The arithmetic is float32, and each result is rounded once. Tensors that the adapter does not change are copied bit for
bit; tied embeddings stay tied, because no tensor is added.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import safe_open

from loratune.model.safetensors_headers import stored_name, weight_files_of, weight_index_of
from loratune.model.weight_facts import has_own_head
from loratune.run.errors import RunError

if TYPE_CHECKING:
    from pathlib import Path

    from loratune.exporting.adapter_matrices import LowRank, Replaced

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CODES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_TYPES = {code: dtype for dtype, code in _CODES.items()}

Values = Callable[[torch.Tensor], torch.Tensor]
"""Maps a weight in the base's files to the values that training multiplied with."""


class MergedWeights:
    """The tensors of a base model with an adapter applied, read from the base's files one at a time.

    Args:
        base: A folder with safetensors.
        updates: Module name → low-rank update; empty for the base unchanged.
        frozen: Module name → its weight's values in training, where these differ from the file (a quantized base).
        replaced: Tensor name → the values that replace it.

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
        self._replaced_in_files = self._find_replaced()
        self._values_of = {self._weight_of(module): values for module, values in self._frozen.items()}
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._file_of)

    def in_file(self, file: str) -> list[str]:
        """Return the names of the tensors in one file."""
        return [name for name, owner in self._file_of.items() if owner == file]

    def metadata(self, file: str) -> dict[str, str]:
        """Return the file's own metadata."""
        return self._shards[file].metadata() or {}

    def shape(self, name: str) -> list[int]:
        """Return the shape of a merged tensor, without loading it."""
        shape: list[int] = self._slice(name).get_shape()
        return self._replaced_in_files[name].shape(shape) if name in self._replaced_in_files else shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor in the base's files.

        Raises:
            RunError: The tensor is quantized, or of another type that cannot be merged into.
        """
        code = self._slice(name).get_dtype()
        if code not in _TYPES:
            raise RunError(f"tensor {name} has type {code}", file=self._base, fix="use the model before quantization")
        return _TYPES[code]

    def base(self, name: str) -> torch.Tensor:
        """Return a tensor of the base, with the values that training multiplied with."""
        weight: torch.Tensor = self._shards[self._file_of[name]].get_tensor(name)
        return self._values_of[name](weight) if name in self._values_of else weight

    def update(self, name: str) -> LowRank | Replaced | None:
        """Return what the adapter does to a tensor; None if it leaves it as it is."""
        return self._replaced_in_files.get(name) or self._update_of.get(name)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a merged tensor: in float32 if the adapter changes it, otherwise unchanged."""
        update = self.update(name)
        return self.base(name) if update is None else update.applied_to(self.base(name))

    def _slice(self, name: str) -> Any:
        return self._shards[self._file_of[name]].get_slice(name)

    def _weight_of(self, module: str) -> str:
        found = stored_weight(module, self._file_of)
        if found is None:
            raise self._unknown(f"the adapted module {module}")
        return found

    def _find_replaced(self) -> dict[str, Replaced]:
        """Return the replaced tensors by their names in the files."""
        replaced = self._replaced
        stored = {name: stored_name(name, self._file_of) for name in replaced}
        for name, in_file in stored.items():
            values = replaced[name].values
            # Of a tied pair the adapter has both, and the files perhaps one.
            twins = (other for other in replaced if stored[other] is not None and other != name)
            if in_file is None and not any(torch.equal(values, replaced[other].values) for other in twins):
                raise self._unknown(name)
        return {in_file: replaced[name] for name, in_file in stored.items() if in_file is not None}

    def _unknown(self, what: str) -> RunError:
        return RunError(
            f"the base's files have no tensor for {what}",
            file=self._base,
            fix="this architecture stores its weights under other names; load base and adapter with PEFT",
        )


def stored_weight(module: str, stored: Collection[str]) -> str | None:
    """Return the name under which files store a module's weight; None if they do not, or if it is ambiguous.

    Args:
        module: The module's name in the model.
        stored: Names of the tensors in the files.
    """
    own = stored_name(f"{module}.weight", stored)
    parts = module.split(".")
    layer = next((index for index, part in enumerate(parts) if part.isdigit()), 0)
    if own is not None or not layer:
        return own
    # Else the only tensor that has the same name from the layer number on.
    ending = "." + ".".join(parts[layer - 1 :]) + ".weight"
    found = [name for name in stored if name.endswith(ending)]
    if len(found) > 1:  # a vision tower has layers of the same names
        found = [name for name in found if "language_model." in name]
    return found[0] if len(found) == 1 else None


def weight_files(folder: Path) -> list[str]:
    """Return the names of the weight files in a model's folder.

    Raises:
        RunError: There are none.
    """
    found = [path.name for path in weight_files_of(folder)]
    if not found:
        raise RunError("no safetensors weights in the base's folder", file=folder, fix="download the model completely")
    return found


def check_not_quantized(base: Path) -> None:
    """Refuse a base whose files contain quantized weights."""
    settings = json.loads((base / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if settings:
        raise RunError(
            f"the base's weights are quantized ({settings.get('quant_method', 'unknown')}): "
            "an adapter cannot be added to them in place",
            file=base / "config.json",
            fix="loratune merge RUN OUT, which writes the full model, or loratune export --to vllm",
        )


def write_merged(
    base: Path,
    updates: Mapping[str, LowRank],
    out: Path,
    *,
    dtype: torch.dtype | None,
    frozen: Mapping[str, Values] = MappingProxyType({}),
    replaced: Mapping[str, Replaced] = MappingProxyType({}),
) -> None:
    """Write the merged weights, and a `config.json` with their type.

    Args:
        base: The base's folder.
        updates: The adapter's low-rank updates, by module name.
        out: An existing folder to write into.
        dtype: The type of the written floating-point tensors; None keeps that of each tensor in the base.
        frozen: As for `MergedWeights`.
        replaced: As for `MergedWeights`.

    Raises:
        RunError: The base is quantized, or lacks a tensor that the adapter changes.
    """
    check_not_quantized(base)
    with MergedWeights(base, updates, frozen, replaced) as weights:
        for file in weights.files:
            _write_file(out / file, weights, file, dtype)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    if has_own_head(base):  # else what reads the flag would drop the head that was trained with
        for part in (config, config.get("text_config") or {}):
            if part.get("tie_word_embeddings"):
                part["tie_word_embeddings"] = False
        config["tie_word_embeddings"] = False
    grown = max((item.num_rows for item in replaced.values()), default=0)
    for part in (config, config.get("text_config") or {}):
        if part.get("vocab_size", grown) < grown:
            part["vocab_size"] = grown
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    index = weight_index_of(base)
    if index is not None:
        record = json.loads(index.read_text(encoding="utf-8"))
        record["metadata"] = {"total_size": sum((out / file).stat().st_size for file in weights.files)}
        (out / index.name).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def copy_companions(base: Path, adapter: Path, out: Path, stop_token_ids: Sequence[int]) -> None:
    """Copy the files next to the weights: tokenizer and template of training, the model's code, the generation config.

    Args:
        base: The base's folder.
        adapter: The run's adapter folder, with tokenizer and template.
        out: The folder to copy into.
        stop_token_ids: The tokens that end an answer; the generation config gets those that it lacks.
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
    """Return `eos_token_id` with the missing stop tokens added."""
    known = eos if isinstance(eos, list) else [] if eos is None else [eos]
    tokens = list(dict.fromkeys([*known, *stops]))
    return tokens[0] if len(tokens) == 1 else tokens or None


def _write_file(path: Path, weights: MergedWeights, file: str, dtype: torch.dtype | None) -> None:
    """Write one safetensors file: 8 bytes with the header's length, the header as JSON, the tensors end to end."""
    types = {name: _written_type(weights.dtype(name), dtype) for name in weights.in_file(file)}
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


def _written_type(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and own.is_floating_point else own
