from __future__ import annotations

import pytest
import torch

from loratune.model.kernels.dropout import (
    AdapterDropout,
    _hash_mask,
    _mask_in_pieces,
    column_numbers,
    current_rows,
    keep_mask,
    row_numbers,
    rows_of_forward,
    uniform,
)


def mask_of(
    lengths: dict[int, int], *, seed: int = 0, step: int = 0, module: str = "q", width: int = 64
) -> torch.Tensor:
    """The mask of a micro-batch of examples, index → tokens, with dropout 0.5."""
    rows = row_numbers(seed, step, list(lengths), list(lengths.values()))
    with rows_of_forward(rows):
        return keep_mask(torch.empty(len(rows), width), column_numbers(module, width), 0.5)


def test_an_example_has_its_mask_in_every_micro_batch() -> None:
    alone = mask_of({7: 30})
    torch.manual_seed(1)  # no generator has a part in it
    packed = mask_of({2: 11, 7: 30, 5: 4})
    assert torch.equal(packed[11:41], alone)
    assert torch.equal(mask_of({7: 12}), alone[:12]), "nor has what comes after a token"


def test_these_are_its_bits() -> None:
    """On every machine and in every version: another mask is another training."""
    rows, columns = row_numbers(42, 3, [0, 17], [2, 1]), column_numbers("model.layers.0.self_attn.q_proj", 3)
    assert rows.tolist() == [952025392, -294427048, -131388101]
    assert columns.tolist() == [600670423, 426325077, 1308816178]
    drop = AdapterDropout(0.5, "model.layers.0.self_attn.q_proj", 3, torch.device("cpu"))
    with rows_of_forward(rows):
        assert drop(torch.ones(3, 3)).tolist() == [[2, 0, 2], [0, 2, 0], [2, 2, 2]]


@pytest.mark.parametrize("changed", [{"seed": 1}, {"step": 1}, {"module": "k"}])
def test_another_seed_step_or_module_has_another_mask(changed: dict[str, int | str]) -> None:
    one, other = mask_of({0: 500}), mask_of({0: 500}, **changed)  # type: ignore[arg-type]
    # 32,000 pairs agree by half, with a standard deviation of 0.0028
    assert abs(float((one == other).double().mean()) - 0.5) < 0.012


def test_examples_steps_and_seeds_share_no_rows() -> None:
    numbers = [row_numbers(seed, step, range(40), [25] * 40) for seed in (0, 1, 2) for step in range(6)]
    # 18,000 numbers of 32 bits: 0.04 pairs are expected to be equal
    assert len(torch.cat(numbers).unique()) >= 17_999


def test_without_a_step_masks_are_drawn_and_a_module_with_other_rows_has_masks_too() -> None:
    columns, x = column_numbers("q", 333), torch.empty(1001, 333)
    torch.manual_seed(3)
    first, second = keep_mask(x, columns, 0.05), keep_mask(x, columns, 0.05)
    torch.manual_seed(3)
    assert torch.equal(first, keep_mask(x, columns, 0.05))
    with rows_of_forward(row_numbers(0, 0, [1], [9])):
        third = keep_mask(x, columns, 0.05)
    assert current_rows() is None
    for one, other in ((first, second), (first, third)):
        # 333,333 draws with p = 0.05: the standard deviation of the fraction is 0.0004
        assert abs(float(one.double().mean()) - 0.95) < 0.002
        # two masks agree as often as independent ones: 0.95² + 0.05²
        assert abs(float((one == other).double().mean()) - 0.905) < 0.003


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_the_mask_and_the_noise_of_a_cpu() -> None:
    rows, columns, x = row_numbers(1, 2, [3, 4], [1000, 1]), column_numbers("q", 333), torch.empty(1, 1001, 333)
    with rows_of_forward(rows):
        expected = keep_mask(x, columns, 0.05)
    with rows_of_forward(rows.cuda()):
        found = keep_mask(x.cuda(), columns.cuda(), 0.05)
    assert torch.equal(found.cpu(), expected)
    assert torch.equal(uniform(rows.cuda(), columns.cuda()).cpu(), uniform(rows, columns))


def test_outside_training_nothing_is_dropped_and_in_it_the_mean_stays() -> None:
    drop = AdapterDropout(0.25, "q", 512, torch.device("cpu"))
    x = torch.ones(300, 512)
    with rows_of_forward(row_numbers(0, 0, [0], [300])):
        dropped = drop(x)
    assert dropped.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert float(dropped.mean()) == pytest.approx(1, abs=0.01)
    assert torch.equal(drop.eval()(x), x)
    assert not drop.state_dict(), "the numbers are no part of a checkpoint"


@pytest.mark.parametrize("shape", [(1001, 333), (1, 64), (3, 200_000)])
def test_the_mask_of_compiled_code_is_the_same(shape: tuple[int, int]) -> None:
    by_row, by_column = (torch.randint(-(2**31), 2**31, (n,), dtype=torch.int32) for n in shape)
    masks = [make(by_row[:, None], by_column, round(0.3 * 2**32) - 2**31) for make in (_hash_mask, _mask_in_pieces)]
    assert torch.equal(*masks)
    assert masks[0].shape == shape


@pytest.mark.parametrize("dropout", [0.05, 0.5])
def test_elements_of_the_mask_are_independent(dropout: float) -> None:
    """Rows share the numbers of columns, and columns, of several modules, those of rows, which must not show.

    Each statistic has mean 0 and standard deviation 1 for independent draws.
    """
    variance = dropout * (1 - dropout)
    modules, lengths = ("q", "k", "v"), [100, 1, 399, 500]
    with rows_of_forward(row_numbers(42, 5, range(4), lengths)):
        masks = [keep_mask(torch.empty(1000, 512), column_numbers(name, 512), dropout) for name in modules]
    m = torch.cat(masks, dim=1).double() - (1 - dropout)
    rectangles = m[1:, 1:] * m[:-1, :-1] * m[1:, :-1] * m[:-1, 1:]
    standardised = {
        "mean": m.mean() / variance**0.5,
        "neighbors in a row": (m[:, 1:] * m[:, :-1]).mean() / variance,
        "neighbors in a column": (m[1:] * m[:-1]).mean() / variance,
        "corners of a rectangle": rectangles.mean() / variance**2,
    }
    for name, value in standardised.items():
        assert abs(float(value)) * m.numel() ** 0.5 < 4, name
    by_row, by_column = m.mean(1).var() / (variance / 1536), m.mean(0).var() / (variance / 1000)
    assert float(by_row) == pytest.approx(1, abs=4 * (2 / 1000) ** 0.5)
    assert float(by_column) == pytest.approx(1, abs=4 * (2 / 1536) ** 0.5)
    correlations = (m.T @ m / 1000 / variance).fill_diagonal_(0)
    assert float(correlations.square().sum() / (1536 * 1535) * 1000) == pytest.approx(1, abs=0.02)


def test_noise_is_uniform_and_neighbors_are_independent() -> None:
    noise = uniform(row_numbers(0, 0, [4], [1000]), column_numbers("neftune", 512)).double()
    # 512,000 numbers: the standard deviations are 0.0008 of the mean, 0.0004 of the mean square
    assert float(noise.abs().max()) <= 1
    assert abs(float(noise.mean())) < 0.004
    assert float(noise.square().mean()) == pytest.approx(1 / 3, abs=0.002)
    counts = torch.histc(noise, 64, -1, 1)
    assert float(((counts - 8000).square() / 8000).sum()) < 63 + 5 * (2 * 63) ** 0.5
    for one, other in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1])):
        assert abs(float((one * other).mean())) * one.numel() ** 0.5 * 3 < 4
