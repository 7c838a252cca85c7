"""NEFTune: noise on the embeddings while training (Jain et al. 2023, arXiv 2310.05914)."""

from __future__ import annotations

from typing import Any

import torch


class EmbeddingNoise:
    """Adds uniform noise of at most alpha / √(L·d) to each number of the embeddings, while their module is in training: L tokens of the
    example, d the width.

    L is the example's own length, whatever it shares a micro-batch with. For an example alone this is transformers' `neftune_noise_alpha`,
    number for number from the same random state; where transformers pads a batch, its L is the longest example's.

    Args:
        alpha: The strength.
        embeddings: The model's module of input embeddings.

    Attributes:
        lengths: int64 [E], the tokens of each example that the next call lays end to end; None: it is one example.
    """

    lengths: torch.Tensor | None = None

    def __init__(self, alpha: float, embeddings: torch.nn.Module) -> None:
        self._alpha = alpha
        embeddings.register_forward_hook(self._add)

    def _add(self, module: torch.nn.Module, inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        """`embedded`: [1, T, d]."""
        if not module.training:
            return embedded
        _, num_tokens, width = embedded.shape
        lengths = self.lengths
        if lengths is None:
            lengths = torch.tensor([num_tokens], device=embedded.device)
        most = self._alpha / (lengths * width).sqrt()
        most = torch.repeat_interleave(most, lengths, output_size=num_tokens).to(embedded.dtype)
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * most[None, :, None]
