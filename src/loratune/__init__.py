"""LoRA fine-tuning that can be trusted: `from loratune import Recipe, plan, train, resume, evaluate`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# The libraries read these once, when they are imported: no telemetry, no advertisements.
for _name in (
    "HF_HUB_DISABLE_TELEMETRY",
    "DO_NOT_TRACK",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS",
    "TRL_EXPERIMENTAL_SILENCE",
):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

if TYPE_CHECKING:
    from loratune.pipeline import evaluate, plan, resume, train
    from loratune.recipe import Recipe
    from loratune.reporting.page import compare, report

__all__ = ["Recipe", "__version__", "compare", "evaluate", "plan", "report", "resume", "train"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import on first use: `loratune --help` must not wait for torch."""
    if name == "Recipe":
        from loratune.recipe import Recipe

        return Recipe
    if name in ("evaluate", "plan", "resume", "train"):
        import loratune.pipeline

        return getattr(loratune.pipeline, name)
    if name in ("compare", "report"):
        import loratune.reporting.page

        return getattr(loratune.reporting.page, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
