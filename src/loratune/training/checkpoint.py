"""Checkpoints: all that a run needs to resume bit-for-bit, in plain files.

    checkpoints/120/adapter_model.safetensors   the adapter, in PEFT's format
                    optimizer.safetensors       tensors of the optimizer's state
                    random.safetensors          torch's RNG states
                    state.json                  the rest: optimizer, schedule, Python's and NumPy's RNG states
                    trainer_state.json          transformers' own record: step, epoch
                    manifest.json               SHA-256 of every file; written last

A checkpoint is written under a temporary name and then renamed, so a folder with a step as its name is complete; one
that is deleted is renamed first. Whatever a killed run leaves behind has a name that begins with a dot, and is ignored.
Nothing is pickled.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from loratune.data.steps import trigger_steps
from loratune.model.adapter.modules_to_save import with_copies, without_copies
from loratune.run.digest import file_sha256
from loratune.run.directory import RunDir, cannot_write
from loratune.run.errors import MachineError, RunError
from loratune.training.token_budget import random_state, set_random_state

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from loratune.recipe.recipe import TrainSection
    from loratune.run.progress import Progress

TRAINER_STATE = "trainer_state.json"
_ADAPTER, _OPTIMIZER, _RANDOM = "adapter_model.safetensors", "optimizer.safetensors", "random.safetensors"
_STATE, _MANIFEST = "state.json", "manifest.json"
_FILES = frozenset((_ADAPTER, _OPTIMIZER, _RANDOM, _STATE, TRAINER_STATE))


def save_checkpoint(
    folder: Path,
    *,
    model: PeftModel,
    optimizer: Any,
    scheduler: Any,
    trainer_state: str,
    keep: int | None,
    held_out: Mapping[int, float | None],
    keep_too: Collection[int | None] = (),
) -> None:
    """Write a checkpoint atomically, then delete the oldest beyond `keep`, but never the best one.

    Args:
        folder: `checkpoints/STEP`.
        model: The adapted model, whose adapter is saved.
        optimizer: The optimizer, whose state is saved.
        scheduler: The learning-rate schedule, whose state is saved.
        trainer_state: transformers' `TrainerState` as JSON.
        keep: Number of checkpoints to keep; None keeps all.
        held_out: Step → held-out loss, None where the evaluation failed.
        keep_too: Steps whose checkpoints are kept in any case.

    Raises:
        MachineError: The disk is full or not writable. Earlier checkpoints are intact.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        with cannot_write(folder):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            _write_files(temporary, model, optimizer, scheduler, trainer_state)
            _write_manifest(temporary)
            remove_checkpoint(folder)
            temporary.rename(folder)
            sync(folder.parent)
            if keep is not None:
                best = best_checkpoint(folder.parent, held_out)
                for old in checkpoints_in(folder.parent)[:-keep]:
                    if int(old.name) not in (best, *keep_too):
                        remove_checkpoint(old)
    except MachineError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def adopt_checkpoint(source: Path, folder: Path, train: TrainSection, *, num_steps: int) -> None:
    """Copy a checkpoint of another run, as if the run of `folder` had saved it at the step that `folder` names.

    At step 0 it is the start of a run: its adapter and the optimizer's moments are kept; learning rates, schedule and
    order of the examples are those of a run that has not taken a step.

    Args:
        source: The other run's checkpoint.
        folder: `checkpoints/STEP` of the run that gets it.
        train: The recipe's section of that run.
        num_steps: Optimizer steps of that run.

    Raises:
        MachineError: The disk is full or not writable.
    """
    step, temporary = int(folder.name), folder.with_name(f".{folder.name}.tmp")
    with cannot_write(folder):
        shutil.copytree(source, temporary)
        trainer = json.loads((source / TRAINER_STATE).read_text(encoding="utf-8"))
        cadences = {"eval_steps": train.eval_every, "save_steps": train.save_every, "logging_steps": train.log_every}
        trainer |= {
            name: math.ceil(num_steps * every) if every < 1 else int(every)
            for name, every in cadences.items()
            if not isinstance(every, str)
        }
        trainer |= {"max_steps": num_steps, "num_train_epochs": math.ceil(train.epochs)}
        if not step:
            trainer |= {"global_step": 0, "epoch": 0.0}
            state = json.loads((source / _STATE).read_text(encoding="utf-8"))
            (temporary / _STATE).write_text(json.dumps({**state, "scheduler": None}), encoding="utf-8")
        (temporary / TRAINER_STATE).write_text(json.dumps(trainer, indent=2), encoding="utf-8")
        (temporary / _MANIFEST).unlink()
        _write_manifest(temporary)
        temporary.rename(folder)
        sync(folder.parent)


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint."""
    if folder.exists():  # renamed first: a kill in the middle must not leave half of it under a valid name
        leaving = folder.with_name(f".{folder.name}.old.tmp")
        shutil.rmtree(leaving, ignore_errors=True)
        folder.rename(leaving)
        shutil.rmtree(leaving)


def best_checkpoint(folder: Path, held_out: Mapping[int, float | None]) -> int | None:
    """Return the step of the checkpoint with the lowest held-out loss, the earliest of equals; None if none has one."""
    steps = [int(path.name) for path in checkpoints_in(folder)]
    measured = [(loss, step) for step in steps if (loss := held_out.get(step)) is not None and math.isfinite(loss)]
    return min(measured)[1] if measured else None


def checkpoints_in(folder: Path) -> list[Path]:
    """Return all checkpoints, oldest first."""
    found = [path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name))


def latest_checkpoint(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """Return the newest undamaged checkpoint, and newer damaged ones with the damage of each."""
    damaged: dict[Path, str] = {}
    for path in reversed(checkpoints_in(folder)):
        problem = damage_of(path)
        if not problem:
            return path, damaged
        damaged[path] = problem
    return None, damaged


def newest_valid_checkpoint(run: RunDir, progress: Progress) -> Path | None:
    """Return the newest undamaged checkpoint of a run, None if it has none yet; delete newer damaged ones.

    Raises:
        RunError: All checkpoints are damaged.
    """
    checkpoint, damaged = latest_checkpoint(run.checkpoints)
    if checkpoint is None and damaged:
        problems = "; ".join(f"{path.name}: {problem}" for path, problem in damaged.items())
        raise RunError(
            f"every checkpoint is damaged ({problems})", file=run.checkpoints, fix="train again with --overwrite"
        )
    for path, problem in damaged.items():
        progress.warn(f"checkpoint {path.name} is damaged ({problem}) and deleted; an earlier one is used")
        remove_checkpoint(path)  # or it would count among the `train.keep_checkpoints` that are kept
    return checkpoint


def load_adapter_weights(folder: Path, model: PeftModel) -> None:
    """Load the adapter of a checkpoint into the model."""
    _load_tensors(load_file(folder / _ADAPTER, device=str(model.device)), model)


def load_mean(folders: Sequence[Path], model: PeftModel) -> None:
    """Load the mean of several checkpoints' adapters into the model, weight by weight, computed in double precision.

    The means of A and of B do not multiply to the mean of the updates B·A; for neighboring checkpoints they are close.
    """
    parts = [load_file(folder / _ADAPTER) for folder in folders]
    mean = {name: torch.stack([part[name].double() for part in parts]).mean(0) for name in parts[0]}
    _load_tensors(
        {name: weight.to(device=model.device, dtype=parts[0][name].dtype) for name, weight in mean.items()}, model
    )


def _load_tensors(tensors: Mapping[str, torch.Tensor], model: PeftModel) -> None:
    """Load a checkpoint's tensors, which hold each tied tensor once, into the adapter."""
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    set_peft_model_state_dict(model, with_copies(tensors, own))


def load_optimizer(folder: Path, optimizer: Any, scheduler: Any) -> None:
    """Restore the optimizer and the learning-rate schedule."""
    state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    found = _join_state(state["optimizer"], load_file(folder / _OPTIMIZER))
    if state["scheduler"] is None:  # another run's, adopted: its moments, under this run's rates and schedule
        optimizer.load_state_dict({**found, "param_groups": optimizer.state_dict()["param_groups"]})
        return
    optimizer.load_state_dict(found)
    scheduler.load_state_dict(state["scheduler"])


def load_random(folder: Path) -> None:
    """Restore the random generators of Python, NumPy and torch.

    Raises:
        RunError: The checkpoint comes from a machine with a different number of GPUs.
    """
    state = json.loads((folder / _STATE).read_text(encoding="utf-8"))["random"]
    tensors = load_file(folder / _RANDOM)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    num_gpus = sum(name.startswith("cuda") for name in tensors)
    if num_gpus != torch.cuda.device_count():
        raise RunError(
            f"the checkpoint has random states of {num_gpus} GPUs, but this machine has {torch.cuda.device_count()}"
        )
    set_random_state(tensors)


def _write_files(folder: Path, model: PeftModel, optimizer: Any, scheduler: Any, trainer_state: str) -> None:
    # PEFT's "auto" would ask the Hub at every save whether the vocabulary was resized; new rows are saved by themselves
    adapter = without_copies(get_peft_model_state_dict(model, save_embedding_layers=False))
    save_file(_contiguous(adapter), folder / _ADAPTER)
    structure, tensors = _split_state(optimizer.state_dict())
    save_file(tensors, folder / _OPTIMIZER)
    random_record, random_tensors = _random_state()
    save_file(random_tensors, folder / _RANDOM)
    record = {"optimizer": structure, "scheduler": scheduler.state_dict(), "random": random_record}
    (folder / _STATE).write_text(json.dumps(record), encoding="utf-8")
    (folder / TRAINER_STATE).write_text(trainer_state, encoding="utf-8")


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _split_state(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Split an optimizer's state into what JSON can hold and tensors.

    Tensors are named `parameter.entry`, or `parameter.group/entry` for the nested entries of bitsandbytes.
    """
    numbers: dict[str, dict[str, Any]] = {}
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for parameter, entries in state["state"].items():
        flat = dict(_flattened(entries))
        numbers[str(parameter)] = {k: v for k, v in flat.items() if not isinstance(v, torch.Tensor)}
        for name, value in flat.items():
            if isinstance(value, torch.Tensor):
                # bitsandbytes shares its quantization tables between parameters; safetensors refuses shared memory
                tensors[f"{parameter}.{name}"] = value.clone() if value.data_ptr() in seen else value
                seen.add(value.data_ptr())
    return {"numbers": numbers, "param_groups": state["param_groups"]}, _contiguous(tensors)


def _flattened(entries: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in entries.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", item) for inner, item in value.items())
        else:
            yield name, value


def _join_state(structure: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    flat = [
        (f"{name}.{key}", value) for name, entries in structure["numbers"].items() for key, value in entries.items()
    ]
    state: dict[int, dict[str, Any]] = {int(name): {} for name in structure["numbers"]}
    for name, value in (*flat, *tensors.items()):
        parameter, _, entry = name.partition(".")
        *group, entry = entry.split("/")
        place = state[int(parameter)]
        (place.setdefault(group[0], {}) if group else place)[entry] = value
    return {"state": state, "param_groups": structure["param_groups"]}


def _random_state() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return {"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), *rest]}, random_state()


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        sync(path)
    digests = {path.name: file_sha256(path) for path in files}
    (folder / _MANIFEST).write_text(json.dumps(digests, indent=2), encoding="utf-8")
    sync(folder / _MANIFEST)
    sync(folder)


def damage_of(folder: Path) -> str:
    """Describe what is wrong with a checkpoint's files; "" if they are as they were written."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or manifest.keys() != _FILES:
            return f"{_MANIFEST} does not name the files of a checkpoint"
        changed = [name for name, digest in manifest.items() if file_sha256(folder / name) != digest]
    except (OSError, ValueError) as error:
        return str(error)
    return f"{', '.join(changed)} changed" if changed else ""


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def averaged_steps(train: TrainSection, *, last_step: int, num_steps: int, num_per_epoch: int) -> list[int]:
    """Return the steps whose adapters are averaged in a run that ends after `last_step`.

    These are the last `train.average_checkpoints` steps among those that `train.save_every` saves and `last_step`
    itself.

    Args:
        train: The recipe's section.
        last_step: The last step of the run, or of the run so far.
        num_steps: Optimizer steps of the complete run.
        num_per_epoch: Optimizer steps of an epoch.
    """
    if train.average_checkpoints is None:
        return []
    # From the recipe, not from the folder: a checkpoint saved by an interruption must not change the mean.
    wanted = trigger_steps(train.save_every, steps=num_steps, num_per_epoch=num_per_epoch)
    return [*(step for step in wanted if step < last_step), last_step][-train.average_checkpoints :]


def resume_state(checkpoint: Path) -> int:
    """Return the number of optimizer steps taken before a checkpoint."""
    return int(json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))["global_step"])
