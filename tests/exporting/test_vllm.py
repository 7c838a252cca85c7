from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from loratune.exporting.adapter_matrices import LowRank
from loratune.exporting.vllm import check_vllm, serve_adapter
from loratune.run.errors import RecipeError


def update(rank: int, magnitude: torch.Tensor | None = None) -> LowRank:
    return LowRank(a=torch.zeros(rank, 4), b=torch.zeros(4, rank), scale=1.0, magnitude=magnitude)


@pytest.mark.parametrize(("rank", "allowed"), [(1, 8), (8, 8), (9, 16), (200, 256), (512, 512)])
def test_the_rank_is_rounded_up_to_one_that_vllm_allows(rank: int, allowed: int) -> None:
    updates = {"model.layers.0.self_attn.q_proj": update(4), "model.layers.1.mlp.up_proj": update(rank)}
    assert check_vllm(updates, LlamaConfig()) == max(8, allowed)


@pytest.mark.parametrize(
    ("module", "rank", "config", "words"),
    [
        ("transformer.h.0.attn.c_attn", 4, GPT2Config(), "adapt gpt2"),
        ("model.layers.0.self_attn.rotary", 4, LlamaConfig(), "adapt rotary of llama"),
        ("model.layers.0.self_attn.q_proj", 513, LlamaConfig(), "rank is 513"),
    ],
)
def test_what_vllm_does_not_load_is_refused_by_name(module: str, rank: int, config: object, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as error:
        check_vllm({module: update(rank)}, config)
    assert "--merged" in error.value.fix


def test_dora_is_refused() -> None:
    with pytest.raises(RecipeError, match="DoRA"):
        check_vllm({"model.layers.0.self_attn.q_proj": update(4, torch.ones(4))}, LlamaConfig())


def test_the_command_survives_odd_names() -> None:
    folder = Path("/my runs/a'b")
    command = serve_adapter(base="org/base", revision="abc", adapter=folder, name="tuned", rank=16, dtype="bfloat16")
    words = shlex.split(command)
    assert words[:5] == ["vllm", "serve", "org/base", "--revision", "abc"]
    assert f"tuned={folder}" in words
    assert words[words.index("--max-lora-rank") + 1] == "16"
