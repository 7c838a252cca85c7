"""The preview shows the tensors."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from loratune.data.examples import Example
from loratune.data.preview import MAX_TOKENS, preview
from loratune.data.rows.row import Origin


def example(tokenizer: PreTrainedTokenizerBase, *parts: tuple[str, bool]) -> Example:
    ids: list[int] = []
    supervised: list[bool] = []
    for text, trained in parts:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += tokens
        supervised += [trained] * len(tokens)
    return Example(
        input_ids=np.array(ids, np.int32), supervised=np.array(supervised), origin=Origin(file="a.jsonl", line=3)
    )


@pytest.fixture
def shown(smollm2_tokenizer: PreTrainedTokenizerBase) -> Example:
    parts = ("<|im_start|>assistant\n", False), ("It is 5 😀.<|im_end|>", True), ("\n", False)
    return example(smollm2_tokenizer, *parts)


def printed(renderable: object, **settings: object) -> str:
    output = io.StringIO()
    Console(file=output, width=200, **settings).print(renderable)  # type: ignore[arg-type]
    return output.getvalue()


def test_without_color_what_is_trained_stands_in_brackets(
    shown: Example, smollm2_tokenizer: PreTrainedTokenizerBase
) -> None:
    text = printed(preview([shown], smollm2_tokenizer, 3))

    assert "<|im_start|>assistant\n⟦It is 5 😀.<|im_end|>•⟧\n" in text
    assert f"a.jsonl:3: {len(shown.input_ids)} tokens, {int(shown.supervised.sum())} trained" in text
    assert "\x1b" not in text


def test_in_color_trained_tokens_are_green_and_the_stop_token_is_underlined(
    shown: Example, smollm2_tokenizer: PreTrainedTokenizerBase
) -> None:
    text = printed(preview([shown], smollm2_tokenizer, 3), force_terminal=True, color_system="standard")

    assert "\x1b[32mIt is 5 😀.\x1b[0m\x1b[1;4;32m<|im_end|>\x1b[0m" in text
    assert "\x1b[1;2m<|im_start|>\x1b[0m\x1b[2massistant\x1b[0m" in text


def test_it_shows_as_many_examples_as_asked_and_cuts_long_ones(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    long = example(smollm2_tokenizer, ("so " * 600, True))

    text = printed(preview([long, long, long], smollm2_tokenizer, 2))

    assert text.count("a.jsonl:3") == 2
    assert f"{len(long.input_ids) - MAX_TOKENS} more tokens" in text


def test_the_page_has_the_same_marks_and_escapes_what_the_data_holds(
    smollm2_tokenizer: PreTrainedTokenizerBase,
) -> None:
    planted = '<script>alert(1)</script> & "it\'s"'
    shown = example(
        smollm2_tokenizer, (planted, False), ("<|im_start|>", False), (f"Yes. {planted}<|im_end|>", True), ("\n", False)
    )

    page = preview([shown], smollm2_tokenizer, 3).html(title="<b>tiny</b>")

    assert "<script" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#34;it&#39;s&#34;" in page
    assert '<span class="trained special stop">&lt;|im_end|&gt;</span>' in page
    assert '<span class="trained">Yes. &lt;script' in page
    assert '<span class=" special">&lt;|im_start|&gt;</span>' in page
    assert "http" not in page
    assert "src=" not in page
