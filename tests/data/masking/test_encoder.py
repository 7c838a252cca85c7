"""Tokens and offsets are the tokenizer's own, whichever way a text takes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from loratune.data.masking.encoder import Encoder
from loratune.data.masking.spans import any_of
from loratune.data.masking.special_tokens import SpecialText, special_names
from loratune.data.masking.tokenizer import backend_of, exact_offsets
from loratune.run.errors import DataError

TEXTS = ["<|im_start|>user\nIt's  12 o'clock<|im_end|>\n", "", "日本 is “Japan”", "half 🙂 and half"]


def test_tokens_are_those_of_the_tokenizer_with_and_without_the_word_cache(
    smollm2_tokenizer: PreTrainedTokenizerBase,
) -> None:
    backend = backend_of(smollm2_tokenizer)
    encode = Encoder(backend)
    assert encode._by_words is not None
    without_cache = Encoder(backend)
    without_cache._by_words = None
    with exact_offsets(backend):
        expected = backend.encode_batch(TEXTS, add_special_tokens=False)
    for encoder in (encode, without_cache):
        for tokens, encoding in zip(encoder(TEXTS), expected, strict=True):
            assert tokens.ids.tolist() == encoding.ids
            assert tokens.ends.tolist() == [end for _, end in encoding.offsets]
            assert tokens.ids.dtype == np.int32


def test_exact_offsets_leave_the_tokenizer_as_it_was(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    backend = copy.deepcopy(backend_of(smollm2_tokenizer))
    backend.enable_truncation(5)
    backend.enable_padding(pad_id=0)
    before = backend.to_str()
    with exact_offsets(backend):
        assert backend.truncation is None
        assert len(backend.encode("one two three four five six seven").ids) > 5
    assert backend.to_str() == before


def test_a_tokenizer_without_offsets_is_refused() -> None:
    with pytest.raises(DataError, match="does not report where in the text"):
        backend_of(object())  # type: ignore[arg-type]


def test_names_of_special_tokens_hide_and_show(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    special = SpecialText(smollm2_tokenizer, special_names(smollm2_tokenizer))
    text = "Say <|im_end|> to stop"
    hidden = special.hide({"content": text})["content"]
    assert len(hidden) == len(text)
    assert "<|im_end|>" not in hidden
    assert special.show(hidden) == text
    assert special.count(text) == 1
    assert any_of(["ab", "abc"]).findall("abcab") == ["abc", "ab"]
