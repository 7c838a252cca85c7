"""Everything that can be known to be wrong before the weights load, and is no concern of one stage alone.

`prepare` runs these for plan, train and resume, the quickest first. What belongs to one stage is checked by that stage,
and before the weights load as well:

    recipe        unknown settings, wrong types, contradictions                        recipe.py
    device        there or not                                                         model/device.py
    model         found, config and tokenizer readable, trusted code, targets match    model/load.py, model/targets.py
    optimizer     its package is there, and runs on the device                         early_checks.py
    start         an adapter as the recipe says                                        model/beginning.py
    weights       all files there, whole, and of this model                            model/weights.py
    data          every row; labels verified in two ways                               data/
    references    of the metric: JSON where it is json                                 evaluation/scoring.py
    memory        the longest example fits                                             planning/memory.py
    output        empty, or a run that may be overwritten                              run.py
"""

from __future__ import annotations

import importlib
import importlib.metadata
import netrc
import os
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from packaging.version import Version

from loratune.data.examples import Example
from loratune.data.prompts import Prompt
from loratune.data.steps import count_occurrences, num_steps, num_steps_per_epoch, trigger_steps
from loratune.model.adapter.modules_to_save import FullyTrained
from loratune.model.adapter.patterns import check_patterns, check_used
from loratune.model.adapter.start_from import check_adapter, locate_adapter
from loratune.model.adapter.variants import check_ranks, check_variant
from loratune.model.load import BaseModel
from loratune.model.quantization.checkpoint import method_of
from loratune.model.safetensors_headers import check_stored, check_weights
from loratune.planning.memory.optimizer import OF_BITSANDBYTES, state_bytes
from loratune.planning.parameters import ParameterCount
from loratune.recipe.recipe import Recipe, TrainSection
from loratune.run.errors import DataError, MachineError, RecipeError

FIRST_ON_CPUS = Version("0.50")
"""Of bitsandbytes: the first in which these were seen to run on a CPU."""


def check_sharded(recipe: Recipe) -> None:
    """Whether the base can be shared by processes as the recipe would have it.

    Raises:
        RecipeError: It cannot.
    """
    problem = ""
    if recipe.model.quantization != "none":
        problem = f"model.quantization is {recipe.model.quantization}, whose weights are not cut into parts"
    elif recipe.lora.variant in ("pissa", "olora", "eva"):
        problem = f"lora.variant is {recipe.lora.variant}, which begins with the whole base"
    elif recipe.lora.target_parameters:
        problem = "lora.target_parameters is given, whose parameters PEFT changes while a layer runs"
    if problem and recipe.train.strategy == "auto":
        raise RecipeError(
            f"no device holds the base alone, and processes cannot share it (train.strategy fsdp): {problem}",
            fix="leave that setting out, or a device with more memory",
        )
    if problem:
        raise RecipeError(
            f"train.strategy is fsdp, but {problem}", fix="train.strategy=ddp, where a device holds the base"
        )


def check_trackers(recipe: Recipe) -> None:
    """Whether the trackers of `train.report_to` are installed, and the one that needs a key has it.

    Raises:
        RecipeError: One is missing.
    """
    missing = [name for name in recipe.train.report_to if find_spec(name) is None]
    if missing:
        raise RecipeError(
            f"train.report_to names {', '.join(missing)}, which is not installed",
            fix=f"pip install {' '.join(missing)}",
        )
    if "wandb" in recipe.train.report_to and not _has_wandb_key():
        raise RecipeError(
            "train.report_to names wandb, which has no key here", fix="wandb login, or WANDB_MODE=offline"
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
    """Whether bitsandbytes, where it makes the optimizer, can run.

    Args:
        recipe: What to do.
        device: cpu, cuda or mps.
        is_here: Whether the device is on this machine.

    Raises:
        MachineError: It is not installed, or has no such optimizer for the device.
    """
    name = recipe.train.optimizer
    if name not in OF_BITSANDBYTES:
        return
    if device == "mps":
        raise MachineError(
            f"train.optimizer is {name}, which bitsandbytes runs on CUDA and CPUs only; this is an Apple GPU",
            fix="train.optimizer=adamw",
        )
    if not is_here:
        return
    if find_spec("bitsandbytes") is None:
        raise MachineError(
            f"train.optimizer is {name}, but bitsandbytes is not installed", fix="pip install 'loratune[bitsandbytes]'"
        )
    have = importlib.metadata.version("bitsandbytes")
    if device == "cpu" and Version(have) < FIRST_ON_CPUS:
        raise MachineError(
            f"train.optimizer is {name}, which bitsandbytes {have} is not known to run on a CPU",
            fix=f"pip install 'bitsandbytes>={FIRST_ON_CPUS}', or train.optimizer=adamw",
        )


def check_output(folder: Path) -> None:
    """Whether the run directory can be written.

    Raises:
        MachineError: It or the nearest folder above it is no folder, or is not ours to write in.
    """
    nearest = _nearest(folder)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        what = "is not a folder" if not nearest.is_dir() else "may not be written"
        raise MachineError(
            f"train.output_dir cannot be made: this {what}", file=nearest, fix="another train.output_dir"
        )


def check_files(base: BaseModel, model: Any, head: tuple[str, ...]) -> None:
    """Whether all weights are there but those of a classifier's head, which may be made anew.

    Raises:
        RecipeError: They are not, or are of another model.
    """
    check_weights(base.path, model, quantized=method_of(model.config) is not None, without=head)
    check_stored(base.stored, model, name=base.name, without=head)


def check_trained(recipe: Recipe, model: Any, parameters: ParameterCount) -> None:
    """Whether ranks, variant and patterns go with what is trained.

    Raises:
        RecipeError: They do not.
    """
    matrices = parameters.matrices
    check_ranks(recipe.lora, matrices)
    check_variant(recipe.lora, matrices, model)
    check_patterns(recipe.lora, [matrix.name for matrix in matrices])
    trained = [*(matrix.name for matrix in matrices), *(item.name for item in parameters.whole)]
    check_used("train.learning_rate_pattern", recipe.train.learning_rate_pattern, trained, "trained")
    _check_whole(recipe, parameters.whole)


def check_vocabulary(examples: Sequence[Example], model: Any) -> None:
    """Whether the model has an embedding for every token of the data.

    Args:
        examples: Training and held-out examples.
        model: May be on the meta device.

    Raises:
        RecipeError: The tokenizer is of another model.
    """
    num_embeddings: int = model.get_input_embeddings().weight.shape[0]
    for example in examples:
        highest = int(example.input_ids.max())
        if highest >= num_embeddings:
            raise RecipeError(
                f"the tokenizer writes token {highest}, but the model has {num_embeddings} embeddings",
                file=example.origin.file,
                line=example.origin.line,
                fix="the tokenizer in the model's folder is of another model, or was extended; put the model's own there",
            )


def check_prompts(recipe: Recipe, prompts: Sequence[Prompt], positions: int | None) -> None:
    """Whether there is something to score, and the model has room for the answers.

    Args:
        recipe: Its evaluate section.
        prompts: Of the held-out conversations to be answered.
        positions: Of the model; None where it states none.

    Raises:
        DataError: No held-out conversation has an answer, or a prompt leaves no room for one.
    """
    metric, room = recipe.evaluate.metric, recipe.evaluate.max_new_tokens
    if metric != "none" and not prompts:
        raise DataError(
            f"evaluate.metric is {metric}, but no held-out conversation has an answer to compare with",
            fix="evaluate.metric=none, or other data.eval",
        )
    for prompt in prompts:
        if positions is not None and len(prompt.input_ids) + room > positions:
            raise DataError(
                f"a prompt of {len(prompt.input_ids):,} tokens and an answer of {room:,} (evaluate.max_new_tokens) do not "
                f"fit the model's {positions:,} positions",
                file=prompt.origin.file,
                line=prompt.origin.line,
                fix=f"evaluate.max_new_tokens={positions - len(prompt.input_ids)}"
                if len(prompt.input_ids) < positions
                else "shorten the row, or leave it out of data.eval",
            )


def check_start(recipe: Recipe, parameters: ParameterCount, output_dir: Path) -> Path | None:
    """The folder of the adapter to begin with; None where it is a fresh one.

    Raises:
        RecipeError: It is not as the recipe says, or `--overwrite` would delete it.
        MachineError: The hub cannot be reached.
    """
    if recipe.lora.start_from is None:
        return None
    folder = locate_adapter(recipe.lora.start_from)
    if folder.is_relative_to(output_dir.resolve()):
        raise RecipeError(
            f"lora.start_from is {recipe.lora.start_from}, which lies in the run's own directory",
            fix="another train.output_dir",
        )
    check_adapter(folder, recipe.lora, [count.matrix for count in parameters.per_module], parameters.whole)
    return folder


def _check_whole(recipe: Recipe, whole: Sequence[FullyTrained]) -> None:
    """Whether what is trained whole is no matrix that `model.quantization` packs."""
    packed = [item.name for item in whole if not (item.is_head or item.is_embedding) and max(map(len, item.shapes)) > 1]
    if packed and recipe.model.quantization != "none":
        raise RecipeError(
            f"lora.modules_to_save trains {packed[0]} whole, but model.quantization is {recipe.model.quantization}, which packs "
            "it",
            fix="name it in lora.targets, or model.quantization=none",
        )


def check_cadence(train: TrainSection, num_examples: int) -> None:
    """Whether there are as many checkpoints as are averaged.

    Raises:
        RecipeError: There are fewer.
    """
    wanted, saves = train.average_checkpoints, len(_steps_of(train, train.save_every, num_examples))
    if wanted is None or wanted <= saves:
        return
    steps = num_steps(num_examples, train.batch_size, train.epochs)
    closer = max(1, steps // wanted)
    possible = f"train.save_every={closer}" if steps >= wanted else "more epochs"
    raise RecipeError(
        f"train.average_checkpoints is {wanted}, but a run of {steps:,} steps with train.save_every {train.save_every} has "
        f"{saves} of them",
        fix=f"{possible}, or {f'train.average_checkpoints={saves}' if saves > 1 else 'leave train.average_checkpoints out'}",
    )


def cadence_notes(train: TrainSection, num_examples: int) -> tuple[str, ...]:
    """Settings that come to nothing in so short a run, a sentence each, without a full stop."""
    evaluated = _steps_of(train, train.eval_every, num_examples)
    notes = []
    if train.early_stopping is not None and len(evaluated) < train.early_stopping + 2:
        notes.append(
            f"train.early_stopping is {train.early_stopping}, but the held-out loss is measured {len(evaluated)}× in this run, so it "
            "cannot end early; a smaller train.eval_every lets it"
        )
    if train.final_adapter == "best" and len({*evaluated} & {*_steps_of(train, train.save_every, num_examples)}) == 1:
        notes.append(
            "train.final_adapter is best, but only the last step is both saved and evaluated: there is nothing to choose from"
        )
    return tuple(notes)


def _steps_of(train: TrainSection, every: str | float, num_examples: int) -> list[int]:
    return trigger_steps(
        every,
        steps=num_steps(num_examples, train.batch_size, train.epochs),
        num_per_epoch=num_steps_per_epoch(num_examples, train.batch_size),
    )


def check_disk(recipe: Recipe, parameters: ParameterCount, num_examples: int) -> None:
    """Whether the checkpoints and the adapter fit the disk: adapter and the optimizer's state in each.

    Raises:
        MachineError: They do not.
    """
    steps = num_steps(num_examples, recipe.train.batch_size, recipe.train.epochs)
    saves = count_occurrences(recipe.train.save_every, steps=steps, epochs=recipe.train.epochs)
    # beside the newest the best is kept, and a new one is written before the oldest goes
    newest = (recipe.train.keep_checkpoints or saves) + (recipe.train.average_checkpoints or 0)
    kept = min(saves, newest + 1) + 1
    matrices = [count.matrix for count in parameters.per_module]
    state = state_bytes(recipe.train.optimizer, matrices, recipe.lora, parameters.whole_shapes)
    checkpoint = 4 * parameters.trainable + state
    needed = kept * checkpoint + parameters.adapter_bytes + 50 * 2**20
    folder = _nearest(Path(recipe.train.output_dir))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MachineError(
            f"{kept} checkpoints and the adapter need {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free",
            file=folder,
            fix="train.keep_checkpoints=1, train.save_every=never, or another train.output_dir",
        )


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    return folder
