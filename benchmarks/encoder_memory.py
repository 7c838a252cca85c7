"""Compare planned and measured peak memory of encoders on a CPU.

    python benchmarks/encoder_memory.py FOLDER [--cases bert-512-float32,…]

Each case is a `loratune train` of three steps in its own process, on a model of base size with random weights. All
texts have the same length, except one in eight, which has half of it. Prints the table of docs/results/memory.md. The
largest case needs 3 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, ModernBertConfig, PretrainedConfig, PreTrainedTokenizerFast

CASES = ("bert-128-float32", "bert-512-float32", "modernbert-512-float32", "bert-512-bfloat16", "bert-128-float32-many")
SHAPES: dict[str, PretrainedConfig] = {
    "bert": BertConfig(),
    "modernbert": ModernBertConfig(pad_token_id=0, cls_token_id=2, bos_token_id=2, sep_token_id=3, eos_token_id=3),
}
BATCH, STEPS = 8, 3


def model(folder: Path, kind: str) -> Path:
    """A folder with this model and a tokenizer of a thousand words, made if missing."""
    path = folder / kind
    if (path / "tokenizer.json").is_file():
        return path
    torch.manual_seed(0)
    AutoModel.from_config(SHAPES[kind]).save_pretrained(path)
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(1000))]
    core = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=core, model_input_names=inputs, **special).save_pretrained(path)
    return path


def data(folder: Path, length: int, *, many: bool) -> Path:
    """Texts of so many tokens; `many`: of many lengths up to that."""
    path = folder / f"{length}-{many}.jsonl"
    draw = random.Random(length)

    def words(number: int) -> int:
        return draw.randrange(length // 4, length) - 2 if many else length // (1 if number % 8 else 2) - 2

    rows = [
        {"text": " ".join(f"w{draw.randrange(1000)}" for _ in range(words(number))), "label": number % 3}
        for number in range(BATCH * STEPS * (8 if many else 1))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(folder: Path, case: str) -> dict[str, Any]:
    """The plan of a case, with what was measured."""
    kind, length, dtype, *many = case.split("-")
    recipe = folder / "case.yaml"
    recipe.write_text(
        f"""
task: sequence_classification
model: {{name: {model(folder, kind)}, dtype: {dtype}}}
data: {{train: {data(folder, int(length), many=bool(many))}, eval: none, max_length: {length}}}
lora: {{targets: attention}}
train: {{output_dir: {folder / "run"}, epochs: 1, batch_size: {BATCH}, device: cpu, save_every: never, recompute: 0,
        token_budget: {BATCH * int(length)}}}
"""
    )
    command = [sys.executable, "-m", "loratune", "train", str(recipe), "--json", "--overwrite"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    plan: dict[str, Any] = json.loads(done.stdout)["plan"]
    return plan


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", default=",".join(CASES))
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    print(
        "| case | weights | adapter, optimizer | activations | backward | heap | process | planned | measured | error |"
    )
    print("|" + "---|" * 10)
    for case in options.cases.split(","):
        plan = run(folder, case)
        memory, measured = plan["memory"], plan["measured"]["peak_bytes"]
        numbers = (
            memory["weights_bytes"],
            memory["adapter_bytes"] + memory["optimizer_bytes"],
            memory["activation_bytes"],
            memory["backward_bytes"],
            memory["allocator_bytes"],
            memory["process_bytes"],
            memory["peak_bytes"],
            measured,
        )
        cells = " | ".join(f"{number / 2**20:,.0f}" for number in numbers)
        print(f"| {case} | {cells} | {memory['peak_bytes'] / measured - 1:+.1%} |", flush=True)


if __name__ == "__main__":
    main()
