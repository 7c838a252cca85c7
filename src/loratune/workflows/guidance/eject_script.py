"""The text of an ejected script, from the template `script.py.jinja`."""

from __future__ import annotations

import importlib.resources
import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from transformers.pytorch_utils import Conv1D

from loratune.data.rows.sources import is_local
from loratune.model.adapter.attach import short_module_names
from loratune.model.adapter.modules_to_save import modules_to_save_arguments
from loratune.model.adapter.patterns import highest_rank
from loratune.model.adapter.target_parameters import target_parameter_arguments
from loratune.model.adapter.targets import router_loss
from loratune.model.adapter.variants import changes_base, peft_arguments
from loratune.model.load import load_config
from loratune.model.quantization.checkpoint import method_of
from loratune.model.quantization.kinds import BY_BITSANDBYTES
from loratune.planning.lock import versions
from loratune.planning.parameters import skeleton
from loratune.recipe.recipe import Recipe, TrainSection
from loratune.run.directory import RunDir
from loratune.run.errors import RecipeError
from loratune.training.hf_arguments import TrainingData, own_optimizer, trl_arguments
from loratune.training.trl_dataset import check_trl_can_train
from loratune.workflows.guidance.eject_rows import builder, eval_sources, is_pairs
from loratune.workflows.tasks.preference.trl_trainer import dpo_arguments

if TYPE_CHECKING:
    from loratune.planning.preparation import Preparation

WIDTH = 118
"""Columns of the script's comments."""
TORCHAO_CONFIGS = {"int8_weight_only": "Int8WeightOnlyConfig", "float8_weight_only": "Float8WeightOnlyConfig"}
"""`model.quantization` → name of torchao's configuration class."""
NOT_WRITTEN = {"output_dir", "disable_tqdm"}
"""Arguments of the `trl` engine that the script sets elsewhere or does not need."""

FIELD_OF = {
    "num_train_epochs": "epochs",
    "max_steps": "max_steps",
    "optim": "optimizer",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warmup_fraction",
    "per_device_train_batch_size": "batch_size",
    "eval_strategy": "eval_every",
    "save_strategy": "save_every",
    "logging_strategy": "log_every",
    "save_total_limit": "keep_checkpoints",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "seed": "seed",
    "neftune_noise_alpha": "neftune_noise_alpha",
    "label_smoothing_factor": "label_smoothing",
    "metric_for_best_model": "early_stopping",
}
"""Argument of `SFTConfig` → the field of the train section whose docstring explains it."""


def render_script(prepared: Preparation, rows: Path | None, why_rows: str) -> str:
    """Return the script as text.

    Args:
        prepared: The run as it would start.
        rows: Folder with tokens and labels; None if the script loads the user's own rows.
        why_rows: Why the script needs that folder.

    Raises:
        RecipeError: The base model's weights are quantized, or TRL cannot train it.
    """
    recipe, base = prepared.recipe, prepared.model.base
    section = recipe.model
    config = load_config(base, section)
    method = method_of(config)
    if method is not None:
        raise RecipeError(
            f"model.name is {section.name}, whose weights are quantized ({method}); "
            "a script would not load them as loratune does",
            fix="use the model as it was before quantization",
        )
    model = skeleton(config, trust_remote_code=section.trust_remote_code)
    check_trl_can_train(model)
    constants, load = _data_lines(prepared, rows)
    return _template().render(
        # inside a docstring, which a quote in the name must not end
        title=f"LoRA fine-tuning of {section.name.encode('unicode_escape').decode()}.".replace('"', "'"),
        versions=_versions(recipe),
        from_rows=rows is not None,
        pairs=is_pairs(prepared),
        trainer="DPO" if is_pairs(prepared) else "SFT",
        data_comment=_data_comment(why_rows),
        constants={
            "checkpoint": _literal(base.name if base.revision else str(base.path)),
            **constants,
            "output_dir": _literal(f"{recipe.train.output_dir}-ejected"),
        },
        **_adapter_values(prepared, model),
        train=recipe.train,
        words=_words(),
        rates=_literal(recipe.train.learning_rate_pattern),
        by_tokens=_needs_held_out_loss(recipe.train),
        chosen=_chosen(recipe.train),
        peft_names=_peft_names(prepared),
        transformers_names=_transformers_names(recipe),
        device=_literal(recipe.train.device),
        load=load,
        revision=f", revision={_literal(base.revision)}" if base.revision else "",
        trust=", trust_remote_code=True" if section.trust_remote_code else "",
        dtype=section.dtype,
        quantization=section.quantization,
        torchao_config=TORCHAO_CONFIGS.get(section.quantization, ""),
        arguments=_arguments(prepared, direct=rows is None),
        has_eval=bool(prepared.data.eval),
        optimizer=_optimizer(recipe.train),
    )


def _adapter_values(prepared: Preparation, model: Any) -> dict[str, Any]:
    lora, parameters = prepared.recipe.lora, prepared.adapter.parameters
    extra = peft_arguments(lora) | modules_to_save_arguments(parameters.whole, prepared.model.new_tokens)
    extra |= target_parameter_arguments(parameters.stacks, lora)
    return {
        "lora": lora,
        "targets": _literal(short_module_names(model, prepared.adapter.targets)),
        "targets_in_words": prepared.adapter.targets_in_words,
        "trainable": f"{parameters.trainable:,}",
        "fan_in_fan_out": isinstance(model.get_submodule(prepared.adapter.targets[0]), Conv1D),
        "peft_arguments": [f"{name}={_literal(value)}," for name, value in extra.items()],
        "changes_base": changes_base(lora),
        "start": _literal(str(prepared.adapter.start)) if prepared.adapter.start else "",
        "new_tokens": _literal(lora.new_tokens) if lora.new_tokens else "",
        "eva": highest_rank(lora) if lora.variant == "eva" else 0,
    }


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - Python, not HTML
    )
    source = importlib.resources.files("loratune.workflows.guidance").joinpath("script.py.jinja")
    return environment.from_string(source.read_text(encoding="utf-8"))


def _optimizer(train: TrainSection) -> str:
    """Return the optimizer class and arguments if `SFTConfig` has no name for it, else an empty text."""
    own = own_optimizer(train)
    return f"(torch.optim.{own[0].__name__}, {_literal(own[1])})" if own else ""


def _chosen(train: TrainSection) -> str:
    """Return which adapter the run ends with: `mean`, `best`, or empty for that of the last step."""
    return "mean" if train.average_checkpoints else "best" if train.final_adapter == "best" else ""


def _needs_held_out_loss(train: TrainSection) -> bool:
    """Return whether a decision depends on the held-out loss, which then must be computed as loratune does."""
    return train.early_stopping is not None or train.final_adapter == "best"


def _peft_names(prepared: Preparation) -> str:
    recipe, chosen = prepared.recipe, _chosen(prepared.recipe.train)
    names = ["LoraConfig", "TaskType", "get_peft_model"]
    names += ["EvaConfig", "initialize_lora_eva_weights"] if recipe.lora.variant == "eva" else []
    names += ["load_peft_weights", "set_peft_model_state_dict"] if prepared.adapter.start or chosen else []
    names += ["get_peft_model_state_dict"] if chosen == "mean" else []
    return ", ".join(sorted(names, key=lambda name: (name[0].islower(), name)))


def _transformers_names(recipe: Recipe) -> str:
    names = ["AutoModelForCausalLM", "AutoTokenizer"]
    names += ["BitsAndBytesConfig"] if recipe.model.quantization in BY_BITSANDBYTES else []
    names += ["EarlyStoppingCallback"] if recipe.train.early_stopping else []
    names += ["TorchAoConfig"] if recipe.model.quantization not in ("none", *BY_BITSANDBYTES) else []
    return ", ".join([*names, "set_seed"])


def _versions(recipe: Recipe) -> str:
    known = versions(recipe.model_dump())
    return ", ".join(f"{name} {known[name]}" for name in ("datasets", "transformers", "peft", "trl"))


def _words() -> dict[str, str]:
    """Return the first sentence of each field's docstring, by `section.field`."""
    return {
        f"{section}.{field}": _first_sentence(declared.description or "")
        for section, part in ((name, info.annotation) for name, info in Recipe.model_fields.items())
        for field, declared in part.model_fields.items()  # type: ignore[union-attr]
    }


def _first_sentence(text: str) -> str:
    return " ".join(text.split()).partition(". ")[0].rstrip(".")


def _data_comment(why_rows: str) -> list[str]:
    if not why_rows:
        return ["TRL turns these rows into exactly the tokens and labels that loratune trains (all compared)."]
    text = (
        "The rows were tokenized and labeled by loratune (label -100: not trained), because TRL would not train the "
        f"same tokens: {why_rows}."
    )
    return textwrap.wrap(text, WIDTH - 2, break_long_words=False)


def _data_lines(prepared: Preparation, rows: Path | None) -> tuple[dict[str, str], list[str]]:
    """Return the constants that name the data, and the lines that load it."""
    names = ["train", *(["eval"] if prepared.data.eval else [])]
    if rows is not None:
        load = [f'{name}_dataset = load_dataset("parquet", data_files=rows["{name}"], split="train")' for name in names]
        files = ", ".join(f'"{name}": str(rows_dir / "{name}.parquet")' for name in names)
        return {"rows_dir": f"Path(__file__).parent / {_literal(rows.name)}", "rows": f"{{{files}}}"}, load
    constants, load = {}, []
    sources = {"train": prepared.recipe.data.train, "eval": eval_sources(prepared)}
    for name in names:
        (source,) = sources[name] or ()
        if is_local(source):
            constants[f"{name}_file"] = _literal(str(Path(source.name).expanduser().resolve()))
            load.append(f'{name}_dataset = load_dataset("{builder(source)}", data_files={name}_file, split="train")')
        else:
            arguments = ", ".join(_literal(part) for part in (source.name, source.config) if part)
            load.append(f"{name}_dataset = load_dataset({arguments}, split={_literal(source.split or 'train')})")
    return constants, load


def _arguments(prepared: Preparation, *, direct: bool) -> list[str]:
    """Return the lines of `SFTConfig`, from the arguments of the `trl` engine."""
    recipe, words = prepared.recipe, _words()
    data = TrainingData(
        train=prepared.data.train,
        known=prepared.data.train,
        eval=prepared.data.eval,
        token_budget=prepared.estimate.memory.token_budget,
    )
    run = RunDir(Path(recipe.train.output_dir))
    arguments = trl_arguments(recipe.train, data, run, bf16=recipe.model.dtype == "bfloat16")
    if is_pairs(prepared):
        arguments |= dpo_arguments(recipe.preference)
    arguments["report_to"] = list(recipe.train.report_to)
    arguments["save_total_limit"] = None if _chosen(recipe.train) else recipe.train.keep_checkpoints
    if recipe.train.early_stopping:
        arguments |= {"metric_for_best_model": "eval_loss", "greater_is_better": False}
    if direct:
        arguments["max_length"] = int(recipe.data.max_length)
        arguments["assistant_only_loss"] = recipe.data.train_on != "all"
    lines = ["output_dir=output_dir,"]
    for name, value in arguments.items():
        if name in NOT_WRITTEN or (value is None and name != "max_length"):
            continue
        if name == "router_aux_loss_coef" and not router_loss(load_config(prepared.model.base, recipe.model)):
            continue
        comment = words.get(f"train.{FIELD_OF.get(name, '')}", "")
        if name == "warmup_steps":
            comment = (
                f"{recipe.train.warmup_fraction:g} of {prepared.estimate.num_steps:,} steps: the learning "
                "rate rises from zero"
            )
        if name == "router_aux_loss_coef":
            comment = "no load-balancing loss of the routers, which would depend on which examples share a batch"
        line = f"{name}={_literal(value)},"
        lines += _with_comment(line, comment)
    return lines


def _with_comment(line: str, comment: str) -> list[str]:
    """Put the comment after the line if it fits, else above it."""
    if not comment:
        return [line]
    if len(line) + len(comment) + 8 <= WIDTH:
        return [f"{line}  # {comment}"]
    return [*(f"# {part}" for part in textwrap.wrap(comment, WIDTH - 6)), line]


def _literal(value: Any) -> str:
    """Format a value as Python source, with double quotes."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(name)}: {_literal(item)}' for name, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_literal(item) for item in value)}]"
    return repr(value)
