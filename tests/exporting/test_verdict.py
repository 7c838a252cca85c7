"""The bound on differing tokens is the binomial one."""

from __future__ import annotations

import numpy as np
import pytest

from loratune.exporting.verdict import RIGHT_FLIPS, SURPRISE, allowed_flips


@pytest.mark.parametrize(
    ("num_decided", "num_flipped"), [(1, 0), (20, 0), (66, 0), (445, 0), (512, 0), (10, 1), (66, 6), (512, 9)]
)
def test_a_right_export_exceeds_the_bound_once_in_a_thousand_times_at_most(num_decided: int, num_flipped: int) -> None:
    rate = max(RIGHT_FLIPS, (num_flipped + 1) / (num_decided + 2))
    draws = np.random.default_rng(0).binomial(num_decided, rate, size=200_000)
    allowed = allowed_flips(num_decided, num_flipped)
    assert float((draws > allowed).mean()) <= 1.3 * SURPRISE
    assert float((draws > allowed - 1).mean()) > SURPRISE / 2, "a smaller bound would refuse right ones"


def test_nothing_decided_allows_nothing() -> None:
    assert allowed_flips(0, 0) == 0
