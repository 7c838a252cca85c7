"""A frozen table with a few trained rows: `lora.new_tokens`, in the embedding and in the output head.

PEFT copies the full table in each forward and computes the gradient of the full copy. Here the trained rows are looked
up, or multiplied, separately from the table, and only they get a gradient.

Shapes: V vocabulary, H width, N trained rows, whose token ids are in ascending order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def embed_with_trained_rows(
    ids: torch.Tensor, weight_VH: torch.Tensor, rows_NH: torch.Tensor, numbers_N: torch.Tensor
) -> torch.Tensor:
    """Look up the embeddings of tokens, [..., H] in the type of the table, with a gradient to the trained rows.

    Args:
        ids: int64 [...], token ids.
        weight_VH: [V, H], the frozen table.
        rows_NH: [N, H], usually float32: the trained rows.
        numbers_N: int64 [N], ascending: which rows of the table they replace.
    """
    places = torch.searchsorted(numbers_N, ids).clamp_(max=len(numbers_N) - 1)
    trained = (numbers_N[places] == ids).unsqueeze(-1)
    return torch.where(trained, F.embedding(places, rows_NH).to(weight_VH.dtype), F.embedding(ids, weight_VH))


def project_with_trained_rows(
    hidden: torch.Tensor, weight_VH: torch.Tensor, rows_NH: torch.Tensor, numbers_N: torch.Tensor
) -> torch.Tensor:
    """Compute the logits of a frozen head with trained rows, [..., V], with a gradient to `hidden` and the rows.

    Arguments as in `embed_with_trained_rows`; `hidden` is [..., H].
    """
    logits = F.linear(hidden, weight_VH)
    return logits.index_copy(-1, numbers_N, F.linear(hidden, rows_NH.to(hidden.dtype)))
