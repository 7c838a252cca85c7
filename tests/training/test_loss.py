"""The comparison of the fast loss with the model's own before a run starts: how large a difference it accepts."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from loratune.data.batch import collate
from loratune.model.adapter.attach import attach_adapter
from loratune.model.adapter.targets import resolve_targets
from loratune.model.kernels import varlen_attention
from loratune.recipe.recipe import LoraSection
from loratune.run.errors import RunError
from loratune.training.loss import SupervisedLoss, fastest_loss, make_loss, output_head
from loratune.training.neftune import EmbeddingNoise
from tests.model.adapter.test_attach import tiny
from tests.model.kernels.varlen import SIGNATURES, pretend_gpu
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


def test_examples_taken_one_at_a_time_have_the_loss_of_packed_ones_and_tell_no_lengths_to_the_noise() -> None:
    batch = collate([example(20), example(15), example(9)])
    packed, separate = (
        make_loss(adapted(torch.float32), EXAMPLES)[0],
        SupervisedLoss(adapted(torch.float32), packed=False),
    )
    for loss in (packed, separate):
        loss.model.eval()
        loss.noise = EmbeddingNoise(5.0, loss.model.get_input_embeddings())  # which adds none outside of training
    torch.testing.assert_close(separate.per_token(batch), packed.per_token(batch), rtol=1e-5, atol=1e-5)
    assert packed.noise is not None
    assert packed.noise.lengths is not None
    assert packed.noise.lengths.tolist() == [20, 15, 9]
    assert separate.noise is not None
    assert separate.noise.lengths is None


def test_a_head_that_is_no_linear_layer_is_refused_by_name() -> None:
    base = tiny(1)
    base.lm_head = torch.nn.Identity()
    with pytest.raises(RunError, match="does not support this output head: an adapted or unknown Identity"):
        output_head(base)


@pytest.mark.parametrize("signature", SIGNATURES)
def test_on_a_gpu_the_packed_loss_equals_the_model_s_own(signature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, SIGNATURES[signature])
    loss, reason = make_loss(adapted(torch.bfloat16), EXAMPLES)
    assert (loss.packed, reason, loss.slow_attention) == (True, "", "")


def test_a_kernel_that_is_called_wrongly_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch 2.11's signature and the arguments of 2.12, every model used to train one example at a time."""
    pretend_gpu(monkeypatch, SIGNATURES["torch 2.11"])
    real = varlen_attention.varlen_attn
    monkeypatch.setattr(varlen_attention, "varlen_attn", lambda *args, **given: real(*args, enable_gqa=False, **given))
    with pytest.raises(TypeError, match="enable_gqa"):
        make_loss(adapted(torch.bfloat16), EXAMPLES)


def test_a_model_that_takes_no_boundaries_goes_one_example_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(torch.float32)
    decoder = model.get_base_model().base_model
    real = decoder.forward

    def narrow(
        *,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: object = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> object:
        return real(input_ids=input_ids, use_cache=use_cache)

    monkeypatch.setattr(decoder, "forward", narrow)
    loss, reason = make_loss(model, EXAMPLES)
    assert not loss.packed
    assert reason.startswith("the model's code does not take the examples' boundaries: ")
    assert "cu_seq_lens_q" in reason


def test_an_attention_that_transformers_cannot_replace_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(torch.float32)

    def refuse(name: str) -> None:
        if name == "loratune_packed":
            raise ValueError("no such attention")

    monkeypatch.setattr(model.get_base_model(), "set_attn_implementation", refuse)
    loss, reason = make_loss(model, EXAMPLES)
    assert not loss.packed
    assert reason == "transformers cannot replace the model's attention: no such attention"


def test_attention_that_flash_lacks_is_packed_and_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, SIGNATURES["torch 2.11"], any_type=False)
    loss, reason = make_loss(adapted(torch.float32), EXAMPLES)
    assert (loss.packed, reason) == (True, "")
    assert loss.slow_attention == "flash attention has no float32"
    assert loss.packing == {"packed": True, "why_unpacked": "", "slow_attention": "flash attention has no float32"}
