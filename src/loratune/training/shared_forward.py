"""Whether a model computes the same when tokens that several sequences begin with go through it only once.

As `make_loss` does for packed examples, this is found out on the user's own model, on short sequences, before a run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from loratune.data.batch import collate
from loratune.data.examples import Example
from loratune.data.shared_prefixes import SHARING_DEVICE, share_prefixes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.training.loss import SupervisedLoss


COMPARED_TOKENS = 24
"""Tokens of each example that the comparison takes."""


def obstacle_to_sharing(loss: SupervisedLoss, examples: Sequence[Example]) -> str:
    """Return why equal prefixes must go through this model once per sequence; empty if once is enough.

    Args:
        loss: The loss, packed where the model allows it.
        examples: The training examples; short sequences are made of the first and the last.
    """
    if not loss.packed:
        return f"examples do not share a forward pass: {loss.why_unpacked}"
    if loss.model.device.type != SHARING_DEVICE:
        return f"only a {SHARING_DEVICE} computes them once, and this is {loss.model.device.type}"
    sequences = _branching(examples[0], examples[-1])
    separate = collate(sequences)
    shared = share_prefixes(separate, least=2)
    assert shared.num_tokens < separate.num_tokens
    was_training = loss.model.training
    loss.model.eval()
    try:
        losses, expected = (loss.per_token(batch.to(loss.model.device)) for batch in (shared, separate))
    finally:
        loss.model.train(was_training)
    difference = float((losses - expected).square().mean().sqrt())
    if not difference <= loss.tolerance:  # so written, NaN fails too
        return f"shared prefixes differ from separate ones by {difference:.2g}"
    return ""


def _branching(one: Example, other: Example) -> list[Example]:
    """Return three sequences of the tokens of two examples: one branches off from the first early, one late."""
    ids, more = one.input_ids[:COMPARED_TOKENS], other.input_ids[-COMPARED_TOKENS:]
    early, late = max(2, len(ids) // 3), max(2, 2 * len(ids) // 3)
    made = [ids, np.concatenate([ids[:early], more]), np.concatenate([ids[:late], more[::-1]])]
    return [Example(input_ids=each, supervised=np.ones(len(each), dtype=bool), origin=one.origin) for each in made]
