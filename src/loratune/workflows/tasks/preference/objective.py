"""The losses of preferences, as functions of the log-probabilities of answers.

Shapes: P pairs or judged answers, A answers of each: 2 of a pair, else 1. c is the chosen answer, r the rejected one;
|y| an answer's trained tokens, with its stop token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid

from loratune.model.device import Choice
from loratune.recipe.sections.preference import DEFAULT_BETA, PreferenceSection


class Answers(NamedTuple):
    """What a model says of answers; of a pair the first column is the chosen answer, the second the rejected one.

    Attributes:
        logps_PA: log p(answer | prompt), the sum over its tokens, in nats.
        lengths_PA: Tokens of each answer.
        reference_PA: log p of the same answers under the reference; None for losses without one.
    """

    logps_PA: torch.Tensor  # noqa: N815 - a shape
    lengths_PA: torch.Tensor  # noqa: N815
    reference_PA: torch.Tensor | None  # noqa: N815


def beta_of(section: PreferenceSection) -> float:
    """Return the strength of the preference, with `auto` resolved."""
    return DEFAULT_BETA[section.loss] if section.beta == "auto" else float(section.beta)


def pair_losses(section: PreferenceSection, answers: Answers) -> torch.Tensor:
    """Return the loss of each pair, [P], with a gradient.

    With Δ = (log p(c) - log p_ref(c)) - (log p(r) - log p_ref(r)) and m(y) = log p(y) / |y|:

        dpo    -(1 - ε)·log σ(β·Δ) - ε·log σ(-β·Δ)              Rafailov et al. 2023, arXiv 2305.18290, equation 7;
               ε: conservative DPO, Mitchell 2023, "A note on DPO with noisy preferences"
        ipo    (Δ' - 1/(2·β))², Δ' with each log-ratio divided by |y|
               Azar et al. 2023, arXiv 2310.12036, equation 17; per token, as its authors and TRL compute it
        orpo   -m(c) - β·log σ(logit(exp m(c)) - logit(exp m(r)))
               Hong, Lee and Thorne 2024, arXiv 2403.07691, equations 6 and 7
        simpo  -log σ(β·m(c) - β·m(r) - γ)                      Meng, Xia and Chen 2024, arXiv 2405.14734, equation 6

    and with `sft_weight` α the term -α·m(c) beside each (Pang et al. 2024, arXiv 2404.19733, equation 1).

    Args:
        section: The recipe's preference section.
        answers: What the model says of the answers.
    """
    beta, smoothing = beta_of(section), section.label_smoothing
    means_P2 = answers.logps_PA / answers.lengths_PA
    if section.loss == "dpo":
        delta_P = difference(log_ratios(answers))
        losses_P = -(1 - smoothing) * logsigmoid(beta * delta_P) - smoothing * logsigmoid(-beta * delta_P)
    elif section.loss == "ipo":
        losses_P = (difference(log_ratios(answers) / answers.lengths_PA) - 1 / (2 * beta)) ** 2
    elif section.loss == "orpo":
        # log(p / (1 - p)) of p = exp(mean); log1p(-exp) is exact where p is small, and finite below p = 1
        log_odds_P2 = means_P2 - torch.log1p(-torch.exp(means_P2.clamp(max=-torch.finfo(means_P2.dtype).eps)))
        losses_P = -means_P2[:, 0] - beta * logsigmoid(difference(log_odds_P2))
    else:
        losses_P = -logsigmoid(beta * difference(means_P2) - section.target_margin)
    return losses_P - section.sft_weight * means_P2[:, 0] if section.sft_weight else losses_P


def judged_losses(
    section: PreferenceSection, answers: Answers, good_P: torch.Tensor, baseline: float = 0.0
) -> torch.Tensor:
    """Return the loss of each judged answer, [P], with a gradient.

    KTO (Ethayarajh et al. 2024, arXiv 2402.01306, equations 7 and 8). With r = log p(y|x) - log p_ref(y|x):

        good answers   λ_D·(1 - σ(β·(r - z)))      λ_D = `desirable_weight`, 1 in the paper
        bad answers    λ_U·(1 - σ(β·(z - r)))      λ_U = `undesirable_weight`, 1 in the paper

    z estimates KL(p || p_ref), without a gradient; see `baseline`. The paper's loss has λ_y - v, and this is it.

    Args:
        section: The recipe's preference section.
        answers: What the model says of the answers, A = 1.
        good_P: 1 for good answers, 0 for bad ones.
        baseline: z, in nats.
    """
    (ratios_P,) = log_ratios(answers).unbind(1)
    good_P = good_P.to(ratios_P.dtype)
    weights_P = section.desirable_weight * good_P + section.undesirable_weight * (1 - good_P)
    # 1 - σ(x) = σ(-x), which stays exact where σ(x) is near 1
    return weights_P * torch.sigmoid(-beta_of(section) * (2 * good_P - 1) * (ratios_P - baseline))


def log_ratios(answers: Answers) -> torch.Tensor:
    """Return log p - log p_ref of each answer, [P, A]; times β these are DPO's implicit rewards."""
    assert answers.reference_PA is not None, "the reference was not computed"
    return answers.logps_PA - answers.reference_PA


def difference(of_answers_P2: torch.Tensor) -> torch.Tensor:
    """Return chosen minus rejected, [P]."""
    return of_answers_P2[:, 0] - of_answers_P2[:, 1]


def beta_choice(section: PreferenceSection) -> dict[str, Choice]:
    """Return what `preference.beta: auto` becomes, and why."""
    if section.beta != "auto":
        return {}
    return {"preference.beta": Choice(f"{beta_of(section):g}", f"the default of {section.loss}")}
