"""The model card of an adapter: what was trained on what, how well it does, what it is for, how to load it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from loratune.reporting.samples_section import last_part
from loratune.reporting.task import ReportedTask, reported_task
from loratune.reporting.units import as_difference, as_interval, as_measure, measure_in_words
from loratune.run.directory import RunDir, write_text
from loratune.run.errors import plural
from loratune.run.records.evaluation import ComparisonRecord, EvaluationRecord
from loratune.run.records.files import read_record
from loratune.run.records.lock import LockRecord
from loratune.run.records.plan import PlanRecord

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_PLACEHOLDER = "path/of/this/folder"

_RESIZE = (
    "base.resize_token_embeddings(max(len(tokenizer), base.get_input_embeddings().num_embeddings))"
    "  # for the new tokens"
)

Recipe = dict[str, dict[str, Any]]


def write_card(run: RunDir) -> None:
    """Write `adapter/README.md` from the run's files."""
    write_text(run.adapter / "README.md", card_of(run))


def card_of(run: RunDir, repo: str = "") -> str:
    """Return the card made from the run's files.

    Args:
        run: The run.
        repo: Hub repository of the adapter; empty for a folder.
    """
    evaluation = read_record(run.evaluation, EvaluationRecord) if run.evaluation.is_file() else None
    lock, plan = read_record(run.lock, LockRecord), read_record(run.plan, PlanRecord)
    return model_card(lock, plan, evaluation, name=run.root.name, repo=repo)


def model_card(
    lock: LockRecord, plan: PlanRecord, evaluation: EvaluationRecord | None, *, name: str, repo: str = ""
) -> str:
    """Return the card as Markdown, with the Hub's metadata on top.

    Args:
        lock: `lock.json`.
        plan: `plan.json`.
        evaluation: `evaluation.json`, or None without held-out data.
        name: Name of the run.
        repo: Hub repository of the adapter; empty for a folder. A card for the Hub names no folder of this machine.
    """
    task = reported_task(lock)
    text = [
        f"# LoRA adapter for {base_name(lock)}",
        "",
        *_trained(lock, plan, task),
        "",
        *(_results(evaluation, task) if evaluation is not None else ()),
        *_intended_use(lock, evaluation, task),
        *_load(lock, repo, task),
        "## Recipe",
        "",
        "All settings, including automatic ones:",
        "",
        "```yaml",
        yaml.safe_dump(
            shared_recipe(lock.recipe) if repo else lock.recipe, sort_keys=False, allow_unicode=True
        ).strip(),
        "```",
        "",
    ]
    metadata = _metadata(lock, evaluation, name, task)
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n".join(text)))


def base_name(lock: LockRecord) -> str:
    """Return the base model's name for people: its Hub id, or the name of its file or folder."""
    name: str = lock.recipe["model"]["name"]
    return name if lock.inputs.model_revision is not None or name.startswith("package:") else last_part(name)


def shared_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe with names of files and folders instead of their paths on this machine."""

    def shared(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shared(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [shared(inner) for inner in value]
        return last_part(value) if isinstance(value, str) and value.startswith(("/", "~", "./", "../")) else value

    changed: Recipe = shared(recipe)
    return changed


def _metadata(lock: LockRecord, evaluation: EvaluationRecord | None, name: str, task: ReportedTask) -> ModelCardData:
    earlier = [{"name": name} for name in lock.extends.trained_on] if lock.extends is not None else []
    sets = sorted({source["name"] for source in (*lock.recipe["data"]["train"], *earlier) if _is_hub_id(source)})
    return ModelCardData(
        base_model=lock.recipe["model"]["name"] if lock.inputs.model_revision is not None else None,
        datasets=sets or None,
        library_name="peft",
        pipeline_tag=task.pipeline,
        tags=["lora", "loratune"],
        model_name=name if evaluation else None,
        eval_results=list(_eval_results(lock.recipe, evaluation, task)) if evaluation else None,
    )


def _is_hub_id(source: dict[str, Any]) -> bool:
    """Return whether a source has the form of a Hub id and not the ending of a file."""
    name: str = source["name"]
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and "." not in name.rpartition("/")[2]


def _eval_results(recipe: Recipe, evaluation: EvaluationRecord, task: ReportedTask) -> Iterator[EvalResult]:
    held_out = recipe["data"]["eval"]
    source = held_out[0] if isinstance(held_out, list) and len(held_out) == 1 else None
    for measure, value in evaluation.tuned.items():
        yield EvalResult(
            task_type=task.pipeline,
            task_name=task.pipeline.replace("-", " ").title(),
            dataset_type=source["name"] if source and _is_hub_id(source) else "held-out",
            dataset_name=last_part(source["name"]) if source else f"held-out {task.example}s",
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


def _trained(lock: LockRecord, plan: PlanRecord, task: ReportedTask) -> Iterator[str]:
    recipe = lock.recipe
    train, lora = recipe["train"], recipe["lora"]
    sources = _in_words(recipe["data"]["train"])
    yield (
        f"Trained on {plural(plan.data.num_examples, 'example')} of {sources} "
        f"({task.trained_on_with_counts(lock, plan.data)}), {plural(train['epochs'], 'epoch')}, "
        f"{plural(train['batch_size'], 'example')} per step, learning rate {train['learning_rate']:g}."
    )
    if lock.extends is not None and not lock.extends.exact:
        yield ""
        yield f"Before that, it was trained on {_in_words([{'name': name} for name in lock.extends.trained_on])}."
    yield ""
    yield (
        f"{_VARIANTS.get(lora.get('variant', 'plain'), '')}Rank {lora['r']}, alpha {lora['alpha']:g}, "
        f"dropout {lora['dropout']:g} on {lock.adapter.targets}: {lock.adapter.trainable:,} trained parameters."
    )
    quantization = recipe["model"].get("quantization", "none")
    if quantization != "none":
        yield ""
        yield (
            f"Trained and evaluated on the base model in {quantization} (`model.quantization`); on the base model in "
            "another type the answers differ."
        )


def _in_words(sources: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"`{s['name'] if _is_hub_id(s) else last_part(s['name'])}`" for s in sources)


def _results(evaluation: EvaluationRecord, task: ReportedTask) -> Iterator[str]:
    yield f"## Results on {evaluation.num_examples:,} held-out {task.example}s"
    yield ""
    yield f"| | {evaluation.side_before} | fine-tuned | difference | {evaluation.interval.level:.0%} interval |"
    yield "|---|---|---|---|---|"
    for name, tuned in evaluation.tuned.items():
        difference = evaluation.difference[name]
        yield (
            f"| {measure_in_words(name)} | {as_measure(name, evaluation.base[name])} | {as_measure(name, tuned)} | "
            f"{as_difference(name, difference.value)} | {as_interval(name, difference)} |"
        )
    for name, part in (evaluation.sources or {}).items():
        yield _loss_row(f"`{last_part(name)}`", part)
    if evaluation.forgetting is not None:
        yield _loss_row("another kind", evaluation.forgetting)
    if evaluation.majority is not None:
        majority = evaluation.majority
        yield ""
        yield f"About the model before the run: {evaluation.note} ({majority.label}: accuracy {majority.accuracy:.1%})."
    yield ""


def _loss_row(of_what: str, part: ComparisonRecord) -> str:
    difference = part.difference["nll"]
    return (
        f"| loss on {plural(part.num_examples, 'conversation')} of {of_what} | {part.base['nll']:.4g} | "
        f"{part.tuned['nll']:.4g} | {difference.value:+.4g} | {as_interval('nll', difference)} |"
    )


def _intended_use(lock: LockRecord, evaluation: EvaluationRecord | None, task: ReportedTask) -> list[str]:
    sources = ", ".join(last_part(source["name"]) for source in lock.recipe["data"]["train"])
    measured = f"was measured on held-out {task.example}s of that kind" if evaluation else "was not measured"
    return [
        "## Intended use",
        "",
        f"For {task.example}s like those of {sources}{task.intended_use()}. Quality {measured}; other uses, safety and "
        "bias were not examined. The base model's terms of use apply to the adapter too.",
        "",
    ]


def _load(lock: LockRecord, repo: str, task: ReportedTask) -> list[str]:
    place = repo or _PLACEHOLDER
    kind, options = task.auto_class, task.load_options(lock)
    on_hub = lock.inputs.model_revision is not None
    loadable = base_name(lock) if repo or on_hub else lock.inputs.model_path
    if not repo or on_hub:
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
        f"The base model, `{loadable}`, was a local file or folder: replace THE_BASE_MODEL with the path of your copy.",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import AutoModelFor{kind}, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")',
        f'base = AutoModelFor{kind}.from_pretrained("THE_BASE_MODEL"{options})',
        *([_RESIZE] if lock.recipe["lora"].get("new_tokens") else []),
        f'model = PeftModel.from_pretrained(base, "{place}")',
        "```",
        "",
    ]
