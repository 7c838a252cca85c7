"""`lock.json`: everything that decides a run, so that resuming with other inputs is noticed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from loratune.data.examples import Example, labels_fingerprint
from loratune.model.quantization.kinds import package_of
from loratune.planning.memory.optimizer import OF_BITSANDBYTES
from loratune.run import processes
from loratune.run.digest import file_sha256

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from loratune.run.directory import Record

PACKAGES = ("loratune", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers", "safetensors")


INPUTS = ("model", "template", "train", "eval", "start", "labels")
"""The inputs of a run that have a fingerprint. `start` is there only if it starts from an adapter, `labels` only if it
classifies."""


def model_fingerprint(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a model folder that decides its answers, by file name."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json"), *folder.glob("*.jinja")])
    return {path.name: file_sha256(path) for path in files}


def examples_fingerprint(examples: Sequence[Example]) -> dict[str, str]:
    """Return the SHA-256 of all token ids and of the token masks; for labeled examples, of their classes too."""
    tokens, mask = hashlib.sha256(), hashlib.sha256()
    for example in examples:
        length = b"".join(len(sequence.input_ids).to_bytes(8, "little") for sequence in example.sequences)
        tokens.update(length + example.input_ids.astype("<i4").tobytes())
        mask.update(length + example.supervised.astype("u1").tobytes())
    classes = labels_fingerprint(examples)
    return {"tokens": tokens.hexdigest(), "mask": mask.hexdigest(), **({"classes": classes} if classes else {})}


def text_fingerprint(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def versions(recipe: Record) -> dict[str, str]:
    """Return the versions of Python and of the packages that a run with this recipe uses."""
    package = package_of(recipe["model"].get("quantization", "none"))
    others = {package} if package else set()
    if recipe["train"].get("optimizer") in OF_BITSANDBYTES:
        others.add("bitsandbytes")
    packages = (*PACKAGES, *sorted(others))
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


@cache  # each reading parses a page of text
def _version(package: str) -> str:
    return importlib.metadata.version(package)


def changed_inputs(before: Record, now: Record, keys: Sequence[str] = INPUTS, *, known_only: bool = False) -> list[str]:
    """Name the inputs that differ between two locks, as `inputs.train.mask` or `inputs.model.config.json`.

    Args:
        before: The lock of the run.
        now: The lock that the same recipe gives now.
        keys: The inputs to compare.
        known_only: Whether to ignore model files that `before` does not list.
    """
    changed: list[str] = []
    for key in keys:
        old, new = before["inputs"].get(key), now["inputs"].get(key)
        if key == "model" and known_only:
            new = {name: digest for name, digest in new.items() if name in old}
        if isinstance(old, dict) and isinstance(new, dict):
            changed += [f"inputs.{key}.{name}" for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
        elif old != new:
            changed.append(f"inputs.{key}")
    return changed


def changed_settings(before: Record, now: Record) -> list[str]:
    """Return the settings that changed between two recipes as written, as `train.learning_rate (0.01 → 0.02)`."""
    return [
        f"{section}.{field} ({_shown(before.get(section, {}).get(field))} → {_shown(now.get(section, {}).get(field))})"
        for section in sorted(before.keys() & now.keys())  # another task has other sections, and is a change itself
        for field in sorted({*before.get(section, {}), *now.get(section, {})})
        if before.get(section, {}).get(field) != now.get(section, {}).get(field)
    ]


def _shown(value: Any) -> str:
    return f"{value:.12g}" if isinstance(value, float) else str(value)  # 6 epochs, not 6.0


def make_lock(
    *, recipe: dict[str, Any], choices: dict[str, Any], inputs: dict[str, Any], adapter: dict[str, Any]
) -> Record:
    """Return the contents of `lock.json`.

    Args:
        recipe: Every effective setting, `auto` resolved.
        choices: Setting → what `auto` became, and why.
        inputs: Fingerprints of model, template and examples.
        adapter: Target modules and parameter counts.
    """
    return {
        "recipe": recipe,
        "choices": choices,
        "inputs": inputs,
        "adapter": adapter,
        "versions": versions(recipe),
        "machine": {
            "platform": platform.platform(),
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "processes": processes.size(),
        },
    }
