"""The baseline z of KTO: an estimate of KL(p || p_ref) for each step, from prompts with answers to other prompts.

    step      (x1, y1) (x2, y2) … (xm, ym)        the examples, in the order of the shuffle
    mismatch  (x1, ym) (x2, y1) … (xm, ym-1)      each prompt with the answer of the example before it
    z         max(0, mean of log p(y|x) - log p_ref(y|x) over these m)

Ethayarajh et al. 2024 (arXiv 2402.01306, section 4.1) and TRL do the same. z has no gradient and no dropout, and is
that of the whole step, whatever its micro-batches and processes. Steps are a function of the seed, so log p_ref of
every mismatch of the run is computed before step 1, with the rest of the reference.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from loratune.data.examples import JudgedExample
from loratune.data.steps import num_steps_per_epoch, step_examples
from loratune.run.progress import NO_PROGRESS
from loratune.workflows.tasks.preference.log_probs import LogProbs, answers_of, log_probs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.planning.preparation import Preparation
    from loratune.run.progress import Progress
    from loratune.training.token_budget import TokenBudget
    from loratune.workflows.tasks.preference.loss import PreferenceLoss


def mismatched(prompt_of: JudgedExample, answer_of: JudgedExample, max_length: int) -> JudgedExample:
    """Return the prompt of one example with the answer of another, cut at `max_length` tokens."""
    start = int(prompt_of.supervised.argmax())
    first = int(answer_of.supervised.argmax())
    ids = np.concatenate([prompt_of.input_ids[:start], answer_of.input_ids[first:]])[:max_length]
    supervised = np.concatenate([np.zeros(start, dtype=bool), answer_of.supervised[first:]])[:max_length]
    supervised[0] = False  # nothing predicts the first token
    return JudgedExample(input_ids=ids, supervised=supervised, origin=prompt_of.origin, label=answer_of.label)


def mismatches(examples: Sequence[JudgedExample], max_length: int) -> list[JudgedExample]:
    """Return the prompt of each example of a step with the answer of the one before it, the first with the last's."""
    return [mismatched(examples[n], examples[n - 1], max_length) for n in range(len(examples))]


class Baseline:
    """The mismatches of every step, and z.

    Args:
        examples: The training examples.
        batch_size: Examples of a step.
        seed: Seed of the order of the examples.
        max_length: The maximum length of an example, in tokens.

    Attributes:
        max_length: The maximum length of an example, in tokens.
        reference: float64 [n, 1]; log p_ref of the mismatches of all steps, one after the other.
    """

    def __init__(self, examples: Sequence[JudgedExample], *, batch_size: int, seed: int, max_length: int) -> None:
        self._examples, self._batch_size, self._seed = examples, batch_size, seed
        self.max_length = max_length
        self._per_epoch = num_steps_per_epoch(len(examples), batch_size)
        self.reference: LogProbs = np.empty((0, 1))

    def measure(self, num_steps: int, loss: PreferenceLoss, budget: TokenBudget, progress: Progress) -> LogProbs:
        """Return log p of the mismatches of the first steps of a run, under the model as it is now."""
        parts = []
        for first in range(0, num_steps, self._per_epoch):
            steps = range(first, min(first + self._per_epoch, num_steps))
            examples = [example for step in steps for example in self._mismatches(step)]
            parts.append(log_probs(loss, examples, budget, progress, "reference baseline"))
        return np.concatenate(parts)

    def of_step(self, step: int, loss: PreferenceLoss, budget: TokenBudget) -> float:
        """Return z of a step, counted from 0, in nats. All ranks call it; each measures a share.

        Raises:
            MachineError: One mismatch does not fit into memory.
        """
        examples = self._mismatches(step)
        epoch, index = divmod(step, self._per_epoch)
        first = epoch * len(self._examples) + index * self._batch_size
        reference = self.reference[first : first + len(examples)]
        ratios = log_probs(loss, examples, budget, NO_PROGRESS, "baseline") - reference
        return max(0.0, math.fsum(ratios[:, 0].tolist()) / len(examples))

    def _mismatches(self, step: int) -> list[JudgedExample]:
        epoch, index = divmod(step, self._per_epoch)
        numbers = step_examples(
            len(self._examples), batch_size=self._batch_size, seed=self._seed, epoch=epoch, index=index
        )
        return mismatches([self._examples[number] for number in numbers], self.max_length)


def baseline_of(prepared: Preparation) -> Baseline | None:
    """Return the baseline of a prepared run; None if its loss has none."""
    recipe = prepared.recipe
    if recipe.preference.loss != "kto":
        return None
    return Baseline(
        answers_of(prepared.data.train),
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        max_length=int(recipe.data.max_length),
    )
