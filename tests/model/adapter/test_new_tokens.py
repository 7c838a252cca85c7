from __future__ import annotations

import pytest
import torch

from loratune.model.adapter.new_tokens import num_added_parameters, resize_embeddings, trained_numbers
from tests.model.adapter.test_attach import tiny


@pytest.mark.parametrize(("ids", "rows"), [((50, 51), 60), ((60, 61), 62)])
def test_new_rows_are_the_mean_of_those_before_them_and_the_others_stay(ids: tuple[int, int], rows: int) -> None:
    model = tiny()
    before = [layer.weight.detach().clone() for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    assert num_added_parameters(model, ids) == (60 * 16 if rows > 60 else 0)
    resize_embeddings(model, ids)
    for layer, old in zip((model.get_input_embeddings(), model.get_output_embeddings()), before, strict=True):
        assert layer.weight.shape == (rows, 16)
        torch.testing.assert_close(layer.weight[list(ids)], old[: ids[0]].mean(0).expand(2, -1))
        assert torch.equal(layer.weight[: ids[0]], old[: ids[0]])


def test_the_trained_ids_of_a_saved_adapter() -> None:
    assert trained_numbers({}) == set()
    assert trained_numbers({"trainable_token_indices": [3, 4]}) == {3, 4}
    assert trained_numbers({"trainable_token_indices": {"embed_tokens": [3], "lm_head": [3, 5]}}) == {3, 5}
