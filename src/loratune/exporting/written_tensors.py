"""Read back the tensors of a merged folder or a GGUF file, one at a time, and how their types round."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize, quantize
from safetensors import safe_open

from loratune.exporting.gguf.model import kind_of_shape
from loratune.exporting.merge_weights import weight_files
from loratune.model.gguf_config import ROPE_FACTORS
from loratune.model.safetensors_headers import stored_name

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from loratune.exporting.gguf.architectures import GgufLayout
    from loratune.exporting.weights_proof import Rounding

_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_WHOLE = ("I64", "I32", "I16", "I8", "U8", "BOOL")


class FolderTensors:
    """The tensors of a folder of safetensors.

    Args:
        folder: The folder.
        tied: Whether the head is the embedding, by the model's configuration: a copy of it in the files is not read.
    """

    def __init__(self, folder: Path, *, tied: bool) -> None:
        self._open = ExitStack()
        shards = [self._open.enter_context(safe_open(folder / file, framework="pt")) for file in weight_files(folder)]
        self._shard_of: dict[str, Any] = {name: shard for shard in shards for name in shard.keys()}  # noqa: SIM118
        self._tied = tied

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of most matrices; None if loratune does not know it."""
        kinds = Counter(
            part.get_dtype() for part in map(self._slice, self._shard_of) if len(part.get_shape()) > 1
        ).most_common(1)
        return _FLOATS.get(kinds[0][0]) if kinds else None

    def find(self, name: str) -> str | None:
        """Return the name in the files of one of the model's tensors; None if they do not store it."""
        found = stored_name(name, self._shard_of)
        if found is None and self._tied and name == "lm_head.weight":
            return stored_name("model.embed_tokens.weight", self._shard_of)
        return found

    def names(self) -> Iterable[str]:
        """Return the names of all tensors but a copy of a tied embedding."""
        copied = self._tied and "lm_head.weight" in self._shard_of and self._head_is_embedding()
        return [name for name in self._shard_of if not (copied and name == "lm_head.weight")]

    def _head_is_embedding(self) -> bool:
        embedding = stored_name("model.embed_tokens.weight", self._shard_of)
        return embedding is not None and torch.equal(*(self.read(name)[0] for name in ("lm_head.weight", embedding)))

    def read(self, name: str) -> tuple[torch.Tensor, Rounding | None, str]:
        """Return a tensor in float32, how its type rounds, and the type's name."""
        kind: str = self._slice(name).get_dtype()
        tensor: torch.Tensor = self._shard_of[name].get_tensor(name)
        dtype = tensor.dtype if kind in _WHOLE else _FLOATS.get(kind)
        return tensor.float(), None if dtype is None else rounding_to(dtype), kind

    def arranged(self, name: str, tensor: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - as for GGUF
        """Return the tensor: these files have the model's own layout."""
        return tensor

    def _slice(self, name: str) -> Any:
        return self._shard_of[name].get_slice(name)


class GgufTensors:
    """The tensors of a GGUF file.

    Args:
        file: The file.
        layout: How the architecture's tensors are named and arranged.
        tied: Whether the head is the embedding.
    """

    def __init__(self, file: Path, layout: GgufLayout, *, tied: bool) -> None:
        self._tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
        self._layout = layout
        self._tied = tied

    @property
    def rounding(self) -> Rounding | None:
        """How a file of loratune's own types is rounded; None for other types, and several in one file."""
        return rounding_in(self._tensors.values())

    def as_stored(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the values in the file of one of the model's matrices, in the model's layout.

        Args:
            name: The tensor's name in the model.
            tensor: Its values before, which are returned for what is no matrix, or not in the file.
        """
        stored = self.find(name) if tensor.dim() > 1 else None
        if stored is None:
            return tensor
        values = self._layout.rows_back(stored, self.read(stored)[0])
        return values.to(tensor.device) if values.shape == tensor.shape else tensor

    def find(self, name: str) -> str | None:
        """Return the name in the file of one of the model's tensors; None if it does not store it."""
        found = self._layout.name(name)
        if self._tied and name == "lm_head.weight":
            return "token_embd.weight"
        return found if found in self._tensors else None

    def names(self) -> Iterable[str]:
        """Return the names of all tensors but the factors of rotary positions, which the model computes."""
        return self._tensors.keys() - {ROPE_FACTORS}

    def read(self, name: str) -> tuple[torch.Tensor, Rounding | None, str]:
        """Return a tensor in float32, how its type rounds, and the type's name."""
        tensor = self._tensors[name]
        kind = tensor.tensor_type
        shape = [int(size) for size in reversed(tensor.shape)]
        values = torch.from_numpy(dequantize(tensor.data, kind).copy()).reshape(shape).float()
        return values, gguf_rounding(kind), kind.name

    def arranged(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the model in llama.cpp's order of rows."""
        return self._layout.values(name, tensor).float()


def rounding_in(tensors: Iterable[Any]) -> Rounding | None:
    """Return how the matrices of a GGUF file are rounded; None for types of llama.cpp's quantizer.

    Args:
        tensors: The tensors of a `GGUFReader`.
    """
    kinds = Counter(tensor.tensor_type for tensor in tensors if len(tensor.shape) > 1)
    ours = all(kind.name in (*_FLOATS, "Q8_0") for kind in kinds)
    return gguf_rounding(kinds.most_common(1)[0][0]) if ours and kinds else None


def rounding_to(dtype: torch.dtype) -> Rounding:
    """Return how a torch type rounds."""
    return lambda tensor: tensor.to(dtype).float()


def gguf_rounding(kind: GGMLQuantizationType) -> Rounding | None:
    """Return how tensors of a GGUF file with matrices of this type are rounded; None if the `gguf` package cannot."""
    if kind.name not in _FLOATS:
        try:
            quantize(torch.zeros(1, 256).numpy(), kind)
        except NotImplementedError:
            return None

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        own = kind_of_shape(tensor.shape, kind)
        if own.name in _FLOATS:
            return tensor.to(_FLOATS[own.name]).float()
        values = tensor.detach().cpu().float().contiguous().numpy()
        return torch.from_numpy(dequantize(quantize(values, own), own)).reshape(tensor.shape).to(tensor.device)

    return rounded
