"""What `loratune adapter` prints with `--json`."""

from __future__ import annotations

from loratune.run.records.base import FileRecord, Part


class MatrixRecord(Part):
    """The update of one matrix."""

    name: str
    """The module."""
    rank: int
    """Rank of its factors."""
    scale: float
    """Factor by which B·A is multiplied: alpha/r, or alpha/√r with rank-stabilized LoRA."""
    norm: float
    """Frobenius norm of the update."""
    effective_rank: float
    """Exponential of the entropy of the normalized singular values (Roy & Vetterli 2007)."""
    rank_of_99_percent: int
    """Number of singular values that make up 99 % of the squared norm."""


class InspectOutput(FileRecord):
    """`loratune adapter inspect`: what an adapter is."""

    adapter: str
    """Its folder."""
    kind: str
    """`LoRA`, `rank-stabilized LoRA` or `DoRA`, with the PEFT settings by which it is more than
    updates of matrices."""
    base: str
    """Base model that the adapter names; empty if it names none."""
    base_sha256: dict[str, str] | None
    """Weight file of the base → SHA-256; null if the base is not on this machine."""
    num_parameters: int
    """Number of its parameters."""
    matrices: tuple[MatrixRecord, ...]
    """The updates of single matrices."""
    other: tuple[str, ...]
    """Biases, full tensors and stacked experts that it also contains."""


class CheckRecord(Part):
    """The verification of what was written."""

    relative_error: float
    """Error of the written updates against the closed form, over the norm of the updates that were added."""
    peft_error: float | None
    """The same for the updates as PEFT computes them; null if the base is not on this machine."""
    logits_difference: float | None
    """Largest difference between a logit by PEFT and by the closed form, relative to the largest logit;
    null without base."""
    logits_change: float | None
    """The same between the base and the closed form, which is the effect of the adapter."""


class AdapterOutput(FileRecord):
    """`loratune adapter combine`, `resize`, `extract` and `convert`: what was written."""

    folder: str
    """The new adapter's folder."""
    ranks: tuple[int, int]
    """Its lowest and its highest rank."""
    num_parameters: int
    """Number of its parameters."""
    discarded_share: float
    """Share of the squared norm of the requested updates that the ranks discard."""
    worst_matrix: str | None
    """Matrix with the largest discarded share; null if nothing is discarded."""
    worst_share: float
    """The discarded share of that matrix."""
    left_out: dict[str, float]
    """`extract` only: tensor that is not a matrix of a linear layer of the base → norm of its change, which is not in
    the adapter."""
    seed: int | None
    """`combine` only: the seed of what `dare_linear` and `dare_ties` drop; null for other methods."""
    check: CheckRecord
    """The verification."""


class MatrixDifference(Part):
    """One matrix in two adapters."""

    name: str
    """Name of the module, or, in `others`, of the tensor."""
    relative_difference: float | None
    """‖second - first‖ / ‖first‖ of the updates; null if the first is zero and the second is not."""
    cosine: float
    """Cosine of the angle between the updates."""


class AdapterDiffOutput(FileRecord):
    """`loratune adapter diff`: two adapters' updates."""

    relative_difference: float | None
    """‖second - first‖ / ‖first‖ over all matrices; null if the first is zero and the second is not."""
    cosine: float
    """Cosine of the angle between all updates."""
    only_first: tuple[str, ...]
    """Matrices that only the first adapter adapts, and biases and tensors that only it contains."""
    only_second: tuple[str, ...]
    """The same for the second adapter."""
    matrices: tuple[MatrixDifference, ...]
    """Matrices that both adapt."""
    others: tuple[MatrixDifference, ...]
    """Biases and full tensors that both contain, compared by value; not included in the totals."""


class AdapterProofOutput(FileRecord):
    """`loratune adapter merge` and `certify`: the comparison of files with base and adapter."""

    folder: str
    """The files."""
    verdict: str
    """`same`, `different`, or `undecided`: rounding left nothing of the update, so the base alone would pass."""
    problems: tuple[str, ...]
    """What differs."""
    kept: float
    """Share of the update that is left after rounding."""
    relative_error: float
    """Error as a fraction of the update."""
    types: tuple[str, ...]
    """Types of the tensors."""
