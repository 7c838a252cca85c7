"""Character spans become token masks, or a reason why not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from loratune.data.masking.encoder import Encoder
from loratune.data.masking.token_labels import (
    LengthViolations,
    OnLong,
    RenderedText,
    TokenMask,
    TokenMasker,
    _tokens_of,
)
from loratune.data.masking.tokenizer import backend_of
from loratune.data.masking.tokens import Tokens
from loratune.data.rows.row import Origin
from loratune.run.errors import BadRow, DataError

ORIGIN = Origin(file="chats.jsonl", line=3)
TEXT = "<|im_start|>assistant\nHello there<|im_end|>\n"
SPAN = (TEXT.index("Hello"), TEXT.index("\n", TEXT.index("Hello")))
RENDERED = RenderedText(
    text=TEXT,
    spans=[SPAN],
    check=None,
    names=("message 2 (assistant)",),
    without_stop_token=frozenset(),
    is_plain_text=False,
    origin=ORIGIN,
    num_controls=None,
    hidden=None,
)
Mask = Callable[..., TokenMask | None]


@pytest.fixture
def mask(smollm2_tokenizer: PreTrainedTokenizerBase) -> Mask:
    def make(text: RenderedText, max_length: int = 64, on_long: OnLong = "error") -> TokenMask | None:
        masker = TokenMasker(smollm2_tokenizer, max_length=max_length, on_long=on_long)
        found = masker(text, Encoder(backend_of(smollm2_tokenizer))([text.text])[0])
        masker.too_long.raise_if_any(max_length)
        return found[0] if found else None

    return make


def test_the_tokens_of_a_span_are_trained_with_their_stop_token(
    mask: Mask, smollm2_tokenizer: PreTrainedTokenizerBase
) -> None:
    ids, supervised = mask(RENDERED) or pytest.fail("left out")
    assert smollm2_tokenizer.decode(ids[supervised]) == "Hello there<|im_end|>"


def test_two_ways_that_disagree_about_a_token_stop_the_run(mask: Mask) -> None:
    start, end = SPAN
    assert mask(replace(RENDERED, check=[(start, end)])) is not None
    with pytest.raises(DataError, match=r"chats\.jsonl:3: two ways of finding the trained tokens disagree"):
        mask(replace(RENDERED, check=[(start, end - len("<|im_end|>"))]))


def test_a_span_must_end_with_its_stop_token(mask: Mask) -> None:
    start, end = SPAN
    short = (start, end - len("<|im_end|>"))
    with pytest.raises(BadRow, match="does not write the stop token of message 2"):
        mask(replace(RENDERED, spans=[short]))
    assert mask(replace(RENDERED, spans=[short], without_stop_token=frozenset({0}))) is not None


def test_a_token_that_reaches_out_of_the_span_is_refused_or_left_out(
    mask: Mask, smollm2_tokenizer: PreTrainedTokenizerBase
) -> None:
    start, end = SPAN
    ids, supervised = mask(replace(RENDERED, spans=[(start + 2, end)])) or pytest.fail("left out")
    assert smollm2_tokenizer.decode(ids[supervised]) == " there<|im_end|>", (
        "Hello is one token, of which two are cut off"
    )
    with pytest.raises(BadRow, match="contains text that the chat template adds after it: 're'"):
        mask(replace(RENDERED, spans=[(start, TEXT.index("re<"))], without_stop_token=frozenset({0})))


def test_long_examples_follow_the_policy(mask: Mask) -> None:
    with pytest.raises(DataError, match="1 example is longer than max_length 6; the longest has"):
        mask(RENDERED, 6)
    assert mask(RENDERED, 6, "drop") is None
    ids, _ = mask(RENDERED, 6, "truncate") or pytest.fail("left out")
    assert len(ids) == 6
    assert mask(RENDERED, 2, "truncate") is None, "nothing trained is left of it"


def test_violations_name_the_first_and_the_longest() -> None:
    violations = LengthViolations()
    violations.raise_if_any(8)
    violations.add(LengthViolations(count=1, first=ORIGIN, longest=9))
    violations.add(LengthViolations(count=2, first=Origin(file="b", line=1), longest=12))
    with pytest.raises(DataError, match=r"chats\.jsonl:3: 3 examples are longer than max_length 8; the longest has 12"):
        violations.raise_if_any(8)


@pytest.mark.parametrize("max_length", [5, 7, 64])
def test_a_document_goes_on_in_the_next_example(smollm2_tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    document = replace(
        RENDERED, text="One two three four five six seven eight nine ten.", spans=None, is_plain_text=True
    )
    (tokens,) = Encoder(backend_of(smollm2_tokenizer))([document.text])
    whole = TokenMasker(smollm2_tokenizer, max_length=10**6, on_long="split")(document, tokens)[0]
    masker = TokenMasker(smollm2_tokenizer, max_length=max_length, on_long="split")
    parts = masker(document, tokens)

    assert [token for ids, mask in parts for token in ids[mask]] == [*whole[0][whole[1]]], "each token once"
    assert all(2 <= len(ids) <= max_length and not mask[0] for ids, mask in parts)
    assert masker.counts["split"] == (len(parts) > 1) == (max_length < len(whole[0]))


def test_a_conversation_is_never_split(mask: Mask) -> None:
    with pytest.raises(DataError, match="longer than max_length 5"):
        mask(RENDERED, max_length=5, on_long="split")


def counted(tokenizer: PreTrainedTokenizerBase, text: RenderedText, max_length: int, on_long: OnLong) -> dict[str, int]:
    masker = TokenMasker(tokenizer, max_length=max_length, on_long=on_long)
    (tokens,) = Encoder(backend_of(tokenizer))([text.text])
    for _ in range(3):
        masker(text, tokens)
    return {**masker.counts, "too_long": masker.too_long.count}


def test_what_happened_is_counted_for_each_example(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    length = len(smollm2_tokenizer(TEXT)["input_ids"])
    start, end = SPAN
    straddling = replace(RENDERED, spans=[(start + 2, end)])
    always = {"verified": 3, "straddling": 0}
    assert counted(smollm2_tokenizer, RENDERED, length, "error") == always | {"too_long": 0}, "as long as the limit"
    assert counted(smollm2_tokenizer, RENDERED, length - 1, "error") == always | {"too_long": 3}
    assert counted(smollm2_tokenizer, RENDERED, length - 1, "drop") == always | {"dropped_long": 3, "too_long": 0}
    assert counted(smollm2_tokenizer, RENDERED, length - 1, "truncate") == always | {"truncated": 3, "too_long": 0}
    assert counted(smollm2_tokenizer, RENDERED, 2, "truncate") == always | {"dropped_empty": 3, "too_long": 0}
    assert counted(smollm2_tokenizer, straddling, length, "drop") == {"verified": 3, "straddling": 3, "too_long": 0}


def test_plain_text_ends_with_the_end_of_text_where_the_tokenizer_has_one(
    smollm2_tokenizer: PreTrainedTokenizerBase,
) -> None:
    text = replace(RENDERED, text="One two", spans=None, is_plain_text=True)
    without = copy.deepcopy(smollm2_tokenizer)
    without.eos_token = None
    words = smollm2_tokenizer("One two")["input_ids"]
    for tokenizer, end in ((smollm2_tokenizer, [smollm2_tokenizer.eos_token_id]), (without, [])):
        (tokens,) = Encoder(backend_of(tokenizer))([text.text])
        ((ids, mask),) = TokenMasker(tokenizer, max_length=64, on_long="error")(text, tokens)
        assert ids.tolist() == [*words, *end]
        assert mask.tolist() == [False, *[True] * (len(ids) - 1)]


def test_the_last_token_of_a_span_is_the_one_with_its_last_character() -> None:
    text, ids = "ab", np.arange(3, dtype=np.int32)
    tokens = Tokens(ids=ids, starts=np.array([0, 1, 2]), ends=np.array([1, 2, 2]), decoded=None)
    assert _tokens_of(tokens, text, 0, 1, "it") == (0, 0, False)
    assert _tokens_of(tokens, text, 0, 2, "it") == (0, 1, False)
    assert _tokens_of(tokens, text, 1, 2, "it") == (1, 1, False)


@pytest.mark.parametrize("text", ["Øne two", "One twø"])
def test_every_token_must_give_back_its_text_the_first_one_too(
    smollm2_tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    (tokens,) = Encoder(backend_of(smollm2_tokenizer))(["One two"])
    tokens = replace(tokens, decoded="One two")  # as of a tokenizer that writes Ø and ø without their strokes
    masker = TokenMasker(smollm2_tokenizer, max_length=64, on_long="error")
    with pytest.raises(BadRow, match="cannot write it"):
        masker(replace(RENDERED, text=text, spans=None, is_plain_text=True), tokens)
