"""The model card of an adapter: what was trained on what, how well it does, what it is for, how to load it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from loratune.recipe.roles import as_written
from loratune.reporting.samples_section import short
from loratune.reporting.units import as_difference, as_measure, measure_in_words
from loratune.run.directory import Record, RunDir, read_json, write_text
from loratune.run.errors import plural

_HERE = "path/of/this/folder"

_GROW = "base.resize_token_embeddings(max(len(tokenizer), base.get_input_embeddings().num_embeddings))  # for the new tokens"


def write_card(run: RunDir) -> None:
    """Write `adapter/README.md` from the run's files."""
    write_text(run.adapter / "README.md", card_of(run))


def card_of(run: RunDir, repo: str = "") -> str:
    """The card from the run's files; `repo`: where on the hub it will stand."""
    evaluation = read_json(run.evaluation) if run.evaluation.is_file() else None
    return model_card(read_json(run.lock), read_json(run.plan), evaluation, name=run.root.name, repo=repo)


def model_card(lock: Record, plan: Record, evaluation: Record | None, *, name: str, repo: str = "") -> str:
    """The card as Markdown, with the hub's metadata on top.

    Args:
        lock: `lock.json`.
        plan: `plan.json`.
        evaluation: `evaluation.json`, or None where nothing was held out.
        name: Of the run.
        repo: Where on the hub the adapter will stand; empty: it is a folder. A card for the hub names no folder of
            this machine.
    """
    recipe = lock["recipe"]
    base = base_name(lock)
    text = [
        f"# LoRA adapter for {base}",
        "",
        *_trained(lock, plan),
        "",
        *_results(evaluation, _unit(recipe)),
        *_intended_use(recipe, evaluation),
        *_load(lock, repo),
        "## Recipe",
        "",
        "Every setting, also those that were left to loratune:",
        "",
        "```yaml",
        yaml.safe_dump(shared_recipe(recipe) if repo else recipe, sort_keys=False, allow_unicode=True).strip(),
        "```",
        "",
    ]
    metadata = _metadata(lock, evaluation, name)
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n".join(text)))


def base_name(lock: Record) -> str:
    """What people know the base by: its hub id, or the name of its file or folder."""
    name: str = lock["recipe"]["model"]["name"]
    return name if lock["inputs"]["model_revision"] is not None or name.startswith("package:") else short(name)


def shared_recipe(recipe: Record) -> Record:
    """The recipe with the names of files and folders for their paths, which say where this machine keeps things."""

    def shared(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shared(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [shared(inner) for inner in value]
        return short(value) if isinstance(value, str) and value.startswith(("/", "~", "./", "../")) else value

    changed: Record = shared(recipe)
    return changed


def _metadata(lock: Record, evaluation: Record | None, name: str) -> ModelCardData:
    recipe = lock["recipe"]
    on_hub = lock["inputs"]["model_revision"] is not None
    sets = sorted({source["name"] for source in recipe["data"]["train"] if _is_hub_id(source)})
    return ModelCardData(
        base_model=recipe["model"]["name"] if on_hub else None,
        datasets=sets or None,
        library_name="peft",
        pipeline_tag="text-classification" if _classifies(recipe) else "text-generation",
        tags=["lora", "loratune"],
        model_name=name if evaluation else None,
        eval_results=list(_eval_results(recipe, evaluation)) if evaluation else None,
    )


def _classifies(recipe: Record) -> bool:
    return bool(recipe["model"].get("task") == "sequence_classification")


def _unit(recipe: Record) -> str:
    """What an example is."""
    return "text" if _classifies(recipe) else "conversation"


def _is_hub_id(source: Record) -> bool:
    """Whether a data set is on the hub: it has the form of an id and not the ending of a file."""
    name: str = source["name"]
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and "." not in name.rpartition("/")[2]


def _eval_results(recipe: Record, evaluation: Record) -> Iterator[EvalResult]:
    held_out = recipe["data"]["eval"]
    source = held_out[0] if isinstance(held_out, list) and len(held_out) == 1 else None
    for measure, value in evaluation["tuned"].items():
        yield EvalResult(
            task_type="text-classification" if _classifies(recipe) else "text-generation",
            task_name="Text Classification" if _classifies(recipe) else "Text Generation",
            dataset_type=source["name"] if source and _is_hub_id(source) else "held-out",
            dataset_name=short(source["name"]) if source else f"held-out {_unit(recipe)}s",
            metric_type=measure,
            metric_name=measure_in_words(measure),
            metric_value=value,
        )


_VARIANTS = {
    "rslora": "rsLoRA. ",
    "dora": "DoRA. ",
    "pissa": "PiSSA, saved as a plain LoRA of twice the rank. ",
    "olora": "OLoRA, saved as a plain LoRA of twice the rank. ",
}


def _trained(lock: Record, plan: Record) -> Iterator[str]:
    recipe, data = lock["recipe"], plan["data"]
    train, lora = recipe["train"], recipe["lora"]
    sources = ", ".join(f"`{s['name'] if _is_hub_id(s) else short(s['name'])}`" for s in recipe["data"]["train"])
    loss_on = (
        f"to name the class of each: {', '.join(lock['inputs']['labels'])}"
        if _classifies(recipe)
        else f"{data['num_supervised_tokens']:,} of {data['num_tokens']:,} tokens carry loss, `train_on: "
        f"{as_written(recipe['data']['train_on'])}`"
    )
    yield (
        f"Trained on {plural(data['num_examples'], 'example')} of {sources} ({loss_on}), "
        f"{train['epochs']:g} epochs of {train['batch_size']} examples a step, learning rate {train['learning_rate']:g}."
    )
    yield ""
    yield (
        f"{_VARIANTS.get(lora.get('variant', 'plain'), '')}Rank {lora['r']}, alpha {lora['alpha']:g}, "
        f"dropout {lora['dropout']:g} on {lock['adapter']['targets']}: "
        f"{lock['adapter']['trainable']:,} trained parameters."
    )
    quantization = recipe["model"].get("quantization", "none")
    if quantization != "none":
        yield ""
        yield (
            f"It was trained and evaluated on the base in {quantization} (`model.quantization`); on the base in another type it "
            "answers differently."
        )


def _results(evaluation: Record | None, unit: str) -> list[str]:
    if evaluation is None:
        return []
    level = f"{evaluation['interval']['level']:.0%}"
    rows = [
        f"## Results on {evaluation['num_examples']:,} held-out {unit}s",
        "",
        f"| | base | tuned | difference | {level} interval |",
        "|---|---|---|---|---|",
    ]
    for name, tuned in evaluation["tuned"].items():
        difference = evaluation["difference"][name]
        low, high = (as_difference(name, difference[end]).removesuffix(" points") for end in ("low", "high"))
        rows.append(
            f"| {measure_in_words(name)} | {as_measure(name, evaluation['base'][name])} | {as_measure(name, tuned)} | "
            f"{as_difference(name, difference['value'])} | {low} to {high} |"
        )
    for name, part in evaluation.get("sources", {}).items():
        difference = part["difference"]["nll"]
        rows.append(
            f"| loss on {plural(part['num_examples'], 'conversation')} of `{short(name)}` | {part['base']['nll']:.4g} | "
            f"{part['tuned']['nll']:.4g} | {difference['value']:+.4g} | {difference['low']:+.4g} to "
            f"{difference['high']:+.4g} |"
        )
    if "forgetting" in evaluation:
        other = evaluation["forgetting"]
        difference = other["difference"]["nll"]
        rows.append(
            f"| loss on {plural(other['num_examples'], 'conversation')} of another kind | {other['base']['nll']:.4g} | "
            f"{other['tuned']['nll']:.4g} | {difference['value']:+.4g} | {difference['low']:+.4g} to "
            f"{difference['high']:+.4g} |"
        )
    if "majority" in evaluation:
        majority = evaluation["majority"]
        rows += ["", f"Of the base: {evaluation['note']} ({majority['label']}: accuracy {majority['accuracy']:.1%})."]
    return [*rows, ""]


def _intended_use(recipe: Record, evaluation: Record | None) -> list[str]:
    sources = ", ".join(short(source["name"]) for source in recipe["data"]["train"])
    measured = f"was measured on held-out {_unit(recipe)}s of that kind" if evaluation else "was not measured"
    return [
        "## Intended use",
        "",
        f"For {_unit(recipe)}s such as those of {sources}"
        + ("" if _classifies(recipe) else ", in the chat template beside the adapter")
        + f". It {measured}; other uses, "
        "safety and bias were not examined. What the base model may and may not be used for holds for the adapter too.",
        "",
    ]


def _load(lock: Record, repo: str) -> list[str]:
    place = repo or _HERE
    kind, options = "CausalLM", ""
    if _classifies(lock["recipe"]):
        kind, options = "SequenceClassification", f", num_labels={len(lock['inputs']['labels'])}"
    loadable = base_name(lock) if repo or lock["inputs"]["model_revision"] is not None else lock["inputs"]["model_path"]
    if not repo or lock["inputs"]["model_revision"] is not None:
        return [
            "## Load it",
            "",
            "```python",
            f"from peft import AutoPeftModelFor{kind}",
            "from transformers import AutoTokenizer",
            "",
            f'model = AutoPeftModelFor{kind}.from_pretrained("{place}"{options})',
            f'tokenizer = AutoTokenizer.from_pretrained("{place}")',
            "```",
            "",
            f"The base model is loaded from `{loadable}`.",
            "",
        ]
    return [
        "## Load it",
        "",
        f"The base, `{loadable}`, was a file or folder of the machine that trained; put yours in its place.",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import AutoModelFor{kind}, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")',
        f'base = AutoModelFor{kind}.from_pretrained("THE_BASE_MODEL"{options})',
        *([_GROW] if lock["recipe"]["lora"].get("new_tokens") else []),
        f'model = PeftModel.from_pretrained(base, "{place}")',
        "```",
        "",
    ]
