"""Settings of a model under the names that programs know which do not read transformers 5's `rope_parameters`.

transformers 5 writes the rotary positions as `rope_parameters`. transformers 4, and mlx-lm for Llama and Qwen, read
`rope_theta` and `rope_scaling` beside it; where these are missing they take 10,000 and no scaling, without an error. So
exported folders have both. transformers 5 reads the same from either.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from loratune.exporting.merge_weights import copy_companions, weight_files
from loratune.model.safetensors_headers import weight_index_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_BESIDE = ("rope_theta", "partial_rotary_factor")
"""Parts of `rope_parameters` that are settings of their own under the older names."""


def with_older_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that has rotary positions under both names; those it has already are kept.

    Parameters by kind of layer (Gemma 3) have no older form that all programs share, and stay as they are.
    """
    both = dict(config)
    rope = both.get("rope_parameters")
    if isinstance(both.get("text_config"), dict):
        both["text_config"] = with_older_names(both["text_config"])
    if not isinstance(rope, dict) or any(isinstance(part, dict) for part in rope.values()):
        return both
    for name in _BESIDE:
        if name in rope:
            both.setdefault(name, rope[name])
    scaling = {name: value for name, value in rope.items() if name not in _BESIDE}
    if scaling.get("rope_type", "default") != "default":
        both.setdefault("rope_scaling", scaling)
    return both


def read_config(folder: Path) -> dict[str, Any]:
    """Return the contents of a model's `config.json`."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def add_older_names(folder: Path) -> None:
    """Give a written folder's `config.json` both names."""
    both = with_older_names(read_config(folder))
    (folder / "config.json").write_text(json.dumps(both, indent=2) + "\n", encoding="utf-8")


def lacks_older_names(folder: Path) -> bool:
    """Return whether a model's `config.json` has rotary positions under the new name alone."""
    config = read_config(folder)
    return with_older_names(config) != config


def write_linked_base(base: Path, adapter: Path, target: Path, stop_token_ids: Sequence[int]) -> None:
    """Write a base whose configuration has both names: links to its weights, and tokenizer and template of training.

    Args:
        base: The base's folder.
        adapter: The run's adapter folder.
        target: The folder to create.
        stop_token_ids: The tokens that end an answer.
    """
    target.mkdir()
    index = weight_index_of(base)
    for file in [*weight_files(base), *([] if index is None else [index.name])]:
        (target / file).symlink_to((base / file).resolve())
    (target / "config.json").write_text(json.dumps(read_config(base), indent=2) + "\n", encoding="utf-8")
    add_older_names(target)
    copy_companions(base, adapter, target, stop_token_ids)
