"""What the steps of run.sh share: where results go, models with random weights, rows, recipes."""

from __future__ import annotations

import json
import os
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from loratune.model.kernels import cross_entropy
from loratune.planning import speed
from loratune.recipe.recipe import Recipe
from loratune.workflows.tiny_model import byte_tokenizer

OUT, DEVICE = Path(os.environ["OUT"]), os.environ["DEVICE"]
ON_GPU = DEVICE == "cuda"
WORK = OUT / "work"
if not ON_GPU:  # graphs are captured as on a GPU; a C++ compiler would take most of the dry run's time for no answer
    torch.compile = partial(torch.compile, backend="aot_eager")
    # A plan times products, here once and on few rows; chunks of 128 rows, so that the loss takes several as on a GPU.
    speed.FEWEST_REPETITIONS, speed.TIMED_SECONDS = 1, 0.0
    cross_entropy.CHUNK_BYTES[DEVICE] = 4 * 512 * 128
WORDS = ("red", "green", "blue", "small", "large", "round", "flat", "warm", "cold", "loud")

QWEN2 = {
    "vocab_size": 151_936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}
TINY_QWEN2 = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BIG = QWEN2 if ON_GPU else TINY_QWEN2
# Rows of very different lengths, a batch of which takes two micro-batches or more. Few tokens on a CPU, whose products
# in bfloat16 are slow: there they take most of a step.
RAGGED: dict[str, Any] = (
    {"tokens": 512, "batch": 8, "ragged": True} if ON_GPU else {"tokens": 192, "batch": 4, "ragged": True}
)
TOKEN_BUDGET = 1500 if ON_GPU else 300
SMALL = TINY_QWEN2 | ({"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4} if ON_GPU else {})


def record(**values: Any) -> None:
    """Append a result, so that it is kept whatever comes after."""
    line = json.dumps(values, default=str)
    with (OUT / "results.jsonl").open("a", encoding="utf-8") as out:
        out.write(line + "\n")
    print(line)


def attempt(what: str, work: Callable[[], Any]) -> None:
    """Do one of several things; a failure is a result, and the others go on."""
    try:
        work()
    except Exception as error:  # noqa: BLE001 - on a machine that nobody has tried, anything may fail
        record(what=what, ok=False, error=f"{type(error).__name__}: {error}"[:500])
        if ON_GPU:
            torch.cuda.empty_cache()


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of the second."""
    other = other.double().cpu()
    return float((one.double().cpu() - other).norm() / other.norm())


def milliseconds(work: Callable[[], Any], runs: int = 20) -> float:
    """Return the median time of a piece of work, on a GPU by its own clock and without waiting in between."""
    for _ in range(3):
        work()
    if not ON_GPU:
        started = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - started)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(marks))


def write_model(name: str, kind: str, sizes: dict[str, int], dtype: torch.dtype) -> Path:
    """Write a model with random weights, once, and return its folder."""
    folder = WORK / name
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = {"qwen2": Qwen2Config, "llama": LlamaConfig}[kind](
            **sizes, max_position_embeddings=32_768, tie_word_embeddings=False, pad_token_id=0
        )
        with torch.device(DEVICE):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    return folder


def write_rows(name: str, tokens: int, rows: int, *, ragged: bool) -> Path:
    """Write conversations of about `tokens` tokens each, or of a sixth to all of them; one token is a byte."""
    draw, file = random.Random(0), WORK / f"{name}.jsonl"
    WORK.mkdir(exist_ok=True)
    with file.open("w", encoding="utf-8") as out:
        for _ in range(rows):
            letters = draw.randint(tokens // 6, tokens - 60) if ragged else tokens
            text = " ".join(draw.choices(WORDS, k=letters // 4))[:letters]
            turns = [{"role": "user", "content": text[: letters // 2]}]
            turns.append({"role": "assistant", "content": text[letters // 2 :]})
            out.write(json.dumps({"messages": turns}) + "\n")
    return file


def recipe(
    name: str, folder: Path, *, tokens: int, batch: int, steps: int, ragged: bool = False, **sections: dict[str, Any]
) -> Recipe:
    """Return a recipe for the model in a folder on generated rows, by default without evaluation and checkpoints."""
    rows = write_rows(name, tokens, batch * steps, ragged=ragged)
    never = dict.fromkeys(("eval_every", "save_every", "log_every"), "never")
    values: dict[str, dict[str, Any]] = {
        "model": {"name": str(folder), "dtype": "bfloat16"},
        "data": {"train": str(rows), "eval": "none", "train_on": "all", "max_length": tokens},
        "lora": {},
        "evaluate": {"metric": "none"},
        "train": {"device": DEVICE, "batch_size": batch, "epochs": 1, "output_dir": str(WORK / "runs" / name), **never},
    }
    for section, own in sections.items():
        values[section] |= own
    return Recipe.parse(values)
