"""What can be known to be wrong is reported before the weights load, by plan, train and resume alike."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from transformers import AutoTokenizer

from loratune.model.adapter.targets import Matrix
from loratune.planning import checks
from loratune.planning.parameters import MatrixCount, ParameterCount
from loratune.recipe.recipe import Recipe
from loratune.run.errors import DataError, MachineError, RecipeError
from loratune.workflows.plan import plan
from loratune.workflows.resume import resume
from loratune.workflows.train import train
from tests.conftest import write_jsonl

MakeRecipe = Callable[..., Recipe]


def test_a_tracker_whose_own_packages_are_missing_is_refused(
    tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "trackio.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(RecipeError, match="cannot be imported: No module named 'no_such_package'"):
        checks.check_trackers(tiny_recipe(train__report_to=["trackio"]))


def test_a_tracker_without_its_key_is_refused(tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda _: object())
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    monkeypatch.setenv("NETRC", os.devnull)
    recipe = tiny_recipe(train__report_to=["wandb"])
    with pytest.raises(RecipeError, match="no API key is set") as error:
        checks.check_trackers(recipe)
    assert error.value.fix == "wandb login, or WANDB_MODE=offline"
    monkeypatch.setenv("WANDB_API_KEY", "k")
    checks.check_trackers(recipe)


def test_an_output_directory_below_a_file_is_refused(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="this is not a folder") as error:
        plan(tiny_recipe(train__output_dir=str(tmp_path / "file" / "run")))
    assert error.value.file == str(tmp_path / "file")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    tiny_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<new>"}]
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": chat}])
    size = len(tokenizer)
    with pytest.raises(
        RecipeError, match=f"produces token {size - 1}, but the model has only {size - 1} embeddings"
    ) as error:
        plan(tiny_recipe(model__name=str(folder), data__train=str(rows), data__eval="none"))
    assert error.value.place == f"{rows}:1"


def test_answers_that_do_not_fit_the_model_are_refused(tiny_recipe: MakeRecipe, chat_files: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match="do not fit the model's 512 positions") as error:
        plan(tiny_recipe(evaluate__metric="contains", evaluate__max_new_tokens=500))
    assert error.value.place == f"{chat_files[1]}:1"
    assert error.value.fix.startswith("evaluate.max_new_tokens=")


def test_a_metric_without_answers_to_score_is_refused(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"Story {n}."} for n in range(4)])
    recipe = tiny_recipe(data__train=str(rows), data__eval=str(rows), data__train_on="all", evaluate__metric="contains")
    with pytest.raises(DataError, match="no held-out conversation has an answer"):
        plan(recipe)


def test_resume_checks_what_plan_and_train_check(tiny_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    recipe = tiny_recipe(model__name=str(folder), data__eval="none", train__epochs=1)
    run = train(recipe).run
    (run.adapter / "adapter_config.json").unlink()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    for start in (lambda: plan(recipe), lambda: train(recipe, overwrite=True), lambda: resume(run.root)):
        with pytest.raises(RecipeError, match="cut short"):
            start()
    assert run.lock.is_file()


@pytest.mark.parametrize(
    ("settings", "words", "fix"),
    [
        (
            {"train__average_checkpoints": 3},
            "is 3, but a run of 6 steps with train.save_every epoch saves only 2",
            "train.save_every=2",
        ),
        (
            {"train__average_checkpoints": 7},
            "is 7, but a run of 6 steps",
            "more epochs, or train.average_checkpoints=2",
        ),
        (
            {"lora__r": 1000},
            r"lora\.r is 1,000, far more than both sides of model.*q_proj, which is 32 × 32",
            "32 or less",
        ),
        ({"lora__rank_pattern": {"v_proj": 999}}, r"lora\.rank_pattern is 999, .*16 × 32", "16 or less"),
        ({"lora__rank_pattern": {"k_proj": 2}}, "k_proj applies to none", "adapted are q_proj, v_proj"),
        (
            {"lora__rank_pattern": {"q_proj": 2, "0.self_attn.q_proj": 3}},
            "0.self_attn.q_proj applies to none.*q_proj, which comes before it",
            "write 0.self_attn.q_proj before q_proj",
        ),
        ({"lora__modules_to_save": ["rotary_emb"]}, "rotary_emb is a LlamaRotaryEmbedding", "leave out rotary_emb"),
    ],
)
def test_settings_that_do_not_fit_this_model_and_data_are_refused(
    tiny_recipe: MakeRecipe, settings: dict[str, object], words: str, fix: str
) -> None:
    with pytest.raises(RecipeError, match=words) as error:
        plan(tiny_recipe(**settings))
    assert error.value.fix.startswith(fix)


def test_settings_without_effect_in_this_run_are_warned_about(tiny_recipe: MakeRecipe) -> None:
    reported = plan(tiny_recipe(train__early_stopping=1, lora__r=20)).notes.warnings
    assert any(
        words.startswith("train.early_stopping is 1, but this run measures the held-out loss only 2 times")
        for words in reported
    )
    assert any("such as model.layers.0.self_attn.v_proj (16 × 32) with 20" in words for words in reported)
    settings = {"train__final_adapter": "best", "train__eval_every": 4, "train__save_every": 5}
    assert any(
        "only the last step is both saved and evaluated" in words
        for words in plan(tiny_recipe(**settings)).notes.warnings
    )
    settings = {"train__final_adapter": "best", "train__eval_every": 2, "train__save_every": 2}
    reported = plan(tiny_recipe(train__early_stopping=1, **settings)).notes.warnings
    assert not [words for words in reported if words.startswith("train.")]


def test_labeled_texts_without_the_task_are_refused(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = write_jsonl(
        tmp_path / "rows.jsonl", [{"text": "play", "label": "music"}, {"text": "rain", "label": "weather"}]
    )
    with pytest.raises(DataError, match="no answers") as error:
        plan(tiny_recipe(data__train=str(rows)))
    assert error.value.fix.startswith("task=sequence_classification")


class DiskUsage(NamedTuple):
    total: int
    used: int
    free: int


def test_the_disk_must_hold_every_checkpoint_that_is_kept(
    tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Adapter and AdamW's state are 12 bytes a parameter. Of three checkpoints two are kept, and the best; a new one is
    # written before the oldest is deleted: four at once. The final adapter and the run's other files are added.
    matrices = [Matrix(name=str(n), d_in=4096, d_out=4096) for n in range(10)]
    trainable = 10 * 16 * (4096 + 4096)
    parameters = ParameterCount(
        trainable=trainable,
        total=trainable,
        adapter_bytes=4 * trainable,
        per_module=tuple(MatrixCount(matrix=matrix, trainable=trainable // 10) for matrix in matrices),
    )
    recipe = tiny_recipe(lora__r=16, train__epochs=3, train__save_every="epoch", train__keep_checkpoints=2)
    needed = 4 * 12 * trainable + 4 * trainable + checks.OTHER_FILES_BYTES

    def check(free: int, **settings: object) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: DiskUsage(10**12, 10**12 - free, free))
        checks.check_disk(
            recipe.model_copy(update={"train": recipe.train.model_copy(update=settings)}), parameters, num_examples=20
        )

    check(needed)
    with pytest.raises(MachineError, match="4 checkpoints and the adapter need"):
        check(needed - 1)
    check(needed - 4 * 8 * trainable, optimizer="sgd")
    check(needed - 2 * 12 * trainable, keep_checkpoints=1, epochs=1)
