"""Compute BLEU (Papineni et al. 2002) with sacrebleu (Post 2018), from counts that add up over answers.

BLEU is not a mean over answers: n-grams and lengths of all answers are added first. So each answer is kept as its
counts, and the BLEU of any selection of answers, such as a resample, is computed from their sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from sacrebleu.metrics import BLEU

from loratune.data.statistics import scripts

if TYPE_CHECKING:
    from collections.abc import Sequence

ORDER = 4
Counts = np.ndarray[tuple[int, int], np.dtype[np.float64]]
Values = np.ndarray[tuple[int], np.dtype[np.float64]]


_WITHOUT_SPACES = {"HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"}


def tokenizer_for(references: Sequence[Sequence[str]]) -> str:
    """Return the name of sacrebleu's tokenizer for the script of the references.

    13a splits at spaces: a Chinese or Thai answer would be one word, right or wrong as a whole. `zh` splits Chinese
    characters; `char` splits all, since sacrebleu's tokenizers for Japanese and Korean need further programs.
    """
    shares = scripts([reference for each in references for reference in each])
    if sum(shares.get(script, 0) for script in _WITHOUT_SPACES) > 0.1:
        return "char"
    return "zh" if shares.get("CJK", 0) > 0.5 else "13a"


class Bleu:
    """sacrebleu's BLEU with its defaults: cased, exponential smoothing, n-grams up to 4.

    Args:
        tokenize: sacrebleu's name of the tokenizer.
    """

    def __init__(self, tokenize: str = "13a") -> None:
        # The effective order is for single answers only; it does not change the counts.
        self._single = BLEU(effective_order=True, max_ngram_order=ORDER, tokenize=tokenize)

    def counts(self, answer: str, references: Sequence[str]) -> list[int]:
        """Return the counts of one answer: [2 + 2·ORDER].

        These are the lengths of the answer and its nearest reference, the matched n-grams by order, and the n-grams by
        order.
        """
        result = self._single.sentence_score(answer, references)
        return [result.sys_len, result.ref_len, *result.counts, *result.totals]

    def one(self, answer: str, references: Sequence[str]) -> float:
        """Return the BLEU of a single answer, 0 to 100, over the orders that it is long enough for.

        Good enough to sort answers by; the mean over answers is not the BLEU of all.
        """
        return float(self._single.sentence_score(answer, references).score)


def corpus_bleu(sums: Counts) -> Values:
    """Return the BLEU, 0 to 100, of each row of summed counts [rows, 2 + 2·ORDER]."""
    return np.array([_bleu(row) for row in sums.astype(int).tolist()])


def _bleu(row: list[int]) -> float:
    result = BLEU.compute_bleu(
        correct=row[2 : 2 + ORDER], total=row[2 + ORDER :], sys_len=row[0], ref_len=row[1], smooth_method="exp"
    )
    return float(result.score)


def signature(references: Sequence[Sequence[str]], tokenize: str = "13a") -> str:
    """Return sacrebleu's signature: only BLEU scores with equal signatures can be compared.

    Args:
        references: The references of each answer.
        tokenize: sacrebleu's name of the tokenizer.
    """
    longest = max(map(len, references))
    streams = [[each[n] if n < len(each) else None for each in references] for n in range(longest)]
    bleu = BLEU(max_ngram_order=ORDER, tokenize=tokenize)
    bleu.corpus_score([""] * len(references), streams)
    return str(bleu.get_signature())
