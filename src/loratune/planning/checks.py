"""Checks of a run that need no weights, and that belong to no single stage.

`prepare` runs these for plan, train and resume, the quickest first. What belongs to one stage is checked there, also
before the weights load:

    recipe        unknown settings, wrong types, contradictions             recipe/
    device        whether it is there                                       model/device.py
    model         found, config and tokenizer readable, trusted code        model/load.py
    targets       whether they match the model                              model/adapter/targets.py
    optimizer     its package is there, and runs on the device              here
    start_from    an adapter with the recipe's settings                     model/adapter/start_from.py
    weights       all files there, complete, and of this model              model/safetensors_headers.py
    data          every row; token masks computed in two ways               data/
    references    whether the metric can read them: JSON if it is json      evaluation/scoring.py
    memory        the longest example fits                                  planning/memory/memory.py
    output        empty, or a run that may be overwritten                   run/directory.py
"""

from __future__ import annotations

import importlib
import importlib.metadata
import netrc
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from packaging.version import Version

from loratune.data.steps import count_occurrences, num_steps, num_steps_per_epoch, trigger_steps
from loratune.model.adapter.pattern_checks import check_patterns, check_used
from loratune.model.adapter.start_from import check_adapter, locate_adapter
from loratune.model.adapter.variants import check_ranks, check_variant
from loratune.model.quantization.checkpoint import method_of
from loratune.model.safetensors_headers import check_stored, check_weights
from loratune.planning.memory.optimizer import OF_BITSANDBYTES, state_bytes
from loratune.run.errors import DataError, MachineError, RecipeError, plural
from loratune.run.extras import pip_install

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.data.examples import Example
    from loratune.data.prompts import Prompt
    from loratune.model.adapter.modules_to_save import FullyTrained
    from loratune.model.load import BaseModel
    from loratune.planning.parameters import ParameterCount
    from loratune.recipe.recipe import Recipe, TrainSection

OTHER_FILES_BYTES = 50 * 2**20
"""Allowance for everything else in a run directory: logs, report, evaluation. An estimate."""

FIRST_ON_CPUS = Version("0.50")
"""The first version of bitsandbytes in which these optimizers were seen to run on a CPU."""


def check_sharded(recipe: Recipe) -> None:
    """Check that the base can be sharded over processes (FSDP) with this recipe.

    Raises:
        RecipeError: It cannot.
    """
    problem = ""
    if recipe.model.quantization != "none":
        problem = f"model.quantization is {recipe.model.quantization}, whose weights cannot be sharded"
    elif recipe.lora.variant in ("pissa", "olora", "eva"):
        problem = f"lora.variant is {recipe.lora.variant}, which starts from the whole base"
    elif recipe.lora.target_parameters:
        problem = "lora.target_parameters is given, whose parameters PEFT changes while a layer runs"
    if problem and recipe.train.strategy == "auto":
        raise RecipeError(
            f"the base does not fit one device, and cannot be sharded (train.strategy fsdp): {problem}",
            fix="leave that setting out, or use a device with more memory",
        )
    if problem:
        raise RecipeError(
            f"train.strategy is fsdp, but {problem}", fix="train.strategy=ddp, if one device can hold the base"
        )


def check_trackers(recipe: Recipe) -> None:
    """Check that the trackers of `train.report_to` are installed, and that the one that needs a key has it.

    Raises:
        RecipeError: A tracker, one of its packages or its key is missing.
    """
    missing = [name for name in recipe.train.report_to if find_spec(name) is None]
    if missing:
        raise RecipeError(
            f"train.report_to names {', '.join(missing)}, which is not installed",
            fix=f"pip install {' '.join(missing)}",
        )
    if "wandb" in recipe.train.report_to and not _has_wandb_key():
        raise RecipeError(
            "train.report_to names wandb, but no API key is set", fix="wandb login, or WANDB_MODE=offline"
        )
    for name in recipe.train.report_to:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise RecipeError(
                f"train.report_to names {name}, which cannot be imported: {error}", fix=f"pip install --upgrade {name}"
            ) from error


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def check_optimizer(recipe: Recipe, device: str, *, is_here: bool) -> None:
    """Check that bitsandbytes can run the optimizer, if it is one of its own.

    Args:
        recipe: Its optimizer decides.
        device: cpu, cuda or mps.
        is_here: Whether the device is on this machine.

    Raises:
        MachineError: bitsandbytes is not installed, or does not support the device.
    """
    name = recipe.train.optimizer
    if name not in OF_BITSANDBYTES:
        return
    if device == "mps":
        raise MachineError(
            f"train.optimizer is {name}, which bitsandbytes runs on CUDA and CPUs only, not on Apple GPUs",
            fix="train.optimizer=adamw",
        )
    if not is_here:
        return
    if find_spec("bitsandbytes") is None:
        raise MachineError(
            f"train.optimizer is {name}, but bitsandbytes is not installed", fix=pip_install("bitsandbytes")
        )
    have = importlib.metadata.version("bitsandbytes")
    if device == "cpu" and Version(have) < FIRST_ON_CPUS:
        raise MachineError(
            f"train.optimizer is {name}, but bitsandbytes {have} is not known to run it on a CPU",
            fix=f"pip install 'bitsandbytes>={FIRST_ON_CPUS}', or train.optimizer=adamw",
        )


def check_output(folder: Path) -> None:
    """Check that the run directory can be created and written.

    Raises:
        MachineError: It, or the nearest existing path above it, is not a folder or not writable.
    """
    nearest = _nearest(folder)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        what = "is not a folder" if not nearest.is_dir() else "is not writable"
        raise MachineError(
            f"train.output_dir cannot be created: this {what}", file=nearest, fix="choose another train.output_dir"
        )


def check_files(base: BaseModel, model: Any, head: tuple[str, ...]) -> None:
    """Check that all weights are there, except those of a classifier's head, which may be newly initialized.

    Args:
        base: Where the base model's files are.
        model: The model on the meta device.
        head: Modules of a classifier's head.

    Raises:
        RecipeError: Weights are missing, or belong to another model.
    """
    check_weights(base.path, model, quantized=method_of(model.config) is not None, without=head)
    check_stored(base.stored, model, name=base.name, without=head)


def check_trained(recipe: Recipe, model: Any, parameters: ParameterCount) -> None:
    """Check that ranks, variant and patterns fit the modules that are trained.

    Raises:
        RecipeError: They do not.
    """
    matrices = parameters.matrices
    check_ranks(recipe.lora, matrices)
    check_variant(recipe.lora, matrices, model)
    check_patterns(recipe.lora, [matrix.name for matrix in matrices])
    trained = [*(matrix.name for matrix in matrices), *(item.name for item in parameters.whole)]
    check_used("train.learning_rate_pattern", recipe.train.learning_rate_pattern, trained, "trained")
    _check_fully_trained(recipe, parameters.whole)


def check_vocabulary(examples: Sequence[Example], model: Any) -> None:
    """Check that the model has an embedding for every token of the data.

    Args:
        examples: Training and held-out examples.
        model: The model; it may be on the meta device.

    Raises:
        RecipeError: It has not: the tokenizer belongs to another model.
    """
    num_embeddings: int = model.get_input_embeddings().weight.shape[0]
    for example in examples:
        highest = int(example.input_ids.max())
        if highest >= num_embeddings:
            raise RecipeError(
                f"the tokenizer produces token {highest}, but the model has only {num_embeddings} embeddings",
                file=example.origin.file,
                line=example.origin.line,
                fix="the tokenizer in the model's folder belongs to another model or was extended; use the model's own",
            )


def check_prompts(recipe: Recipe, prompts: Sequence[Prompt], positions: int | None) -> None:
    """Check that there is something to score, and that prompts and answers fit the model.

    Args:
        recipe: Its `evaluate` section decides.
        prompts: The held-out prompts to be answered.
        positions: The most tokens of a sequence; None if the model states no limit.

    Raises:
        DataError: No held-out conversation has an answer, or a prompt leaves no room for one.
    """
    metric, room = recipe.evaluate.metric, recipe.evaluate.max_new_tokens
    if metric != "none" and not prompts:
        raise DataError(
            f"the metric is {metric}, but no held-out conversation has an answer to compare with",
            fix="another data.eval, or no metric (evaluate.metric=none)",
        )
    for prompt in prompts:
        if positions is not None and len(prompt.input_ids) + room > positions:
            raise DataError(
                f"a prompt of {len(prompt.input_ids):,} tokens and an answer of {room:,} (evaluate.max_new_tokens) do "
                f"not fit the model's {positions:,} positions",
                file=prompt.origin.file,
                line=prompt.origin.line,
                fix=f"evaluate.max_new_tokens={positions - len(prompt.input_ids)}"
                if len(prompt.input_ids) < positions
                else "shorten the row, or leave it out of data.eval",
            )


def check_start(recipe: Recipe, parameters: ParameterCount, output_dir: Path) -> Path | None:
    """Check the adapter to start from, and return its folder; None for a fresh adapter.

    Args:
        recipe: Its `lora.start_from` names the adapter.
        parameters: What is trained.
        output_dir: The run directory.

    Raises:
        RecipeError: The adapter does not match the recipe, or `--overwrite` would delete it.
        MachineError: The Hub cannot be reached.
    """
    if recipe.lora.start_from is None:
        return None
    folder = locate_adapter(recipe.lora.start_from)
    if folder.is_relative_to(output_dir.resolve()):
        raise RecipeError(
            f"lora.start_from is {recipe.lora.start_from}, which is inside the run directory",
            fix="choose another train.output_dir",
        )
    check_adapter(folder, recipe.lora, [count.matrix for count in parameters.per_module], parameters.whole)
    return folder


def _check_fully_trained(recipe: Recipe, whole: Sequence[FullyTrained]) -> None:
    """Check that no module trained in full is a matrix that `model.quantization` packs."""
    packed = [item.name for item in whole if not (item.is_head or item.is_embedding) and max(map(len, item.shapes)) > 1]
    if packed and recipe.model.quantization != "none":
        raise RecipeError(
            f"lora.modules_to_save trains {packed[0]} in full, but model.quantization is {recipe.model.quantization}, "
            "which packs it",
            fix="name it in lora.targets, or set model.quantization=none",
        )


def check_cadence(train: TrainSection, num_examples: int) -> None:
    """Check that the run saves as many checkpoints as it averages.

    Args:
        train: The recipe's `train` section.
        num_examples: Training examples of an epoch.

    Raises:
        RecipeError: It saves fewer.
    """
    wanted, saves = train.average_checkpoints, len(_steps_of(train, train.save_every, num_examples))
    if wanted is None or wanted <= saves:
        return
    steps = num_steps(num_examples, train.batch_size, train.epochs)
    closer = max(1, steps // wanted)
    longer = "more epochs" if train.max_steps is None else f"train.max_steps={wanted}"
    possible = f"train.save_every={closer}" if steps >= wanted else longer
    fewer = f"train.average_checkpoints={saves}" if saves > 1 else "leave train.average_checkpoints out"
    raise RecipeError(
        f"train.average_checkpoints is {wanted}, but a run of {steps:,} steps with train.save_every "
        f"{train.save_every} saves only {saves}",
        fix=f"{possible}, or {fewer}",
    )


def cadence_notes(train: TrainSection, num_examples: int) -> tuple[str, ...]:
    """Return warnings about settings that have no effect in a run of this length."""
    evaluated = _steps_of(train, train.eval_every, num_examples)
    notes = []
    if train.early_stopping is not None and len(evaluated) < train.early_stopping + 2:
        notes.append(
            f"train.early_stopping is {train.early_stopping}, but this run measures the held-out loss only "
            f"{len(evaluated)} times, so it cannot stop early; set a smaller train.eval_every"
        )
    if train.final_adapter == "best" and len({*evaluated} & {*_steps_of(train, train.save_every, num_examples)}) == 1:
        notes.append(
            "train.final_adapter is best, but only the last step is both saved and evaluated, so it is the only choice"
        )
    return tuple(notes)


def _steps_of(train: TrainSection, every: str | float, num_examples: int) -> list[int]:
    return trigger_steps(
        every,
        steps=num_steps(num_examples, train.batch_size, train.epochs),
        num_per_epoch=num_steps_per_epoch(num_examples, train.batch_size),
    )


def check_disk(recipe: Recipe, parameters: ParameterCount, num_examples: int) -> None:
    """Check that the checkpoints and the adapter fit the disk.

    Args:
        recipe: The recipe with every `auto` resolved.
        parameters: What is trained.
        num_examples: Training examples of an epoch.

    Raises:
        MachineError: They do not.
    """
    steps = num_steps(num_examples, recipe.train.batch_size, recipe.train.epochs)
    saves = count_occurrences(recipe.train.save_every, steps=steps, epochs=recipe.train.epochs)
    # Besides the newest, the best is kept, and a new checkpoint is written before the oldest is deleted.
    newest = (recipe.train.keep_checkpoints or saves) + (recipe.train.average_checkpoints or 0)
    kept = min(saves, newest + 1) + 1 + (recipe.train.schedule == "warmup_stable_decay")  # `branch_step`
    matrices = [count.matrix for count in parameters.per_module]
    state = state_bytes(recipe.train.optimizer, matrices, recipe.lora, parameters.whole_shapes)
    checkpoint = 4 * parameters.trainable + state  # the adapter in float32
    needed = kept * checkpoint + parameters.adapter_bytes + OTHER_FILES_BYTES
    folder = _nearest(Path(recipe.train.output_dir))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MachineError(
            f"{plural(kept, 'checkpoint')} and the adapter need {needed / 2**20:,.0f} MiB, "
            f"but {free / 2**20:,.0f} MiB are free",
            file=folder,
            fix="train.keep_checkpoints=1, train.save_every=never, or a train.output_dir on another disk",
        )


def _nearest(folder: Path) -> Path:
    """Return the folder, or the nearest existing path above it."""
    folder = folder.expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    return folder
