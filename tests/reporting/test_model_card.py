from __future__ import annotations

import copy

import pytest
import yaml
from huggingface_hub import ModelCard

from loratune.reporting.model_card import model_card
from loratune.run.directory import Record, RunDir, read_json
from loratune.run.records.base import parse
from loratune.run.records.evaluation import EvaluationRecord
from loratune.run.records.files import read_record
from loratune.run.records.lock import LockRecord
from loratune.run.records.plan import PlanRecord


@pytest.fixture
def lock(finished_run: RunDir) -> Record:
    lock: Record = copy.deepcopy(read_json(finished_run.lock))
    return lock


def test_a_base_and_data_of_the_hub_are_linked(lock: Record, finished_run: RunDir) -> None:
    lock["inputs"]["model_revision"] = "abc"
    lock["recipe"]["model"]["name"] = "org/base"
    lock["recipe"]["data"]["train"][0]["name"] = "org/chats"
    lock["recipe"]["data"]["eval"] = [{"name": "org/chats", "split": "test"}]
    evaluation = read_record(finished_run.evaluation, EvaluationRecord)
    plan = read_record(finished_run.plan, PlanRecord)
    card = ModelCard(model_card(parse(LockRecord, lock), plan, evaluation, name="run", repo="me/it"))
    assert card.data.base_model == "org/base"
    assert card.data.datasets == ["org/chats"]
    assert {(result.dataset_type, result.dataset_name) for result in card.data.eval_results} == {("org/chats", "chats")}
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/it")' in card.text


def test_the_recipe_on_the_card_loads_and_names_no_folder_of_this_machine(lock: Record, finished_run: RunDir) -> None:
    record, plan = parse(LockRecord, lock), read_record(finished_run.plan, PlanRecord)
    text = model_card(record, plan, None, name="run", repo="me/it")
    recipe = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert recipe["lora"] == lock["recipe"]["lora"]
    assert "/" not in recipe["model"]["name"]
    assert lock["inputs"]["model_path"] not in text
    assert "## Results" not in text
    assert "was not measured" in text
    here = model_card(record, plan, None, name="run")
    assert lock["inputs"]["model_path"] in here, "on this machine the card says where the base lies"
