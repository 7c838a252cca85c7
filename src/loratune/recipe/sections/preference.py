"""The `preference` section of a recipe."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from loratune.recipe.sections.base import Contradiction, Float, Section

DEFAULT_BETA = {"dpo": 0.1, "ipo": 0.1, "orpo": 0.1, "simpo": 2.0, "kto": 0.1}
"""`preference.loss` → the value of `beta` that its paper uses."""

WITH_REFERENCE = ("dpo", "ipo", "kto")
"""Losses that compare with the model as it was before training."""

_ONLY_FOR = {
    "label_smoothing": ("dpo",),
    "target_margin": ("simpo",),
    "sft_weight": ("dpo", "ipo", "orpo", "simpo"),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}
"""Field → the losses that have it."""


class PreferenceSection(Section):
    """How pairs of a better and a worse answer, or single answers with a label, are trained (`task: preference`)."""

    only_for: ClassVar[str] = "preference"

    loss: Literal["dpo", "ipo", "orpo", "simpo", "kto"] = "dpo"
    """The loss of a pair. `dpo`: direct preference optimization; `ipo`: identity preference optimization, per token;
    both compare with a reference, the model as it was before training. `orpo`: odds ratio preference optimization,
    which includes the likelihood of the chosen answer; `simpo`: simple preference optimization, by log-probabilities
    per token; both need no reference. `kto`: Kahneman-Tversky optimization, for rows with one answer and a `label` that
    says whether it is good; with the same reference as `dpo`."""

    beta: Annotated[Float, Field(gt=0)] | Literal["auto"] = Field(default="auto", union_mode="left_to_right")
    """The strength of the preference: how closely `dpo`, `kto` and `ipo` (where it is called τ) stay to the reference,
    the weight of the odds ratio in `orpo` (λ), the scale of the rewards in `simpo`. `auto`: 0.1, but 2.0 for
    `simpo`."""

    label_smoothing: Float = Field(default=0.0, ge=0, lt=0.5)
    """The probability that the two answers of a pair are swapped by mistake (conservative DPO). For `dpo` only."""

    sft_weight: Float = Field(default=0.0, ge=0)
    """The weight of an additional term, the mean of -log p over the tokens of the chosen answer, which keeps its
    likelihood from falling (as in RPO). 0: none. For pairs only."""

    target_margin: Float = Field(default=1.0, ge=0)
    """By how much the reward of the chosen answer should exceed that of the rejected one in `simpo` (γ)."""

    desirable_weight: Float = Field(default=1.0, gt=0)
    """The weight of good answers in `kto` (λ_D). With n_D good and n_U bad ones, the paper advises
    n_D·λ_D / (n_U·λ_U) between 1 and 4/3."""

    undesirable_weight: Float = Field(default=1.0, gt=0)
    """The weight of bad answers in `kto` (λ_U)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, losses in _ONLY_FOR.items():
            value = getattr(self, name)
            if value != type(self).model_fields[name].default and self.loss not in losses:
                raise Contradiction(
                    f"preference.{name} is {value:g}, which is for {', '.join(losses)}, but preference.loss is "
                    f"{self.loss}",
                    fix=f"leave preference.{name} out, or preference.loss={losses[0]}",
                )
        return self
