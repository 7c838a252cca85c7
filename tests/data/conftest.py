"""Tokenizers with any chat template, and what a rendering trains, as text."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import PreTrainedTokenizerBase

from loratune.data.examples import Example
from loratune.data.masking.policy import Policy
from loratune.data.masking.render import Rendered, render
from loratune.data.rows.conversation import Conversation
from loratune.data.rows.formats import to_conversations
from loratune.data.rows.row import Row

TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"

# What looks like a control token in TRL's templates; their tokenizers have each of these as one token.
CONTROL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>\s]{1,40}｜>|</?(?:start|end)_of_\w+>|</?s>|<\|\"\|>"
    r"|<\|(?:turn|channel|tool_call|tool_response)>|<(?:turn|channel|tool_call|tool_response)\|>"
)


@pytest.fixture(scope="session")
def control_tokenizer(smollm2_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer, with the control tokens of all templates as special tokens."""
    tokenizer = copy.deepcopy(smollm2_tokenizer)
    found = {token for path in TRL_TEMPLATES.glob("*.jinja") for token in CONTROL.findall(path.read_text("utf-8"))}
    specials = sorted((found | {"<s>", "</s>", "[INST]", "[/INST]", "<BOS>", "<EOS>"}) - set(tokenizer.get_vocab()))
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    tokenizer.name_or_path = "smollm2-with-control-tokens"
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    return tokenizer


@pytest.fixture
def with_template(control_tokenizer: PreTrainedTokenizerBase) -> Iterator[Callable[..., PreTrainedTokenizerBase]]:
    """The tokenizer of `control_tokenizer` with a chat template: the source of one, or the name of one of TRL's."""
    before = control_tokenizer.chat_template, control_tokenizer.bos_token, control_tokenizer.eos_token

    def make(template: str, *, bos: str = "<BOS>", eos: str = "<EOS>") -> PreTrainedTokenizerBase:
        source = template if "{" in template else (TRL_TEMPLATES / f"{template}.jinja").read_text("utf-8")
        control_tokenizer.chat_template = source
        control_tokenizer.bos_token, control_tokenizer.eos_token = bos, eos
        return control_tokenizer

    yield make
    control_tokenizer.chat_template, control_tokenizer.bos_token, control_tokenizer.eos_token = before


@pytest.fixture(scope="session")
def converse() -> Callable[..., Conversation]:
    """Make a conversation of messages."""

    def make(*messages: dict[str, Any], tools: list[dict[str, Any]] | None = None, line: int = 1) -> Conversation:
        row = Row(file="chats.jsonl", line=line, value={"messages": list(messages), "tools": tools})
        conversations, rejected = to_conversations([row], "messages")
        assert not rejected, rejected
        return conversations[0]

    return make


@pytest.fixture(scope="session")
def rendered() -> Callable[..., Rendered]:
    """`render` with defaults."""

    def make(conversations: list[Conversation], tokenizer: PreTrainedTokenizerBase, **settings: Any) -> Rendered:
        defaults: dict[str, Any] = {"train_on": "assistant", "thinking": "keep", "max_length": 4096, "on_long": "error"}
        processes = settings.pop("processes", None)
        return render(conversations, tokenizer, Policy(**{**defaults, **settings}), processes=processes)

    return make


@pytest.fixture(scope="session")
def trained_texts() -> Callable[[Example, PreTrainedTokenizerBase], list[str]]:
    """The runs of trained tokens of an example, decoded."""

    def make(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        tokens = zip(example.input_ids.tolist(), example.supervised.tolist(), strict=True)
        runs = [(trained, [token for token, _ in run]) for trained, run in groupby(tokens, key=lambda pair: pair[1])]
        return [tokenizer.decode(run, skip_special_tokens=False) for trained, run in runs if trained]

    return make
