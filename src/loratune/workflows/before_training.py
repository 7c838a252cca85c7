"""The model as it was before a run's first step: the base, or the base with the adapter of `lora.start_from`.

That is what the trained model is compared with: whoever continues an adapter asks what the new steps changed.
"""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from loratune.model.adapter.start_from import CONFIG, WEIGHTS, adapter_fingerprint, load_weights_into
from loratune.run.directory import RunDir, cannot_write, read_json

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from peft import PeftModel

    from loratune.run.progress import Progress


def keep_start(run: RunDir, adapter: Path) -> None:
    """Copy the adapter that a run begins with into its directory.

    Raises:
        MachineError: It cannot be written.
    """
    with cannot_write(run.start):
        run.start.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(adapter / name, run.start / name)


def started_from_adapter(run: RunDir, progress: Progress) -> bool:
    """Whether the model before the run had an adapter that is available for the comparison."""
    expected = read_json(run.lock)["inputs"].get("start") if run.lock.is_file() else None
    if (run.start / WEIGHTS).is_file() and expected in (None, adapter_fingerprint(run.start)):
        return True
    if expected is not None:
        progress.warn(
            "the adapter of lora.start_from is missing from RUN/start, or changed: the fine-tuned model is compared "
            "with the base alone, not with where the run began"
        )
    return False


@contextmanager
def before_training(model: PeftModel, run: RunDir, *, started: bool) -> Iterator[None]:
    """Make a loaded model the one before the run's first step; it is restored at the end of the block.

    Args:
        model: The base with the run's adapter.
        run: The run directory.
        started: What `started_from_adapter` says.
    """
    if not started:
        with model.disable_adapter():
            yield
        return
    kept = {name: weight.detach().clone() for name, weight in model.named_parameters() if _is_trained(name, weight)}
    load_weights_into(model, run.start)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name in kept:
                    weight.copy_(kept[name])


def _is_trained(name: str, weight: torch.nn.Parameter) -> bool:
    """Whether an adapter may have the weight; a model that was loaded to answer requires no gradients."""
    return weight.requires_grad or ".lora_" in name or ".modules_to_save." in name
