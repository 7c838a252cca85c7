"""Where answers end when a model is served."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from loratune.model.load import BaseModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generation_stops(base: BaseModel, config: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The tokens at which servers stop for this model."""
    ids = config.eos_token_id
    file = base.path / "generation_config.json"
    if file.is_file():
        ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id", ids)
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    return tuple(map(str, tokenizer.convert_ids_to_tokens(ids)))
