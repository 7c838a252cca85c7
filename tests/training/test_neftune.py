"""NEFTune and label smoothing against transformers and TRL."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.integrations.neftune import neftune_post_forward_hook

from loratune.recipe.recipe import Recipe
from loratune.run.directory import read_json
from loratune.training.neftune import EmbeddingNoise
from loratune.workflows.resume import resume
from loratune.workflows.train import train
from tests.invariants.test_same_mathematics import assert_same, trajectory

MakeRecipe = Callable[..., Recipe]
WIDTH = 48


def noise_of(lengths: list[int], alpha: float, *, seed: int) -> torch.Tensor:
    """What our hook adds to examples laid end to end, [T, d]."""
    embeddings = nn.Embedding(10, WIDTH)
    noise = EmbeddingNoise(alpha, embeddings)
    if len(lengths) > 1:
        noise.lengths = torch.tensor(lengths)
    ids = torch.zeros(1, sum(lengths), dtype=torch.long)
    torch.manual_seed(seed)
    added: torch.Tensor = (embeddings(ids) - embeddings.eval()(ids))[0].detach()
    return added


def test_outside_of_steps_an_example_alone_gets_the_noise_of_transformers_number_for_number() -> None:
    torch.manual_seed(3)
    module, embedded = SimpleNamespace(training=True, neftune_noise_alpha=5.0), torch.zeros(1, 30, WIDTH)
    expected = neftune_post_forward_hook(module, None, embedded)[0]
    torch.testing.assert_close(noise_of([30], 5.0, seed=3), expected, rtol=0, atol=1e-6)


def test_each_example_of_a_micro_batch_gets_the_noise_of_its_own_length() -> None:
    lengths = [4, 400, 25]
    for example in torch.split(noise_of(lengths, 5.0, seed=0), lengths):
        most = 5.0 / (len(example) * WIDTH) ** 0.5
        assert 0.98 * most < example.abs().max() <= most + 1e-6
        # a uniform distribution: mean 0, variance most² / 3; 192 numbers know theirs to a few percent
        assert abs(float(example.mean())) < 0.15 * most
        assert float(example.var()) == pytest.approx(most**2 / 3, rel=0.2)


def one_pattern(tensor: torch.Tensor, low: float = 0, high: float = 1, generator: object = None) -> torch.Tensor:
    """In place of `uniform_`: the same numbers for every tensor of a shape."""
    drawn = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0))
    return tensor.copy_(low + (high - low) * drawn)


@pytest.mark.slow
def test_both_engines_train_with_the_same_noise_and_evaluate_without(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one example a step there is nothing that TRL could pad; here both get the same numbers."""
    monkeypatch.setattr(torch.Tensor, "uniform_", one_pattern)
    monkeypatch.setattr(EmbeddingNoise, "_unit", lambda self, x: torch.empty_like(x).uniform_(-1, 1))
    settings = {"train__batch_size": 1, "train__epochs": 0.4, "lora__targets": "complete"}
    noisy = {**settings, "train__neftune_noise_alpha": 20.0}
    fast = train(tiny_recipe(**noisy)).run
    stock = train(tiny_recipe(**noisy, train__engine="trl", train__output_dir=str(tmp_path / "trl"))).run
    assert_same(fast, stock, tolerance=1e-5)
    plain = train(tiny_recipe(**settings, train__output_dir=str(tmp_path / "plain"))).run
    assert abs(trajectory(plain)[0][0] - trajectory(fast)[0][0]) > 1e-3
    assert read_json(plain.evaluation)["base"]["nll"] == read_json(fast.evaluation)["base"]["nll"]
    assert trajectory(fast)[1][-1] == pytest.approx(read_json(fast.evaluation)["tuned"]["nll"], abs=1e-6)


@pytest.mark.slow
def test_a_resumed_run_has_the_same_noise_to_the_bit(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    settings = {"train__neftune_noise_alpha": 5.0, "train__label_smoothing": 0.1, "train__save_every": 2}
    whole = train(tiny_recipe(**settings)).run
    killed = train(tiny_recipe(**settings, train__output_dir=str(tmp_path / "part"))).run
    shutil.rmtree(killed.adapter)
    shutil.rmtree(killed.checkpoints / "6")
    assert_same(whole, resume(killed.root).run, tolerance=0)


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
@pytest.mark.slow
def test_both_engines_smooth_alike_and_evaluate_unsmoothed(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    settings = {"train__label_smoothing": 0.2, "lora__targets": "complete", "train__epochs": 1}
    fast = train(tiny_recipe(**settings, train__token_budget=150)).run
    stock = train(tiny_recipe(**settings, train__engine="trl", train__output_dir=str(tmp_path / "trl"))).run
    assert_same(fast, stock, tolerance=1e-5)
    plain = {**settings, "train__label_smoothing": 0.0}
    plain = train(tiny_recipe(**plain, train__output_dir=str(tmp_path / "plain"))).run
    assert trajectory(plain)[0][0] != pytest.approx(trajectory(fast)[0][0], abs=1e-2)
    assert read_json(plain.evaluation)["base"]["nll"] == read_json(fast.evaluation)["base"]["nll"]
