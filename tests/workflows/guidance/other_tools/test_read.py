"""Files of other tools as recipes: realistic ones of each tool, and every setting taken over or named."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from loratune.recipe.other_names import SETTINGS
from loratune.recipe.recipe import Recipe
from loratune.run.errors import RecipeError
from loratune.workflows.guidance.init import init
from loratune.workflows.guidance.other_tools.data import DATA_WORDS
from loratune.workflows.guidance.other_tools.preferences import TASK_KEYS
from loratune.workflows.guidance.other_tools.read import OtherFile, read_other_file
from loratune.workflows.guidance.other_tools.rules import _RULES

AXOLOTL = """\
base_model: NousResearch/Llama-3.2-1B
load_in_4bit: true
strict: false
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
    split: train
    shards: 10
val_set_size: 0.1
output_dir: ./outputs/lora-out
adapter: qlora
sequence_len: 2048
sample_packing: true
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_linear: true
wandb_entity:
gradient_accumulation_steps: 2
micro_batch_size: 4
num_epochs: 4
optimizer: adamw_torch_fused
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
tf32: false
gradient_checkpointing: true
logging_steps: 1
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens:
  pad_token: <|end_of_text|>
"""
FACTORY = """\
model_name_or_path: Qwen/Qwen3-4B-Instruct-2507
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: mine, chats
template: qwen3_nothink
cutoff_len: 2048
max_samples: 1000
overwrite_output_dir: true
output_dir: saves/qwen3
logging_steps: 10
save_steps: 500
plot_loss: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: constant_with_warmup
warmup_ratio: 0.1
bf16: true
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
report_to: none
"""
TRL: dict[str, Any] = {
    "model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "dataset_name": "trl-lib/Capybara",
    "dataset_config": "default",
    "dataset_train_split": "train",
    "dataset_test_split": "test",
    "learning_rate": 2.0e-4,
    "max_steps": 200,
    "warmup_steps": 20,
    "gradient_accumulation_steps": 4,
    "eval_strategy": "no",
    "save_strategy": "epoch",
    "packing": True,
    "completion_only_loss": False,
    "use_peft": True,
    "peft_config": {
        "r": 32,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "use_dora": True,
    },
    "model_init_kwargs": {"torch_dtype": "torch.bfloat16"},
    "optim": "adafactor",
    "report_to": ["tensorboard"],
    "lr_scheduler_type": "polynomial",
}
MLX = """\
model: mlx-community/Llama-3.2-1B-Instruct
train: true
data: my/chats
fine_tune_type: lora
num_layers: 16
batch_size: 4
iters: 1000
learning_rate: 1e-5
steps_per_report: 10
steps_per_eval: 200
save_every: 100
max_seq_length: 2048
grad_checkpoint: true
mask_prompt: false
lora_parameters:
  rank: 8
  scale: 20.0
  dropout: 0.0
lr_schedule:
  name: cosine_decay
  warmup: 100
  arguments: [1e-5, 1000]
"""


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def read(name: str, text: str) -> OtherFile:
    Path(name).write_text(text)
    return read_other_file(Path(name))


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
        ("a.yaml", "lora: {r: 8}\n", "this is a recipe of loratune already", "loratune plan"),
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


# ---- nothing is dropped silently

EXAMPLES = {
    "axolotl.yml": AXOLOTL,
    "factory.yaml": FACTORY,
    "trl.json": json.dumps(TRL),
    "mlx.yaml": MLX,
    "axolotl-pairs.yml": AXOLOTL.replace(
        "type: alpaca", "type: {field_prompt: q, field_chosen: good, prompt_format: x}"
    )
    + "rl: simpo\nsimpo_gamma: 0.3\ntest_datasets: [{path: x}]\ndeepspeed: {zero_optimization: {stage: 3}}\n",
    "axolotl-files.yml": AXOLOTL.replace(
        "path: teknium/GPT4-LLM-Cleaned", "path: json\n    data_files: [a.jsonl, b.jsonl]"
    ),
    "factory-pairs.yaml": FACTORY.replace("stage: sft", "stage: dpo\npref_loss: ipo\npref_beta: 0.2").replace(
        "mine, chats", "pairs"
    ),
    "mlx-full.yaml": MLX.replace(
        "fine_tune_type: lora", "fine_tune_type: full\nwandb: null\noptimizer_config: {adam: {}}"
    ),
}
INFO = {
    "mine": {"file_name": "m.json", "columns": {"prompt": "q", "history": "h", "images": "i"}, "num_samples": 3},
    "chats": {
        "hf_hub_url": "owner/chats",
        "split": "train",
        "formatting": "sharegpt",
        "columns": {"messages": "turns"},
        "tags": {"role_tag": "from", "content_tag": "value", "user_tag": "me", "assistant_tag": "gpt"},
    },
    "pairs": {"file_name": "p.json", "ranking": True, "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}},
}


def leaves(value: Any, name: str = "") -> Iterator[str]:
    """Every key of a file, by its full name, down to what is no mapping and no list of mappings."""
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from leaves(part, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for number, item in enumerate(value):
            yield from leaves(item, f"{name}.{number}")
    else:
        yield name


def comments_of(path: Path) -> str:
    return " ".join(line.strip().removeprefix("# ") for line in path.read_text().splitlines() if "#" in line)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_key_of_a_file_stands_in_the_comments_of_the_recipe(name: str) -> None:
    Path("data").mkdir()
    Path("data/dataset_info.json").write_text(json.dumps(INFO))
    Path(name).write_text(EXAMPLES[name])
    comments = comments_of(init(source=name)[0])
    values = yaml.safe_load(EXAMPLES[name])
    used = {entry: INFO[entry] for entry in str(values.get("dataset", "")).split(", ") if entry in INFO}
    for key in [*leaves(values), *(leaves({"dataset_info": used}) if used else ())]:
        whole = key.partition(".")[0] if key.startswith(("deepspeed.", "test_datasets.")) else key
        assert re.search(rf"\b{re.escape(whole)}: ", comments), f"{key} of {name} is dropped silently"


VALUES: tuple[Any, ...] = (False, 3, ["a", "b"], {"a": 1})
MORE_VALUES: tuple[Any, ...] = (True, 0, 0.5, "word", "", [1], [{"a": 1}], [], {}, None)
KNOWN = sorted({*SETTINGS, *_RULES, *TASK_KEYS, *DATA_WORDS, "datasets", "learning_rate", "never heard of"})


@pytest.mark.parametrize(
    "value", [*VALUES, *(pytest.param(value, marks=pytest.mark.slow) for value in MORE_VALUES)], ids=repr
)
def test_any_value_of_any_setting_is_accounted_for_or_an_error_with_its_line_its_value_and_a_fix(value: Any) -> None:
    for name in KNOWN:
        Path("a.yaml").write_text(yaml.safe_dump({"zero": 0, name: value}))
        found = answer_to(Path("a.yaml"))
        if isinstance(found, RecipeError):
            assert (found.file, found.line in (1, 2), bool(found.fix)) == ("a.yaml", True, True), f"{name}: {found}"
            told = [found.problem]
        else:
            told = [*itertools.chain(*found.origins.values()), *map(str, found.left_out)]
        assert any(text.startswith(name) for text in told), f"{name}: {value} is not in {told}"


def answer_to(path: Path) -> OtherFile | RecipeError:
    try:
        return read_other_file(path)
    except RecipeError as error:
        return error


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nmicro_batch_size: [2, 4]\n", "micro_batch_size is [2, 4], where one word or number belongs"),
        ("a: 1\nrl: {name: dpo}\n", "rl is {'name': 'dpo'}, where"),
        ("a: 1\nstage: [sft]\n", "stage is ['sft'], where"),
        ("a: 1\nadapter: {r: 8}\n", "adapter is {'r': 8}, where"),
        ("peft:\n  scale: [1]\n", "peft.scale is [1], where"),
    ],
)
def test_a_list_where_a_word_belongs_is_an_error_at_its_line(text: str, problem: str) -> None:
    with pytest.raises(RecipeError) as error:
        read("a.yaml", text)
    assert error.value.problem.startswith(problem)
    assert (error.value.file, error.value.line) == ("a.yaml", 2)
    assert "as one value" in error.value.fix


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({"completion_only_loss": False, "assistant_only_loss": True}, "assistant"),
        ({"assistant_only_loss": True, "completion_only_loss": False}, "assistant"),
        ({"completion_only_loss": False, "assistant_only_loss": False}, "all"),
        ({"train_on_inputs": False}, "assistant"),
        ({"train_on_inputs": True}, "all"),
        ({"train_on_prompt": False, "mask_history": True}, "last"),
        ({"mask_prompt": True}, "last"),
    ],
)
def test_several_settings_say_together_what_is_trained(settings: dict[str, Any], trained: str) -> None:
    assert read("a.json", json.dumps(settings)).settings["data.train_on"] == trained


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "completion_only_loss: true\ntrain_on_inputs: true\n",
            "train_on_inputs: true makes data.train_on all, but completion_only_loss: true makes it assistant",
        ),
        ("mask_history: true\ntrain_on_prompt: true\n", "train_on_prompt: true makes data.train_on all, but"),
        (
            "stage: pt\nassistant_only_loss: true\n",
            "assistant_only_loss: true makes data.train_on assistant, but stage",
        ),
        (
            "stage: sft\ntask_type: SEQ_CLS\n",
            "task_type: 'SEQ_CLS' makes model.task sequence_classification, but stage",
        ),
    ],
)
def test_settings_that_contradict_each_other_on_what_is_learned_are_refused(text: str, problem: str) -> None:
    with pytest.raises(RecipeError) as error:
        read("a.yaml", text)
    assert error.value.problem.startswith(problem)
    assert (error.value.line, error.value.fix) == (2, "remove one of them from the file")


def test_other_settings_that_contradict_each_other_are_told() -> None:
    found = read("a.yaml", "use_dora: true\nuse_rslora: true\nnum_train_epochs: 2\nnum_epochs: 3\n")
    assert found.settings == {"lora.variant": "dora", "train.epochs": 2}
    assert [str(item) for item in found.left_out] == [
        "use_rslora: true (lora.variant is 'dora' already, by use_dora: true)",
        "num_epochs: 3 (train.epochs is 2 already, by num_train_epochs: 2)",
    ]


def test_a_json_file_has_lines_and_no_key_twice() -> None:
    with pytest.raises(RecipeError) as error:
        read("a.json", '{\n "a": 1,\n "lr": [1]\n}')
    assert error.value.line == 3
    with pytest.raises(RecipeError, match="the key 'lr' occurs twice"):
        read("a.json", '{"lr": 1, "lr": 2}')
    with pytest.raises(RecipeError, match="where one word") as error:
        read("a.json", '{\n\t"lr": [1]}')
    assert error.value.line is None, "tabs are no YAML"


def test_a_file_of_mlx_lm_with_three_settings_is_no_recipe_of_ours() -> None:
    assert read("a.yaml", "model: m\ndata: d\ntrain: true\n").settings == {"model.name": "m", "data.train": "d"}
