"""The `preference` section of a recipe."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from loratune.recipe.sections.base import Contradiction, Float, Section

DEFAULT_BETA = {"dpo": 0.1, "ipo": 0.1, "orpo": 0.1, "simpo": 2.0}
"""`preference.loss` → the value of `beta` that its paper uses."""

WITH_REFERENCE = ("dpo", "ipo")
"""Losses that compare with the model as it was before training."""


class PreferenceSection(Section):
    """How pairs of a better and a worse answer are trained (`task: preference`)."""

    only_for: ClassVar[str] = "preference"

    loss: Literal["dpo", "ipo", "orpo", "simpo"] = "dpo"
    """The loss of a pair. `dpo`: direct preference optimization; `ipo`: identity preference optimization, per token;
    both compare with a reference, the model as it was before training. `orpo`: odds ratio preference optimization, with
    the likelihood of the chosen answer in it; `simpo`: simple preference optimization, by log-probabilities per token;
    both need no reference."""

    beta: Annotated[Float, Field(gt=0)] | Literal["auto"] = Field(default="auto", union_mode="left_to_right")
    """The strength of the preference: how closely `dpo` and `ipo` (where it is called τ) stay at the reference, the
    weight of the odds ratio in `orpo` (λ), the scale of the rewards in `simpo`. `auto`: 0.1, and 2.0 for `simpo`."""

    label_smoothing: Float = Field(default=0.0, ge=0, lt=0.5)
    """The probability that a pair is labeled the wrong way round (conservative DPO). For `dpo` only."""

    sft_weight: Float = Field(default=0.0, ge=0)
    """The weight of an additional term, the mean of -log p over the tokens of the chosen answer, which keeps its
    likelihood from falling (as in RPO). 0: none."""

    target_margin: Float = Field(default=1.0, ge=0)
    """By how much the reward of the chosen answer should exceed that of the rejected one in `simpo` (γ)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.label_smoothing and self.loss != "dpo":
            raise Contradiction(
                f"preference.label_smoothing is {self.label_smoothing:g}, which is for dpo, but preference.loss is "
                f"{self.loss}",
                fix="preference.label_smoothing=0, or preference.loss=dpo",
            )
        if self.target_margin != type(self).model_fields["target_margin"].default and self.loss != "simpo":
            raise Contradiction(
                f"preference.target_margin is {self.target_margin:g}, which is for simpo, but preference.loss is "
                f"{self.loss}",
                fix="leave preference.target_margin out, or preference.loss=simpo",
            )
        return self
