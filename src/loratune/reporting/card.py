"""The model card of an adapter: what was trained on what, how well it does, how to load it."""

from __future__ import annotations

import yaml

from loratune.run import Record, RunDir, read_json, write_text


def write_card(run: RunDir) -> None:
    """Write `adapter/README.md` from the run's files."""
    lock, plan = read_json(run.lock), read_json(run.plan)
    evaluation = read_json(run.evaluation) if run.evaluation.is_file() else None
    write_text(run.adapter / "README.md", model_card(lock, plan, evaluation))


def model_card(lock: Record, plan: Record, evaluation: Record | None) -> str:
    """The card as Markdown, with the hub's metadata on top.

    Args:
        lock: `lock.json`.
        plan: `plan.json`.
        evaluation: `evaluation.json`, or None where nothing was held out.
    """
    recipe = lock["recipe"]
    base = lock["recipe"]["model"]["name"]
    on_hub = lock["inputs"]["model_revision"] is not None
    metadata = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "loratune"]}
    if on_hub:
        metadata["base_model"] = base
    loadable = base if on_hub else lock["inputs"]["model_path"]
    data, train, lora = plan["data"], recipe["train"], recipe["lora"]
    sources = ", ".join(f"`{source['name']}`" for source in recipe["data"]["train"])
    return "\n".join(
        [
            "---",
            yaml.safe_dump(metadata, sort_keys=False).strip(),
            "---",
            "",
            f"# LoRA adapter for {base}",
            "",
            f"Trained on {data['num_examples']:,} examples of {sources} ({data['num_supervised_tokens']:,} of "
            f"{data['num_tokens']:,} tokens carry loss, `train_on: {recipe['data']['train_on']}`), "
            f"{train['epochs']:g} epochs of {train['batch_size']} examples a step, learning rate "
            f"{train['learning_rate']:g}.",
            "",
            f"Rank {lora['r']}, alpha {lora['alpha']:g}, dropout {lora['dropout']:g} on {lock['adapter']['targets']}: "
            f"{lock['adapter']['trainable']:,} trained parameters.",
            "",
            *_results(evaluation),
            "## Load it",
            "",
            "```python",
            "from peft import AutoPeftModelForCausalLM",
            "from transformers import AutoTokenizer",
            "",
            'model = AutoPeftModelForCausalLM.from_pretrained("path/of/this/folder")',
            'tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")',
            "```",
            "",
            f"The base model is loaded from `{loadable}`.",
            "",
        ]
    )


def _results(evaluation: Record | None) -> list[str]:
    if evaluation is None:
        return []
    rows = ["## Results on held-out data", "", "| | base | tuned |", "|---|---|---|"]
    for name, tuned in evaluation["tuned"].items():
        base = evaluation["base"][name]
        rows.append(f"| {name} | {base:.4g} | {tuned:.4g} |")
    return [*rows, ""]
