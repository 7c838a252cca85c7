"""Which settings an ejected script can follow; the others are refused with the reason."""

from __future__ import annotations

from typing import Any

from loratune.recipe.recipe import Recipe
from loratune.run.errors import RecipeError
from loratune.workflows.tasks.task import task_of

SUPPORTED_FIELDS = {
    "model": {"task", "name", "revision", "dtype", "quantization", "trust_remote_code"},
    "data": {
        *("train", "eval", "format", "columns", "train_on", "thinking", "special_tokens_in_text"),
        *("max_length", "on_long", "on_bad_row", "streaming"),
    },
    "lora": {
        "r",
        "alpha",
        "dropout",
        "targets",
        "layers",
        "variant",
        "start_from",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "target_parameters",
        "new_tokens",
    },
    "train": {
        *("output_dir", "epochs", "max_steps", "learning_rate", "batch_size", "warmup_fraction", "weight_decay"),
        *("optimizer", "lora_plus_ratio", "schedule"),
        *("max_grad_norm", "seed", "engine", "device", "token_budget", "eval_every", "save_every", "log_every"),
        *("keep_checkpoints", "report_to", "neftune_noise_alpha", "label_smoothing"),
        *("learning_rate_pattern", "early_stopping", "final_adapter", "average_checkpoints"),
        "max_skipped_steps",  # has no effect without train.on_bad_step=skip, which is refused
        *("compile", "recompute", "strategy"),  # affect only speed and memory of the fast engine
        "share_prefixes",  # and which masks dropout draws, which are not those of the script anyway
    },
    "preference": {"loss", "beta"},
}
"""Settings that a script follows, by section. Any other setting is refused unless it has its default value.

The evaluate section is left out, and the script says so.
"""

UNSUPPORTED_VALUES: dict[str, dict[Any, tuple[str, str]]] = {
    "preference.loss": {
        "kto": (
            "KTOTrainer takes mismatches from a fixed order of the rows",
            "train.engine=trl, which trains it with stock KTOTrainer",
        ),
        **dict.fromkeys(("orpo", "simpo"), ("TRL's trainer of it is experimental", "preference.loss=dpo or ipo")),
    },
    "model.quantization": {
        "fp8": ("PEFT has no layers for it", "use model.quantization none, nf4 or int8"),
        "int4_weight_only": (
            "transformers' Trainer refuses it; loratune packs these weights itself",
            "model.quantization=nf4",
        ),
    },
    "lora.variant": {
        "loftq": ("PEFT's own initialization needs CUDA and a scale of 1", "lora.variant=plain or eva"),
    },
    "train.on_bad_step": {
        "skip": ("transformers' Trainer applies every step, even one that is not finite", "train.on_bad_step=error"),
    },
}
"""Setting → values that a script cannot follow, each with the reason and the fix."""


def check_supported(recipe: Recipe) -> None:
    """Raise a `RecipeError` if the recipe has a setting that a script cannot follow."""
    default = Recipe()
    for name, values in UNSUPPORTED_VALUES.items():
        section, _, field = name.partition(".")
        value = getattr(getattr(recipe, section), field)
        if value in values:
            why, fix = values[value]
            raise RecipeError(f"{name} is {value}, which a plain TRL + PEFT script cannot follow: {why}", fix=fix)
    task_of(recipe).check_script(recipe)
    if recipe.lora.modules_to_save and recipe.model.dtype != "float32":
        raise RecipeError(
            f"lora.modules_to_save is set and model.dtype is {recipe.model.dtype}: PEFT would train these modules in "
            "that type, loratune trains them in float32",
            fix="model.dtype=float32, or lora.modules_to_save=[]",
        )
    for section, covered in SUPPORTED_FIELDS.items():
        mine, plain = getattr(recipe, section), getattr(default, section)
        for field in type(mine).model_fields:
            if field not in covered and getattr(mine, field) != getattr(plain, field):
                raise RecipeError(
                    f"{section}.{field} is {getattr(mine, field)}, which a plain TRL + PEFT script cannot follow",
                    fix=f"use {section}.{field}={getattr(plain, field)}",
                )
