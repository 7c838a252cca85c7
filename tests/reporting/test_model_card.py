from __future__ import annotations

import copy

import pytest
import yaml
from huggingface_hub import ModelCard

from loratune.reporting.model_card import model_card
from loratune.run.directory import Record, RunDir, read_json


@pytest.fixture
def lock(finished_run: RunDir) -> Record:
    lock: Record = copy.deepcopy(read_json(finished_run.lock))
    return lock


def test_a_base_and_data_of_the_hub_are_linked(lock: Record, finished_run: RunDir) -> None:
    lock["inputs"]["model_revision"] = "abc"
    lock["recipe"]["model"]["name"] = "org/base"
    lock["recipe"]["data"]["train"][0]["name"] = "org/chats"
    lock["recipe"]["data"]["eval"] = [{"name": "org/chats", "split": "test"}]
    card = ModelCard(
        model_card(lock, read_json(finished_run.plan), read_json(finished_run.evaluation), name="run", repo="me/it")
    )
    assert card.data.base_model == "org/base"
    assert card.data.datasets == ["org/chats"]
    assert {(result.dataset_type, result.dataset_name) for result in card.data.eval_results} == {("org/chats", "chats")}
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/it")' in card.text


def test_the_recipe_on_the_card_loads_and_names_no_folder_of_this_machine(lock: Record, finished_run: RunDir) -> None:
    text = model_card(lock, read_json(finished_run.plan), None, name="run", repo="me/it")
    recipe = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert recipe["lora"] == lock["recipe"]["lora"]
    assert "/" not in recipe["model"]["name"]
    assert lock["inputs"]["model_path"] not in text
    assert "## Results" not in text
    assert "was not measured" in text
    here = model_card(lock, read_json(finished_run.plan), None, name="run")
    assert lock["inputs"]["model_path"] in here, "on this machine the card says where the base lies"
