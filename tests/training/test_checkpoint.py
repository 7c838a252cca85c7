from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from loratune.recipe.recipe import Recipe
from loratune.run.directory import read_json
from loratune.run.errors import MachineError, RecipeError, RunError
from loratune.training.checkpoint import checkpoints_in, latest_checkpoint, load_random, save_checkpoint
from loratune.workflows.resume import resume
from loratune.workflows.train import train
from tests.conftest import write_jsonl

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, PeftModel]:
    """Three checkpoints of a small adapted model with an optimizer that has taken a step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from loratune.model.adapter.attach import attach_adapter, trainable_parameters
    from loratune.recipe.recipe import LoraSection

    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    model = attach_adapter(
        LlamaForCausalLM(config), LoraSection(r=2), ("model.layers.0.self_attn.q_proj",), base_name="x", seed=0
    )
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=0.1)
    for parameter in trainable_parameters(model).values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in (2, 4, 10):
        save_checkpoint(
            tmp_path / str(step),
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            trainer_state="{}",
            keep=None,
            held_out={},
        )
    return tmp_path, model


def test_checkpoints_are_plain_files_that_nothing_unpickles(saved: tuple[Path, PeftModel]) -> None:
    folder, _ = saved
    names = {path.name for path in (folder / "10").iterdir()}
    assert names == {
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "random.safetensors",
        "state.json",
        "trainer_state.json",
        "manifest.json",
    }


def test_the_newest_undamaged_checkpoint_is_chosen(saved: tuple[Path, PeftModel]) -> None:
    folder, _ = saved
    assert [path.name for path in checkpoints_in(folder)] == ["2", "4", "10"]
    with (folder / "10" / "optimizer.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        last = stream.read(1)
        stream.seek(-1, 2)
        stream.write(bytes([last[0] ^ 1]))
    (folder / "4" / "state.json").unlink()
    chosen, damaged = latest_checkpoint(folder)
    assert chosen == folder / "2"
    assert list(damaged) == [folder / "10", folder / "4"]
    assert "optimizer.safetensors changed" in damaged[folder / "10"]


@pytest.mark.parametrize("manifest", ["{}", "[]", '{"../lock.json": "0"}', "nothing"])
def test_a_manifest_that_names_other_files_is_damage(saved: tuple[Path, PeftModel], manifest: str) -> None:
    folder, _ = saved
    (folder / "10" / "manifest.json").write_text(manifest)
    chosen, damaged = latest_checkpoint(folder)
    assert chosen == folder / "4"
    assert list(damaged) == [folder / "10"]


def test_random_states_come_back(saved: tuple[Path, PeftModel]) -> None:
    folder, _ = saved
    load_random(folder / "10")
    before = (random.random(), np.random.rand(), torch.rand(1))
    load_random(folder / "10")
    assert (random.random(), np.random.rand(), torch.rand(1)) == before


def test_a_save_that_fails_leaves_the_earlier_checkpoints(saved: tuple[Path, PeftModel]) -> None:
    folder, model = saved

    class Full:
        def state_dict(self) -> dict[str, object]:
            raise OSError(28, "No space left on device")

    with pytest.raises(MachineError, match="No space left"):
        save_checkpoint(
            folder / "20", model=model, optimizer=Full(), scheduler=None, trainer_state="", keep=1, held_out={}
        )
    assert latest_checkpoint(folder)[0] == folder / "10"
    assert sorted(path.name for path in folder.iterdir()) == ["10", "2", "4"]


def test_only_the_newest_are_kept_and_the_best(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    keep = {"train__save_every": 1, "train__keep_checkpoints": 2}
    run = train(tiny_recipe(**keep, train__eval_every="never")).run
    assert [path.name for path in checkpoints_in(run.checkpoints)] == ["5", "6"]
    assert not run.best.exists()
    # held-out answers in words that training never shows: the longer it trains, the worse they get
    said = [{"role": "user", "content": "Describe"}, {"role": "assistant", "content": "quartz zebra 7 7 7"}]
    other = write_jsonl(tmp_path / "other.jsonl", [{"messages": said}])
    recipe = tiny_recipe(
        **keep,
        train__eval_every=1,
        train__final_adapter="best",
        data__eval=str(other),
        lora__targets="complete",
        train__learning_rate=5e-2,
        train__output_dir=str(tmp_path / "b"),
    )
    run = train(recipe).run
    losses = {line["step"]: line["eval_nll"] for line in run.read_metrics() if "eval_nll" in line}
    best = min(losses, key=lambda step: losses[step])
    assert best < 5, losses
    assert [path.name for path in checkpoints_in(run.checkpoints)] == [str(best), "5", "6"]
    assert read_json(run.best) == {"step": best, "eval_nll": losses[best], "checkpoint": f"checkpoints/{best}"}
    name = "adapter_model.safetensors"
    adapter, kept = load_file(run.adapter / name), load_file(run.checkpoints / str(best) / name)
    assert all(torch.equal(adapter[key], kept[key]) for key in adapter)
    assert adapter.keys() == kept.keys()
    assert read_json(run.evaluation)["tuned"]["nll"] == pytest.approx(losses[best])


def test_resume_refuses_what_it_cannot_continue(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}"}]}
        for i in range(16)
    ]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    run = train(tiny_recipe(data__train=str(data), train__epochs=1)).run
    with pytest.raises(RecipeError, match="the run is finished"):
        resume(run.root)
    shutil.rmtree(run.adapter)
    written = run.recipe.read_text()
    run.recipe.write_text(written.replace("learning_rate: 0.01", "learning_rate: 0.02"))
    with pytest.raises(RecipeError, match=r"since the run started: train\.learning_rate \(0\.01 → 0\.02\)"):
        resume(run.root)
    run.recipe.write_text(f"# a comment changes nothing\n{written}")
    data.write_text("\n".join(json.dumps(row) for row in rows[1:] + rows[:1]))
    with pytest.raises(RecipeError, match=r"changed since the run started: inputs\.train"):
        resume(run.root)
    data.write_text("\n".join(json.dumps(row) for row in rows))
    for path in checkpoints_in(run.checkpoints):
        (path / "manifest.json").unlink()
    with pytest.raises(RunError, match="every checkpoint is damaged"):
        resume(run.root)
