"""Processes that share the base (FSDP2) take the steps of one that holds all of it."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loratune.planning.checks import check_sharded
from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir, read_json, write_json
from loratune.run.errors import RecipeError
from loratune.workflows.resume import resume
from tests.invariants.test_processes import (
    SETTINGS,
    TORCHRUN,
    WAIT_SECONDS,
    command,
    lose_the_end,
    one,
    process_of,
    sizes,
    started,
    wait_for,
    write_recipe,
)
from tests.invariants.test_same_mathematics import assert_same

__all__ = ["one"]

MakeRecipe = Callable[..., Recipe]
SHARDED = {**SETTINGS, "train__strategy": "fsdp"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_that_share_the_base_take_the_steps_of_one(
    tiny_recipe: MakeRecipe, one: RunDir, tmp_path: Path, number: int
) -> None:
    file, run = write_recipe(tiny_recipe(**SHARDED), tmp_path, "shared")
    done = command([*TORCHRUN, f"--nproc-per-node={number}", "-m", "loratune", "train", file])
    assert done.returncode == 0, done.stderr
    assert_same(one, run, tolerance=1e-5)
    assert sizes(run) == sizes(one)
    measured, expected = read_json(run.evaluation), read_json(one.evaluation)
    for name in ("base", "tuned"):
        assert measured[name]["nll"] == pytest.approx(expected[name]["nll"], abs=1e-5)
        assert measured[name]["exact_match"] == expected[name]["exact_match"]
    assert read_json(run.lock)["recipe"]["train"]["strategy"] == "fsdp"
    assert run.is_complete
    lose_the_end(run)
    assert_same(one, resume(run.root).run, tolerance=1e-5)  # in one process, which holds all of it


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"train__recompute": 1},
        {"train__batch_size": 1, "train__epochs": 0.5, "train__save_every": "epoch", "train__eval_every": 4},
        {"data__streaming": True},
        {"lora__variant": "dora"},
        {"lora__modules_to_save": ["lm_head", "norm", "layers.1.input_layernorm"], "train__learning_rate": 1e-3},
        {"lora__new_tokens": ["Describ"]},
        {"train__final_adapter": "best", "evaluate__forgetting": "same"},
    ],
    ids=["recomputed", "a-process-without-examples", "streamed", "dora", "whole", "new-tokens", "best"],
)
def test_so_they_do_with(
    tiny_recipe: MakeRecipe, chat_files: tuple[Path, Path], tmp_path: Path, settings: dict[str, object]
) -> None:
    if settings.get("evaluate__forgetting"):
        settings = {**settings, "evaluate__forgetting": [str(chat_files[1])]}
    runs = []
    for strategy in ("ddp", "fsdp"):
        recipe = tiny_recipe(**{**SHARDED, **settings, "train__strategy": strategy})
        file, run = write_recipe(recipe, tmp_path, strategy)
        done = command([*TORCHRUN, "--nproc-per-node=2", "-m", "loratune", "train", file])
        assert done.returncode == 0, done.stderr
        runs.append(run)
    assert_same(*runs, tolerance=1e-5)
    assert sizes(runs[0]) == sizes(runs[1])
    whole, shared = (read_json(run.evaluation) for run in runs)
    assert shared["tuned"]["nll"] == pytest.approx(whole["tuned"]["nll"], abs=1e-5)
    if "forgetting" in whole:
        assert shared["forgetting"]["tuned"]["nll"] == pytest.approx(whole["forgetting"]["tuned"]["nll"], abs=1e-5)


@pytest.mark.slow
def test_with_dropout_a_resumed_run_is_the_uninterrupted_one_to_the_bit(
    tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    file, run = write_recipe(tiny_recipe(**{**SHARDED, "lora__dropout": 0.1}), tmp_path, "shared")
    done = command([*TORCHRUN, "--nproc-per-node=2", "-m", "loratune", "train", file])
    assert done.returncode == 0, done.stderr
    whole = RunDir(tmp_path / "whole")
    shutil.copytree(run.root, whole.root)
    lose_the_end(run)
    done = command([sys.executable, "-m", "loratune", "resume", run.root, "--processes", 2])
    assert done.returncode == 0, done.stderr
    assert_same(whole, run, tolerance=0)
    run.evaluation.unlink()  # what a kill leaves after the adapter was saved
    plan = read_json(run.plan)
    plan.pop("measured")
    write_json(run.plan, plan)
    done = command([sys.executable, "-m", "loratune", "resume", run.root, "--processes", 2])
    assert done.returncode == 0, done.stderr
    assert read_json(run.evaluation)["tuned"] == read_json(whole.evaluation)["tuned"]


@pytest.mark.slow
def test_a_killed_process_is_started_again(tiny_recipe: MakeRecipe, one: RunDir, tmp_path: Path) -> None:
    file, run = write_recipe(tiny_recipe(**SHARDED), tmp_path, "killed")
    options = ["--nproc-per-node=2", "--max-restarts=1", "-m", "loratune", "train", file]
    with started([*TORCHRUN, *options]) as process:
        wait_for((run.checkpoints / "2").is_dir)
        process_of(process.pid, 1).send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 0, output
    assert "resuming after step" in output
    assert_same(one, run, tolerance=1e-5)
    assert sizes(run) == sizes(one)


@pytest.mark.slow
def test_each_process_keeps_a_part_of_the_layers(tiny_model: Path, tmp_path: Path) -> None:
    script = tmp_path / "parts.py"
    script.write_text(
        """
import sys, torch
from loratune.model.adapter.attach import attach_adapter
from loratune.model.adapter.targets import resolve_targets
from loratune.recipe.recipe import LoraSection
from loratune.run import processes
from loratune.training.fsdp import shard_layers
from loratune.training.layers import decoder_layers
from transformers import AutoModelForCausalLM

processes.start()
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = attach_adapter(base, LoraSection(r=2), resolve_targets(base, "complete"), base_name="x", seed=0)
ids = torch.arange(3, 40)[None]
def held():
    own = lambda w: w.to_local().numel() if hasattr(w, "to_local") else w.numel()
    return [sum(own(w) for w in layer.parameters() if not w.requires_grad) for layer in decoder_layers(model)]
with torch.no_grad():
    before, whole = model(ids).logits, held()
    shard_layers(model, "cpu")
    after = model(ids).logits
assert torch.equal(before, after)
assert [2 * part for part in held()] == whole, (held(), whole)
for _ in range(2):
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    assert [2 * part for part in held()] == whole
    assert all(w.grad is not None for w in model.parameters() if w.requires_grad)
print("halves")
""",
        encoding="utf-8",
    )
    done = command([*TORCHRUN, "--nproc-per-node=2", script, tiny_model])
    assert done.stdout.count("halves") == 2, done.stderr


def test_what_cannot_be_shared_is_refused(tiny_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"train\.strategy is fsdp, but lora\.variant is pissa"):
        check_sharded(tiny_recipe(train__strategy="fsdp", lora__variant="pissa"))
    with pytest.raises(RecipeError, match=r"train\.strategy is fsdp, but model\.quantization is nf4"):
        check_sharded(tiny_recipe(train__strategy="fsdp", model__quantization="nf4"))
    with pytest.raises(RecipeError, match=r"the base does not fit one device, .* lora\.variant is eva"):
        check_sharded(tiny_recipe(lora__variant="eva"))
