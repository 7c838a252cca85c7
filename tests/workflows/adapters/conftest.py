"""Adapters of random factors, saved by PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

MakeAdapter = Callable[..., Path]


def load(base: Path, kind: Any = AutoModelForCausalLM) -> Any:
    return kind.from_pretrained(base, dtype=torch.float32)


def change_config(folder: Path, **settings: Any) -> None:
    """Change settings in an adapter's `adapter_config.json`."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.fixture
def make_adapter(tiny_model: Path, tmp_path: Path) -> MakeAdapter:
    """Saves an adapter of random factors with PEFT."""

    def made(
        name: str,
        seed: int,
        base: Path = tiny_model,
        kind: Any = AutoModelForCausalLM,
        std: float = 0.2,
        **settings: Any,
    ) -> Path:
        torch.manual_seed(seed)
        config = LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings})
        model = get_peft_model(load(base, kind), config)
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name or (parameter.requires_grad and parameter_name.endswith("bias")):
                torch.nn.init.normal_(parameter, std=std)
        model.save_pretrained(str(tmp_path / name))
        return tmp_path / name

    return made
