"""How many operations a layer launches, counted without a GPU: what the plan takes for the work of a GPU's host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen2Config

from loratune.model.adapter.attach import attach_adapter, use_fast_layers
from loratune.model.adapter.targets import resolve_targets
from loratune.model.kernels.attention import PACKED, register
from loratune.planning.speed import LAUNCHES
from loratune.recipe.recipe import LoraSection
from tests.model.kernels.varlen import pretend_gpu

NO_LAUNCH = {"detach", "empty", "empty_like", "new_empty", "_unsafe_view", "empty_strided"}

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


class Launches(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        is_view = any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)
        self.count += not is_view and func._schema.name.split("::")[1] not in NO_LAUNCH
        return func(*args, **kwargs or {})


class OneLaunch(torch.autograd.Function):
    """Attention of which nothing is counted: a kernel more or less."""

    @staticmethod
    def forward(ctx: Any, *heads: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*heads)
        return torch.empty_like(heads[0])

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, enable_gqa: bool = False, **__: Any):
    return OneLaunch.apply(query, key, value)


def counted(layers: int, kind: str) -> int:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.device("meta"):
        config = Qwen2Config(vocab_size=100, num_hidden_layers=layers, **sizes)
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    targets = resolve_targets(base, "balanced")
    adapted = attach_adapter(base, LoraSection(dropout=0.05), targets, base_name="meta", seed=0).to("meta")
    ids = torch.zeros(1, 32, dtype=torch.long, device="meta")
    if kind == "decode":
        adapted.eval()
        with torch.no_grad():
            cache = base(input_ids=ids, use_cache=True).past_key_values
            with Launches() as launches:
                base(input_ids=ids[:, :1], position_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        return launches.count
    use_fast_layers(adapted)
    register()
    base.set_attn_implementation(PACKED)
    base.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    ends = torch.tensor([0, 32], dtype=torch.int32)
    whole = {"cu_seq_lens_q": ends.to("meta"), "cu_seq_lens_k": ends, "max_length_q": 32, "max_length_k": 32}
    with Launches() as launches:
        base.base_model(input_ids=ids, position_ids=ids, use_cache=False, **whole)[0].sum().backward()
    return launches.count


@pytest.mark.parametrize("kind", LAUNCHES)
def test_the_plan_s_launches_are_those_of_a_layer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To 15 %: transformers and the adapter's layer change by a few operations."""
    pretend_gpu(monkeypatch, varlen)
    assert counted(3, kind) - counted(2, kind) == pytest.approx(LAUNCHES[kind], rel=0.15)
