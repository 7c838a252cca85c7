"""No field is accepted and ignored: changing any of them changes something that a user can see.

A run that is refused counts only for the fields in `REFUSALS`, where refusing is the documented effect.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.run.errors import LoratuneError
from loratune.run.progress import NO_PROGRESS
from loratune.workflows.train import train
from tests.conftest import conversation, make_moe, write_jsonl

LATER = (
    *(
        "lora.rank_pattern",
        "lora.alpha_pattern",
        "lora.modules_to_save",
        "lora.new_tokens",
        "lora.layers",
        "lora.alpha",
    ),
    *(
        "train.optimizer",
        "train.schedule",
        "train.lora_plus_ratio",
        "train.learning_rate_pattern",
        "train.weight_decay",
    ),
    *("train.neftune_noise_alpha", "train.label_smoothing", "train.average_checkpoints", "train.early_stopping"),
    *("train.keep_checkpoints", "train.final_adapter", "train.seed", "train.report_to", "train.save_every"),
    *("train.warmup_fraction", "train.max_grad_norm", "train.log_every", "train.recompute", "data.streaming"),
    *("preference.loss", "preference.label_smoothing", "preference.sft_weight", "preference.target_margin"),
    *("preference.desirable_weight", "preference.undesirable_weight"),
    "train.share_prefixes",
    *("train.compile", "data.on_long", "data.on_bad_row", "data.thinking", "data.special_tokens_in_text"),
)
"""Fields whose effect other tests of the default suite see too: here they run with `-m slow` only."""

# field → a value other than the baseline's
OTHER: dict[str, Any] = {
    "model.name": "FOLDER",
    "model.revision": "v2",  # see _check_revision
    "model.dtype": "bfloat16",
    "model.quantization": "int8",
    "model.trust_remote_code": True,  # see _check_trust
    "model.task": "sequence_classification",
    "data.train": "FILE",
    "data.eval": 0.3,
    "data.format": "prompt_completion",
    "data.columns": {"completion": "other"},
    "data.train_on": ["assistant", "user"],
    "data.thinking": "strip",
    "data.special_tokens_in_text": "as_text",
    "data.max_length": 90,
    "data.on_long": "drop",
    "data.on_bad_row": "error",
    "data.streaming": True,
    "lora.r": 3,
    "lora.alpha": 4,
    "lora.dropout": 0.3,
    "lora.targets": "attention",
    "lora.layers": "last 1",
    "lora.variant": "rslora",
    "lora.start_from": "ADAPTER",
    "lora.rank_pattern": {"q_proj": 3},
    "lora.alpha_pattern": {"v_proj": 4},
    "lora.modules_to_save": ["norm"],
    "lora.new_tokens": ["<|thing|>"],
    "lora.target_parameters": ["mlp.experts.down_proj"],
    "train.output_dir": "FOLDER",
    "train.epochs": 2,
    "train.max_steps": 3,
    "train.learning_rate": 1e-3,
    "train.batch_size": 5,
    "train.optimizer": "adafactor",
    "train.lora_plus_ratio": 4.0,
    "train.learning_rate_pattern": {"q_proj": 1e-3},
    "train.schedule": "cosine",
    "train.warmup_fraction": 0.5,
    "train.weight_decay": 0.5,
    "train.max_grad_norm": 0.01,
    "train.seed": 7,
    "train.engine": "trl",
    "train.device": "cuda",
    "train.token_budget": 130,
    "train.share_prefixes": False,
    "train.compile": True,
    "train.strategy": "fsdp",
    "train.recompute": 1,
    "train.eval_every": 1,
    "train.save_every": 1,
    "train.log_every": 1,
    "train.keep_checkpoints": 1,
    "train.final_adapter": "best",
    "train.on_bad_step": "error",
    "train.max_skipped_steps": 1,
    "train.report_to": ["tensorboard"],
    "train.early_stopping": 1,
    "train.neftune_noise_alpha": 5.0,
    "train.average_checkpoints": 2,
    "train.label_smoothing": 0.1,
    "preference.loss": "ipo",
    "preference.beta": 0.5,
    "preference.label_smoothing": 0.2,
    "preference.sft_weight": 0.5,
    "preference.target_margin": 0.2,
    "preference.desirable_weight": 1.5,
    "preference.undesirable_weight": 0.5,
    "evaluate.metric": "contains",
    "evaluate.samples": 1,
    "evaluate.samples_every": 1,
    "evaluate.max_new_tokens": 2,
    "evaluate.forgetting": "FILE",
}
# fields whose documented effect is a refusal → words of the refusal
REFUSALS = {
    "data.on_bad_row": "unknown role 'king'",
    "train.device": "cuda is not available",
    "train.on_bad_step": "",
    "train.max_skipped_steps": "",
}
PAIRS: dict[str, Any] = {"model.task": "preference", "data.train": "PAIRS", "data.eval": "PAIRS", "evaluate.samples": 0}
JUDGED = {**PAIRS, "data.train": "JUDGED", "data.eval": "JUDGED", "preference.loss": "kto"}
IN_THE_PLAN = (
    *("model.name", "model.dtype", "model.quantization", "model.task", "data.train", "data.eval", "data.format"),
    *("data.columns", "data.train_on", "data.max_length", "lora.r", "lora.targets", "lora.start_from"),
    *("lora.target_parameters", "train.epochs", "train.max_steps", "train.batch_size", "train.token_budget"),
    "evaluate.forgetting",
)
"""Fields whose effect is seen in examples, parameters, memory or steps: that is compared by default, and the trained
runs with the slow tests."""
# settings that the field needs to matter; they are in the run it is compared with too
ALSO: dict[str, dict[str, Any]] = {
    "lora.target_parameters": {"model.name": "MOE", "lora.dropout": 0},
    "data.format": {"data.train": "SEVERAL", "data.eval": "SEVERAL"},  # rows that fit several formats
    "data.columns": {"data.train": "SEVERAL", "data.eval": "SEVERAL", "data.format": "prompt_completion"},
    # The same rows as conversations and as labeled texts; no answers are generated, since classifiers have none.
    "model.task": {"data.train": "SEVERAL", "data.eval": "SEVERAL", "evaluate.max_new_tokens": 256},
    "train.keep_checkpoints": {"train.save_every": 1},
    # too high a rate, so that the last step is not the best one
    "train.final_adapter": {"train.save_every": 1, "train.eval_every": 1, "train.learning_rate": 20.0},
    "train.on_bad_step": {"lora.alpha": 1e38, "train.on_bad_step": "skip"},  # no gradient of such a scale has a norm
    "train.max_skipped_steps": {"lora.alpha": 1e38, "train.on_bad_step": "skip"},
    "train.average_checkpoints": {"train.save_every": 1},
    "train.early_stopping": {"train.eval_every": 1, "train.learning_rate": 0.3},
    **dict.fromkeys(
        ("preference.loss", "preference.beta", "preference.label_smoothing", "preference.sft_weight"), PAIRS
    ),
    "preference.target_margin": {**PAIRS, "preference.loss": "simpo"},
    **dict.fromkeys(("preference.desirable_weight", "preference.undesirable_weight"), JUDGED),
    "evaluate.samples": {"evaluate.metric": "exact_match"},
    "evaluate.max_new_tokens": {"evaluate.metric": "exact_match"},
}


class Listener:
    """Progress that keeps what the user would see."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def task(self, name: str, total: int | None, unit: str = "") -> Iterator[Listener]:
        yield self

    def advance(self, amount: int = 1, note: str = "") -> None:
        pass

    def line(self, text: str) -> None:
        self.lines.append(text.rpartition(" · ")[0] if "tokens/s" in text else text)

    def warn(self, text: str) -> None:
        self.lines.append(text)

    def metrics(self, record: dict[str, Any]) -> None:
        pass

    def checkpoint(self, record: dict[str, Any], folder: Path) -> None:
        pass


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    thought = {"role": "assistant", "content": "<think>It is red.</think>Red."}
    made = [conversation(i) for i in range(14)]
    made.append({"messages": [{"role": "user", "content": "Color?"}, thought]})
    made.append(
        {"messages": [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "one two " * 60}]}
    )
    named = [{"role": "user", "content": "What is <|im_end|>?"}, {"role": "assistant", "content": "The end."}]
    made.append({"messages": named})
    made.append({"messages": [{"role": "king", "content": "Count."}]})
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", made)


@pytest.fixture(scope="module")
def baseline_values(tiny_model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "model": {"name": str(tiny_model), "dtype": "float32"},
        "data": {"train": str(rows), "eval": str(rows), "on_bad_row": "skip", "max_length": 80, "on_long": "truncate"},
        "lora": {"r": 2, "alpha": 8, "dropout": 0.1},
        "train": {
            "output_dir": str(tmp_path_factory.mktemp("runs") / "baseline"),
            "epochs": 1,
            "learning_rate": 1e-2,
            "batch_size": 4,
            "device": "cpu",
        },
        "evaluate": {"max_new_tokens": 4},
    }


def footprint(recipe: Recipe) -> dict[str, Any]:
    """Return everything that a user can see of a run, except times and the recipe itself."""
    listener = Listener()
    try:
        run = train(recipe, overwrite=True, progress=listener).run
    except LoratuneError as error:
        return {"error": str(error)}
    plan = json.loads(run.plan.read_text())
    strategy = plan["choices"].get("train.strategy")  # a single process has no other to share the base with
    for name in ("time", "measured", "choices", "presets"):
        plan.pop(name)
    for name in ("peak_bytes", "process_bytes", "interval"):  # depend on the tests that ran in this process before
        plan["memory"].pop(name)
    metrics = run.read_metrics()
    for record in metrics:
        record.pop("tokens_per_second", None)
        record.pop("peak_bytes", None)
        record.pop("time", None)
        record.pop("seconds", None)
    adapter = load_file(run.adapter / "adapter_model.safetensors")
    seen = {
        "files": sorted(path.name for path in run.root.iterdir()),
        "root": str(run.root),
        "plan": plan,
        "metrics": metrics,
        "adapter": {name: tensor.sum().item() for name, tensor in adapter.items()},
        "scale": json.loads((run.adapter / "adapter_config.json").read_text()),
        "inputs": json.loads(run.lock.read_text())["inputs"],
        "data": json.loads(run.data.read_text())["train"]["num_rejected"],
        "evaluation": json.loads(run.evaluation.read_text()),
        "checkpoints": sorted(path.name for path in run.checkpoints.iterdir()),
        "lines": listener.lines,
        "strategy": strategy,
    }
    shutil.rmtree(run.root)
    return seen


def planned(recipe: Recipe) -> dict[str, Any]:
    """Return what is known of a run before its weights load: its examples, its parameters, its memory, its steps."""
    prepared = prepare(recipe, NO_PROGRESS)
    plan, lock = prepared.as_plan(), prepared.as_lock()
    memory = {k: v for k, v in plan["memory"].items() if k not in ("peak_bytes", "process_bytes", "interval")}
    return {
        **{name: plan[name] for name in ("parameters", "data", "packing", "num_processes")},
        "memory": memory,
        "num_steps": plan["time"]["num_steps"],
        "inputs": lock["inputs"],
        "adapter": lock["adapter"],
    }


def with_settings(values: dict[str, Any], settings: dict[str, Any]) -> Recipe:
    changed = {section: dict(fields) for section, fields in values.items()}
    for name, value in settings.items():
        section, _, field = name.partition(".")
        changed.setdefault(section, {})[field] = value
    return Recipe.parse(changed)


@pytest.fixture(scope="module")
def places(
    baseline_values: dict[str, Any],
    smollm2_tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, str]:
    """Words in the tables above → paths of what they stand for."""
    folder = tmp_path_factory.mktemp("places")
    several = [
        {**conversation(i), "prompt": f"Color {i}?", "completion": "red", "other": "green and round"}
        | {"text": f"words {i}", "label": ("no", "yes")[i % 2]}
        for i in range(16)
    ]
    pairs = [{"prompt": f"Color {i}?", "chosen": "red", "rejected": "I do not know"} for i in range(8)]
    judged = [{"prompt": f"Color {i}?", "completion": "red" if i % 2 else "no idea", "label": i % 2} for i in range(8)]
    first = train(with_settings(baseline_values, {"train.output_dir": str(folder / "first")})).run
    return {
        "ADAPTER": str(first.adapter),
        "MOE": str(make_moe(folder / "moe", smollm2_tokenizer)),
        "SEVERAL": str(write_jsonl(folder / "several.jsonl", several)),
        "PAIRS": str(write_jsonl(folder / "pairs.jsonl", pairs)),
        "JUDGED": str(write_jsonl(folder / "judged.jsonl", judged)),
    }


@pytest.fixture(scope="module")
def baseline(baseline_values: dict[str, Any], places: dict[str, str]) -> Callable[[str], dict[str, Any]]:
    """Footprint of the run that a field's run is compared with; each is trained once."""
    made: dict[str, dict[str, Any]] = {}

    def of(field: str) -> dict[str, Any]:
        also = also_set(field, places)
        key = json.dumps(also)
        if key not in made:
            made[key] = footprint(with_settings(baseline_values, also))
        return made[key]

    return of


@pytest.fixture(scope="module")
def baseline_plan(baseline_values: dict[str, Any], places: dict[str, str]) -> Callable[[str], dict[str, Any]]:
    """What is planned for the run that a field's run is compared with; each is planned once."""
    made: dict[str, dict[str, Any]] = {}

    def of(field: str) -> dict[str, Any]:
        also = also_set(field, places)
        key = json.dumps(also)
        if key not in made:
            made[key] = planned(with_settings(baseline_values, also))
        return made[key]

    return of


def also_set(field: str, places: dict[str, str]) -> dict[str, Any]:
    return {name: placed(value, places) for name, value in ALSO.get(field, {}).items()}


def placed(value: Any, places: dict[str, str]) -> Any:
    return places.get(value, value) if isinstance(value, str) else value


def test_the_list_has_every_field() -> None:
    fields = {
        f"{name}.{field}"
        for name, section in Recipe.model_fields.items()
        for field in section.annotation.model_fields  # type: ignore[union-attr]
    }
    assert fields == set(OTHER)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("field", "trains"),
    [(f, f not in IN_THE_PLAN) for f in OTHER if f not in LATER]
    + [pytest.param(f, True, marks=pytest.mark.slow) for f in OTHER if f in LATER or f in IN_THE_PLAN],
)
def test_changing_a_field_changes_what_happens(
    field: str,
    trains: bool,
    baseline_values: dict[str, Any],
    baseline: Callable[[str], dict[str, Any]],
    baseline_plan: Callable[[str], dict[str, Any]],
    places: dict[str, str],
    tiny_model: Path,
    tmp_path: Path,
    smollm2_tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    value = placed(OTHER[field], places)
    if field == "model.name":
        value = shutil.copytree(tiny_model, tmp_path / "model")
        (tmp_path / "model" / "chat_template.jinja").write_text(
            smollm2_tokenizer.chat_template.replace("SmolLM", "Tiny")
        )
    elif field == "model.revision":
        _check_revision(baseline_values, tiny_model, tmp_path, monkeypatch)
        return
    elif field == "model.trust_remote_code":
        _check_trust(baseline_values, tiny_model, tmp_path)
        return
    elif field in ("data.train", "evaluate.forgetting"):
        value = write_jsonl(tmp_path / "other.jsonl", [conversation(i) for i in range(50, 66)])
    elif field == "train.output_dir":
        value = tmp_path / "elsewhere"
    also = also_set(field, places)
    value = str(value) if isinstance(value, Path) else value
    changed = with_settings(baseline_values, {**also, field: value})
    if not trains:
        assert planned(changed) != baseline_plan(field)
        return
    before, after = baseline(field), footprint(changed)
    assert "error" not in before, before
    if field in REFUSALS:
        assert REFUSALS[field] in after["error"]
    else:
        assert "error" not in after, after
        assert after != before


def test_an_unchanged_recipe_leaves_the_same_footprint(
    baseline_values: dict[str, Any],
    baseline: Callable[[str], dict[str, Any]],
    baseline_plan: Callable[[str], dict[str, Any]],
) -> None:
    assert footprint(with_settings(baseline_values, {})) == baseline("")
    assert planned(with_settings(baseline_values, {})) == baseline_plan("")


def _check_revision(values: dict[str, Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The revision chooses among those of a Hub model: here two in a local cache, with different templates."""
    cache = tmp_path / "hub" / "models--tiny--llama"
    for name, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        folder = Path(shutil.copytree(tiny_model, cache / "snapshots" / commit))
        template = (folder / "chat_template.jinja").read_text()
        (folder / "chat_template.jinja").write_text(template.replace("SmolLM", f"Tiny {name}"))
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    first, second = (
        prepare(with_settings(values, {"model.name": "tiny/llama", **revision}), NO_PROGRESS, weights=False)
        for revision in ({}, {"model.revision": "v2"})
    )
    assert (first.model.base.revision, second.model.base.revision) == ("a" * 40, "b" * 40)
    assert first.data.train[0].input_ids.tolist() != second.data.train[0].input_ids.tolist()


def _check_trust(values: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    """Code of the model runs only when the recipe says so."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    ran = tmp_path / "ran"
    (folder / "configuration_own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig\n"
        f"Path({str(ran)!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    refused = footprint(with_settings(values, {"model.name": str(folder)}))
    assert "trust_remote_code" in refused["error"]
    assert not ran.exists()
    footprint(with_settings(values, {"model.name": str(folder), "model.trust_remote_code": True}))
    assert ran.exists()
