"""`eject`: the same run as one plain script in the shape of the seed's, on datasets, transformers, peft and trl alone.

How the trained tokens get into it is decided by trying. If stock TRL, given the user's own rows, makes exactly the tokens
and labels that loratune trains, the script loads these rows and lets TRL do it. If not, the tokens and labels are written
beside the script, and the script says why.
"""

from __future__ import annotations

import importlib.resources
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.utils.logging import disable_progress_bar
from transformers.pytorch_utils import Conv1D

from loratune.data.examples import Example
from loratune.data.rows.sources import is_local
from loratune.model.adapter.attach import short_names
from loratune.model.adapter.modules_to_save import modules_to_save_arguments
from loratune.model.adapter.patterns import highest_rank
from loratune.model.adapter.target_parameters import target_parameter_arguments
from loratune.model.adapter.targets import router_loss
from loratune.model.adapter.variants import changes_base, peft_arguments
from loratune.model.load import load_config
from loratune.model.quantization.checkpoint import method_of
from loratune.model.quantization.kinds import BY_BITSANDBYTES
from loratune.planning.auto import NO_LIMIT
from loratune.planning.lock import versions
from loratune.planning.parameters import skeleton
from loratune.planning.preparation import Preparation
from loratune.recipe.recipe import Recipe, Source, TrainSection
from loratune.recipe.roles import as_written, trained_roles
from loratune.recipe.tasks import require_text
from loratune.run.directory import Record, RunDir
from loratune.run.errors import MachineError, RecipeError
from loratune.run.progress import Progress
from loratune.training.hf_arguments import TrainingData, own_optimizer, trl_arguments
from loratune.training.trl_dataset import check_trl_can_train, preparation_difference, with_label_ids

BUILDERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
"""Suffix → the builder of `load_dataset` that reads it."""


WIDTH = 118
TORCHAO_CONFIGS = {"int8_weight_only": "Int8WeightOnlyConfig", "float8_weight_only": "Float8WeightOnlyConfig"}
"""Kinds of `model.quantization` → what torchao calls them."""
SUPPORTED_FIELDS = {
    "model": {"name", "revision", "dtype", "quantization", "trust_remote_code"},
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
        *("output_dir", "epochs", "learning_rate", "batch_size", "warmup_fraction", "weight_decay"),
        *("optimizer", "lora_plus_ratio", "schedule"),
        *("max_grad_norm", "seed", "engine", "device", "token_budget", "eval_every", "save_every", "log_every"),
        *("keep_checkpoints", "report_to", "neftune_noise_alpha", "label_smoothing"),
        *("learning_rate_pattern", "early_stopping", "final_adapter", "average_checkpoints"),
        "max_skipped_steps",  # of train.on_bad_step alone
        *("compile", "recompute", "strategy"),  # of the fast engine's speed and memory alone
    },
}
"""The settings that a script follows. Another one that is not at its default is refused. The evaluate section is left out,
and the script says so."""

UNSUPPORTED_VALUES: dict[str, dict[Any, tuple[str, str]]] = {
    "model.quantization": {
        "fp8": ("PEFT alone has no layers for it", "leave model.quantization at none, nf4 or int8"),
        "int4_weight_only": (
            "the trainer of transformers refuses it; loratune packs these weights itself",
            "model.quantization=nf4",
        ),
    },
    "lora.variant": {
        "loftq": ("PEFT's own beginning is for CUDA and a scale of 1 alone", "lora.variant=plain or eva"),
    },
    "train.on_bad_step": {
        "skip": ("transformers' Trainer applies every step, also one that is not finite", "train.on_bad_step=error"),
    },
}
"""Setting → values that the script cannot follow, why, and what to do."""

NOT_WRITTEN = {"output_dir", "disable_tqdm"}
"""Arguments of the engine that the script has elsewhere, or does better without."""

FIELD_OF = {
    "num_train_epochs": "epochs",
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
"""Argument of `SFTConfig` → the field of the train section whose words explain it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ejected:
    """What was written.

    Attributes:
        script: The script.
        rows: The folder with tokens and labels; None where the script reads the user's own rows.
        why_rows: Why TRL could not make the tokens and labels itself.
    """

    script: Path
    rows: Path | None
    why_rows: str

    def as_dict(self) -> Record:
        """For `--json`."""
        return {
            "script": str(self.script),
            "rows": str(self.rows) if self.rows is not None else None,
            "why_rows": self.why_rows,
        }


def eject(prepared: Preparation, script: Path, *, overwrite: bool, progress: Progress) -> Ejected:
    """Write the run as one plain script.

    Args:
        prepared: The run, as it would start.
        script: Where to write it. Tokens and labels, if need be, go to a folder of the same name with `-rows`.
        overwrite: Whether a script or a folder that is there may be replaced.
        progress: Who is told how it goes.

    Raises:
        RecipeError: There is such a file already, or the script has no counterpart for a setting.
        MachineError: It cannot be written.
    """
    require_text(
        prepared.recipe, "loratune eject", "train.engine=trl runs transformers' own Trainer on the same batches"
    )
    _check_covered(prepared.recipe)
    if prepared.data.stream is not None:
        raise RecipeError("the script takes all examples at once", fix="data.streaming=false")
    rows = script.with_name(f"{script.stem}-rows")
    for path in (script, rows):
        if path.exists() and not overwrite:
            raise RecipeError("there is such a file already", file=path, fix="--overwrite, or --out FILE")
    progress.line("letting TRL prepare the data, to compare every token and label with loratune's")
    why_rows = _why_not_directly(prepared)
    try:
        script.parent.mkdir(parents=True, exist_ok=True)
        if why_rows:
            _write_rows(prepared, rows)
        script.write_text(_script(prepared, rows if why_rows else None, why_rows), encoding="utf-8")
    except OSError as error:
        raise MachineError(f"cannot write: {error}", file=script, fix="--out FILE for another place") from error
    return Ejected(script=script, rows=rows if why_rows else None, why_rows=why_rows)


def _write_rows(prepared: Preparation, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "eval.parquet").unlink(missing_ok=True)  # of an earlier script, with held-out data
    disable_progress_bar()
    with_label_ids(prepared.data.train).to_parquet(folder / "train.parquet")
    if prepared.data.eval:
        with_label_ids(prepared.data.eval).to_parquet(folder / "eval.parquet")


# ---- can TRL make the same of the user's own rows?


def _why_not_directly(prepared: Preparation) -> str:
    """Empty when it can: then `load_dataset` and TRL alone give the same tokens and labels."""
    data = prepared.recipe.data
    if prepared.recipe.lora.variant == "eva":
        return "lora.variant is eva, which begins with the tokens that are trained"
    sides: list[tuple[Source, list[Example]]] = []
    for side, sources, examples in (
        ("train", data.train, prepared.data.train),
        ("eval", _eval_sources(prepared), prepared.data.eval),
    ):
        if not examples:
            continue
        if sources is None:
            return "the held-out conversations are a part of the training data that loratune chose"
        reason = _why_not_one_source(sources) or ("has columns of other names" if data.columns else "")
        if reason:
            return f"the {side} data {reason}"
        sides.append((sources[0], examples))
    if trained_roles(data.train_on) not in ((), ("assistant",)):
        return f"data.train_on is {as_written(data.train_on)}, and TRL trains the assistant's answers or all tokens"
    max_length = min(int(data.max_length), NO_LIMIT)
    for source, examples in sides:
        try:
            rows = _load(source)
        except (ValueError, OSError, DatasetGenerationError, DatasetNotFoundError) as error:
            return f"load_dataset cannot read {source.name}: {str(error).partition(chr(10))[0]}"
        difference = preparation_difference(
            rows, examples, prepared.model.tokenizer, max_length=max_length, assistant_only=data.train_on != "all"
        )
        if difference:
            return difference
    return ""


def _eval_sources(prepared: Preparation) -> tuple[Source, ...] | None:
    """The sources of the held-out data; None where it is a part of the training data."""
    wanted = prepared.recipe.data.eval
    if isinstance(wanted, tuple):
        return wanted
    (source, *_) = prepared.data.report["eval"]["sources"] if prepared.data.eval else [{"held_out": 0}]
    if "held_out" in source:
        return None
    return (Source.model_validate({key: source[key] for key in Source.model_fields}),)


def _why_not_one_source(sources: Sequence[Source]) -> str:
    if len(sources) > 1:
        return "comes from several sources"
    if sources[0].weight != 1:
        return f"has the weight {sources[0].weight:g}"
    if is_local(sources[0]) and Path(sources[0].name).suffix.lower() not in BUILDERS:
        return "is a folder of files"
    return ""


def _load(source: Source) -> Any:
    disable_progress_bar()
    if not is_local(source):
        return load_dataset(source.name, source.config, split=source.split or "train")
    return load_dataset(_builder(source), data_files=str(Path(source.name).expanduser()), split="train")


def _builder(source: Source) -> str:
    return BUILDERS[Path(source.name).suffix.lower()]


# ---- the script


def _check_covered(recipe: Recipe) -> None:
    default = Recipe()
    for name, values in UNSUPPORTED_VALUES.items():
        section, _, field = name.partition(".")
        value = getattr(getattr(recipe, section), field)
        if value in values:
            why, fix = values[value]
            raise RecipeError(f"{name} is {value}, which a script of TRL and PEFT alone cannot follow: {why}", fix=fix)
    if recipe.lora.modules_to_save and recipe.model.dtype != "float32":
        raise RecipeError(
            f"lora.modules_to_save trains modules whole, and model.dtype is {recipe.model.dtype}: PEFT alone would train them in that "
            "type, loratune trains them in float32",
            fix="model.dtype=float32, or lora.modules_to_save=[]",
        )
    for section, covered in SUPPORTED_FIELDS.items():
        mine, plain = getattr(recipe, section), getattr(default, section)
        for field in type(mine).model_fields:
            if field not in covered and getattr(mine, field) != getattr(plain, field):
                raise RecipeError(
                    f"{section}.{field} is {getattr(mine, field)}, which a script of TRL and PEFT alone cannot follow",
                    fix=f"leave {section}.{field} at {getattr(plain, field)}",
                )


def _script(prepared: Preparation, rows: Path | None, why_rows: str) -> str:
    recipe, base = prepared.recipe, prepared.model.base
    section = recipe.model
    config = load_config(base, section)
    method = method_of(config)
    if method is not None:
        raise RecipeError(
            f"model.name is {section.name}: its weights come quantised ({method}), which the script would not load as loratune does",
            fix="name the model as it was before quantisation",
        )
    model = skeleton(config, trust_remote_code=section.trust_remote_code)
    check_trl_can_train(model)
    constants, load = _data_lines(prepared, rows)
    extra = peft_arguments(recipe.lora) | modules_to_save_arguments(
        prepared.adapter.parameters.whole, prepared.model.new_tokens
    )
    extra |= target_parameter_arguments(prepared.adapter.parameters.stacks, recipe.lora)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)  # noqa: S701 - Python, not HTML
    template = environment.from_string(
        importlib.resources.files("loratune.workflows.guidance").joinpath("script.py.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        # in a docstring, where a name must not end it
        title=f"LoRA fine-tuning of {section.name.encode('unicode_escape').decode()}.".replace('"', "'"),
        versions=_versions(recipe),
        from_rows=rows is not None,
        data_comment=_data_comment(why_rows),
        constants={
            "checkpoint": _literal(base.name if base.revision else str(base.path)),
            **constants,
            "output_dir": _literal(f"{recipe.train.output_dir}-ejected"),
        },
        lora=recipe.lora,
        train=recipe.train,
        words=_words(),
        targets=_literal(short_names(model, prepared.adapter.targets)),
        targets_in_words=prepared.adapter.targets_in_words,
        trainable=f"{prepared.adapter.parameters.trainable:,}",
        fan_in_fan_out=isinstance(model.get_submodule(prepared.adapter.targets[0]), Conv1D),
        peft_arguments=[f"{name}={_literal(value)}," for name, value in extra.items()],
        changes_base=changes_base(recipe.lora),
        start=_literal(str(prepared.adapter.start)) if prepared.adapter.start else "",
        new_tokens=_literal(recipe.lora.new_tokens) if recipe.lora.new_tokens else "",
        eva=highest_rank(recipe.lora) if recipe.lora.variant == "eva" else 0,
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


def _optimizer(train: TrainSection) -> str:
    """One that is not named in `SFTConfig`."""
    own = own_optimizer(train)
    return f"(torch.optim.{own[0].__name__}, {_literal(own[1])})" if own else ""


def _chosen(train: TrainSection) -> str:
    """What the run ends with that is not the last step's adapter."""
    return "mean" if train.average_checkpoints else "best" if train.final_adapter == "best" else ""


def _needs_held_out_loss(train: TrainSection) -> bool:
    """Whether something is decided by the held-out loss, which then must be that of loratune."""
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
    """Field → the first sentence of its docstring."""
    return {
        f"{section}.{field}": _first_sentence(declared.description or "")
        for section, part in ((name, info.annotation) for name, info in Recipe.model_fields.items())
        for field, declared in part.model_fields.items()  # type: ignore[union-attr]
    }


def _first_sentence(text: str) -> str:
    return " ".join(text.split()).partition(". ")[0].rstrip(".")


def _data_comment(why_rows: str) -> list[str]:
    if not why_rows:
        return ["TRL makes of these rows exactly the tokens and labels that loratune trains: compared, each of them."]
    text = (
        "The rows are tokenised and labelled by loratune (label -100: not trained), because TRL alone would not train the "
        f"same: {why_rows}."
    )
    return textwrap.wrap(text, WIDTH - 2, break_long_words=False)


def _data_lines(prepared: Preparation, rows: Path | None) -> tuple[dict[str, str], list[str]]:
    """Constants that name the data, and the lines that load it."""
    names = ["train", *(["eval"] if prepared.data.eval else [])]
    if rows is not None:
        load = [f'{name}_dataset = load_dataset("parquet", data_files=rows["{name}"], split="train")' for name in names]
        files = ", ".join(f'"{name}": str(rows_dir / "{name}.parquet")' for name in names)
        return {"rows_dir": f"Path(__file__).parent / {_literal(rows.name)}", "rows": f"{{{files}}}"}, load
    constants, load = {}, []
    sources = {"train": prepared.recipe.data.train, "eval": _eval_sources(prepared)}
    for name in names:
        (source,) = sources[name] or ()
        if is_local(source):
            constants[f"{name}_file"] = _literal(str(Path(source.name).expanduser().resolve()))
            load.append(f'{name}_dataset = load_dataset("{_builder(source)}", data_files={name}_file, split="train")')
        else:
            arguments = ", ".join(_literal(part) for part in (source.name, source.config) if part)
            load.append(f"{name}_dataset = load_dataset({arguments}, split={_literal(source.split or 'train')})")
    return constants, load


def _arguments(prepared: Preparation, *, direct: bool) -> list[str]:
    """The lines of `SFTConfig`: the arguments of the `trl` engine."""
    recipe, words = prepared.recipe, _words()
    data = TrainingData(
        train=prepared.data.train,
        known=prepared.data.train,
        eval=prepared.data.eval,
        token_budget=prepared.estimate.memory.token_budget,
    )
    run = RunDir(Path(recipe.train.output_dir))
    arguments = trl_arguments(recipe.train, data, run, bf16=recipe.model.dtype == "bfloat16")
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
                f"{recipe.train.warmup_fraction:g} of {prepared.estimate.num_steps:,} steps: the rate rises from zero"
            )
        if name == "router_aux_loss_coef":
            comment = "no load-balancing loss of the routers, which would depend on what shares a batch"
        line = f"{name}={_literal(value)},"
        lines += _with_comment(line, comment)
    return lines


def _with_comment(line: str, comment: str) -> list[str]:
    """The comment behind the line where there is room, else above it."""
    if not comment:
        return [line]
    if len(line) + len(comment) + 8 <= WIDTH:
        return [f"{line}  # {comment}"]
    return [*(f"# {part}" for part in textwrap.wrap(comment, WIDTH - 6)), line]


def _literal(value: Any) -> str:
    """Python's spelling of a value, with double quotes."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(name)}: {_literal(item)}' for name, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_literal(item) for item in value)}]"
    return repr(value)
