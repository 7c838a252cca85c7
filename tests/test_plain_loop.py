"""The teaching loop in examples/ and `loratune train` end with the same adapter."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.run.progress import NoProgress
from loratune.workflows.train import train

FILE = Path(__file__).parent.parent / "examples" / "plain_loop.py"
TOLERANCE = 1e-5
"""Largest difference of a weight; the wrong losses below move weights by more than 100 times as much."""

Adapter = dict[str, torch.Tensor]


@pytest.fixture
def plain_loop() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plain_loop", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "plain_loop", module)
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def recipe(tiny_model: Path, chat_files: tuple[Path, Path], tmp_path: Path) -> Recipe:
    """Two epochs of three steps, the last of which has fewer examples; gradients are clipped."""
    return Recipe.parse(
        {
            "model": {"name": str(tiny_model), "dtype": "float32"},
            "data": {"train": str(chat_files[0]), "eval": "none"},
            "lora": {"dropout": 0.0, "r": 4, "alpha": 8, "targets": ["q_proj", "v_proj", "down_proj"]},
            "train": {
                "output_dir": str(tmp_path / "run"),
                "epochs": 2,
                "learning_rate": 1e-2,
                "warmup_fraction": 0.3,
                "weight_decay": 0.1,
                "max_grad_norm": 0.5,
                "batch_size": 8,
                "token_budget": 150,
                "device": "cpu",
                "save_every": "never",
            },
        }
    )


@pytest.fixture
def run_plain(
    plain_loop: ModuleType, recipe: Recipe, tiny_model: Path, chat_files: tuple[Path, Path], tmp_path: Path
) -> Callable[[], Adapter]:
    """Run the teaching loop with the recipe's settings; give back its adapter."""
    settings = plain_loop.Settings(
        r=4,
        alpha=8,
        targets=("q_proj", "v_proj", "down_proj"),
        epochs=2,
        learning_rate=1e-2,
        warmup_fraction=0.3,
        weight_decay=0.1,
        max_grad_norm=0.5,
        batch_size=8,
        seed=recipe.train.seed,
        token_budget=200,
    )

    def run() -> Adapter:
        plain_loop.train(tiny_model, chat_files[0], tmp_path / "plain", settings)
        return load_file(tmp_path / "plain" / "adapter_model.safetensors")

    return run


def largest_difference(one: Adapter, other: Adapter) -> float:
    assert one.keys() == other.keys()
    return max(float((tensor - other[name]).abs().max()) for name, tensor in one.items())


def test_the_teaching_loop_is_short() -> None:
    assert len(FILE.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_teaching_loop_and_the_engine_name_each_other() -> None:
    from loratune.training import fast_trainer

    assert fast_trainer.__file__ is not None
    assert "loratune/training/fast_trainer.py" in FILE.read_text(encoding="utf-8")
    assert "examples/plain_loop.py" in Path(fast_trainer.__file__).read_text(encoding="utf-8")


def test_the_teaching_loop_masks_as_loratune(
    plain_loop: ModuleType, recipe: Recipe, tiny_model: Path, chat_files: tuple[Path, Path]
) -> None:
    import json

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = [json.loads(line) for line in chat_files[0].read_text(encoding="utf-8").splitlines()]
    examples = prepare(recipe, NoProgress()).data.train
    assert len(examples) == len(rows)
    for row, expected in zip(rows, examples, strict=True):
        made = plain_loop.make_example(row["messages"], tokenizer)
        assert made.input_ids == expected.input_ids.tolist()
        assert made.supervised == expected.supervised.tolist()


def test_the_teaching_loop_ends_with_the_same_adapter(recipe: Recipe, run_plain: Callable[[], Adapter]) -> None:
    result = train(recipe)
    lines = [line for line in result.run.read_metrics() if "loss" in line]
    assert len(lines) == 6
    assert max(line["grad_norm"] for line in lines) > recipe.train.max_grad_norm, "clipping is part of what is compared"
    expected = load_file(result.run.adapter / "adapter_model.safetensors")
    assert largest_difference(expected, run_plain()) <= TOLERANCE
    assert max(float(tensor.abs().max()) for name, tensor in expected.items() if "lora_B" in name) > 1e-3


class TestTheComparisonCanFail:
    """Each change of the teaching loop's mathematics moves its adapter by far more than the tolerance."""

    def differs(self, recipe: Recipe, run_plain: Callable[[], Adapter]) -> bool:
        expected = load_file(train(recipe).run.adapter / "adapter_model.safetensors")
        return largest_difference(expected, run_plain()) > 100 * TOLERANCE

    def test_by_means_of_micro_batch_means(
        self,
        recipe: Recipe,
        plain_loop: ModuleType,
        run_plain: Callable[[], Adapter],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def mean_of_means(model: torch.nn.Module, examples: list[object], token_budget: int) -> float:
            batches = list(plain_loop.micro_batches(examples, token_budget))
            assert len(batches) > 1 or len(examples) < 8
            for batch in batches:
                supervised = sum(sum(example.supervised[1:]) for example in batch)
                (plain_loop.sum_loss(model, batch) / supervised / len(batches)).backward()
            return math.nan

        monkeypatch.setattr(plain_loop, "step_gradients", mean_of_means)
        assert self.differs(recipe, run_plain)

    @pytest.mark.parametrize("offset", [-1, 1])
    def test_by_a_mask_that_is_off_by_one(
        self,
        offset: int,
        recipe: Recipe,
        plain_loop: ModuleType,
        run_plain: Callable[[], Adapter],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        make = plain_loop.make_example

        def shifted(messages: list[dict[str, str]], tokenizer: object) -> object:
            example = make(messages, tokenizer)
            mask = torch.tensor(example.supervised).roll(offset).tolist()
            return plain_loop.Example(input_ids=example.input_ids, supervised=mask)

        monkeypatch.setattr(plain_loop, "make_example", shifted)
        assert self.differs(recipe, run_plain)

    def test_by_examples_that_attend_to_each_other(
        self,
        recipe: Recipe,
        plain_loop: ModuleType,
        run_plain: Callable[[], Adapter],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        one_block = lambda values, repeats: torch.zeros(int(repeats.sum()), dtype=values.dtype)  # noqa: E731
        monkeypatch.setattr(torch, "repeat_interleave", one_block)
        assert self.differs(recipe, run_plain)
