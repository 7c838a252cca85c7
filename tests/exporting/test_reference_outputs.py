"""The yardstick of a certificate: divergences from the trained model, exact where nothing differs."""

from __future__ import annotations

import pytest
import torch

from loratune.exporting.reference_outputs import divergence_from


@pytest.mark.parametrize("vocabulary", [4, 49_152, 151_936])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_the_same_logits_have_no_divergence_however_large_the_vocabulary(vocabulary: int, spread: float) -> None:
    logits_SV = spread * torch.randn(8, vocabulary, generator=torch.Generator().manual_seed(0))
    found = divergence_from([logits_SV.log_softmax(-1)], iter([logits_SV]))
    assert found.mean_kl is not None
    assert found.mean_kl < 1e-9
    assert bool(found.same_top.all())


def test_what_is_wrong_in_the_sum_of_the_log_probabilities_alone_is_no_divergence() -> None:
    """On some CPUs a float32 sum over SmolLM2's vocabulary is off by 1.6e-5."""
    logits_SV = torch.randn(8, 1000)
    found = divergence_from([logits_SV.log_softmax(-1) + 1.6e-5], iter([logits_SV]))
    assert found.mean_kl == pytest.approx(0, abs=1e-10)


def test_a_small_difference_is_measured_in_nats() -> None:
    logits_SV, other_SV = torch.randn(8, 1000).double(), torch.randn(8, 1000).double()
    other_SV = logits_SV + 1e-3 * other_SV
    wanted = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=logits_SV), torch.distributions.Categorical(logits=other_SV)
    )
    found = divergence_from([logits_SV.log_softmax(-1).float()], iter([other_SV]))
    torch.testing.assert_close(found.kl, wanted, rtol=1e-2, atol=1e-10)


def test_a_padded_vocabulary_is_compared_without_its_padding() -> None:
    logits_SV = torch.randn(3, 10)
    padded_SV = torch.cat([logits_SV, torch.full((3, 6), 9.0)], dim=1)
    for wanted, actual in ((logits_SV, padded_SV), (padded_SV, logits_SV)):
        found = divergence_from([wanted.log_softmax(-1)], iter([actual]))
        assert found.mean_kl == pytest.approx(0, abs=1e-10)
