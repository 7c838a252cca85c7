"""Tiny random classifiers and labeled texts: bases without a head, as people find them on the hub."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from loratune.recipe.recipe import Recipe

INTENTS = {
    "weather": ("rain", "sunny", "forecast", "storm"),
    "music": ("song", "album", "play", "louder"),
    "timer": ("minutes", "alarm", "wake", "countdown"),
}
FILLER = ("please", "now", "tell", "me", "the", "about", "for", "today", "a", "new", "can", "you")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def letters() -> PreTrainedTokenizerFast:
    """Of bytes, which is all that transformers' own Qwen2 tokenizer keeps without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def tokenizer(*, encoder: bool, types: bool = False) -> PreTrainedTokenizerFast:
    """Of whole words. An encoder's puts [CLS] and [SEP] around texts."""
    words = [*SPECIAL, *FILLER, *(word for kind in INTENTS.values() for word in kind)]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if encoder:
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    names = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"} if encoder else {"eos_token": "[SEP]", "pad_token": None}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_input_names=names, **special)


_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_ENCODER = {**_SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 128}
KINDS: dict[str, tuple[type, dict[str, Any], type]] = {
    "bert": (BertConfig, _ENCODER, BertModel),
    "bert-mlm": (BertConfig, _ENCODER, BertForMaskedLM),
    "roberta": (RobertaConfig, {**_ENCODER, "type_vocab_size": 1}, RobertaForMaskedLM),
    "distilbert": (
        DistilBertConfig,
        {
            "dim": 16,
            "hidden_dim": 32,
            "n_layers": 2,
            "n_heads": 2,
            "max_position_embeddings": 128,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "seq_classif_dropout": 0.0,
        },
        DistilBertForMaskedLM,
    ),
    "modernbert": (
        ModernBertConfig,
        {
            **_SIZES,
            "max_position_embeddings": 128,
            "local_attention": 8,
            "cls_token_id": 2,
            "sep_token_id": 3,
            "bos_token_id": 2,
        },
        ModernBertForMaskedLM,
    ),
    "llama": (LlamaConfig, {**_SIZES, "num_key_value_heads": 1, "max_position_embeddings": 128}, LlamaForCausalLM),
    "qwen2": (Qwen2Config, {**_SIZES, "num_key_value_heads": 1, "max_position_embeddings": 128}, Qwen2ForCausalLM),
}


def make_base(folder: Path, kind: str) -> Path:
    """A random base of an architecture, without a classifier's head."""
    config_of, settings, model_of = KINDS[kind]
    encoder = kind not in ("llama", "qwen2")
    made = letters() if kind == "qwen2" else tokenizer(encoder=encoder, types=kind.startswith("bert"))
    torch.manual_seed(0)
    pad = {"pad_token_id": 0} if encoder else {"pad_token_id": None, "bos_token_id": None, "eos_token_id": 3}
    config = config_of(vocab_size=len(made), initializer_range=0.3, **settings, **pad)
    model_of(config).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def intent(number: int) -> dict[str, Any]:
    """A short request, and what it is about."""
    draw = random.Random(number)
    label = sorted(INTENTS)[number % len(INTENTS)]
    words = draw.sample(FILLER, draw.randint(1, 4))
    words.insert(draw.randrange(len(words)), draw.choice(INTENTS[label]))
    return {"text": " ".join(words), "label": label}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Kind → a random base of it, made once."""
    folder = tmp_path_factory.mktemp("bases")

    def base(kind: str) -> Path:
        return folder / kind if (folder / kind).is_dir() else make_base(folder / kind, kind)

    return base


def class_recipe(base: Path, folder: Path, *, num_rows: int = 48, **settings: Any) -> Recipe:
    """Of intents; settings as `train__epochs=1`."""
    folder.mkdir(parents=True, exist_ok=True)
    train = write_rows(folder / "train.jsonl", [intent(number) for number in range(num_rows)])
    held_out = write_rows(folder / "eval.jsonl", [intent(number) for number in range(1000, 1018)])
    values: dict[str, Any] = {
        "model": {"name": str(base), "dtype": "float32", "task": "sequence_classification"},
        "data": {"train": str(train), "eval": str(held_out), "max_length": 64},
        "lora": {"dropout": 0.0, "r": 4, "targets": "complete"},
        "train": {
            "output_dir": str(folder / "run"),
            "epochs": 2,
            "learning_rate": 1e-3,
            "batch_size": 8,
            "device": "cpu",
        },
    }
    for name, value in settings.items():
        section, _, field = name.partition("__")
        values.setdefault(section, {})[field] = value
    return Recipe.parse(values)


def plain_logits(model: Any, texts: list[str], tokenizer: Any) -> torch.Tensor:
    """By transformers alone, a batch padded by its tokenizer."""
    with torch.no_grad():
        return model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits
