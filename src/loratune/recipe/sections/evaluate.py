"""The `evaluate` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from loratune.recipe.sections.base import Int, Section, Source, as_sources_or_setting


class EvaluateSection(Section):
    """What is measured on the held-out data, base vs. fine-tuned."""

    metric: Literal["none", "exact_match", "json", "contains", "bleu"] = "none"
    """How a generated answer is scored against its references. `exact_match`: the same text; `json`: the same JSON
    value; `contains`: a reference occurs in the answer; `bleu`: corpus BLEU, by sacrebleu; `none`: nothing is
    generated, only the held-out loss is measured."""

    samples: Int = Field(default=100, ge=1)
    """How many held-out prompts to answer, starting from the first. Conversations that differ only in their last answer
    count as one prompt with several references."""

    max_new_tokens: Int = Field(default=256, ge=1)
    """The maximum length of a generated answer, in tokens."""

    forgetting: Annotated[Literal["none"] | tuple[Source, ...], BeforeValidator(as_sources_or_setting)] = "none"
    """Data from another domain, to detect catastrophic forgetting: its loss should not rise during training. A source,
    a list of sources, or `none`."""
