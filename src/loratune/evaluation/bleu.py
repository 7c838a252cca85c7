"""BLEU (Papineni et al. 2002) by sacrebleu (Post 2018), from counts that add up over answers.

BLEU is no mean over answers: n-grams and lengths of all answers are added first. So each answer is kept as its counts, and
the BLEU of any choice of answers, such as a resample, is computed from their sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sacrebleu.metrics import BLEU

ORDER = 4
Counts = np.ndarray[tuple[int, int], np.dtype[np.float64]]
Values = np.ndarray[tuple[int], np.dtype[np.float64]]


class Bleu:
    """sacrebleu's BLEU with its defaults: tokenizer 13a, cased, exponential smoothing, n-grams up to 4."""

    def __init__(self) -> None:
        # The effective order is for single answers only; it changes no counts.
        self._single = BLEU(effective_order=True, max_ngram_order=ORDER)

    def counts(self, answer: str, references: Sequence[str]) -> list[int]:
        """Length of the answer and of its nearest reference, matched n-grams by order, n-grams by order: [2 + 2·ORDER]."""
        found = self._single.sentence_score(answer, references)
        return [found.sys_len, found.ref_len, *found.counts, *found.totals]

    def one(self, answer: str, references: Sequence[str]) -> float:
        """BLEU of a single answer, 0 to 100: over the orders that it is long enough for. To sort answers by, no more."""
        return float(self._single.sentence_score(answer, references).score)


def corpus_bleu(sums: Counts) -> Values:
    """BLEU, 0 to 100, of each row of sums of counts [rows, 2 + 2·ORDER]."""
    return np.array([_of_sums(row) for row in sums.astype(int).tolist()])


def _of_sums(row: list[int]) -> float:
    found = BLEU.compute_bleu(
        correct=row[2 : 2 + ORDER], total=row[2 + ORDER :], sys_len=row[0], ref_len=row[1], smooth_method="exp"
    )
    return float(found.score)


def signature(references: Sequence[Sequence[str]]) -> str:
    """Sacrebleu's own line on how it counts, without which two BLEU scores cannot be compared.

    Args:
        references: Of each answer.
    """
    most = max(map(len, references))
    streams = [[each[n] if n < len(each) else None for each in references] for n in range(most)]
    bleu = BLEU(max_ngram_order=ORDER)
    bleu.corpus_score([""] * len(references), streams)
    return str(bleu.get_signature())
