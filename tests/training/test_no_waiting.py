"""Inside a step the host asks the device for no value: it would wait for all that is under way there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loratune.data.batch import MicroBatch
from loratune.model.kernels import attention
from loratune.recipe.recipe import Recipe
from loratune.run.directory import read_json
from loratune.training import loss
from loratune.training.fast_trainer import FastTrainer
from loratune.workflows.train import train
from tests.conftest import conversation, write_jsonl

MakeRecipe = Callable[..., Recipe]

ASKS = {
    torch.ops.aten._local_scalar_dense.default,  # item, float, int, bool, and tolist of a scalar
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten._unique2.default,
}


class NoAsking(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        assert func not in ASKS, f"a step asks for a value: {func}"
        if func is torch.ops.aten.index.Tensor:
            masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
            assert not masks, "a step indexes by a mask, whose length nobody knows"
        return func(*args, **kwargs or {})


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def watch_steps(monkeypatch: pytest.MonkeyPatch, watched: Callable[[], AbstractContextManager[Any]]) -> list[int]:
    """Each step's gradients are computed under the watch; returns a list that gets an entry a step."""
    real, steps = FastTrainer._accumulate_gradients, []

    def gradients(self: FastTrainer, *args: Any) -> torch.Tensor:
        with watched():
            losses = real(self, *args)
        steps.append(self.state.global_step)
        return losses

    monkeypatch.setattr(FastTrainer, "_accumulate_gradients", gradients)
    return steps


@pytest.fixture
def recipe(tiny_recipe: MakeRecipe, tmp_path: Path) -> Recipe:
    """Of several sources, with dropout on all matrices: all that a step can do on a GPU, where nothing is shared."""
    files = [write_jsonl(tmp_path / f"{i}.jsonl", [conversation(n) for n in range(i, 40, 2)]) for i in range(2)]
    return tiny_recipe(
        data__train=[str(file) for file in files],
        lora__dropout=0.1,
        lora__targets="complete",
        train__token_budget=200,
        train__share_prefixes=False,
    )


def masked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boundaries: torch.Tensor, *, asks: bool, **_: object
) -> torch.Tensor:
    """Attention of each example over itself, which does not look at the numbers in `boundaries` on the host."""
    tokens = torch.arange(query.shape[2])
    of_token = torch.bucketize(tokens, boundaries[1:], right=True)
    mask = (tokens[:, None] >= tokens) & (of_token[:, None] == of_token)
    if asks:
        assert float(mask.sum()) > 0
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2)


def test_a_step_asks_for_no_value(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, whose attention alone looks at the examples' boundaries: it is replaced."""
    monkeypatch.setattr(attention, "block_attention", partial(masked, asks=False))
    steps = watch_steps(monkeypatch, NoAsking)
    train(recipe)
    assert len(steps) == 10


def test_the_watch_sees_a_value_that_is_asked_for(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "block_attention", partial(masked, asks=True))
    watch_steps(monkeypatch, NoAsking)
    with pytest.raises(AssertionError, match="a step asks for a value"):
        train(recipe)


def forbid_reading_boundaries(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Make boundaries that were moved to the device unreadable; returns them."""
    moved, real_to, real_tolist = [], MicroBatch.to, torch.Tensor.tolist

    def to(self: MicroBatch, device: torch.device) -> MicroBatch:
        batch = real_to(self, device)
        moved.append(batch.boundaries.clone())
        return replace(batch, boundaries=moved[-1])

    def tolist(self: torch.Tensor) -> Any:
        assert all(self.data_ptr() != other.data_ptr() for other in moved), "boundaries are read on the device"
        return real_tolist(self)

    monkeypatch.setattr(MicroBatch, "to", to)
    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    return moved


@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_boundaries_are_read_on_the_host(packed: bool, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of attention, which a GPU takes for float32, and where examples go one at a time."""
    monkeypatch.setattr(loss, "obstacle", lambda model: "" if packed else "a test")
    moved = forbid_reading_boundaries(monkeypatch)
    result = train(recipe)
    assert read_json(result.run.plan)["measured"]["packing"]["packed"] is packed
    assert len(moved) > 10


def test_the_watch_sees_boundaries_that_are_read_on_the_device(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_reading_boundaries(monkeypatch)
    real = attention.packed_attention
    monkeypatch.setattr(
        attention,
        "packed_attention",
        lambda *args, **given: real(*args, **{**given, "cu_seq_lens_k": None}),
    )
    with pytest.raises(AssertionError, match="boundaries are read on the device"):
        train(recipe)


class NoCopiesOfWeights(TorchDispatchMode):
    """Refuses to convert or copy a matrix of base or adapter: it would be done again in every micro-batch."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.matrices = {p.data_ptr(): name for name, p in model.named_parameters() if p.ndim > 1}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        copies = func in {torch.ops.aten._to_copy.default, torch.ops.aten.clone.default, torch.ops.aten.copy_.default}
        source = args[-1] if copies and func is torch.ops.aten.copy_.default else args[0] if copies else None
        assert source is None or source.data_ptr() not in self.matrices, f"copies {self.matrices[source.data_ptr()]}"
        return func(*args, **kwargs or {})


@pytest.mark.slow
def test_a_step_copies_no_weight_and_no_adapter(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    in_bfloat16 = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "bfloat16"})})
    real, steps = FastTrainer._accumulate_gradients, []

    def gradients(self: FastTrainer, *args: Any) -> torch.Tensor:
        with NoCopiesOfWeights(self.model) as watch:
            losses = real(self, *args)
            if not steps:
                weight = self.model.get_base_model().get_output_embeddings().weight
                with pytest.raises(AssertionError, match="copies"):  # the watch sees one
                    weight.float()
        steps.append(len(watch.matrices))
        return losses

    monkeypatch.setattr(FastTrainer, "_accumulate_gradients", gradients)
    train(in_bfloat16)
    assert len(steps) == 10
    # Seven matrices a layer with two of the adapter each, and the embedding, which is the head too.
    assert steps[0] == 2 * 7 * 3 + 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_step_on_a_gpu_waits_for_nothing(dtype: str, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """In flash attention, and in the blocks that float32 takes."""
    steps = watch_steps(monkeypatch, no_synchronisation)
    on_gpu = recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update={"device": "cuda"}),
            "model": recipe.model.model_copy(update={"dtype": dtype}),
        }
    )
    train(on_gpu)
    assert len(steps) == 10
