"""The datasets in files of other tools: what each key of theirs becomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from loratune.workflows.guidance.other_tools.data import data_parts, factory_entries
from loratune.workflows.guidance.other_tools.read import OtherFile, read_other_file
from loratune.workflows.guidance.other_tools.settings import OtherSettings


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def axolotl(*datasets: dict[str, Any]) -> OtherFile:
    Path("a.yaml").write_text(yaml.safe_dump({"base_model": "m", "datasets": list(datasets)}))
    return read_other_file(Path("a.yaml"))


def factory(names: str, **entries: Any) -> OtherFile:
    Path("data").mkdir(exist_ok=True)
    Path("data/dataset_info.json").write_text(json.dumps(entries))
    Path("a.yaml").write_text(yaml.safe_dump({"stage": "sft", "dataset": names}))
    return read_other_file(Path("a.yaml"))


def told(found: OtherFile) -> dict[str, str]:
    return {item.name: item.reason for item in found.left_out}


def test_a_list_of_files_is_a_list_of_sources() -> None:
    found = axolotl({"path": "json", "data_files": ["a.jsonl", "b.jsonl"], "ds_type": "json", "split": "train"})
    assert found.settings["data.train"] == [{"name": "a.jsonl"}, {"name": "b.jsonl"}]
    assert told(found) == {
        "datasets.0.path": "the names of the files say how they are read",
        "datasets.0.ds_type": "the names of the files say how they are read",
        "datasets.0.split": "a file has none",
    }
    Path("rows").mkdir()
    assert axolotl({"path": "rows", "data_files": "a.jsonl"}).settings["data.train"] == [{"name": "rows/a.jsonl"}]


def test_files_of_a_hub_dataset_cannot_be_chosen_and_this_is_told() -> None:
    found = axolotl({"path": "owner/rows", "data_files": ["a.jsonl"], "split": "train"})
    assert found.settings["data.train"] == [{"name": "owner/rows", "split": "train"}]
    assert told(found) == {"datasets.0.data_files": "data.train takes whole Hub datasets, by their config and split"}
    found = axolotl({"path": "json", "data_files": {"train": "a.jsonl"}})
    assert "data.train" not in found.settings
    assert set(told(found)) == {"datasets.0.path", "datasets.0.data_files.train"}


def test_a_type_of_own_fields() -> None:
    kind = {"field_instruction": "q", "field_output": "output", "format": "[INST] {instruction}", "system_prompt": "x"}
    found = axolotl({"path": "a.jsonl", "type": kind})
    assert found.settings["data.columns"] == {"instruction": "q"}
    template = "the tokenizer's chat template writes the prompt"
    assert told(found) == {
        "datasets.0.type.field_output": "read by this name anyway",
        "datasets.0.type.format": template,
        "datasets.0.type.system_prompt": template,
    }


def test_datasets_that_differ() -> None:
    found = axolotl({"path": "a", "type": "alpaca"}, {"path": "b", "type": "chat_template", "field_messages": "turns"})
    assert found.settings["data.train"] == [{"name": "a"}, {"name": "b"}]
    assert found.settings["data.columns"] == {"messages": "turns"}
    assert told(found)["datasets.0.type"] == told(found)["datasets.1.type"]
    found = axolotl({"path": "a", "field_messages": "one"}, {"path": "b", "field_messages": "two"})
    assert found.settings["data.columns"] == {"messages": "one"}
    assert "data.columns is {'messages': 'one'} already, by datasets.0.field_messages" in str(found.left_out[0])


def test_a_type_that_is_unknown_leaves_the_format_to_the_rows() -> None:
    found = axolotl({"path": "a", "type": "context_qa.load_v2"})
    assert found.settings["data.train"] == [{"name": "a"}]
    assert told(found) == {"datasets.0.type": "data.format: auto finds the format of each dataset"}


def test_who_is_trained_is_taken_over() -> None:
    item = {"path": "a", "type": "chat_template", "roles_to_train": ["user", "assistant"], "train_on_eos": "turn"}
    found = axolotl(item)
    assert found.settings["data.train_on"] == ["user", "assistant"]
    assert told(found) == {"datasets.0.train_on_eos": "unknown to loratune"}


def test_every_column_and_tag_of_dataset_info_is_read_or_told() -> None:
    tags = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "bot"}
    found = factory(
        "a, b",
        a={"file_name": "a.json", "columns": {"prompt": "q", "history": "past", "images": "i"}, "num_samples": 5},
        b={"hf_hub_url": "owner/b", "split": "test", "formatting": "sharegpt", "tags": tags},
    )
    assert found.settings["data.train"] == [{"name": "data/a.json"}, {"name": "owner/b", "split": "test"}]
    assert found.settings["data.columns"] == {"instruction": "q"}
    reasons = told(found)
    assert reasons["dataset_info.a.columns.history"] == "data.columns has no such field"
    assert reasons["dataset_info.a.columns.images"] == "data.columns has no such field"
    assert reasons["dataset_info.a.num_samples"] == "unknown to loratune"
    assert reasons["dataset_info.b.tags.user_tag"] == "read as this role anyway"
    assert reasons["dataset_info.b.tags.assistant_tag"].endswith("rename it in the data")
    found = factory("c", c={"file_name": "c.json", "formatting": "sharegpt", "tags": {"role_tag": "speaker"}})
    assert "rename these keys" in told(found)["dataset_info.c.tags.role_tag"]
    found = factory("d", d={"script_url": "d.py"})
    assert told(found)["dataset"].startswith("d is neither a file nor a Hub dataset")


def test_the_parts_name_each_key_once() -> None:
    named = {"dataset_name": "owner/rows", "dataset_config": "small", "dataset_test_split": "test"}
    file = OtherSettings(path=Path("a.yaml"), named=named, lines={})
    assert [part.name for part in data_parts(file, pairs=False)] == list(named)
    assert factory_entries(file, "dataset") == {}
