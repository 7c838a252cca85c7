"""What adapters save for the backward pass, and what their variants and fully trained modules take in addition."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratune.model.adapter.module_roles import reads_attention
from loratune.model.adapter.patterns import rank_of
from loratune.model.adapter.variants import changes_base, num_trainable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.model.adapter.modules_to_save import FullyTrained
    from loratune.model.adapter.targets import Matrix
    from loratune.recipe.recipe import LoraSection


def saved_bytes(matrices: Sequence[Matrix], lora: LoraSection, dtype_bytes: int, *, inputs: bool = True) -> int:
    """Return the bytes that one token leaves in the adapters of these matrices between forward and backward pass.

    A fast layer saves its input (once for all layers that read the same), a byte of mask for each element if there is
    dropout, and the product of width r. DoRA, in PEFT's own forward and in float32, saves the layer's output and the
    update's, a copy of its input, and with dropout the mask and its product. Counted with `saved_tensors_hooks`, the
    formula is within 3 % (`tests/planning/memory/test_memory.py`).

    Args:
        matrices: The adapted matrices.
        lora: Ranks, dropout and variant.
        dtype_bytes: Bytes of one activation.
        inputs: Whether the adapter saves its layer's input; False if the layer saves it anyway.
    """
    if lora.variant == "dora":
        shares_inputs = not lora.dropout and dtype_bytes >= 4  # else PEFT saves a copy of each matrix's own
        shared = _input_bytes(matrices, dtype_bytes) if shares_inputs else 0
        return shared + sum(_saved_by_dora(matrix, lora, dtype_bytes) for matrix in matrices)
    products = dtype_bytes * sum(rank_of(lora, matrix.name) for matrix in matrices)
    masks = sum(matrix.d_in for matrix in matrices) if lora.dropout else 0
    return (_input_bytes(matrices, dtype_bytes) if inputs else 0) + products + masks


def variant_bytes(matrices: Sequence[Matrix], lora: LoraSection, dtype_bytes: int) -> int:
    """Return the bytes that the variant takes during training, on top of what every adapter takes.

    PiSSA and OLoRA keep A₀ and B₀ in float32. DoRA builds the whole update of a matrix: an identity, the update, W,
    their sum and its square, in float32, of the largest matrix at the peak; and if the base is narrower and there is
    dropout, a float32 copy of every adapted matrix, which is saved for the backward pass.
    """
    if changes_base(lora):
        return sum(4 * num_trainable(lora, matrix) for matrix in matrices)
    if lora.variant != "dora":
        return 0
    copies = sum(4 * matrix.d_in * matrix.d_out for matrix in matrices) if lora.dropout and dtype_bytes < 4 else 0
    return copies + max(4 * (matrix.d_in**2 + 4 * matrix.d_in * matrix.d_out) for matrix in matrices)


def target_parameter_bytes(stacks: Sequence[Matrix], dtype_bytes: int) -> int:
    """Return the bytes that stacks of matrices adapted by `lora.target_parameters` take during training.

    PEFT adds the update to a copy of each stack, which is saved for the backward pass. There, the gradient of the
    largest copy and that gradient's cast to the base's type are alive at once.
    """
    sizes = [matrix.count * matrix.d_in * matrix.d_out for matrix in stacks]
    return dtype_bytes * (sum(sizes) + 2 * max(sizes, default=0))


def saved_target_parameter_bytes(stacks: Sequence[Matrix], dtype_bytes: int, active: int) -> int:
    """Return the bytes that one token saves for these copies' gradients: its input to each of `active` matrices."""
    return dtype_bytes * sum(min(active, matrix.count) * matrix.d_in for matrix in stacks)


def fully_trained_bytes(modules: Sequence[FullyTrained], dtype_bytes: int) -> int:
    """Return the bytes that modules trained in full take besides weights, gradients and optimizer state.

    A head: the gradient of one micro-batch in float32. An embedding: the gradient of the whole table in the base's
    type, and in float32 while it is added up, since the lookup gives no sparse gradient.
    """
    heads = sum(4 * item.trainable for item in modules if item.is_head)
    return heads + sum((4 + dtype_bytes) * item.trainable for item in modules if item.is_embedding and not item.is_rows)


def saved_fully_trained_bytes(modules: Sequence[FullyTrained], dtype_bytes: int) -> int:
    """Return the bytes that one token saves for modules trained in full: the inputs of their matrices.

    Norms save their inputs whether they are trained or not.
    """
    inside = [shape for item in modules if not (item.is_head or item.is_embedding) for shape in item.shapes]
    return dtype_bytes * sum(shape[-1] for shape in inside if len(shape) > 1)


def _input_bytes(matrices: Sequence[Matrix], dtype_bytes: int) -> int:
    """Return the bytes of a token's inputs to these matrices; those of one module that read the same count once."""
    inputs = {(m.name.rpartition(".")[0], m.d_in, reads_attention(m.name)): m.d_in for m in matrices}
    return dtype_bytes * sum(inputs.values())


def _saved_by_dora(matrix: Matrix, lora: LoraSection, dtype_bytes: int) -> int:
    r = rank_of(lora, matrix.name)
    if lora.dropout:
        return 4 * (matrix.d_in + 2 * matrix.d_out + r) + matrix.d_in
    cast = 4 * matrix.d_in if dtype_bytes < 4 else 0
    return cast + (4 + dtype_bytes) * matrix.d_out + 4 * r
