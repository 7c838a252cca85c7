"""What is wrong with settings that are right each by itself: checks of the recipe over several of them."""

from __future__ import annotations

import re
from typing import Any, get_args

from pydantic import BaseModel

from loratune.recipe.roles import as_written


class Contradiction(ValueError):
    """What pydantic is told of settings that do not go together.

    Args:
        problem: The settings, by their full names, and their values.
        fix: What the user can do about it.
    """

    def __init__(self, problem: str, *, fix: str) -> None:
        super().__init__(problem)
        self.fix = fix


def check_regular_expressions(name: str, value: dict[str, Any]) -> dict[str, Any]:
    """Refuse keys that are none.

    Raises:
        Contradiction: Which one, and why.
    """
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise Contradiction(
                f"{name}: {pattern} is no regular expression: {error}",
                fix="name a module by its last parts, such as q_proj; any text is .*, and a bracket that is meant as one is \\(",
            ) from None
    return value


def check_once(name: str, value: Any) -> Any:
    """Refuse a list that names something twice.

    Raises:
        Contradiction: What.
    """
    if isinstance(value, tuple) and len(set(value)) < len(value):
        twice = max(value, key=value.count)
        raise Contradiction(f"{name}: {twice} is named twice", fix="leave one of them out")
    return value


def check_no_truth(values: Any, recipe: type[BaseModel]) -> Any:
    """Refuse true and false (YAML's yes and no, on and off) where numbers are wanted, which pydantic takes for 1 and 0.

    Args:
        values: Sections with their fields, not validated yet.
        recipe: The model of the sections.

    Raises:
        Contradiction: In which field.
    """
    for section, info in recipe.model_fields.items():
        part = values.get(section) if isinstance(values, dict) else None
        fields = getattr(info.annotation, "model_fields", {})
        for field, value in part.items() if isinstance(part, dict) else ():
            if field in fields and _has_truth(value) and not _takes_truth(fields[field].annotation):
                shown = str(value).lower() if isinstance(value, bool) else value
                words = " ".join((fields[field].description or "").split())
                raise Contradiction(f"{section}.{field} is {shown}, which is no number and no name", fix=words)
    return values


def _has_truth(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return isinstance(value, bool) or any(isinstance(part, bool | dict) and _has_truth(part) for part in parts)


def _takes_truth(annotation: Any) -> bool:
    return annotation is bool or any(_takes_truth(part) for part in get_args(annotation))


def check_data(data: Any) -> None:
    """The fields of the data section against each other.

    Raises:
        Contradiction: Two settings that do not go together.
    """
    if isinstance(data.max_length, int) and data.max_length < 2:
        raise Contradiction(
            f"data.max_length is {data.max_length}; an example needs at least 2 tokens", fix="data.max_length=auto"
        )
    if isinstance(data.eval, float | int) and not 0 < data.eval < 1:
        raise Contradiction(
            f"data.eval is {data.eval}; as a held-out fraction it must lie between 0 and 1",
            fix="data.eval=0.1, a file, or none",
        )
    if data.format == "text" and data.train_on != "all":
        raise Contradiction(
            f"data.format is text, which has no answers, but data.train_on is {as_written(data.train_on)}",
            fix="set data.train_on: all",
        )
    if data.train_on == ():
        raise Contradiction(
            "data.train_on is an empty list", fix="name the roles whose messages are trained, as [user, assistant]"
        )
    if isinstance(data.train_on, tuple):
        check_once("data.train_on", data.train_on)


def check_train(train: Any, decay_fraction: float) -> None:
    """The fields of the train section against each other.

    Args:
        train: The section.
        decay_fraction: The part of the steps over which `warmup_stable_decay` goes down.

    Raises:
        Contradiction: Two settings that do not go together.
    """
    for name in ("eval_every", "save_every", "log_every"):
        value = getattr(train, name)
        if isinstance(value, str):
            continue
        if value <= 0 or (isinstance(value, float) and value >= 1 and value != int(value)):
            raise Contradiction(
                f"train.{name} is {value}, no number of steps and no fraction",
                fix="give a number of steps, a fraction of the run below 1, epoch or never",
            )
    if isinstance(train.token_budget, int) and train.token_budget < 1:
        raise Contradiction(
            f"train.token_budget is {train.token_budget}", fix="give a positive number of tokens, or auto"
        )
    if isinstance(train.recompute, int) and train.recompute < 0:
        raise Contradiction(f"train.recompute is {train.recompute}", fix="give a number of layers, or auto")
    if train.early_stopping is not None and train.eval_every == "never":
        raise Contradiction(
            f"train.early_stopping is {train.early_stopping}, but train.eval_every is never: there is no loss to go by",
            fix="train.eval_every=epoch",
        )
    if train.final_adapter == "best":
        for name in ("eval_every", "save_every"):
            if getattr(train, name) == "never":
                raise Contradiction(
                    f"train.final_adapter is best, but train.{name} is never: there is nothing to choose from",
                    fix=f"train.{name}=epoch, or train.final_adapter=last",
                )
    if train.average_checkpoints is not None:
        given = f"train.average_checkpoints is {train.average_checkpoints}"
        if train.final_adapter == "best":
            raise Contradiction(
                f"{given}, but train.final_adapter is best: a run ends with one of them", fix="leave one of them out"
            )
        if train.save_every == "never":
            raise Contradiction(f"{given}, but train.save_every is never: there are none", fix="train.save_every=epoch")
    if train.schedule == "inverse_sqrt" and train.warmup_fraction == 0:
        raise Contradiction(
            "train.schedule is inverse_sqrt, which is measured in warm-ups, but train.warmup_fraction is 0",
            fix="train.warmup_fraction=0.05",
        )
    if train.schedule == "warmup_stable_decay" and train.warmup_fraction > 1 - decay_fraction:
        raise Contradiction(
            f"train.schedule is warmup_stable_decay, whose last {decay_fraction:.0%} of the steps go down, but "
            f"train.warmup_fraction is {train.warmup_fraction:g}: they overlap",
            fix=f"train.warmup_fraction={1 - decay_fraction:g} or less",
        )


def check_held_out(recipe: Any) -> None:
    """What needs held-out data, and streaming's engine.

    Args:
        recipe: A `Recipe`.

    Raises:
        Contradiction: There is none.
    """
    if recipe.data.streaming is True and recipe.train.engine == "trl":
        raise Contradiction(
            "data.streaming is true, but train.engine is trl, which takes all examples at once",
            fix="data.streaming=auto, or train.engine=fast",
        )
    if recipe.data.eval != "none":
        return
    fix = "data.eval=0.1 or a file"
    if recipe.evaluate.metric != "none":
        raise Contradiction(
            f"evaluate.metric is {recipe.evaluate.metric}, but data.eval is none: nothing to score", fix=fix
        )
    if recipe.train.final_adapter == "best":
        raise Contradiction(
            "train.final_adapter is best, but data.eval is none: there is no held-out loss to go by", fix=fix
        )
    if recipe.train.early_stopping is not None:
        raise Contradiction(
            f"train.early_stopping is {recipe.train.early_stopping}, but data.eval is none: there is no held-out loss to go by",
            fix=fix,
        )


def check_quantization(recipe: Any) -> None:
    """What goes with the kind of `model.quantization`.

    Args:
        recipe: A `Recipe`, whose module needs this one.

    Raises:
        Contradiction: Two settings that do not go together.
    """
    chosen, dtype, train = recipe.model.quantization, recipe.model.dtype, recipe.train
    if chosen == "fp8" and dtype not in ("auto", "bfloat16"):
        raise Contradiction(
            f"model.quantization is fp8, which is made from bfloat16, but model.dtype is {dtype}",
            fix="model.dtype=auto",
        )
    if chosen not in ("none", "fp8"):
        if dtype == "float16":
            raise Contradiction(
                f"model.quantization is {chosen}, whose products are in bfloat16 or float32, but model.dtype is float16",
                fix="model.dtype=auto",
            )
        if train.compile is True:
            raise Contradiction(
                f"train.compile is true, but the layers of model.quantization {chosen} run uncompiled",
                fix="train.compile=auto",
            )
        if chosen == "int8" and train.recompute not in ("auto", 0):
            raise Contradiction(
                f"train.recompute is {train.recompute}, but int8 layers of bitsandbytes (model.quantization) keep their inputs where "
                "recomputing cannot free them",
                fix="train.recompute=0",
            )
    if chosen != "none" and recipe.lora.variant in ("dora", "pissa", "olora"):
        raise Contradiction(
            f"lora.variant is {recipe.lora.variant}, which needs the weights as they are, but model.quantization is {chosen}",
            fix="lora.variant=plain, or model.quantization=none",
        )


def check_muon(recipe: Any) -> None:
    """Muon makes steps of matrices orthogonal, and is for nothing else.

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
            "train.optimizer is muon, which is for matrices, but lora.variant is dora, whose magnitudes are vectors",
            fix=fix,
        )
    for name in ("modules_to_save", "new_tokens", "target_parameters"):
        if getattr(recipe.lora, name):
            raise Contradiction(
                f"train.optimizer is muon, which is for the adapter's matrices, but lora.{name} is given", fix=fix
            )


def check_beside(recipe: Any) -> None:
    """What is trained beside the adapter's matrices, against other settings.

    Args:
        recipe: A `Recipe`, whose module needs this one.

    Raises:
        Contradiction: Two settings that do not go together.
    """
    lora = recipe.lora
    if lora.start_from is not None and lora.variant in ("pissa", "olora", "eva", "loftq"):
        raise Contradiction(
            f"lora.variant is {lora.variant}, which decides how A and B begin, but lora.start_from names an adapter to begin with; "
            "adapters that it made are saved as plain",
            fix="lora.variant=plain",
        )
    if lora.variant == "eva" and lora.rank_pattern:
        raise Contradiction(
            "lora.variant is eva, which gives matrices with one input one rank, but lora.rank_pattern gives ranks of their own",
            fix="leave one of them out",
        )
    if lora.variant == "loftq" and recipe.model.quantization != "nf4":
        raise Contradiction(
            "lora.variant is loftq, which begins with what nf4 took away from the weights, but model.quantization is "
            f"{recipe.model.quantization}",
            fix="set model.quantization: nf4",
        )
    if lora.start_from is not None and lora.new_tokens:
        raise Contradiction(
            "lora.new_tokens adds tokens, but lora.start_from names an adapter, whose tokenizer is another",
            fix="leave one of them out",
        )
    if not lora.target_parameters:
        return
    if lora.dropout:
        raise Contradiction(
            f"lora.target_parameters adapts a tensor as a whole, which has no input of its own to drop from, but lora.dropout is "
            f"{lora.dropout:g}",
            fix="set lora.dropout: 0",
        )
    if lora.variant not in ("plain", "rslora"):
        raise Contradiction(
            f"lora.target_parameters goes with lora.variant plain or rslora, but lora.variant is {lora.variant}",
            fix="lora.variant=plain",
        )
    if recipe.model.quantization != "none":
        raise Contradiction(
            f"lora.target_parameters names tensors that are not packed, but model.quantization is {recipe.model.quantization}",
            fix="set model.quantization: none",
        )
    if recipe.train.compile is True:
        raise Contradiction(
            "train.compile is true, but PEFT changes the parameters of lora.target_parameters while a layer runs, so it runs "
            "uncompiled",
            fix="train.compile=auto",
        )
