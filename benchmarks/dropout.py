"""Measure what dropout costs of a step: alternating steps of the same model with and without it.

    OMP_NUM_THREADS=1 python benchmarks/dropout.py [--targets complete] [--dtype bfloat16] [--compile] [--pairs 20]

The model has layers of SmolLM2-135M's shape, with random weights, and few of them; a step is one micro-batch of 512
tokens in examples of 128, forward and backward, and 64 of the tokens are trained: so the head, which dropout does not
touch, takes little, and the share is that of the layers. Times are CPU seconds of the process, which other programs
change less than the clock. Prints JSON: medians of both kinds of step, the median ratio of a pair, and the share of a
step that making the masks takes (eager only, where it is a call of its own).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from loratune.data.batch import collate
from loratune.data.examples import Example
from loratune.data.rows.row import Origin
from loratune.model.adapter.attach import attach_adapter
from loratune.model.adapter.targets import resolve_targets
from loratune.model.kernels import lora_linear
from loratune.model.kernels.dropout import row_numbers
from loratune.recipe.recipe import LoraSection
from loratune.training.layers import prepare_layers
from loratune.training.loss import SupervisedLoss, make_loss

NUM_EXAMPLES, LENGTH, NUM_TRAINED, NUM_LAYERS = 4, 128, 16, 2


def example(seed: int) -> Example:
    ids = np.random.default_rng(seed).integers(0, 49152, LENGTH).astype(np.int32)
    supervised = np.arange(LENGTH) >= LENGTH - NUM_TRAINED
    return Example(input_ids=ids, supervised=supervised, origin=Origin(file="random", line=seed + 1))


def make(dropout: float, asked: argparse.Namespace, examples: list[Example]) -> SupervisedLoss:
    """Return the loss of a model in training mode, with its layers as training runs them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    base: Any = AutoModelForCausalLM.from_config(config).to(getattr(torch, asked.dtype))
    lora = LoraSection(dropout=dropout, targets=asked.targets)
    model = attach_adapter(base, lora, resolve_targets(base, asked.targets), base_name="random", seed=0)
    loss, _ = make_loss(model, examples)
    prepare_layers(model, compiled=asked.compile, num_recomputed=0)
    model.train()
    return loss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--targets", default="balanced")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--pairs", type=int, default=20)
    asked = parser.parse_args()
    examples = [example(seed) for seed in range(NUM_EXAMPLES)]
    rows = row_numbers(0, 0, list(range(NUM_EXAMPLES)), [LENGTH] * NUM_EXAMPLES)
    batch = replace(collate(examples), rows=rows)
    losses = {dropout: make(dropout, asked, examples) for dropout in (0.0, 0.05)}

    in_masks = [0.0]
    real = lora_linear.keep_mask

    def timed(*args: Any) -> torch.Tensor:
        started = time.process_time()
        mask = real(*args)
        in_masks[0] += time.process_time() - started
        return mask

    if not asked.compile:
        lora_linear.keep_mask = timed

    def step(dropout: float) -> float:
        started = time.process_time()
        (losses[dropout].sum(batch) / batch.input_ids.numel()).backward()
        return time.process_time() - started

    seconds: dict[float, list[float]] = {0.0: [], 0.05: []}
    for pair in range(asked.pairs + 2):
        if pair == 2:
            in_masks[0] = 0.0
        for dropout in (0.0, 0.05) if pair % 2 else (0.05, 0.0):
            taken = step(dropout)
            if pair >= 2:  # the first two compile and warm up
                seconds[dropout].append(taken)
    ratios = [with_it / without for with_it, without in zip(seconds[0.05], seconds[0.0], strict=True)]
    record = {
        "without": statistics.median(seconds[0.0]),
        "with": statistics.median(seconds[0.05]),
        "median_ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4)[::2],
        "share_of_masks": None if asked.compile else in_masks[0] / sum(seconds[0.05]),
        "torch": torch.__version__,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
