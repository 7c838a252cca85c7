"""Every setting of another tool's file is taken over or named, and what contradicts it too."""

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
from loratune.run.errors import RecipeError
from loratune.workflows.guidance.init import init
from loratune.workflows.guidance.other_tools.data import DATA_WORDS
from loratune.workflows.guidance.other_tools.preferences import TASK_KEYS
from loratune.workflows.guidance.other_tools.read import OtherFile, read_other_file
from loratune.workflows.guidance.other_tools.rules import _RULES
from tests.workflows.guidance.other_tools.files import AXOLOTL, FACTORY, MLX, TRL, read

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
