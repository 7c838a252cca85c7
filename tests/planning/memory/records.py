"""Plans of a small imagined model, changed field by field."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from loratune.planning.memory.inputs import ExecutionSetup, LayerBytes, MemorySettings, ModelSizes, TokenSizes
from loratune.planning.memory.memory import MemoryPlan, plan_memory

LAYER = LayerBytes(saved_for_backward=1000, input=100, forward=400, backward=300, cache=50, attention=0)
MODEL = ModelSizes(
    weights_bytes=2_000_000,
    trainable_parameters=100_000,
    optimizer_bytes=800_000,
    variant_bytes=0,
    layer=LAYER,
    num_layers=10,
    dtype_bytes=2,
    loss_chunk_bytes=1000,
    row_logits_bytes=4000,
)
WORK = TokenSizes(longest=100, largest_step=800)
PLACE = ExecutionSetup(device="cuda", dtype="bfloat16", compiled=False, free_bytes=10**12)
SETTINGS = MemorySettings(token_budget=400)


def plan(**changes: Any) -> MemoryPlan:
    """Plan the memory of the small model; `changes` are fields of any of the four records."""
    given: list[Any] = []
    for record in (MODEL, WORK, PLACE, SETTINGS):
        own = {field.name for field in fields(record)}
        given.append(replace(record, **{name: changes.pop(name) for name in own & set(changes)}))
    assert not changes, f"no such fields: {changes}"
    return plan_memory(*given)
