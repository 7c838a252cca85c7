"""Chat templates in Ollama's language: the same text, or a refusal."""

from __future__ import annotations

import copy

import pytest
from transformers import PreTrainedTokenizerBase

from loratune.data.rows.conversation import Conversation
from loratune.data.rows.row import Origin
from loratune.exporting.ollama import modelfile, translate
from loratune.run.errors import RecipeError

LLAMA3 = (
    "{% for m in messages %}<|start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
SYSTEM_IN_USER = (
    "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}{% set messages = messages[1:] %}"
    "{% endif %}{% for m in messages %}{% if m['role'] == 'user' %}[INST] "
    "{% if loop.first and s is defined %}{{ s }}\n\n{% endif %}{{ m['content'] }} [/INST]{% else %} "
    "{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
)
SYSTEM_IN_LAST_USER = SYSTEM_IN_USER.replace("loop.first", "loop.last")
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + LLAMA3


def with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def conversation(*texts: str, line: int = 1) -> Conversation:
    roles = ["user", "assistant"] * len(texts)
    messages = tuple({"role": role, "content": text} for role, text in zip(roles, texts, strict=False))
    return Conversation(messages=messages, tools=None, text=None, origin=Origin(file="eval.jsonl", line=line))


CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "a"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c\n"}],
]
SYSTEM = [{"role": "system", "content": "Be short."}]


@pytest.mark.parametrize("template", [None, LLAMA3, SYSTEM_IN_USER, NO_SYSTEM])
def test_a_translated_template_writes_the_same_text(
    smollm2_tokenizer: PreTrainedTokenizerBase, template: str | None
) -> None:
    tokenizer = with_template(smollm2_tokenizer, template) if template else smollm2_tokenizer
    turns = translate(tokenizer, [conversation("x", "y", "z")])
    for chat in CHATS if template == NO_SYSTEM else [*CHATS, *(SYSTEM + chat for chat in CHATS)]:
        wanted = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert turns.render(chat) == wanted


def test_the_modelfile_says_it_in_gos_words(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    turns = translate(smollm2_tokenizer, [])
    assert modelfile("./a.gguf", "./b.gguf", turns, ["<|im_end|>"]) == (
        "FROM ./a.gguf\n"
        "ADAPTER ./b.gguf\n"
        'TEMPLATE """<|im_start|>system\n'
        "{{ if $.System }}{{ $.System }}<|im_end|>\n"
        "{{ else }}You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        '{{ end }}{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n'
        "{{ .Content }}<|im_end|>\n"
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n'
        "{{ .Content }}<|im_end|>\n"
        '{{ end }}{{ end }}<|im_start|>assistant\n"""\n'
        'PARAMETER stop "<|im_end|>"\n'
    )


def test_what_the_language_cannot_say_is_refused(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(RecipeError, match="cannot express this chat template"):
        translate(with_template(smollm2_tokenizer, SYSTEM_IN_LAST_USER), [])
    trimming = with_template(smollm2_tokenizer, LLAMA3.replace("m['content']", "m['content'] | trim"))
    assert translate(trimming, [conversation("x")])
    with pytest.raises(RecipeError, match=r"eval\.jsonl:7") as error:
        translate(trimming, [conversation("x"), conversation(" padded ", line=7)])
    assert "--to gguf" in error.value.fix


def test_the_first_token_is_left_to_ollama_where_it_writes_it_itself(
    smollm2_tokenizer: PreTrainedTokenizerBase,
) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = with_template(smollm2_tokenizer, "{{ bos_token }}" + LLAMA3)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id == 1
    assert translate(tokenizer, []).start == ""
    tokenizer.chat_template = LLAMA3
    with pytest.raises(RecipeError, match=r"Ollama would start prompts with <\|im_start\|>"):
        translate(tokenizer, [])
