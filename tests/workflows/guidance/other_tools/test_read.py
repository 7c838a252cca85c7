"""Files of other tools as recipes: realistic ones of each tool, and what cannot be translated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loratune.recipe.recipe import Recipe
from loratune.run.errors import RecipeError
from loratune.workflows.guidance.init import init
from loratune.workflows.guidance.other_tools.read import OtherFile
from tests.workflows.guidance.other_tools.files import AXOLOTL, FACTORY, MLX, TRL, read


def names(found: OtherFile) -> set[str]:
    return {item.name for item in found.left_out}


def test_axolotl() -> None:
    found = read("axolotl.yml", AXOLOTL)
    assert found.tool == "Axolotl"
    assert found.settings == {
        "model.name": "NousResearch/Llama-3.2-1B",
        "model.quantization": "nf4",
        "model.dtype": "auto",
        "data.train": [{"name": "teknium/GPT4-LLM-Cleaned", "split": "train"}],
        "data.format": "alpaca",
        "data.eval": 0.1,
        "data.max_length": 2048,
        "lora.r": 16,
        "lora.alpha": 32,
        "lora.dropout": 0.05,
        "lora.targets": "complete",
        "train.output_dir": "./outputs/lora-out",
        "train.batch_size": 8,
        "train.epochs": 4,
        "train.optimizer": "adamw",
        "train.schedule": "cosine",
        "train.learning_rate": 2e-4,
        "train.log_every": 1,
        "train.warmup_fraction": 0.1,
        "train.eval_every": 1 / 16,
        "train.save_every": "epoch",
        "train.weight_decay": 0.0,
    }
    assert names(found) == {
        *("strict", "datasets.0.shards", "sample_packing", "tf32", "gradient_checkpointing"),
        *("special_tokens.pad_token", "wandb_entity"),
    }
    assert found.origins["train.batch_size"] == ["gradient_accumulation_steps: 2", "micro_batch_size: 4"]


def test_llama_factory_with_its_list_of_datasets() -> None:
    Path("data").mkdir()
    info = {
        "mine": {"file_name": "mine.json", "columns": {"prompt": "q", "query": "input", "response": "a"}},
        "chats": {
            "hf_hub_url": "owner/chats",
            "subset": "small",
            "formatting": "sharegpt",
            "columns": {"messages": "turns"},
            "tags": {"role_tag": "role", "content_tag": "content"},
        },
    }
    Path("data/dataset_info.json").write_text(json.dumps(info))
    found = read("sft.yaml", FACTORY)
    assert found.tool == "LLaMA-Factory"
    assert found.settings["data.train"] == [
        {"name": "data/mine.json"},
        {"name": "owner/chats", "config": "small"},
    ]
    assert "data.format" not in found.settings, "the two have different ones"
    assert found.settings["train.batch_size"] == 8
    assert found.settings["train.schedule"] == "constant"
    assert found.settings["train.eval_every"] == found.settings["train.save_every"] == 500
    assert found.settings["lora.targets"] == "complete"
    assert found.settings["model.dtype"] == "bfloat16"
    assert found.settings["model.trust_remote_code"] is True
    assert found.settings["train.report_to"] == []
    assert names(found) == {
        *("do_train", "template", "max_samples", "overwrite_output_dir", "plot_loss", "per_device_eval_batch_size"),
        *("finetuning_type", "dataset_info.mine.columns.query", "dataset_info.chats.formatting"),
        *("dataset_info.chats.tags.role_tag", "dataset_info.chats.tags.content_tag"),
    }
    one = read("one.yaml", FACTORY.replace("mine, chats", "chats")).settings
    assert (one["data.format"], one["data.columns"]) == ("messages", {"messages": "turns"})
    one = read("one.yaml", FACTORY.replace("mine, chats", "mine")).settings
    assert (one["data.format"], one["data.columns"]) == ("alpaca", {"instruction": "q", "output": "a"})


def test_trl() -> None:
    found = read("trl.json", json.dumps(TRL))
    assert found.tool == "TRL"
    assert found.settings["data.train"] == [{"name": "trl-lib/Capybara", "config": "default", "split": "train"}]
    assert found.settings["data.eval"] == [{"name": "trl-lib/Capybara", "config": "default", "split": "test"}]
    assert found.settings["data.train_on"] == "all"
    assert found.settings["train.batch_size"] == 32, "8 on each device unless it is said"
    assert found.settings["train.warmup_fraction"] == 0.1
    assert found.settings["train.max_steps"] == 200
    assert found.settings["train.eval_every"] == "never"
    assert found.settings["train.optimizer"] == "adafactor"
    assert found.settings["train.report_to"] == ["tensorboard"]
    assert (found.settings["lora.r"], found.settings["lora.variant"]) == (32, "dora")
    assert found.settings["lora.targets"] == ["q_proj", "v_proj"]
    assert found.settings["model.dtype"] == "bfloat16"
    left_out = {item.name: item.reason for item in found.left_out}
    assert set(left_out) == {"packing", "use_peft", "lr_scheduler_type", "peft_config.bias"}
    assert "train.schedule is 'polynomial'" in left_out["lr_scheduler_type"]


def test_mlx_lm() -> None:
    found = read("lora.yaml", MLX)
    assert found.tool == "mlx-lm"
    assert found.settings["model.name"] == "mlx-community/Llama-3.2-1B-Instruct"
    assert found.settings["data.train"] == "my/chats"
    assert found.settings["data.train_on"] == "all"
    assert (found.settings["lora.r"], found.settings["lora.alpha"]) == (8, 160)
    assert found.settings["lora.layers"] == "last 16"
    assert found.settings["train.max_steps"] == 1000
    assert found.settings["train.schedule"] == "cosine"
    assert found.settings["train.warmup_fraction"] == 0.1
    assert found.settings["train.save_every"] == 100
    assert found.settings["train.learning_rate"] == 1e-5
    left_out = {item.name: item.reason for item in found.left_out}
    assert set(left_out) == {"train", "grad_checkpoint", "fine_tune_type", "learning_rate", "lr_schedule.arguments"}
    assert left_out["lr_schedule.arguments"].startswith("the first number is the learning rate")


def test_mlx_lm_counts_micro_batches_as_its_iterations() -> None:
    found = read("lora.yaml", MLX + "grad_accumulation_steps: 5\n").settings
    assert (found["train.batch_size"], found["train.max_steps"]) == (20, 200)
    assert found["train.warmup_fraction"] == 0.5, "the schedule counts updates"
    assert (found["train.log_every"], found["train.eval_every"], found["train.save_every"]) == (2, 40, 20)
    found = read("lora.yaml", "iters: 1000\ngrad_accumulation_steps: 3\nsteps_per_report: 1\n").settings
    assert (found["train.max_steps"], found["train.log_every"]) == (333, 1), "the last micro-batch is never applied"
    assert found["train.batch_size"] == 12, "4 in a micro-batch unless it is said"


@pytest.mark.parametrize(("name", "text"), [("a.yml", AXOLOTL), ("m.yaml", MLX), ("t.json", json.dumps(TRL))])
def test_init_writes_a_recipe_that_can_be_read_and_names_what_it_left_out(name: str, text: str) -> None:
    found = read(name, text)
    path, starter = init(source=name)
    assert path == Path(f"{Path(name).stem}-loratune.yaml")
    recipe = Recipe.load(path)
    expected: dict[str, dict[str, Any]] = {}
    for setting, value in found.settings.items():
        expected.setdefault(setting.partition(".")[0], {})[setting.partition(".")[2]] = value
    assert recipe == Recipe.parse(expected)
    assert starter.left_out == found.left_out
    comments = " ".join(line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("# "))
    assert all(f"{item.name}: " in comments and item.reason in comments for item in found.left_out)
    with pytest.raises(RecipeError, match="already exists"):
        init(source=name)


def test_data_given_beside_the_file_replaces_its_data() -> None:
    Path("trl.json").write_text(json.dumps(TRL | {"dataset_text_field": "body"}))
    path, starter = init("mine.csv", source="trl.json", columns={"prompt": "q", "completion": "a"})
    recipe = Recipe.load(path)
    told = {item.name: item.reason for item in starter.left_out}
    assert told["dataset_name"] == told["dataset_test_split"] == "mine.csv takes its place"
    assert told["dataset_text_field"] == "mine.csv takes its place"
    assert [source.name for source in recipe.data.train] == ["mine.csv"]
    assert recipe.data.columns == {"prompt": "q", "completion": "a"}
    assert recipe.data.eval == "auto", "the test split was of the other data"
    assert recipe.train.max_steps == 200


@pytest.mark.parametrize(
    ("name", "text", "problem", "fix"),
    [
        ("a.yaml", "rl: grpo\n", "rl is grpo, which is not translated", "`loratune init DATA`"),
        ("a.yaml", "lora: {r: 8}\n", "this is already a recipe of loratune", "loratune plan"),
        (
            "a.yaml",
            FACTORY,
            "no training data found: dataset: 'mine, chats' (mine is a name",
            "loratune init DATA --from",
        ),
        ("a.yaml", "lora_r: 8\n", "no training data found", "loratune init DATA --from"),
        ("a.json", "[1]", "not a JSON object", "write {"),
        ("a.json", "{", "cannot read the settings", "provide a JSON object"),
        ("a.yaml", "hub_token: hf_" + "a" * 34, "the recipe contains a Hub token", "remove it"),
    ],
)
def test_what_cannot_be_translated_is_refused(name: str, text: str, problem: str, fix: str) -> None:
    Path(name).write_text(text)
    with pytest.raises(RecipeError) as error:
        init(source=name)
    assert error.value.problem.startswith(problem)
    assert error.value.fix.startswith(fix)
    assert str(error.value.file) == name
    assert not Path("a-loratune.yaml").exists()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"warmup_steps": 100}, None),
        ({"warmup_steps": 0, "warmup_ratio": 0.1}, {"train.warmup_fraction": 0.1}),
        ({"warmup_steps": 5, "max_steps": 50, "warmup_ratio": 0.3},
         {"train.warmup_fraction": 0.1, "train.max_steps": 50}),
        ({"warmup_steps": 0.05}, {"train.warmup_fraction": 0.05}),
        ({"val_size": 0}, {"data.eval": "none"}),
        ({"val_size": 200}, None),
        ({"eval_strategy": False}, {"train.eval_every": "never"}),
        ({"save_strategy": "steps"}, {"train.save_every": 500}),
        ({"eval_strategy": "steps", "evals_per_epoch": 0}, {"train.eval_every": 500}),
        ({"evals_per_epoch": 0}, {"train.eval_every": "never"}),
        ({"max_steps": -1}, None),
        ({"bf16": False}, None),
        ({"load_in_4bit": False}, None),
        ({"quantization_bit": 8}, {"model.quantization": "int8"}),
        ({"init_lora_weights": True}, None),
        ({"init_lora_weights": "pissa"}, {"lora.variant": "pissa"}),
        ({"init_lora_weights": "gaussian"}, None),
        ({"fine_tune_type": "full"}, None),
        ({"fine_tune_type": "dora"}, {"lora.variant": "dora"}),
        ({"lora_target_linear": True, "lora_target_modules": ["q_proj"]}, {"lora.targets": "complete"}),
        ({"use_wandb": True, "wandb_project": "mine"}, {"train.report_to": ["wandb"]}),
        ({"report_to": "none", "wandb_project": "mine"}, {"train.report_to": []}),
        ({"micro_batch_size": 2, "batch_size": 16, "sequence_len": 8},
         {"train.batch_size": 16, "data.max_length": 8}),
        ({"cutoff_len": 8, "gradient_accumulation_steps": 2}, {"data.max_length": 8, "train.batch_size": 16}),
        ({"rank": 8, "scale": "20"}, {"lora.r": 8}),
        ({"task_type": "CAUSAL_LM"}, None),
        ({"task_type": "SEQ_CLS"}, {"model.task": "sequence_classification"}),
        ({"lr_schedule": {"name": "linear_schedule", "arguments": [1e-5, 2e-5, 10]}}, {"train.learning_rate": 1e-5}),
        ({"lora_target": "q_proj,v_proj"}, {"lora.targets": ["q_proj", "v_proj"]}),
        ({"target_modules": ["all-linear"]}, {"lora.targets": "complete"}),
        ({"target_modules": "all-linear"}, {"lora.targets": "complete"}),
        ({"lora_r": 0}, None),
        ({"deepspeed": "ds_z2.json"}, None),
        ({"early_stopping_patience": 3}, {"train.early_stopping": 3}),
        # contradictory until the second one is there too
        ({"lr_scheduler_type": "inverse_sqrt", "warmup_ratio": 0.1},
         {"train.schedule": "inverse_sqrt", "train.warmup_fraction": 0.1}),
        ({"learning_rate": "2e-5"}, {"train.learning_rate": 2e-5}),
        ({"eval_dataset": "held_out.json"}, {"data.eval": [{"name": "held_out.json"}]}),
        ({"eval_dataset": "alpaca_en_demo"}, None),
        ({"stage": "pt"}, {"model.task": "causal_lm", "data.train_on": "all"}),
    ],
)  # fmt: skip
def test_values_that_mean_more_than_another_name(settings: dict[str, Any], expected: dict[str, Any] | None) -> None:
    found = read("a.json", json.dumps(settings))
    assert found.settings == (expected or {})
    assert bool(found.left_out) or expected is not None
