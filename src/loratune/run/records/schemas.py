"""The JSON schemas of what the verbs print with `--json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from loratune.run.errors import RecipeError
from loratune.run.records.adapters import AdapterDiffOutput, AdapterOutput, AdapterProofOutput, InspectOutput
from loratune.run.records.certificate import CertificateRecord
from loratune.run.records.outputs import (
    ComparisonOutput,
    DiffOutput,
    ExportOutput,
    PlanOutput,
    PushOutput,
    ReportOutput,
    ReproductionOutput,
    ResultOutput,
    SampleOutput,
    ServiceOutput,
)
from loratune.run.records.sweep import SweepRecord, TuneRecord

OUTPUTS: Mapping[str, type[BaseModel]] = {
    "plan": PlanOutput,
    "train": ResultOutput,
    "resume": ResultOutput,
    "extend": ResultOutput,
    "evaluate": ResultOutput,
    "sample": SampleOutput,
    "merge": ExportOutput,
    "export": ExportOutput,
    "certify": CertificateRecord,
    "report": ReportOutput,
    "compare": ComparisonOutput,
    "diff": DiffOutput,
    "reproduce": ReproductionOutput,
    "serve": ServiceOutput,
    "push": PushOutput,
    "sweep": SweepRecord,
    "tune": TuneRecord,
    "adapter inspect": InspectOutput,
    **dict.fromkeys(("adapter combine", "adapter resize", "adapter extract", "adapter convert"), AdapterOutput),
    **dict.fromkeys(("adapter merge", "adapter certify"), AdapterProofOutput),
    "adapter diff": AdapterDiffOutput,
}
"""Verb → what it prints."""


def schema_of(verb: str) -> dict[str, Any]:
    """Return the JSON schema of what a verb prints.

    Raises:
        RecipeError: The verb has no schema.
    """
    if verb not in OUTPUTS:
        raise RecipeError(f"no schema for {verb!r}", fix=f"one of {', '.join(OUTPUTS)}; without a verb, the recipe's")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **OUTPUTS[verb].model_json_schema(),
    }
