"""Checks across settings: which valid settings contradict each other."""

from __future__ import annotations

import re
from typing import Any

from loratune.recipe.roles import as_written
from loratune.recipe.sections.base import Contradiction, check_every


def check_regular_expressions(name: str, value: dict[str, Any]) -> dict[str, Any]:
    """Check that all keys are regular expressions.

    Raises:
        Contradiction: A key is not one.
    """
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise Contradiction(
                f"{name}: {pattern} is not a regular expression: {error}",
                fix="name a module by its last parts, such as q_proj; .* matches any text, \\( a parenthesis",
            ) from None
    return value


def check_once(name: str, value: Any) -> Any:
    """Check that a list names nothing twice.

    Raises:
        Contradiction: It does.
    """
    if isinstance(value, tuple) and len(set(value)) < len(value):
        twice = max(value, key=value.count)
        raise Contradiction(f"{name}: {twice} is named twice", fix="remove one of them")
    return value


def check_data(data: Any) -> None:
    """Check the fields of the data section against each other.

    Raises:
        Contradiction: Two settings contradict each other.
    """
    if isinstance(data.max_length, int) and data.max_length < 2:
        raise Contradiction(
            f"data.max_length is {data.max_length}; an example needs at least 2 tokens", fix="data.max_length=auto"
        )
    if isinstance(data.eval, float | int) and not 0 < data.eval < 1:
        raise Contradiction(
            f"data.eval is {data.eval}; a held-out fraction must be between 0 and 1",
            fix="data.eval=0.1, a file, or none",
        )
    if data.format == "text" and data.train_on != "all":
        raise Contradiction(
            f"data.format is text, which has no answers, but data.train_on is {as_written(data.train_on)}",
            fix="set data.train_on: all",
        )
    if data.train_on == ():
        raise Contradiction(
            "data.train_on is an empty list", fix="list the roles whose messages to train, such as [user, assistant]"
        )
    if isinstance(data.train_on, tuple):
        check_once("data.train_on", data.train_on)


def check_train(train: Any, decay_fraction: float) -> None:
    """Check the fields of the train section against each other.

    Args:
        train: The section.
        decay_fraction: Fraction of the steps over which `warmup_stable_decay` decays.

    Raises:
        Contradiction: Two settings contradict each other.
    """
    for name in ("eval_every", "save_every", "log_every"):
        check_every(f"train.{name}", getattr(train, name))
    if isinstance(train.token_budget, int) and train.token_budget < 1:
        raise Contradiction(
            f"train.token_budget is {train.token_budget}", fix="use a positive number of tokens, or auto"
        )
    if isinstance(train.recompute, int) and train.recompute < 0:
        raise Contradiction(f"train.recompute is {train.recompute}", fix="use a number of layers, or auto")
    if train.early_stopping is not None and train.eval_every == "never":
        raise Contradiction(
            f"train.early_stopping is {train.early_stopping}, but train.eval_every is never, so no held-out loss is "
            "measured",
            fix="train.eval_every=epoch",
        )
    if train.final_adapter == "best":
        for name in ("eval_every", "save_every"):
            if getattr(train, name) == "never":
                raise Contradiction(
                    f"train.final_adapter is best, but train.{name} is never, so there is nothing to choose from",
                    fix=f"train.{name}=epoch, or train.final_adapter=last",
                )
    if train.average_checkpoints is not None:
        given = f"train.average_checkpoints is {train.average_checkpoints}"
        if train.final_adapter == "best":
            raise Contradiction(
                f"{given}, but train.final_adapter is best; a run can only end with one of them",
                fix="remove one of them",
            )
        if train.save_every == "never":
            raise Contradiction(
                f"{given}, but train.save_every is never, so there are none", fix="train.save_every=epoch"
            )
    if train.schedule == "inverse_sqrt" and train.warmup_fraction == 0:
        raise Contradiction(
            "train.schedule is inverse_sqrt, which is scaled by the warm-up, but train.warmup_fraction is 0",
            fix="train.warmup_fraction=0.05",
        )
    if train.schedule == "warmup_stable_decay" and train.warmup_fraction > 1 - decay_fraction:
        raise Contradiction(
            f"train.schedule is warmup_stable_decay, which decays over the last {decay_fraction:.0%} of the steps, but "
            f"train.warmup_fraction is {train.warmup_fraction:g}: they overlap",
            fix=f"train.warmup_fraction={1 - decay_fraction:g} or less",
        )


def check_held_out(recipe: Any) -> None:
    """Check settings that need held-out data, and which engine can stream.

    Args:
        recipe: A `Recipe`.

    Raises:
        Contradiction: Two settings contradict each other.
    """
    if recipe.data.streaming is True and recipe.train.engine == "trl":
        raise Contradiction(
            "data.streaming is true, but train.engine is trl, which needs all examples at once",
            fix="data.streaming=auto, or train.engine=fast",
        )
    if recipe.data.eval != "none":
        return
    fix = "data.eval=0.1 or a file"
    if recipe.evaluate.metric != "none":
        raise Contradiction(
            f"evaluate.metric is {recipe.evaluate.metric}, but data.eval is none, so there is nothing to score", fix=fix
        )
    if recipe.evaluate.samples_every != "never":
        raise Contradiction(
            f"evaluate.samples_every is {recipe.evaluate.samples_every}, but data.eval is none, so there are no "
            "held-out prompts to answer",
            fix=fix,
        )
    if recipe.train.final_adapter == "best":
        raise Contradiction(
            "train.final_adapter is best, but data.eval is none, so no held-out loss is measured", fix=fix
        )
    if recipe.train.early_stopping is not None:
        raise Contradiction(
            f"train.early_stopping is {recipe.train.early_stopping}, but data.eval is none, so no held-out loss is "
            "measured",
            fix=fix,
        )


def check_quantization_settings(recipe: Any) -> None:
    """Check what `model.quantization` can be combined with.

    Args:
        recipe: A `Recipe`.

    Raises:
        Contradiction: Two settings contradict each other.
    """
    chosen, dtype, train = recipe.model.quantization, recipe.model.dtype, recipe.train
    if chosen == "fp8" and dtype not in ("auto", "bfloat16"):
        raise Contradiction(
            f"model.quantization is fp8, which starts from bfloat16, but model.dtype is {dtype}",
            fix="model.dtype=auto",
        )
    if chosen not in ("none", "fp8"):
        if dtype == "float16":
            raise Contradiction(
                f"model.quantization is {chosen}, which computes in bfloat16 or float32, but model.dtype is float16",
                fix="model.dtype=auto",
            )
        if train.compile is True:
            raise Contradiction(
                f"train.compile is true, but the layers of model.quantization {chosen} run uncompiled",
                fix="train.compile=auto",
            )
        if chosen == "int8" and train.recompute not in ("auto", 0):
            raise Contradiction(
                f"train.recompute is {train.recompute}, but the int8 layers of bitsandbytes (model.quantization) "
                "keep their "
                "inputs where gradient checkpointing cannot free them",
                fix="train.recompute=0",
            )
    if chosen != "none" and recipe.lora.variant in ("dora", "pissa", "olora"):
        raise Contradiction(
            f"lora.variant is {recipe.lora.variant}, which needs unquantized weights, but model.quantization is "
            f"{chosen}",
            fix="lora.variant=plain, or model.quantization=none",
        )


def check_muon(recipe: Any) -> None:
    """Check that Muon trains matrices only: it orthogonalizes their updates.

    Args:
        recipe: A `Recipe`.

    Raises:
        Contradiction: Something else would be trained.
    """
    if recipe.train.optimizer != "muon":
        return
    fix = "train.optimizer=adamw"
    if recipe.lora.variant == "dora":
        raise Contradiction(
            "train.optimizer is muon, which trains matrices only, but lora.variant is dora, whose magnitudes are "
            "vectors",
            fix=fix,
        )
    for name in ("modules_to_save", "new_tokens", "target_parameters"):
        if getattr(recipe.lora, name):
            raise Contradiction(
                f"train.optimizer is muon, which trains the adapter's matrices only, but lora.{name} is set", fix=fix
            )


def check_beside(recipe: Any) -> None:
    """Check initialization and everything trained in addition to the adapter's matrices against other settings.

    Args:
        recipe: A `Recipe`.

    Raises:
        Contradiction: Two settings contradict each other.
    """
    lora = recipe.lora
    if lora.start_from is not None and lora.variant in ("pissa", "olora", "eva", "loftq"):
        raise Contradiction(
            f"lora.variant is {lora.variant}, which initializes A and B, but lora.start_from names an adapter to "
            "start from; "
            "an adapter trained with it is saved as plain",
            fix="lora.variant=plain",
        )
    if lora.variant == "eva" and lora.rank_pattern:
        raise Contradiction(
            "lora.variant is eva, which gives matrices with the same input the same rank, but lora.rank_pattern is set",
            fix="remove one of them",
        )
    if lora.variant == "loftq" and recipe.model.quantization != "nf4":
        raise Contradiction(
            "lora.variant is loftq, which starts from the quantization error of nf4, but model.quantization is "
            f"{recipe.model.quantization}",
            fix="set model.quantization: nf4",
        )
    if lora.start_from is not None and lora.new_tokens:
        raise Contradiction(
            "lora.new_tokens adds tokens, but the adapter of lora.start_from has its own tokenizer",
            fix="remove one of them",
        )
    if not lora.target_parameters:
        return
    if lora.dropout:
        raise Contradiction(
            f"lora.target_parameters adapts the weight itself, which has no input to drop from, but lora.dropout is "
            f"{lora.dropout:g}",
            fix="set lora.dropout: 0",
        )
    if lora.variant not in ("plain", "rslora"):
        raise Contradiction(
            f"lora.target_parameters requires lora.variant plain or rslora, but lora.variant is {lora.variant}",
            fix="lora.variant=plain",
        )
    if recipe.model.quantization != "none":
        raise Contradiction(
            "lora.target_parameters requires unquantized tensors, but model.quantization is "
            f"{recipe.model.quantization}",
            fix="set model.quantization: none",
        )
    if recipe.train.compile is True:
        raise Contradiction(
            "train.compile is true, but PEFT swaps the parameters of lora.target_parameters during each forward "
            "pass, so the "
            "layers run uncompiled",
            fix="train.compile=auto",
        )
