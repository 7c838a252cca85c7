from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from loratune.run import processes
from loratune.training.gradient_sync import seed_step

Draw = Callable[..., torch.Tensor]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[Draw]:
    """Draws as dropout would, on a rank of several."""

    def draw(*, seed: int, step: int, rank: int, size: int = 2) -> torch.Tensor:
        monkeypatch.setattr(processes, "size", lambda: size)
        monkeypatch.setattr(processes, "rank", lambda: rank)
        seed_step(seed, step)
        return torch.rand(64)

    with torch.random.fork_rng():
        yield draw


def test_each_rank_draws_its_own_dropout_at_each_step(drawn: Draw) -> None:
    masks = [drawn(seed=seed, step=step, rank=rank) > 0.5 for seed in (0, 1) for step in (0, 1) for rank in (0, 1)]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert not one.equal(other)


def test_a_rank_draws_the_same_when_a_step_is_repeated(drawn: Draw) -> None:
    """So a resumed run needs no random state of any rank."""
    first = drawn(seed=3, step=7, rank=1)
    drawn(seed=3, step=8, rank=1)
    assert drawn(seed=3, step=7, rank=1).equal(first)


def test_a_single_process_draws_the_same_too(drawn: Draw) -> None:
    first = drawn(seed=3, step=7, rank=0, size=1)
    torch.rand(5)
    assert drawn(seed=3, step=7, rank=0, size=1).equal(first)
