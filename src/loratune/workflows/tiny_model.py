"""A random Llama of two layers with a tokenizer, a chat template and conversations, for `selftest` and the tests.

It is made on the spot in a second, and everything runs on it as on a large model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

WORDS = ("red", "green", "blue", "small", "large", "round", "flat", "warm", "cold", "loud")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template in the ChatML form."""


def write_tiny_model(folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    """Write a random Llama and its tokenizer into a folder, and return the folder.

    Args:
        folder: The folder to create.
        tokenizer: The tokenizer; by default one token per byte, with `TEMPLATE`.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer or byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.1,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer with one token per byte, so that it needs no file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def conversation(number: int) -> dict[str, object]:
    """Return a chat of one or two turns whose length varies with its number."""
    color, size = WORDS[number % 10], WORDS[(number * 7 + 3) % 10]
    messages = [
        {"role": "user", "content": f"Describe thing {number}" + ", please" * (number % 5)},
        {"role": "assistant", "content": f"It is {color} and {size}" + f", like {color}" * (number % 4) + "."},
    ]
    if number % 3 == 0:
        messages += [{"role": "user", "content": "Shorter."}, {"role": "assistant", "content": f"{color}."}]
    return {"messages": messages}
