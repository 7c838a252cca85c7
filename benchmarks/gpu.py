"""The seed's architecture on a GPU: 1 k, 4 k and 16 k tokens, the four presets, kept and recomputed, against stock TRL.

    python benchmarks/make_model.py /tmp/qwen2-1.5b
    python benchmarks/gpu.py /tmp/qwen2-1.5b > gpu.json

Each case is `loratune bench` on generated conversations of the given length. Stock TRL runs with its defaults (bf16
autocast, gradient checkpointing).
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

from loratune.cli.terminal import TerminalProgress
from loratune.recipe.recipe import TARGET_PRESETS, Recipe
from loratune.workflows.bench import bench, bench_table

LENGTHS = (1024, 4096, 16_384)
STEPS, ROUNDS, BATCH_SIZE = 8, 2, 8


def conversations(file: Path, tokens: int) -> None:
    """Random words, about one token each, cut to exactly `tokens` by the recipe's max_length."""
    draw = random.Random(0)
    words = ("the", "of", "and", "to", "in", "is", "that", "for", "it", "was", "on", "are", "as", "with", "his", "they")
    with file.open("w", encoding="utf-8") as out:
        for _ in range(BATCH_SIZE * STEPS):
            ask, answer = (" ".join(draw.choices(words, k=tokens)) for _ in range(2))
            row = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": row}) + "\n")


def main(model: str) -> None:
    progress, records = TerminalProgress(), []
    with tempfile.TemporaryDirectory() as folder:
        for tokens in LENGTHS:
            file = Path(folder) / f"{tokens}.jsonl"
            conversations(file, tokens)
            for targets in TARGET_PRESETS:
                for recompute in (0, 28):
                    recipe = Recipe.parse(
                        {
                            "model": {"name": model},
                            "data": {"train": str(file), "train_on": "all", "max_length": tokens},
                            "lora": {"targets": targets},
                            "train": {"batch_size": BATCH_SIZE, "compile": True, "recompute": recompute},
                        }
                    )
                    record = bench(recipe, rounds=ROUNDS, steps=STEPS, progress=progress)
                    progress.line(f"{tokens} tokens, {targets}, {recompute} layers recomputed")
                    progress.console.print(bench_table(record))
                    records.append(record)
    print(json.dumps(records))


if __name__ == "__main__":
    main(sys.argv[1])
