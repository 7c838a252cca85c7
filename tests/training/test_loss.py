"""The comparison of the fast loss with the model's own before a run starts: how large a difference it accepts."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from loratune.data.batch import collate
from loratune.model.adapter.attach import attach_adapter
from loratune.model.adapter.targets import resolve_targets
from loratune.recipe.recipe import LoraSection
from loratune.run.errors import RunError
from loratune.training.loss import SupervisedLoss, fastest_loss, make_loss, output_head
from tests.model.adapter.test_attach import tiny
from tests.training.test_layers import example

EXAMPLES = [example(20), example(15)]


def adapted(dtype: torch.dtype) -> PeftModel:
    """A fresh model each time: a loss leaves its attention behind."""
    base = tiny(2).to(dtype)
    return attach_adapter(base, LoraSection(), resolve_targets(base, "balanced"), base_name="tiny", seed=0)


@pytest.mark.parametrize(
    ("dtype", "rounding", "fault"),
    [(torch.float32, 2e-4, 3e-3), (torch.bfloat16, 0.05, 0.5)],
)
def test_a_difference_beyond_rounding_is_refused(dtype: torch.dtype, rounding: float, fault: float) -> None:
    """`rounding` and `fault`: nats by which every token's loss differs. A fault of 3e-3 would show in no loss curve."""
    loss, reason = make_loss(adapted(dtype), EXAMPLES)
    assert reason == ""
    loss.model.eval()
    own = loss.per_token(collate(EXAMPLES))

    def compare(expected: torch.Tensor) -> None:
        fastest_loss(SupervisedLoss, SupervisedLoss.per_token, adapted(dtype), EXAMPLES, expected, longest=20)

    compare(own + rounding)
    with pytest.raises(RunError, match="differs from"):
        compare(own + fault)


def test_a_scale_that_the_model_s_own_forward_does_not_apply_is_refused() -> None:
    model = adapted(torch.float32)
    model.get_base_model().config.logit_scale = 1.5  # the fast path reads it, Llama's forward does not
    assert output_head(model.get_base_model()).logit_scale == 1.5
    with pytest.raises(RunError, match="differs from"):
        make_loss(model, EXAMPLES)
