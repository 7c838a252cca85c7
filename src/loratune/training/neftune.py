"""NEFTune: noise on the embeddings while training (Jain et al. 2023, arXiv 2310.05914)."""

from __future__ import annotations

from typing import Any

import torch

from loratune.model.kernels.dropout import column_numbers, current_rows, uniform


class EmbeddingNoise:
    """Uniform noise of at most alpha / √(L·d) on each element of the input embeddings, in training mode.

    L is the example's own number of tokens, whatever it shares a micro-batch with, and d the embedding width. For an
    example alone the law is that of transformers' `neftune_noise_alpha`; in a padded batch of transformers, L is the
    length of the longest example. The numbers are those of `kernels.dropout`: a function of the recipe, not of how a
    step is split.

    Args:
        alpha: The strength; 5 to 15 in the paper.
        embeddings: The model's input embedding, which gets a forward hook.

    Attributes:
        lengths: int64 [E], tokens of each packed example in the next call; None: the call is one example.
    """

    lengths: torch.Tensor | None = None

    def __init__(self, alpha: float, embeddings: torch.nn.Module) -> None:
        self._alpha = alpha
        self._columns: torch.Tensor | None = None
        embeddings.register_forward_hook(self._add)

    def _add(self, module: torch.nn.Module, inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        """Return the embeddings, [1, T, d], with noise."""
        if not module.training:
            return embedded
        _, num_tokens, width = embedded.shape
        lengths = self.lengths
        if lengths is None:
            lengths = torch.tensor([num_tokens], device=embedded.device)
        most = self._alpha / (lengths * width).sqrt()
        most = torch.repeat_interleave(most, lengths, output_size=num_tokens).to(embedded.dtype)
        return embedded + self._unit(embedded) * most[None, :, None]

    def _unit(self, embedded: torch.Tensor) -> torch.Tensor:
        """Return numbers in [-1, 1], shaped like the embeddings and of their type."""
        rows = current_rows()
        if rows is None:  # not in a step
            return torch.empty_like(embedded).uniform_(-1, 1)
        if self._columns is None:
            self._columns = column_numbers("neftune", embedded.shape[-1]).to(embedded.device)
        return uniform(rows, self._columns).to(embedded.dtype)[None]
