"""What a checkpoint holds, value by value, on a model of a few hundred weights."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from loratune.model.adapter.attach import attach_adapter, trainable_parameters
from loratune.recipe.recipe import LoraSection, TrainSection
from loratune.run.digest import file_sha256
from loratune.run.directory import RunDir
from loratune.run.errors import RunError
from loratune.run.progress import NoProgress
from loratune.training import checkpoint
from loratune.training.checkpoint import (
    averaged_steps,
    best_checkpoint,
    checkpoints_in,
    damage_of,
    latest_checkpoint,
    load_adapter_weights,
    load_mean,
    load_optimizer,
    load_random,
    newest_valid_checkpoint,
    remove_checkpoint,
    resume_state,
    save_checkpoint,
)

ADAPTER = "adapter_model.safetensors"


class State:
    """What is saved of an optimizer or a schedule, and what is put back."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class Warnings(NoProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def warn(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def model() -> PeftModel:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    base = LlamaForCausalLM(config)
    return attach_adapter(base, LoraSection(r=2), ("model.layers.0.self_attn.q_proj",), base_name="x", seed=0)


def fill(model: PeftModel, value: float) -> None:
    with torch.no_grad():
        for weight in trainable_parameters(model).values():
            weight.fill_(value)


def save(folder: Path, step: int, model: PeftModel, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "model": model,
        "optimizer": State({"state": {}, "param_groups": []}),
        "scheduler": State({"last_epoch": step}),
        "trainer_state": json.dumps({"global_step": step}),
        "keep": None,
        "held_out": {},
    }
    save_checkpoint(folder / str(step), **settings | changes)
    return folder / str(step)


def steps_in(folder: Path) -> list[int]:
    return [int(path.name) for path in checkpoints_in(folder)]


def test_the_newest_are_kept_with_the_best_and_those_that_are_needed(model: PeftModel, tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, model)
    held_out = {1: 3.0, 2: 1.0, 3: math.nan, 4: 2.0, 5: None}
    save(tmp_path, 6, model, keep=2, held_out=held_out, keep_too=[3])
    assert steps_in(tmp_path) == [2, 3, 5, 6]
    save(tmp_path, 7, model, keep=1)
    assert steps_in(tmp_path) == [7]


def test_the_best_has_the_lowest_loss_the_first_of_equals(model: PeftModel, tmp_path: Path) -> None:
    for step in (2, 10, 30):
        save(tmp_path, step, model)
    assert best_checkpoint(tmp_path, {}) is None
    assert best_checkpoint(tmp_path, {2: None, 10: math.nan, 30: math.inf}) is None
    assert best_checkpoint(tmp_path, {2: 2.0, 10: 1.5, 30: 1.5}) == 10
    assert best_checkpoint(tmp_path, {4: 0.1, 30: 1.5, 2: 2.0}) == 30, "step 4 has no checkpoint"


def test_only_folders_with_a_number_are_checkpoints(model: PeftModel, tmp_path: Path) -> None:
    assert checkpoints_in(tmp_path / "none") == []
    save(tmp_path, 10, model)
    save(tmp_path, 9, model)
    (tmp_path / "11").write_text("a file")
    (tmp_path / ".12.tmp").mkdir()
    assert steps_in(tmp_path) == [9, 10]


def test_a_checkpoint_that_is_written_again_replaces_the_first(model: PeftModel, tmp_path: Path) -> None:
    save(tmp_path, 3, model, trainer_state=json.dumps({"global_step": 1}))
    (tmp_path / ".3.tmp").mkdir()  # left behind by a kill
    (tmp_path / ".3.old.tmp").mkdir()
    assert resume_state(save(tmp_path, 3, model)) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["3"]
    remove_checkpoint(tmp_path / "3")
    remove_checkpoint(tmp_path / "3")
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_has_every_other_file(model: PeftModel, tmp_path: Path) -> None:
    folder = save(tmp_path, 1, model)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == {path.name: file_sha256(path) for path in folder.iterdir() if path.name != "manifest.json"}
    assert len(manifest) == 5


def test_everything_is_on_the_disk_before_the_checkpoint_has_its_name(
    model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(checkpoint, "sync", lambda path: synced.append(path.name))
    save(tmp_path, 1, model)
    assert synced[-3:] == ["manifest.json", ".1.tmp", tmp_path.name]
    assert len(synced) == 5 + 3
    assert set(synced[:5]) == {path.name for path in (tmp_path / "1").iterdir()} - {"manifest.json"}


@pytest.mark.parametrize("name", [ADAPTER, "optimizer.safetensors", "random.safetensors", "state.json"])
def test_a_changed_file_is_damage(model: PeftModel, tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, 1, model)
    assert damage_of(folder) == ""
    file = folder / name
    file.write_bytes(file.read_bytes() + b" ")
    assert damage_of(folder) == f"{name} changed"
    file.unlink()
    assert name in damage_of(folder)


def test_damaged_newer_checkpoints_are_deleted(model: PeftModel, tmp_path: Path) -> None:
    run, progress = RunDir(root=tmp_path), Warnings()
    assert newest_valid_checkpoint(run, progress) is None
    assert latest_checkpoint(run.checkpoints) == (None, {})
    for step in (1, 2, 3):
        save(run.checkpoints, step, model)
    (run.checkpoints / "3" / ADAPTER).write_bytes(b"")
    assert newest_valid_checkpoint(run, progress) == run.checkpoints / "2"
    assert steps_in(run.checkpoints) == [1, 2]
    assert len(progress.lines) == 1
    assert "checkpoint 3" in progress.lines[0]
    for step in (1, 2):
        (run.checkpoints / str(step) / ADAPTER).write_bytes(b"")
    with pytest.raises(RunError, match="every checkpoint is damaged"):
        newest_valid_checkpoint(run, progress)
    assert steps_in(run.checkpoints) == [1, 2], "they are left for the user to look at"


def test_the_adapter_is_put_back(model: PeftModel, tmp_path: Path) -> None:
    fill(model, 0.25)
    folder = save(tmp_path, 1, model)
    fill(model, 7.0)
    load_adapter_weights(folder, model)
    assert all(bool((weight == 0.25).all()) for weight in trainable_parameters(model).values())


def test_the_mean_is_taken_weight_by_weight_in_double_precision(model: PeftModel, tmp_path: Path) -> None:
    folders = []
    for step, value in enumerate((1.0, 2.0, 6.0), start=1):
        fill(model, value)
        folders.append(save(tmp_path, step, model))
    load_mean(folders, model)
    for weight in trainable_parameters(model).values():
        assert weight.dtype == torch.float32
        assert bool((weight == 3.0).all())
    # In float32 the sum would lose the 1, and the mean would be 0.
    tensors = load_file(folders[0] / ADAPTER)
    for folder, value in zip(folders, (2.0**25, 3.0, -(2.0**25)), strict=True):
        save_file({name: torch.full_like(tensor, value) for name, tensor in tensors.items()}, folder / ADAPTER)
    load_mean(folders, model)
    assert all(bool((weight == 1.0).all()) for weight in trainable_parameters(model).values())


def test_optimizer_and_schedule_are_put_back(model: PeftModel, tmp_path: Path) -> None:
    table = torch.arange(4.0)  # that two parameters share, as in bitsandbytes
    state = {
        "state": {
            0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 3).T, "count": 5, "nested": {"a": table, "n": 1}},
            12: {"step": torch.tensor(4.0), "qmap": table},
        },
        "param_groups": [{"lr": 0.5, "betas": [0.9, 0.999], "params": [0, 12]}],
    }
    folder = save(tmp_path, 1, model, optimizer=State(state), scheduler=State({"last_epoch": 8}))
    optimizer, scheduler = State({}), State({})
    load_optimizer(folder, optimizer, scheduler)
    assert scheduler.state == {"last_epoch": 8}
    assert optimizer.state["param_groups"] == state["param_groups"]
    loaded = optimizer.state["state"]
    assert loaded.keys() == {0, 12}
    assert loaded[0].keys() == {"step", "exp_avg", "count", "nested"}
    assert loaded[0]["count"] == 5
    assert loaded[0]["step"] == 3
    assert torch.equal(loaded[0]["exp_avg"], torch.ones(3, 2))
    assert loaded[0]["nested"]["n"] == 1
    assert torch.equal(loaded[0]["nested"]["a"], table)
    assert loaded[12].keys() == {"step", "qmap"}
    assert torch.equal(loaded[12]["qmap"], table)


def test_every_generator_goes_on_where_it_was(model: PeftModel, tmp_path: Path) -> None:
    random.seed(1)
    np.random.seed(2)
    np.random.standard_normal()  # keeps a second number back
    torch.manual_seed(3)
    folder = save(tmp_path, 1, model)
    expected = random.random(), np.random.standard_normal(), np.random.rand(), torch.rand(1)
    for number in (4, 5):
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)
    load_random(folder)
    assert (random.random(), np.random.standard_normal(), np.random.rand(), torch.rand(1)) == expected


def test_random_states_of_another_number_of_gpus_are_refused(model: PeftModel, tmp_path: Path) -> None:
    folder = save(tmp_path, 1, model)
    here = torch.cuda.device_count()
    tensors = load_file(folder / "random.safetensors")
    save_file({**tensors, f"cuda{here:03d}": torch.zeros(1)}, folder / "random.safetensors")
    with pytest.raises(RunError, match=f"{here + 1} GPUs, but this machine has {here}"):
        load_random(folder)


def test_which_steps_are_averaged() -> None:
    train = TrainSection.model_validate({"average_checkpoints": 2, "save_every": 3})
    at = {"num_steps": 10, "num_per_epoch": 5}
    assert averaged_steps(train, last_step=10, **at) == [9, 10]
    assert averaged_steps(train, last_step=9, **at) == [6, 9], "the last step is not counted twice"
    assert averaged_steps(train, last_step=2, **at) == [2]
