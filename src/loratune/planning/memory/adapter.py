"""What adapters keep for the way back, and what their variants take beside."""

from __future__ import annotations

from collections.abc import Sequence

from loratune.model.adapter.module_roles import reads_attention
from loratune.model.adapter.modules_to_save import FullyTrained
from loratune.model.adapter.patterns import rank_of
from loratune.model.adapter.targets import Matrix
from loratune.model.adapter.variants import changes_base, num_trainable
from loratune.recipe.recipe import LoraSection


def kept_bytes(matrices: Sequence[Matrix], lora: LoraSection, dtype_bytes: int, *, inputs: bool = True) -> int:
    """Bytes that one token leaves in the adapters of these matrices, between forward and backward.

    A fast layer keeps its input (shared by those with the same one), a byte of mask for each element where there is dropout,
    and the r-wide product. DoRA, in PEFT's own forward and in float32, keeps the layer's output and the update's, and of its
    input a copy, with dropout the mask and what it left. Counted with `saved_tensors_hooks`
    (`tests/planning/memory/test_memory.py`). `inputs`: whether a layer's input is kept by the adapter, and not by the layer anyway.
    """
    if lora.variant == "dora":
        return sum(_kept_by_dora(matrix, lora, dtype_bytes) for matrix in matrices) + (
            0 if lora.dropout or dtype_bytes < 4 else _inputs(matrices, dtype_bytes)
        )
    adapters = (_inputs(matrices, dtype_bytes) if inputs else 0) + dtype_bytes * sum(
        rank_of(lora, matrix.name) for matrix in matrices
    )
    if lora.dropout:
        adapters += sum(matrix.d_in for matrix in matrices)
    return adapters


def variant_bytes(matrices: Sequence[Matrix], lora: LoraSection, dtype_bytes: int) -> int:
    """Bytes that the variant takes while it trains, beside what every adapter takes.

    PiSSA and OLoRA: A₀ and B₀ in float32. DoRA: to make the whole update of the largest matrix, an identity, the update, W
    and their sum, and the sum's square, in float32; and where the base is narrower and there is dropout, a float32
    copy of every adapted matrix, kept for the way back.
    """
    if changes_base(lora):
        return sum(4 * num_trainable(lora, matrix) for matrix in matrices)
    if lora.variant != "dora":
        return 0
    copies = sum(4 * matrix.d_in * matrix.d_out for matrix in matrices) if lora.dropout and dtype_bytes < 4 else 0
    return copies + max(4 * (matrix.d_in**2 + 4 * matrix.d_in * matrix.d_out) for matrix in matrices)


def stack_bytes(stacks: Sequence[Matrix], dtype_bytes: int) -> int:
    """Bytes that adapted stacks of matrices take while they train: PEFT adds the update to a copy of each, which is kept for the way back,
    and on that the gradient of the largest is there at once with its own narrower copy."""
    sizes = [matrix.count * matrix.d_in * matrix.d_out for matrix in stacks]
    return dtype_bytes * (sum(sizes) + 2 * max(sizes, default=0))


def stack_kept_bytes(stacks: Sequence[Matrix], dtype_bytes: int, active: int) -> int:
    """Bytes that one token leaves for the gradients of these copies: its input to each of the `active` matrices that it sees."""
    return dtype_bytes * sum(min(active, matrix.count) * matrix.d_in for matrix in stacks)


def whole_bytes(whole: Sequence[FullyTrained], dtype_bytes: int) -> int:
    """Bytes that modules which are trained whole take beside weights, gradients and the optimizer's state.

    A head: its gradient in float32 while a micro-batch's is made. An embedding: the gradient of the whole table in the base's type, and
    in float32 as it is added, since looking up gives no sparse one.
    """
    heads = sum(4 * item.trainable for item in whole if item.is_head)
    return heads + sum((4 + dtype_bytes) * item.trainable for item in whole if item.is_embedding and not item.is_rows)


def whole_kept_bytes(whole: Sequence[FullyTrained], dtype_bytes: int) -> int:
    """Bytes that one token leaves in them for the way back: the inputs of their matrices. Norms keep theirs anyway."""
    inside = [shape for item in whole if not (item.is_head or item.is_embedding) for shape in item.shapes]
    return dtype_bytes * sum(shape[-1] for shape in inside if len(shape) > 1)


def _inputs(matrices: Sequence[Matrix], dtype_bytes: int) -> int:
    inputs = {(m.name.rpartition(".")[0], m.d_in, reads_attention(m.name)): m.d_in for m in matrices}
    return dtype_bytes * sum(inputs.values())


def _kept_by_dora(matrix: Matrix, lora: LoraSection, dtype_bytes: int) -> int:
    r = rank_of(lora, matrix.name)
    if lora.dropout:
        return 4 * (2 * matrix.d_in + 2 * matrix.d_out + r)
    cast = 4 * matrix.d_in if dtype_bytes < 4 else 0
    return cast + (4 + dtype_bytes) * matrix.d_out + 4 * r
