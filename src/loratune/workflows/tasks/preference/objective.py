"""The losses of preference pairs, as functions of the log-probabilities of the two answers.

Shapes: P pairs. c is the chosen answer, r the rejected one; |y| an answer's trained tokens, with its stop token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid

from loratune.model.device import Choice
from loratune.recipe.sections.preference import DEFAULT_BETA, PreferenceSection


class Answers(NamedTuple):
    """What a model says of the answers of P pairs; the first column is the chosen answer, the second the rejected one.

    Attributes:
        logps_P2: log p(answer | prompt), the sum over its tokens, in nats.
        lengths_P2: Tokens of each answer.
        reference_P2: log p of the same answers under the reference; None for losses without one.
    """

    logps_P2: torch.Tensor  # noqa: N815 - a shape
    lengths_P2: torch.Tensor  # noqa: N815
    reference_P2: torch.Tensor | None  # noqa: N815


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
    means_P2 = answers.logps_P2 / answers.lengths_P2
    if section.loss == "dpo":
        delta_P = difference(log_ratios(answers))
        losses_P = -(1 - smoothing) * logsigmoid(beta * delta_P) - smoothing * logsigmoid(-beta * delta_P)
    elif section.loss == "ipo":
        losses_P = (difference(log_ratios(answers) / answers.lengths_P2) - 1 / (2 * beta)) ** 2
    elif section.loss == "orpo":
        # log(p / (1 - p)) of p = exp(mean); log1p(-exp) is exact where p is small, and finite below p = 1
        log_odds_P2 = means_P2 - torch.log1p(-torch.exp(means_P2.clamp(max=-torch.finfo(means_P2.dtype).eps)))
        losses_P = -means_P2[:, 0] - beta * logsigmoid(difference(log_odds_P2))
    else:
        losses_P = -logsigmoid(beta * difference(means_P2) - section.target_margin)
    return losses_P - section.sft_weight * means_P2[:, 0] if section.sft_weight else losses_P


def log_ratios(answers: Answers) -> torch.Tensor:
    """Return log p - log p_ref of each answer, [P, 2]; times β these are DPO's implicit rewards."""
    assert answers.reference_P2 is not None, "the reference was not computed"
    return answers.logps_P2 - answers.reference_P2


def difference(of_answers_P2: torch.Tensor) -> torch.Tensor:
    """Return chosen minus rejected, [P]."""
    return of_answers_P2[:, 0] - of_answers_P2[:, 1]


def beta_choice(section: PreferenceSection) -> dict[str, Choice]:
    """Return what `preference.beta: auto` becomes, and why."""
    if section.beta != "auto":
        return {}
    return {"preference.beta": Choice(f"{beta_of(section):g}", f"the default of {section.loss}")}
