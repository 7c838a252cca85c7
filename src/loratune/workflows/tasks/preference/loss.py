"""The loss of preference pairs on the packed forward: both answers of a pair, log-probabilities in chunks.

    input_ids [1, T]  → decoder, both sequences of every pair end to end → hidden states of the answers' tokens [S, H]
                      → output head and cross-entropy in chunks          → -log p of each token [S]
                      → sums over each answer                            → [P, 2], of which `objective` makes losses [P]

Full logits are never held. Examples without pairs (`evaluate.forgetting`) have the loss of `SupervisedLoss`.
"""

from __future__ import annotations

import torch

from loratune.data.batch import MicroBatch, float_type
from loratune.model.kernels.cross_entropy import cross_entropy_each
from loratune.recipe.sections.preference import PreferenceSection
from loratune.training.loss import SupervisedLoss
from loratune.workflows.tasks.preference.objective import Answers, pair_losses


class PreferenceLoss(SupervisedLoss):
    """The loss of a model on pairs of answers: `SupervisedLoss` with a pair in place of a supervised token.

    Attributes:
        section: The recipe's preference section.
    """

    section = PreferenceSection()

    def sum(self, batch: MicroBatch, each: torch.Tensor | None = None) -> torch.Tensor:
        """Sum the losses of the pairs of a micro-batch; return a float32 scalar with a gradient.

        Args:
            batch: The micro-batch.
            each: float32 [P], filled with the loss of each pair.
        """
        if batch.answer_tokens is None:
            return super().sum(batch, each)
        losses = pair_losses(self.section, self.answers(batch))
        if each is not None:
            each.copy_(losses.detach())
        return losses.sum().float()

    @torch.no_grad()
    def per_token(self, batch: MicroBatch) -> torch.Tensor:
        """Return the loss of each pair, float32 [P]; of examples without pairs, -log p of each supervised token."""
        if batch.answer_tokens is None:
            return super().per_token(batch)
        return pair_losses(self.section, self.answers(batch)).float()

    def answers(self, batch: MicroBatch) -> Answers:
        """Return the log-probabilities of the answers of a micro-batch of pairs, with a gradient."""
        assert batch.answer_tokens is not None, "not a micro-batch of pairs"
        losses_S = cross_entropy_each(self._predictions(batch), self.head, batch.targets, compiled=self.compiled)
        # A sum of hundreds of float32 numbers, whose differences of a few hundredths train the model.
        parts = torch.split(losses_S.to(float_type(losses_S.device)), list(batch.answer_tokens))
        logps_P2 = -torch.stack([part.sum() for part in parts]).view(-1, 2)
        lengths = torch.tensor(batch.answer_tokens, device=logps_P2.device, dtype=logps_P2.dtype)
        return Answers(
            logps_P2=logps_P2,
            lengths_P2=lengths.view(-1, 2),
            reference_P2=None if batch.reference is None else batch.reference.view(-1, 2),
        )
