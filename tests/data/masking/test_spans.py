"""The two ways of finding trained characters, each by itself, against what a reader of the text would mark."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerBase

from loratune.data.masking.spans import blanks_before, first_stop, message_end
from loratune.data.masking.spans_by_prompting import spans_by_difference, spans_by_prompting
from loratune.data.masking.spans_by_substitution import SubstitutionMatcher
from loratune.data.masking.template import ChatTemplate
from loratune.data.masking.template_layout import LayoutFinder, fill
from loratune.run.errors import BadRow
from tests.data.golden import CHAT, GOLDEN, SMOLLM2

WithTemplate = Callable[..., PreTrainedTokenizerBase]


@pytest.mark.parametrize("name", GOLDEN)
def test_each_way_finds_the_answers_alone(name: str, with_template: WithTemplate) -> None:
    source, specials, trained, text = GOLDEN[name]
    template = ChatTemplate(with_template(source, **specials))
    messages = list(CHAT)

    rendering = SubstitutionMatcher(template)(text, messages, None, [1, 3])
    assert [rendering.text[start:end] for start, end in rendering.spans] == trained

    spans = spans_by_prompting(text, messages, None, [1, 3], template)
    assert [text[start:end] for start, end in spans] == trained


def test_each_way_finds_a_users_message_with_its_end(with_template: WithTemplate) -> None:
    template = ChatTemplate(with_template(SMOLLM2, bos="<|im_start|>", eos="<|im_end|>"))
    text = GOLDEN["smollm2"][3]

    rendering = SubstitutionMatcher(template)(text, list(CHAT), None, [0, 2])
    spans = spans_by_difference(text, list(CHAT), None, [0, 2], template)

    assert rendering.spans == spans
    assert [text[start:end] for start, end in spans] == ["What is 2 + 3?<|im_end|>", "And doubled?<|im_end|>"]


def test_a_layout_is_what_the_template_writes_around_the_texts(with_template: WithTemplate) -> None:
    template = ChatTemplate(with_template(SMOLLM2, bos="<|im_start|>", eos="<|im_end|>"))
    text = GOLDEN["smollm2"][3]
    layout = LayoutFinder(template).cached(list(CHAT), None, [1, 3])

    assert [slot.message for slot in layout.slots] == [0, 1, 2, 3]
    assert layout.gaps[1] == "<|im_end|>\n<|im_start|>assistant\n"
    assert layout.prompts[1].tail == layout.gaps[1]
    assert layout.num_controls == 2 * 5
    assert fill(layout, text, list(CHAT)) == [message["content"] for message in CHAT]
    assert fill(layout, text.replace("doubled", "halved"), list(CHAT)) is None
    with pytest.raises(BadRow, match="answers nothing"):
        LayoutFinder(template).cached(list(CHAT[1:]), None, [0])


def test_a_message_ends_with_the_first_stop_before_the_next_message(with_template: WithTemplate) -> None:
    template = ChatTemplate(with_template(SMOLLM2, bos="<|im_start|>", eos="<|im_end|>"))
    text = "Hi<|im_end|>\n<|im_start|>user\n"

    assert first_stop(text, 0, len(text), ("<|im_end|>", "<EOS>")) == len("Hi<|im_end|>")
    assert first_stop(text, 0, 5, ("<|im_end|>",)) is None, "it must end before the limit"
    assert message_end(text, 2, len(text), None, None, template) == len("Hi<|im_end|>")
    assert message_end(text, 2, len(text), "<|im_end|>\n", None, template) == len("Hi<|im_end|>")
    assert message_end(text, 2, len(text), "\n", None, template) is None, "the template does not write it here"
    assert blanks_before("[INST]  Hi", 8) == 6
