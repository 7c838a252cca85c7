"""The two kinds of preference data: pairs of a better and a worse answer, and single answers that were judged.

`data` reads, renders and verifies both alike; what differs stands here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from loratune.data.examples import AnswersExample, Example, JudgedExample, PairExample
from loratune.run.errors import DataError, plural
from loratune.workflows.tasks.preference.judged_rows import Judged, read_judged
from loratune.workflows.tasks.preference.rows import SIDES, Pair, read_pairs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from loratune.data.rows.conversation import Conversation
    from loratune.data.rows.reading import Reader, ReadSide
    from loratune.data.rows.row import Origin
    from loratune.recipe.recipe import PreferenceSection, Source

LENGTH_BIAS = 0.6
"""The share of pairs whose chosen answer is the longer one from which the report speaks of a length bias; 0.5: none."""

BALANCE = (1.0, 4 / 3)
"""The paper of KTO advises a ratio n_D·λ_D / (n_U·λ_U) of good and bad answers in this range (its equation 8)."""


class PreferenceRow(Protocol):
    """One validated row."""

    origin: Origin

    @property
    def sides(self) -> tuple[Conversation, ...]: ...

    @property
    def key(self) -> int: ...


class Kind(ABC):
    """What differs between the kinds of preference data.

    Attributes:
        word: What a row is.
        sides: A name for each conversation of a row.
    """

    word: str
    sides: tuple[str, ...]

    @abstractmethod
    def read(self, read: Reader, sources: Sequence[Source]) -> ReadSide[Any]:
        """Read the rows of sources."""

    def stratum(self, item: Any) -> str:
        """Return the group of a row of which a part is held out, as an adjective; "" if there is one."""
        return ""

    @abstractmethod
    def example(
        self, item: Any, sides: Mapping[str, Example], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> AnswersExample | str | None:
        """Return the example of a row; or why it is refused; None if the maximum length takes what makes it one."""

    @abstractmethod
    def shown(self, item: Any) -> Conversation | None:
        """Return the conversation whose answer is a reference for the model's own; None if there is none."""

    @abstractmethod
    def report(self, examples: Sequence[Any]) -> dict[str, Any]:
        """Return what a side of the data report has of this kind alone."""

    @abstractmethod
    def notices(self, side: Mapping[str, Any], section: PreferenceSection) -> Iterator[str]:
        """Yield notices about the training side of the data report."""


class Pairs(Kind):
    """Rows with a better and a worse answer."""

    word = "pair"
    sides = SIDES

    def read(self, read: Reader, sources: Sequence[Source]) -> ReadSide[Pair]:
        return read_pairs(read, sources)

    def example(
        self, item: Pair, sides: Mapping[str, Example], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> AnswersExample | str | None:
        chosen, rejected = (sides[name] for name in SIDES)
        if np.array_equal(chosen.input_ids, rejected.input_ids):
            if len(chosen.input_ids) == max_length:
                return None  # both were cut before they differ
            return "chosen and rejected have the same tokens, so there is nothing to prefer"
        return _prompt_difference(chosen, rejected, tokenizer) or PairExample.of(chosen, rejected, item.origin)

    def shown(self, item: Pair) -> Conversation | None:
        return item.chosen

    def report(self, examples: Sequence[PairExample]) -> dict[str, Any]:
        lengths = np.array([[int(part.supervised.sum()) for part in example.sequences] for example in examples])
        chosen, rejected = lengths.T
        return {
            "pairs": {
                "chosen_tokens": float(chosen.mean()),
                "rejected_tokens": float(rejected.mean()),
                "chosen_longer": float(((chosen > rejected) + 0.5 * (chosen == rejected)).mean()),
            }
        }

    def notices(self, side: Mapping[str, Any], section: PreferenceSection) -> Iterator[str]:
        pairs = side["pairs"]
        if pairs["chosen_longer"] >= LENGTH_BIAS:
            yield (
                f"the chosen answer is the longer one in {pairs['chosen_longer']:.0%} of the pairs (on average "
                f"{pairs['chosen_tokens']:.0f} and {pairs['rejected_tokens']:.0f} tokens): preferences also teach "
                "length (Park et al. 2024, arXiv 2403.19159); evaluation.json compares the lengths of the answers."
            )


def _prompt_difference(chosen: Example, rejected: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """Describe how the tokens before the two answers differ; "" if they are the same."""
    prompts = [side.input_ids[: int(side.supervised.argmax())] for side in (chosen, rejected)]
    if np.array_equal(prompts[0], prompts[1]):
        return ""
    length = min(map(len, prompts))
    differs = np.flatnonzero(prompts[0][:length] != prompts[1][:length])
    at = int(differs[0]) if len(differs) else length
    texts = [str(tokenizer.decode(prompt[max(0, at - 1) : at + 12])) for prompt in prompts]
    return (
        "the tokens before the two answers differ, so they are not answers to the same prompt: "
        f"{texts[0]!r} before chosen, {texts[1]!r} before rejected"
    )


class JudgedAnswers(Kind):
    """Rows with one answer and a label."""

    word = "answer"
    sides = ("answer",)

    def read(self, read: Reader, sources: Sequence[Source]) -> ReadSide[Judged]:
        return read_judged(read, sources)

    def stratum(self, item: Judged) -> str:
        return "good" if item.label else "bad"

    def example(
        self,
        item: Judged,
        sides: Mapping[str, Example],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
    ) -> AnswersExample | str | None:
        (only,) = sides.values()
        supervised = only.supervised.copy()
        supervised[0] = False  # nothing predicts the first token
        return JudgedExample(input_ids=only.input_ids, supervised=supervised, origin=item.origin, label=item.label)

    def shown(self, item: Judged) -> Conversation | None:
        return item.conversation if item.label else None

    def report(self, examples: Sequence[JudgedExample]) -> dict[str, Any]:
        lengths: list[list[int]] = [[], []]
        for example in examples:
            lengths[example.label].append(int(example.supervised.sum()))
        for label, found in zip(("bad", "good"), lengths, strict=True):
            if not found:
                raise DataError(
                    f"none of {plural(len(examples), 'answer')} is {label}, so there is nothing to tell them from",
                    fix="give answers of both labels (of a held-out part too: data.eval); "
                    "task=causal_lm learns from good ones alone",
                )
        bad, good = lengths
        return {
            "judged": {
                "good": len(good),
                "bad": len(bad),
                "good_tokens": float(np.mean(good)),
                "bad_tokens": float(np.mean(bad)),
            }
        }

    def notices(self, side: Mapping[str, Any], section: PreferenceSection) -> Iterator[str]:
        judged = side["judged"]
        good, bad = judged["good"], judged["bad"]
        weights = section.desirable_weight, section.undesirable_weight
        ratio = good * weights[0] / (bad * weights[1])
        if not BALANCE[0] <= ratio <= BALANCE[1]:
            setting, value = (
                ("desirable_weight", weights[1] * bad / good)
                if ratio < BALANCE[0]
                else ("undesirable_weight", weights[0] * good / bad)
            )
            yield (
                f"{good:,} good and {bad:,} bad answers, weighted {ratio:.3g} to 1: the paper of KTO advises 1 to 1.33 "
                f"(Ethayarajh et al. 2024, equation 8), as with preference.{setting}={value:.3g}."
            )


PAIRS, JUDGED = Pairs(), JudgedAnswers()


def kind_of(section: PreferenceSection) -> Kind:
    """Return the kind of data that a loss learns from."""
    return JUDGED if section.loss == "kto" else PAIRS
