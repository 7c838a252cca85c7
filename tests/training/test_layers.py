from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

from loratune.data.batch import collate
from loratune.data.examples import Example
from loratune.data.shared_prefixes import share_prefixes
from loratune.model.adapter.attach import attach_adapter, use_fast_layers
from loratune.model.adapter.targets import resolve_targets
from loratune.model.device import cpp_compiler
from loratune.model.kernels import cross_entropy
from loratune.model.kernels.dropout import row_numbers
from loratune.recipe.recipe import LoraSection
from loratune.training.layers import decoder_layers, prepare_layers
from loratune.training.loss import SupervisedLoss
from tests.conftest import some
from tests.model.adapter.test_attach import tiny
from tests.model.kernels.varlen import SIGNATURES, pretend_gpu


def example(length: int) -> Example:
    ids = (torch.arange(length) * 7 % 50).numpy()
    return Example(input_ids=ids, supervised=ids >= 0, origin=None)  # type: ignore[arg-type]


def loss_of(layers: int, *, compiled: bool, recomputed: int, dropout: float = 0.1) -> SupervisedLoss:
    base = tiny(layers)
    model = attach_adapter(
        base, LoraSection(dropout=dropout), resolve_targets(base, "complete"), base_name="tiny", seed=0
    )
    use_fast_layers(model)
    loss = SupervisedLoss(model)
    prepare_layers(model, compiled=compiled, num_recomputed=recomputed)
    loss.compiled = compiled
    model.train()
    return loss


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in model.parameters() if weight.requires_grad]


@pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler: torch.compile needs one on a CPU")
def test_one_graph_serves_all_layers_and_any_number_of_tokens() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    loss, eager = (loss_of(5, compiled=compiled, recomputed=0) for compiled in (True, False))
    for lengths in ((9, 4), (12, 30, 2), (7,)):
        rows = row_numbers(1, 0, range(len(lengths)), lengths)
        batch = replace(collate([example(n) for n in lengths]), rows=rows)
        ours, theirs = loss.sum(batch), eager.sum(batch)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        (ours + theirs).backward()
    for one, other in zip(trained(loss.model), trained(eager.model), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert counted == 2  # the layer, and the chunk of the loss
    assert not torch._dynamo.utils.counters["graph_break"]


def test_one_graph_serves_any_tree_of_shared_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    # Graphs are counted, not generated.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(cross_entropy, "_compiled_chunk", cache(cross_entropy._compiled_chunk.__wrapped__))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    loss = loss_of(3, compiled=True, recomputed=0)
    for lengths in ((9, 4), (7,), (12, 30, 2, 20), (5, 5, 5)):  # `example`s begin alike
        batch = share_prefixes(collate([example(n) for n in lengths]), least=4)
        assert batch.num_tokens == max(lengths) + (2 if 2 in lengths else 0)
        loss.sum(batch).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "the layer, and the chunk of the loss"
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("signature", some(list(SIGNATURES)))
def test_on_a_gpu_too_one_graph_serves_all_layers_and_any_number_of_tokens(
    signature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grouped heads and a window that is longer than some of the examples and shorter than others."""
    pretend_gpu(monkeypatch, SIGNATURES[signature])
    # Graphs are counted, not generated.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(cross_entropy, "_compiled_chunk", cache(cross_entropy._compiled_chunk.__wrapped__))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        pad_token_id=0,
    )
    base = MistralForCausalLM(config)
    targets = resolve_targets(base, "complete")
    model = attach_adapter(base, LoraSection(dropout=0.1), targets, base_name="tiny", seed=0)
    use_fast_layers(model)
    loss = SupervisedLoss(model)
    prepare_layers(model, compiled=True, num_recomputed=0)
    loss.compiled = True
    model.train()
    for lengths in ((9, 4), (12, 30, 2), (7,), (3, 3, 3, 5), (40,)):
        loss.sum(collate([example(n) for n in lengths])).backward()
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2, "the layer, and the chunk of the loss"
    assert not counters["graph_break"]
    assert not counters["recompile_limit"]


@pytest.mark.parametrize("recomputed", [0, 1, 3])
def test_a_recomputed_layer_keeps_less_and_gives_the_same(recomputed: int) -> None:
    batch = collate([example(40), example(17)])
    results = []
    for count in (0, recomputed):
        loss = loss_of(3, compiled=False, recomputed=count)
        kept = 0

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel() * tensor.element_size()
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss.sum(batch)
        value.backward()
        results.append((kept, value.detach(), [p.grad for p in loss.model.parameters() if p.requires_grad]))
    (kept_all, value, gradients), (kept_less, again, same) = results
    assert torch.equal(value, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
    assert kept_less < kept_all * (1 - 0.8 * recomputed / 3) if recomputed else kept_less == kept_all


def test_the_layers_are_found_and_run_as_they_are_outside_training() -> None:
    loss = loss_of(3, compiled=True, recomputed=1)
    assert len(decoder_layers(loss.model)) == 3
    loss.model.eval()
    torch._dynamo.utils.counters.clear()
    loss.per_token(collate([example(9)]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
