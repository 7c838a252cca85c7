"""The `evaluate` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from loratune.recipe.sections.base import (
    Cadence,
    Contradiction,
    Int,
    Section,
    Source,
    WrittenSources,
    as_sources_or_setting,
    check_every,
)

Metric = Literal["none", "exact_match", "json", "contains", "bleu"]
METRICS = tuple(name for name in get_args(Metric) if name != "none")
"""Metrics that score answers."""

UNSCORED_ANSWERS = 10
"""Held-out prompts that are answered where no metric scores the answers: enough to see what was learned."""


class EvaluateSection(Section):
    """What is measured on the held-out data, base vs. fine-tuned."""

    metric: Metric = "none"
    """How a generated answer is scored against its references. `exact_match`: the same text; `json`: the same JSON
    value; `contains`: a reference occurs in the answer; `bleu`: corpus BLEU, by sacrebleu; `none`: answers are
    shown but not scored, and only the held-out loss is measured."""

    samples: Int = Field(default=100, ge=0)
    """How many held-out prompts to answer, starting from the first; without a metric at most 10. Conversations that
    differ only in their last answer count as one prompt with several references. 0: nothing is generated."""

    samples_every: Cadence = Field(default="never", union_mode="left_to_right")
    """When to answer the first three held-out prompts during training, to see the answers change; values as for
    `train.eval_every`. It changes no step of the run."""

    max_new_tokens: Int = Field(default=256, ge=1)
    """The maximum length of a generated answer, in tokens."""

    forgetting: Annotated[
        Literal["none"] | tuple[Source, ...],
        BeforeValidator(as_sources_or_setting, json_schema_input_type=WrittenSources),
    ] = "none"
    """Data from another domain, to detect catastrophic forgetting: its loss should not rise during training. A source,
    a list of sources, or `none`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.metric != "none" and not self.samples:
            raise Contradiction(
                f"evaluate.metric is {self.metric}, but evaluate.samples is 0, so there is nothing to score",
                fix="evaluate.samples=100, or evaluate.metric=none",
            )
        check_every("evaluate.samples_every", self.samples_every)
        if self.samples_every != "never" and not self.samples:
            raise Contradiction(
                f"evaluate.samples_every is {self.samples_every}, but evaluate.samples is 0, so nothing is answered",
                fix="evaluate.samples=10, or evaluate.samples_every=never",
            )
        return self
