"""The losses of preferences on the packed forward: all answers end to end, log-probabilities in chunks.

    input_ids [1, T]  → decoder, both sequences of every pair end to end → hidden states of the answers' tokens [S, H]
                      → output head and cross-entropy in chunks          → -log p of each token [S]
                      → sums over each answer                            → [P, A], of which `objective` makes losses [P]

The full logits are never in memory. Examples without pairs (`evaluate.forgetting`) have the loss of `SupervisedLoss`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from loratune.data.batch import MicroBatch, float_type
from loratune.model.kernels.cross_entropy import cross_entropy_each
from loratune.recipe.sections.preference import PreferenceSection
from loratune.training.loss import SupervisedLoss
from loratune.workflows.tasks.preference.objective import Answers, judged_losses, pair_losses

if TYPE_CHECKING:
    from loratune.training.token_budget import TokenBudget
    from loratune.workflows.tasks.preference.baseline import Baseline


class PreferenceLoss(SupervisedLoss):
    """The loss of a model on pairs of answers: `SupervisedLoss` with a pair in place of a supervised token.

    Attributes:
        section: The recipe's preference section.
        num_answers: Answers of each example, A.
    """

    section = PreferenceSection()
    num_answers = 2

    def sum(self, batch: MicroBatch, each: torch.Tensor | None = None) -> torch.Tensor:
        """Sum the losses of the pairs of a micro-batch; return a float32 scalar with a gradient.

        Args:
            batch: The micro-batch.
            each: float32 [P], filled with the loss of each pair.
        """
        if batch.answer_tokens is None:
            return super().sum(batch, each)
        losses = self._losses(batch)
        if each is not None:
            each.copy_(losses.detach())
        return losses.sum().float()

    @torch.no_grad()
    def per_token(self, batch: MicroBatch) -> torch.Tensor:
        """Return the loss of each pair, float32 [P]; of examples without pairs, -log p of each supervised token."""
        if batch.answer_tokens is None:
            return super().per_token(batch)
        return self._measured(batch).float()

    def _losses(self, batch: MicroBatch) -> torch.Tensor:
        """Return the loss of each example in training, [P], with a gradient."""
        return pair_losses(self.section, self.answers(batch))

    def _measured(self, batch: MicroBatch) -> torch.Tensor:
        """Return the loss of each example as it is measured, [P]."""
        return self._losses(batch)

    def answers(self, batch: MicroBatch) -> Answers:
        """Return the log-probabilities of the answers of a micro-batch of preferences, with a gradient."""
        assert batch.answer_tokens is not None, "not a micro-batch of preferences"
        losses_S = cross_entropy_each(self._predictions(batch), self.head, batch.targets, compiled=self.compiled)
        # A sum of hundreds of float32 numbers, whose differences of a few hundredths train the model.
        parts = torch.split(losses_S.to(float_type(losses_S.device)), list(batch.answer_tokens))
        logps_PA = -torch.stack([part.sum() for part in parts]).view(-1, self.num_answers)
        lengths = torch.tensor(batch.answer_tokens, device=logps_PA.device, dtype=logps_PA.dtype)
        return Answers(
            logps_PA=logps_PA,
            lengths_PA=lengths.view(-1, self.num_answers),
            reference_PA=None if batch.reference is None else batch.reference.view(-1, self.num_answers),
        )


class JudgedLoss(PreferenceLoss):
    """The loss of a model on single answers that were judged good or bad (KTO).

    Where it is measured and not trained (held-out loss, each example of a bad step), an answer's loss has the baseline
    0, so that it does not depend on the others it is measured with.

    Attributes:
        baseline: Computes z of each step; None before the reference is known.
        z: The baseline of the current step, in nats.
    """

    num_answers = 1
    baseline: Baseline | None = None
    z = 0.0

    def before_step(self, step: int, budget: TokenBudget) -> None:
        assert self.baseline is not None, "the reference was not computed"
        self.z = self.baseline.of_step(step, self, budget)

    def _losses(self, batch: MicroBatch) -> torch.Tensor:
        assert batch.labels is not None, "not a micro-batch of judged answers"
        return judged_losses(self.section, self.answers(batch), batch.labels, self.z)

    def _measured(self, batch: MicroBatch) -> torch.Tensor:
        assert batch.labels is not None, "not a micro-batch of judged answers"
        return judged_losses(self.section, self.answers(batch), batch.labels)


def loss_class(section: PreferenceSection) -> type[PreferenceLoss]:
    """Return the class of a recipe's loss."""
    return JudgedLoss if section.loss == "kto" else PreferenceLoss
