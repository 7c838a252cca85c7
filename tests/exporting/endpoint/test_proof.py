"""What a server's answers prove, on distributions and answers of our own making."""

from __future__ import annotations

import torch

from loratune.exporting.endpoint.proof import ServedAnswers, ServedDistributions
from loratune.exporting.endpoint.reader import ChatAnswer
from loratune.exporting.endpoint.reference import GreedyAnswer
from loratune.exporting.places import Question

NUM_TOKENS = 50


def served(share: float, noise: float, *, listed: int = 20) -> ServedDistributions:
    """Distributions of a server that has a share of what training changed, and noise of its own."""
    torch.manual_seed(0)
    found = ServedDistributions()
    for _ in range(12):
        base = 2 * torch.randn(8, NUM_TOKENS)
        learned = torch.randn(8, NUM_TOKENS)
        given = (base + share * learned + noise * torch.randn(8, NUM_TOKENS)).log_softmax(-1)
        tops = [dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)) for top in map(_top(listed), given)]
        found.add((base + learned).log_softmax(-1), base.log_softmax(-1), tops)
    return found


def _top(count: int):  # type: ignore[no-untyped-def]
    return lambda row: row.topk(count)


def test_the_share_is_that_of_the_update_also_under_noise() -> None:
    for share in (1.0, 0.5, 0.0):
        for noise in (0.0, 0.5):
            value, error = served(share, noise).share
            assert abs(value - share) < max(5 * error, 0.03), (share, noise, value, error)
    right = served(1.0, 0.0)
    assert right.mean_kl < 1e-9 < right.limit < right.mean_base_kl
    assert served(0.0, 0.0).mean_kl > right.limit


def test_cells_never_say_more_than_the_whole_vocabulary() -> None:
    few, all_tokens = served(0.0, 0.0, listed=5), served(0.0, 0.0, listed=NUM_TOKENS)
    assert 0 < few.mean_kl < all_tokens.mean_kl
    assert few.mean_kl == few.mean_base_kl


def test_positions_that_a_server_reads_differently_are_counted() -> None:
    found = ServedDistributions()
    row = torch.zeros(1, NUM_TOKENS).log_softmax(-1)
    found.add(row, row, [None])
    assert found.num_unread == 1
    assert found.record() is None


def answers(*given: str, base: str = "blue.", clear: str = "red.", ended: bool = True) -> ServedAnswers:
    question = Question(messages=(), tools=None, input_ids=[])
    wanted = GreedyAnswer(question=question, clear=clear, stop=7, base=base)
    served = [ChatAnswer(text=text, ended=ended, num_prompt_tokens=None) for text in given]
    return ServedAnswers(wanted=[wanted] * len(given), given=served)


def test_answers_are_the_trained_models_or_the_bases() -> None:
    right = answers(*["red."] * 12)
    assert right.is_same
    assert right.has_power
    assert not right.is_other
    assert right.missing_stops == []
    base = answers(*["blue."] * 12)
    assert base.is_other
    assert base.num_as_base == 12
    mixed = answers(*["red."] * 7, *["green."] * 5)
    assert not mixed.is_same
    assert not mixed.is_other


def test_where_the_base_answers_alike_nothing_is_shown() -> None:
    alike = answers(*["red."] * 12, base="red.")
    assert alike.is_same
    assert not alike.has_power
    assert not answers(*["green."] * 12, base="red.").is_other


def test_a_few_answers_decide_nothing() -> None:
    assert not answers("blue.", "blue.", "blue.").is_other
    assert not answers("red.").has_power


def test_a_stop_token_is_lost_where_answers_go_on() -> None:
    assert answers(*["red. and blue."] * 3).missing_stops == [7]
    assert answers(*["red."] * 3, ended=False).missing_stops == [7]
    assert answers("red.", "red.", "red. and").missing_stops == []
    assert answers(*["green."] * 3, ended=False).missing_stops == []
