"""A chat, the templates that render it, and what comes out, by hand."""

from __future__ import annotations

from typing import Any

from loratune.data.masking.render import Rendered
from loratune.data.rows.row import Origin

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# Later Mistral templates write the system text into the last user turn: the prompt of an earlier answer is no prefix.
MISTRAL_SYSTEM_LAST = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for message in rest %}"
    "{% if message.role == 'user' %}[INST] {% if system and loop.index0 >= rest | length - 2 %}{{ system }}\n\n{% endif %}"  # noqa: E501
    "{{ message.content }}[/INST]{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)

CHAT = (
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "It is 5."},
    {"role": "user", "content": "And doubled?"},
    {"role": "assistant", "content": "10, of course."},
)

R1_ANSWER = "<think>\nFive times two.\n</think>\n\n10."


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


GOLDEN: dict[str, tuple[str, dict[str, str], list[str], str]] = {
    # name: template, special tokens, what is trained of CHAT, the whole text
    "smollm2": (
        SMOLLM2,
        {"bos": "<|im_start|>", "eos": "<|im_end|>"},
        ["It is 5.<|im_end|>", "10, of course.<|im_end|>"],
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\nIt is 5.<|im_end|>\n"
        "<|im_start|>user\nAnd doubled?<|im_end|>\n<|im_start|>assistant\n10, of course.<|im_end|>\n",
    ),
    "qwen2.5": (
        "qwen2_5",
        {"eos": "<|im_end|>"},
        ["It is 5.<|im_end|>", "10, of course.<|im_end|>"],
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\nIt is 5.<|im_end|>\n"
        "<|im_start|>user\nAnd doubled?<|im_end|>\n<|im_start|>assistant\n10, of course.<|im_end|>\n",
    ),
    "qwen3": (
        "qwen3",
        {"eos": "<|im_end|>"},
        ["It is 5.<|im_end|>", "<think>\n\n</think>\n\n10, of course.<|im_end|>"],
        "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\nIt is 5.<|im_end|>\n"
        "<|im_start|>user\nAnd doubled?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n10, of course.<|im_end|>\n",  # noqa: E501
    ),
    "llama3": (
        "llama3",
        {"eos": "<|eot_id|>"},
        ["It is 5.<|eot_id|>", "10, of course.<|eot_id|>"],
        "<BOS><|start_header_id|>user<|end_header_id|>\n\nWhat is 2 + 3?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nIt is 5.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd doubled?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n10, of course.<|eot_id|>",
    ),
    "gemma": (
        "gemma",
        {},
        ["It is 5.<end_of_turn>", "10, of course.<end_of_turn>"],
        "<BOS><start_of_turn>user\nWhat is 2 + 3?<end_of_turn>\n<start_of_turn>model\nIt is 5.<end_of_turn>\n"
        "<start_of_turn>user\nAnd doubled?<end_of_turn>\n<start_of_turn>model\n10, of course.<end_of_turn>\n",
    ),
    "r1-distill": (
        "deepseek_r1_distill",
        {"eos": "<｜end▁of▁sentence｜>"},
        ["It is 5.<｜end▁of▁sentence｜>", "10, of course.<｜end▁of▁sentence｜>"],
        "<BOS><｜User｜>What is 2 + 3?<｜Assistant｜>It is 5.<｜end▁of▁sentence｜>"
        "<｜User｜>And doubled?<｜Assistant｜>10, of course.<｜end▁of▁sentence｜>",
    ),
    "phi3": (
        "phi3",
        {"eos": "<|endoftext|>"},
        ["It is 5.<|end|>", "10, of course.<|end|>"],
        "<|user|>\nWhat is 2 + 3?<|end|>\n<|assistant|>\nIt is 5.<|end|>\n"
        "<|user|>\nAnd doubled?<|end|>\n<|assistant|>\n10, of course.<|end|>\n<|endoftext|>",
    ),
    "mistral": (
        MISTRAL,
        {"bos": "<s>", "eos": "</s>"},
        [" It is 5.</s>", " 10, of course.</s>"],
        "<s>[INST] What is 2 + 3? [/INST] It is 5.</s>[INST] And doubled? [/INST] 10, of course.</s>",
    ),
}


def rejection(result: Rendered) -> str:
    assert not result.examples
    assert result.rejected[0].origin == Origin(file="chats.jsonl", line=1)
    return result.rejected[0].reason
