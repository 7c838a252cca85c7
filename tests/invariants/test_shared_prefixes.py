"""Sequences that begin alike go through the model once up to where they differ: value and gradients stay exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from loratune.data.batch import collate
from loratune.data.examples import Example
from loratune.data.rows.row import Origin
from loratune.data.shared_prefixes import share_prefixes
from loratune.model.adapter.attach import trainable_parameters
from loratune.model.adapter.targets import resolve_targets
from loratune.model.kernels import block_attention
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import RecipeError
from loratune.run.progress import NoProgress
from loratune.training.loss import make_loss
from loratune.training.shared_forward import obstacle_to_sharing
from loratune.workflows import load
from loratune.workflows.train import train
from tests.conftest import write_jsonl
from tests.invariants.families import BY_HAND, CONFIGS, RANDOM, adapted, base_of
from tests.invariants.test_same_mathematics import assert_same, trajectory

MakeRecipe = Callable[..., Recipe]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of transformers, on made-up token ids and configs

COMMON = ("Llama 2, 3", "Gemma 2", "gpt-oss", "DeepSeek V3, R1", "Gemma 3n (text)")
"""Of the default run: the plain case, windows and soft caps, sinks, latent attention, layers that share keys."""


def branching() -> list[Example]:
    """Five sequences; the first three share 18 tokens, two of them 35, one is the 18 alone, one shares nothing."""
    rng = np.random.default_rng(0)
    prompt, turn, *own = (rng.integers(3, 97, length).astype(np.int32) for length in (18, 17, 5, 3, 9, 7))
    parts = [(prompt, own[0]), (prompt, turn, own[1]), (prompt, turn, own[2]), (prompt,), (own[3],)]
    made = []
    for part in parts:
        ids = np.concatenate(part)
        supervised = rng.random(len(ids)) < 0.6  # shared tokens too, in some sequences and not in others
        supervised[-1] = True
        made.append(Example(input_ids=ids, supervised=supervised, origin=Origin(file="made", line=1)))
    return made


@contextmanager
def everything_in_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let models compute in float64 what they compute in float32 whatever their weights: norms, softmax, rotations."""
    with monkeypatch.context() as patch:
        for name in ("float32", "float"):
            patch.setattr(torch, name, torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def separate(model: PeftModel, examples: list[Example]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The model's own forward and the loss of its logits, one sequence at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        ids = torch.from_numpy(example.input_ids).long()[None]
        logits = model(input_ids=ids, use_cache=False).logits[0]
        labels = ids[0].where(torch.from_numpy(example.supervised), torch.tensor(-100))
        total = total + torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100)
    return total.detach(), torch.autograd.grad(total, list(trainable_parameters(model).values()))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in COMMON else pytest.mark.slow) for name in CONFIGS]
)
def test_value_and_every_gradient_are_those_of_separate_sequences(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of(name, tmp_path)
    targets = resolve_targets(base, BY_HAND.get(name, "complete"))
    model = adapted(base, targets)
    model.train(name not in RANDOM)
    examples = branching()
    loss, _ = make_loss(model, examples)
    obstacle = obstacle_to_sharing(loss, examples)
    loss.shares_prefixes = not obstacle
    batch = collate(examples)
    if not loss.may_share(batch):
        assert obstacle or loss.longest_packed is not None
        return
    model.double()
    model.get_base_model().set_experts_implementation("eager")  # the grouped product has no float64
    own = model.get_base_model().config._attn_implementation
    with everything_in_float64(monkeypatch):
        shared = share_prefixes(batch)
        assert shared.num_tokens == 18 + 17 + 5 + 3 + 9 + 7
        each = torch.empty(len(batch.targets), dtype=torch.float64)
        total = loss.sum(shared, each)
        gradients = torch.autograd.grad(total, list(trainable_parameters(model).values()))
        torch.testing.assert_close(each, loss.per_token(batch), rtol=1e-10, atol=1e-10)
        model.get_base_model().set_attn_implementation("eager")
        expected, expected_gradients = separate(model, examples)
        model.get_base_model().set_attn_implementation(own)
    assert total.dtype == torch.float64
    assert abs(float(total - expected)) < 1e-10 * float(expected)
    for parameter, one, other in zip(trainable_parameters(model), gradients, expected_gradients, strict=True):
        assert float(other.abs().max()) > 0, parameter
        assert float((one - other).abs().max()) < 1e-10 * max(1.0, float(other.abs().max())), parameter


def test_a_sequence_that_saw_anothers_tokens_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the test above could fail, and the check before a run: segments see the one before them in the row."""
    base = base_of("Llama 2, 3", tmp_path)
    model = adapted(base, resolve_targets(base, "complete"))
    examples = branching()
    loss, _ = make_loss(model, examples)
    assert not obstacle_to_sharing(loss, examples)
    real = block_attention._segments

    def wrong(boundaries: torch.Tensor) -> Iterator[tuple[list[slice], int, int]]:
        for before, start, stop in real(boundaries):
            yield [slice(max(0, start - 3), start)] if start else before, start, stop

    monkeypatch.setattr(block_attention, "_segments", wrong)
    assert "shared prefixes differ from separate ones" in obstacle_to_sharing(loss, examples)


def processed(run: RunDir) -> list[int | None]:
    return [line.get("num_processed_tokens") for line in run.read_metrics() if "loss" in line]


@pytest.mark.parametrize(
    "budget", [pytest.param(1, marks=pytest.mark.slow), 300, pytest.param(4096, marks=pytest.mark.slow)]
)
def test_neither_the_budget_nor_computing_prefixes_once_changes_the_steps(
    budget: int, tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout: the rule of the masks is the recipe's, and here no prefix is computed once."""
    settings = {"lora__dropout": 0.1, "lora__targets": "complete", "data__train_on": "all"}
    settings |= {"train__share_prefixes": True}
    folder = {"train__output_dir": str(tmp_path / "once"), "train__token_budget": budget}
    once = train(tiny_recipe(**settings, **folder)).run
    with monkeypatch.context() as patch:
        patch.setattr(load, "obstacle_to_sharing", lambda loss, examples: "said so")
        each = train(tiny_recipe(**settings)).run
    assert_same(once, each, tolerance=1e-5)
    tokens = [line["num_tokens"] for line in once.read_metrics() if "loss" in line]
    assert set(processed(each)) == {None}
    for left, whole in zip(processed(once), tokens, strict=True):
        assert left is not None
        assert left == whole if budget == 1 else left < 0.8 * whole
    plan = read_json(once.plan)
    assert plan["choices"]["train.share_prefixes"]["reason"].endswith("% of the tokens are shared prefixes")
    if budget == 4096:
        told = 1 - sum(left or 0 for left in processed(once)) / sum(tokens)
        assert plan["data"]["shared_fraction"] == pytest.approx(told, abs=0.02), "the second epoch's steps are others"


@pytest.mark.slow
def test_without_dropout_a_run_that_shares_is_one_that_does_not(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Recomputed layers included."""
    settings = {"lora__targets": "complete", "data__train_on": "all", "train__recompute": 1}
    shared = train(tiny_recipe(**settings, train__share_prefixes=True, train__output_dir=str(tmp_path / "shared"))).run
    assert_same(shared, train(tiny_recipe(**settings, train__share_prefixes=False)).run, tolerance=1e-5)


@pytest.mark.slow
def test_sharing_with_dropout_has_masks_of_its_own(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    """So that the first test above could fail."""
    settings = {"lora__dropout": 0.1, "lora__targets": "complete"}
    shared = train(tiny_recipe(**settings, train__share_prefixes=True, train__output_dir=str(tmp_path / "shared"))).run
    separate = train(tiny_recipe(**settings, train__share_prefixes=False)).run
    pairs = zip(trajectory(shared)[0], trajectory(separate)[0], strict=True)
    assert max(abs(a - b) for a, b in pairs) > 1e-4


@pytest.mark.slow
def test_pairs_share_their_prompts(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"What color is thing number {i}?", "chosen": f"It is red, {i}.", "rejected": "I do not know."}
        for i in range(8)
    ]
    file = str(write_jsonl(tmp_path / "pairs.jsonl", rows))
    settings = {
        "model__task": "preference",
        "data__train": file,
        "data__eval": file,
        "train__batch_size": 4,
        "train__epochs": 1,
        "lora__dropout": 0.1,
        "train__share_prefixes": True,
    }
    once = train(tiny_recipe(**settings, train__output_dir=str(tmp_path / "once"))).run
    small = train(tiny_recipe(**settings, train__token_budget=1, train__output_dir=str(tmp_path / "small"))).run
    assert_same(once, small, tolerance=1e-5)
    tokens = [line["num_tokens"] for line in once.read_metrics() if "loss" in line]
    for each_pair, step, whole in zip(processed(small), processed(once), tokens, strict=True):
        assert each_pair is not None
        assert step is not None
        assert step < each_pair < whole, "a pair alone shares its prompt, a step its system prompt too"


def test_what_cannot_share_says_why(tiny_recipe: MakeRecipe) -> None:
    noisy = {"train__neftune_noise_alpha": 5.0}
    with pytest.raises(RecipeError, match=r"share_prefixes is true, but the noise of train\.neftune_noise_alpha"):
        prepare(tiny_recipe(**noisy, train__share_prefixes=True), NoProgress())
    prepared = prepare(tiny_recipe(**noisy), NoProgress())
    assert prepared.recipe.train.share_prefixes is False
    assert prepared.choices["train.share_prefixes"].reason.endswith("depends on the length of each example")
