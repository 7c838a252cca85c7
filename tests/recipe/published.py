"""The published shapes of the models that recipes/ names: what config.json says, and folders that look like theirs.

Shapes are those of the models' config.json, as Lightning-AI/litgpt's `litgpt/config.py` lists them (gpt-oss: its own
model card), and are checked by the number of parameters that the Hub shows for the weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from loratune.planning.parameters import skeleton
from loratune.workflows.tiny_model import byte_tokenizer

QWEN = {"vocab_size": 151936, "max_position_embeddings": 32768}
LLAMA3 = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
GEMMA3_VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A model as it is published.

    Attributes:
        model_type: Its family's name in transformers.
        values: Of its config.json; for a model with an image tower, those of the text part.
        parameters: Of the whole model, an image tower included.
        vision: The image tower's values; None if it has none.
        quantization: The config of weights that are stored quantized.
    """

    model_type: str
    values: dict[str, Any]
    parameters: int
    vision: dict[str, Any] | None = None
    quantization: dict[str, Any] = field(default_factory=dict)

    def config(self) -> PreTrainedConfig:
        """Return the configuration, a new one each time."""
        if self.vision is None:
            more = {"quantization_config": self.quantization} if self.quantization else {}
            return CONFIG_MAPPING[self.model_type](**self.values, **more)
        return CONFIG_MAPPING[self.model_type](text_config=self.values, vision_config=self.vision)


PUBLISHED = {
    "meta-llama/Llama-3.1-8B-Instruct": Published(
        model_type="llama",
        values={
            **LLAMA3,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
        parameters=8_030_261_248,
    ),
    "meta-llama/Llama-3.2-3B-Instruct": Published(
        model_type="llama",
        values={
            **LLAMA3,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "tie_word_embeddings": True,
        },
        parameters=3_212_749_824,
    ),
    "Qwen/Qwen2.5-7B-Instruct": Published(
        model_type="qwen2",
        values={
            **QWEN,
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        parameters=7_615_616_512,
    ),
    "Qwen/Qwen3-8B": Published(
        model_type="qwen3",
        values={
            **QWEN,
            "max_position_embeddings": 40960,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        parameters=8_190_735_360,
    ),
    "google/gemma-3-4b-it": Published(
        model_type="gemma3",
        values={
            "vocab_size": 262208,
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 1024,
            "max_position_embeddings": 131072,
        },
        parameters=4_300_079_472,
        vision=GEMMA3_VISION,
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": Published(
        model_type="mistral",
        values={
            "vocab_size": 32768,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "sliding_window": None,
        },
        parameters=7_248_023_552,
    ),
    "microsoft/phi-4": Published(
        model_type="phi3",
        values={
            "vocab_size": 100352,
            "hidden_size": 5120,
            "intermediate_size": 17920,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 10,
            "max_position_embeddings": 16384,
            "original_max_position_embeddings": 16384,
            "pad_token_id": 100349,
        },
        parameters=14_659_507_200,
    ),
    "openai/gpt-oss-20b": Published(
        model_type="gpt_oss",
        values={
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "max_position_embeddings": 131072,
        },
        parameters=20_914_757_184,
        quantization={"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
    ),
}
"""Hub id → the model."""


def write_folder(model: Published, folder: Path) -> Path:
    """Write a folder that looks like the published one: config, tokenizer, and weight files with nothing in them.

    The weight file has the header of the real tensors and a hole where their bytes would be, so it takes no space.
    Experts in mxfp4 are listed in bfloat16: what a plan reads of them is their number.

    Args:
        model: The model.
        folder: The folder to create.
    """
    config = model.config()
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    header: dict[str, Any] = {}
    end = 0
    for name, parameter in skeleton(model.config()).named_parameters():
        start, end = end, end + 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [start, end]}
    written = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(written).to_bytes(8, "little") + written)
        stream.truncate(8 + len(written) + end)
    return folder
