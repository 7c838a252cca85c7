"""What a recipe may ask of `task: sequence_classification`: settings, targets, plans, rows, and what is refused by
name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from loratune.model.adapter.targets import resolve_targets
from loratune.model.classifier import with_classes
from loratune.planning.parameters import skeleton
from loratune.planning.prepare import prepare, prepare_on_all_ranks
from loratune.recipe.recipe import Recipe
from loratune.run.errors import DataError, RecipeError
from loratune.run.progress import NoProgress
from loratune.workflows.plan import plan
from loratune.workflows.train import train
from tests.classifiers import bases, class_recipe, intent, write_rows

__all__ = ["bases"]


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("model.quantization", "nf4", "model.quantization is nf4"),
        ("data.train_on", "last", "data.train_on is last"),
        ("data.streaming", True, "data.streaming is true"),
        ("train.compile", True, "train.compile is true"),
        ("lora.variant", "pissa", "lora.variant is pissa"),
        ("lora.variant", "eva", "lora.variant is eva"),
        ("lora.variant", "loftq", "lora.variant is loftq"),
        ("lora.start_from", "some/adapter", "lora.start_from is some/adapter"),
        ("lora.rank_pattern", {"query": 4}, "lora.rank_pattern is"),
        ("lora.alpha_pattern", {"query": 4}, "lora.alpha_pattern is"),
        ("lora.modules_to_save", ["norm"], "lora.modules_to_save is"),
        ("lora.new_tokens", ["<|x|>"], "lora.new_tokens is"),
        ("lora.target_parameters", ["mlp.experts.gate_up_proj"], "lora.target_parameters is"),
        ("train.optimizer", "muon", "train.optimizer is muon"),
        ("train.strategy", "fsdp", "train.strategy is fsdp"),
        ("train.learning_rate_pattern", {"query": 1e-5}, "train.learning_rate_pattern is"),
        ("train.early_stopping", 2, "train.early_stopping is 2"),
        ("train.neftune_noise_alpha", 5, "train.neftune_noise_alpha is 5"),
        ("train.label_smoothing", 0.1, "train.label_smoothing is 0.1"),
        ("train.average_checkpoints", 2, "train.average_checkpoints is 2"),
        ("evaluate.metric", "json", "evaluate.metric is json"),
        ("data.columns", {"prompt": "q"}, "data.columns names prompt"),
    ],
)
def test_what_classification_cannot_do_is_refused_by_name(setting: str, value: Any, words: str) -> None:
    section, _, field = setting.partition(".")
    with pytest.raises(RecipeError, match=f"{words}.*model.task sequence_classification|{words}, but labeled rows"):
        Recipe.parse({"task": "sequence_classification", section: {field: value}})


def test_the_task_may_stand_alone(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("task: sequence_classification\nmodel: {name: some/bert}\n")
    assert Recipe.load(file).model.task == "sequence_classification"
    assert Recipe.load(file, ["task=causal_lm"]).model.task == "causal_lm"
    file.write_text("model: {name: some/bert}\n\ntask: regression\n")
    with pytest.raises(RecipeError, match=r"model.task is 'regression'") as wrong:
        Recipe.load(file)
    assert f"{file}:3" in str(wrong.value)
    file.write_text("task: causal_lm\nmodel: {task: causal_lm}\n")
    with pytest.raises(RecipeError, match="the same setting"):
        Recipe.load(file)
    with pytest.raises(RecipeError, match=r"data.columns names label, which is for model.task"):
        Recipe.parse({"data": {"columns": {"label": "y"}}})


def test_a_model_that_is_no_classifier_is_refused(bases: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bases("bert"), tmp_path / "t5"))
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True}))
    with pytest.raises(RecipeError, match="an encoder with a decoder"):
        prepare(class_recipe(folder, tmp_path), NoProgress())


def test_roberta_has_two_positions_less(bases: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the model has 127 positions"):
        prepare(class_recipe(bases("roberta"), tmp_path, data__max_length=128), NoProgress())


def test_targets_are_named_as_bert_names_them(bases: Callable[[str], Path], tmp_path: Path) -> None:
    prepared = prepare(class_recipe(bases("bert"), tmp_path, lora__targets=["attention.self.query"]), NoProgress())
    assert prepared.adapter.targets == tuple(f"bert.encoder.layer.{n}.attention.self.query" for n in range(2))


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("bert", (2, 4, 8, 12)),
        ("roberta", (2, 4, 8, 12)),
        ("distilbert", (2, 4, 8, 12)),
        ("modernbert", (2, 2, 4, 8)),  # query, key and value are one matrix
        ("qwen2", (2, 4, 8, 14)),
    ],
)
def test_presets_find_the_matrices_of_both_layers(
    kind: str, sizes: tuple[int, ...], bases: Callable[[str], Path]
) -> None:
    config = with_classes(AutoConfig.from_pretrained(bases(kind)), ["a", "b"], 0)
    model = skeleton(config, classifier=True)
    found = [resolve_targets(model, preset) for preset in ("minimal", "balanced", "attention", "complete")]
    assert tuple(map(len, found)) == sizes
    assert not any(name.startswith(("classifier", "score", "pre_classifier", "head")) for name in found[-1])


def test_plans_are_for_one_device_and_can_be_probed(bases: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = class_recipe(bases("bert"), tmp_path)
    probed = plan(recipe, probe=True)
    assert probed.estimate.probe is not None
    assert probed.estimate.probe.num_tokens > 0
    assert plan(recipe, device="h100-80gb").estimate.device is not None
    with pytest.raises(RecipeError, match=r"--devices is not available for model\.task sequence_classification"):
        plan(recipe, devices="8xh100-80gb")


def test_several_processes_are_refused(
    bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratune.run.processes.size", lambda: 2)
    with pytest.raises(
        RecipeError, match=r"several processes is not available for model\.task sequence_classification"
    ):
        prepare_on_all_ranks(class_recipe(bases("bert"), tmp_path), NoProgress())


def test_a_data_error_names_its_row(bases: Callable[[str], Path], tmp_path: Path) -> None:
    rows = [intent(n) for n in range(12)] + [{"text": "play", "label": "sports"}]
    held_out = str(write_rows(tmp_path / "odd.jsonl", rows))
    with pytest.raises(DataError, match="sports occurs in the held-out data only") as wrong:
        train(class_recipe(bases("bert"), tmp_path / "x", data__eval=held_out))
    assert f"{held_out}:13" in str(wrong.value)


@pytest.mark.parametrize(("kind", "target"), [("bert", "classifier"), ("bert-mlm", "pooler.dense"), ("llama", "score")])
def test_the_head_is_not_adapted_as_well(kind: str, target: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=rf"lora\.targets adapts .*{target}, but .* is part of the head"):
        prepare(class_recipe(bases(kind), tmp_path, lora__targets=[target]), NoProgress())


def test_classes_that_are_probably_none_of_their_own_are_told(bases: Callable[[str], Path], tmp_path: Path) -> None:
    texts = [intent(n)["text"] for n in range(40)]
    rows = [{"text": text, "label": ("Music", "music", "timer")[n % 3]} for n, text in enumerate(texts)]
    held_out = write_rows(tmp_path / "eval.jsonl", [{"text": "play it", "label": "music"}])
    train_file = write_rows(tmp_path / "rows.jsonl", rows)
    recipe = class_recipe(bases("bert"), tmp_path / "a", data__train=str(train_file), data__eval=str(held_out))
    told = prepare(recipe, NoProgress()).notes.warnings
    assert any("Music and music differ only in case" in words for words in told)
    assert any("no text of the class Music, timer" in words for words in told)
    stars = tmp_path / "stars.csv"
    stars.write_text("text,label\n" + "".join(f"{text},{n % 3}.5\n" for n, text in enumerate(texts)))
    told = prepare(
        class_recipe(bases("bert"), tmp_path / "b", data__train=str(stars), data__eval="none"), NoProgress()
    ).notes.warnings
    assert any("there is no regression" in words for words in told)


def test_a_label_with_a_fraction_and_a_row_of_another_kind_are_told(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    for row, words in (
        ({"text": "play", "label": 0.5}, "label is float 0.5, neither text nor an integer; there is no regression"),
        ({"messages": []}, "no text among its fields messages"),
        ({"sentence2": "play", "label": "music"}, "no sentence1 among its fields sentence2"),
    ):
        train_file = write_rows(tmp_path / "rows.jsonl", [row])
        with pytest.raises(DataError, match=words):
            prepare(class_recipe(bases("bert"), tmp_path / "x", data__train=str(train_file)), NoProgress())
