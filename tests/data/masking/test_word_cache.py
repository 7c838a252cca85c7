"""Word by word, the tokens are the tokenizer's own, and stand where it says."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from loratune.data.masking.tokenizer import exact_offsets
from loratune.data.masking.word_cache import WordCachingEncoder

# Of Llama 3 and of Qwen 2, as their tokenizer.json has them.
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
SPLITS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "digits": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama3": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}
PIECES = [
    "<|im_start|>",
    "<|im_end|>",
    "user\n",
    "the",
    " I'M",
    "don't",
    "12345",
    "  ",
    "\n\n",
    " \n",
    "“é”",
    "日本",
    "🙂",
]


@pytest.fixture(scope="module", params=SPLITS)
def backend(request: pytest.FixtureRequest, smollm2_tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    backend = Tokenizer.from_str(smollm2_tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = SPLITS[request.param]
    return backend


@pytest.fixture(scope="module")
def words(backend: Tokenizer) -> WordCachingEncoder:
    with exact_offsets(backend):
        words = WordCachingEncoder.of(backend)
    assert words is not None
    return words


@settings(deadline=None, max_examples=200)
@given(
    text=st.lists(st.sampled_from(PIECES) | st.text(max_size=8) | st.text(st.characters(max_codepoint=127), max_size=8))
)
def test_words_give_the_tokens_of_the_tokenizer(text: list[str], backend: Tokenizer, words: WordCachingEncoder) -> None:
    whole = "".join(text)
    (tokens,) = words([whole])
    with exact_offsets(backend):
        encoding = backend.encode(whole, add_special_tokens=False)

    if tokens is None:
        assert backend.decode(encoding.ids, skip_special_tokens=False) != whole
        return
    assert tokens.ids.tolist() == encoding.ids
    assert tokens.ends.tolist() == [end for _, end in encoding.offsets]
    assert backend.decode(encoding.ids, skip_special_tokens=False) == whole


def test_other_kinds_of_tokenizers_are_left_alone(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    backend = Tokenizer.from_str(smollm2_tokenizer.backend_tokenizer.to_str())
    assert WordCachingEncoder.of(backend) is not None
    for pre_tokenizer in (
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Metaspace(),
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(r"\p{Greek}+"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    ):
        other = copy.deepcopy(backend)
        other.pre_tokenizer = pre_tokenizer
        assert WordCachingEncoder.of(other) is None
