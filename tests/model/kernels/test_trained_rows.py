from __future__ import annotations

import torch
import torch.nn.functional as F

from loratune.model.kernels.trained_rows import embed_with_trained_rows, project_with_trained_rows

NUMBERS = torch.tensor([2, 9, 10])


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A frozen table, trained rows, and the table with these in it."""
    torch.manual_seed(0)
    table = torch.randn(12, 5, dtype=torch.float64)
    rows = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    return table, rows, table.index_copy(0, NUMBERS, rows)


def test_the_embedding_is_that_of_the_table_with_the_rows_in_it() -> None:
    table, rows, replaced = tensors()
    ids = torch.tensor([[0, 2, 2, 11], [10, 9, 3, 1]])
    actual, expected = embed_with_trained_rows(ids, table, rows, NUMBERS), F.embedding(ids, replaced)
    assert torch.equal(actual, expected)
    upstream = torch.randn_like(actual)
    (gradient,) = torch.autograd.grad(actual, rows, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, rows, upstream)
    torch.testing.assert_close(gradient, expected_gradient)


def test_the_logits_are_those_of_the_table_with_the_rows_in_it() -> None:
    table, rows, replaced = tensors()
    hidden = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    actual, expected = project_with_trained_rows(hidden, table, rows, NUMBERS), F.linear(hidden, replaced)
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(actual)
    gradients = torch.autograd.grad(actual, [hidden, rows], upstream)
    for one, other in zip(gradients, torch.autograd.grad(expected, [hidden, rows], upstream), strict=True):
        torch.testing.assert_close(one, other)
