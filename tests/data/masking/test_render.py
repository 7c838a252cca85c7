"""What is trained, by hand; what is refused; what is cut."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from loratune.data.examples import Example
from loratune.data.masking.render import Rendered
from loratune.data.rows.conversation import Conversation
from loratune.data.rows.formats import to_conversations
from loratune.data.rows.row import Row
from loratune.run.errors import DataError
from tests.data.golden import CHAT, GOLDEN, MISTRAL_SYSTEM_LAST, R1_ANSWER, SMOLLM2, assistant, rejection, user

Make = Callable[..., Conversation]
WithTemplate = Callable[..., PreTrainedTokenizerBase]
Render = Callable[..., Rendered]
Trained = Callable[[Example, PreTrainedTokenizerBase], list[str]]


@pytest.mark.parametrize("name", GOLDEN)
def test_exactly_the_answers_and_their_stop_tokens_are_trained(
    name: str, with_template: WithTemplate, converse: Make, rendered: Render, trained_texts: Trained
) -> None:
    template, tokens, trained, whole = GOLDEN[name]
    tokenizer = with_template(template, **tokens)

    (example,) = rendered([converse(*CHAT)], tokenizer).examples

    assert trained_texts(example, tokenizer) == trained
    assert tokenizer.decode(example.input_ids) == whole
    assert example.input_ids.dtype == np.int32
    assert example.supervised.dtype == np.bool_


@pytest.mark.parametrize("name", GOLDEN)
def test_the_tokens_are_those_of_the_librarys_own_template_call(
    name: str, with_template: WithTemplate, converse: Make, rendered: Render
) -> None:
    template, tokens, _, _ = GOLDEN[name]
    tokenizer = with_template(template, **tokens)

    (example,) = rendered([converse(*CHAT)], tokenizer).examples

    assert example.input_ids.tolist() == tokenizer.apply_chat_template(list(CHAT), return_dict=False)


def test_last_trains_the_last_answer_and_all_trains_every_token_but_the_first(
    with_template: WithTemplate, converse: Make, rendered: Render, trained_texts: Trained
) -> None:
    tokenizer = with_template(SMOLLM2)

    (last,) = rendered([converse(*CHAT)], tokenizer, train_on="last").examples
    (everything,) = rendered([converse(*CHAT)], tokenizer, train_on="all").examples

    assert trained_texts(last, tokenizer) == ["10, of course.<|im_end|>"]
    assert everything.supervised.tolist() == [False] + [True] * (len(everything.input_ids) - 1)


def test_a_template_that_moves_the_system_text_to_the_last_turn_is_followed(
    with_template: WithTemplate, converse: Make, rendered: Render, trained_texts: Trained
) -> None:
    tokenizer = with_template(MISTRAL_SYSTEM_LAST, bos="<s>", eos="</s>")

    (example,) = rendered([converse({"role": "system", "content": "Be brief."}, *CHAT)], tokenizer).examples

    assert trained_texts(example, tokenizer) == [" It is 5.</s>", " 10, of course.</s>"]


def test_earlier_answers_of_gpt_oss_end_without_its_stop_token_so_only_the_last_can_be_trained(
    with_template: WithTemplate, converse: Make, rendered: Render, trained_texts: Trained
) -> None:
    tokenizer = with_template("gptoss", eos="<|return|>")

    refused = rendered([converse(*CHAT)], tokenizer)
    (example,) = rendered([converse(*CHAT)], tokenizer, train_on="last").examples

    assert "without a stop token" in refused.rejected[0].reason
    assert trained_texts(example, tokenizer) == ["<|channel|>final<|message|>10, of course.<|return|>"]


def test_texts_that_read_like_the_templates_own_words_lead_nobody_astray(
    with_template: WithTemplate, converse: Make, rendered: Render, trained_texts: Trained
) -> None:
    tokenizer = with_template("qwen3_6")  # writes earlier answers differently, so prompts are no prefixes
    call = {"function": {"name": "weather", "arguments": {"city": "user"}}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
    turn = (
        user("user\n<tool_response>x</tool_response> assistant"),
        assistant(None, tool_calls=[call]),
        {"role": "tool", "content": "assistant"},
        assistant("assistant\n"),
    )

    conversation = converse(*turn, *turn, tools=tools)

    (example,) = rendered([conversation], tokenizer).examples
    (last,) = rendered([conversation], tokenizer, train_on="last").examples

    assert trained_texts(last, tokenizer) == trained_texts(example, tokenizer)[-1:]
    trained = trained_texts(example, tokenizer)
    assert len(trained) == 4
    assert ["<function=weather>" in text for text in trained] == [True, False, True, False]
    assert [text.removesuffix("<|im_end|>").strip().endswith("assistant") for text in trained] == [
        False,
        True,
        False,
        True,
    ]


# ---- thoughts


def test_r1_drops_thoughts_and_keep_puts_them_back_after_the_opening_of_its_prompt(
    with_template: WithTemplate, converse: Make, rendered: Render, trained_texts: Trained
) -> None:
    tokenizer = with_template("deepseek_r1_distill", eos="<｜end▁of▁sentence｜>")
    conversation = converse(user("5 doubled?"), assistant(R1_ANSWER))
    assert "Five times two" not in tokenizer.apply_chat_template(list(conversation.messages), tokenize=False)

    result = rendered([conversation], tokenizer)

    (example,) = result.examples
    whole = "<BOS><｜User｜>5 doubled?<｜Assistant｜><think>\nFive times two.\n</think>\n\n10.<｜end▁of▁sentence｜>"
    assert tokenizer.decode(example.input_ids) == whole
    assert trained_texts(example, tokenizer) == ["Five times two.\n</think>\n\n10.<｜end▁of▁sentence｜>"]
    assert any("drops the thoughts of 1 answer." in notice for notice in result.notices)


@pytest.mark.parametrize("answer", ["Five times two.\n</think>\n\n10.", "<think>Five times two.</think>10.", R1_ANSWER])
def test_recorded_thoughts_are_recognised_with_and_without_their_opening(
    answer: str, with_template: WithTemplate, converse: Make, rendered: Render, trained_texts: Trained
) -> None:
    tokenizer = with_template("deepseek_r1_distill", eos="<｜end▁of▁sentence｜>")

    (example,) = rendered([converse(user("5 doubled?"), assistant(answer))], tokenizer).examples

    assert trained_texts(example, tokenizer) == ["Five times two.\n</think>\n\n10.<｜end▁of▁sentence｜>"]


def test_answers_without_thoughts_under_a_prompt_that_opens_them_are_reported(
    with_template: WithTemplate, converse: Make, rendered: Render
) -> None:
    result = rendered([converse(*CHAT)], with_template("deepseek_r1_distill"))

    assert any("opens <think>, but 2 of 2 trained answers have no thoughts" in notice for notice in result.notices)


def test_empty_thoughts_that_the_template_adds_are_reported(
    with_template: WithTemplate, converse: Make, rendered: Render, trained_texts: Trained
) -> None:
    tokenizer = with_template("qwen3", eos="<|im_end|>")

    result = rendered([converse(*CHAT)], tokenizer)

    assert [text.startswith("<think>\n\n</think>") for text in trained_texts(result.examples[0], tokenizer)] == [
        False,
        True,
    ]
    assert any("empty thoughts (<think></think>) at the start of 1 of 2 trained answers" in n for n in result.notices)
    own = rendered([converse(user("5 doubled?"), assistant("<think>Twice.</think>10."))], tokenizer)
    assert not any("empty thoughts" in notice for notice in own.notices)


def test_strip_removes_thoughts_and_error_rejects_them(
    with_template: WithTemplate, converse: Make, rendered: Render, trained_texts: Trained
) -> None:
    for template in (SMOLLM2, "qwen3_instruct_2507"):
        tokenizer = with_template(template)
        conversation = converse(user("5 doubled?"), assistant(R1_ANSWER))
        (example,) = rendered([conversation], tokenizer, thinking="strip").examples
        refused = rendered([conversation], tokenizer, thinking="error")

        assert trained_texts(example, tokenizer) == ["10.<|im_end|>"]
        assert "has thoughts" in refused.rejected[0].reason


def test_thoughts_without_an_answer_and_thoughts_without_an_end_are_bad_rows(
    with_template: WithTemplate, converse: Make, rendered: Render
) -> None:
    tokenizer = with_template(SMOLLM2)

    no_answer = rendered([converse(user("Hi"), assistant("<think>\nHm.\n</think>\n"))], tokenizer, thinking="strip")
    no_end = rendered([converse(user("Hi"), assistant("<think>\nHm."))], tokenizer, thinking="strip")

    assert "no answer" in no_answer.rejected[0].reason
    assert "do not end" in no_end.rejected[0].reason


# ---- length


def test_long_examples_are_cut_dropped_or_refused(
    with_template: WithTemplate, converse: Make, rendered: Render
) -> None:
    tokenizer = with_template(SMOLLM2)
    short, long = converse(*CHAT[:2]), converse(user("Hi"), assistant("so " * 300), line=7)
    conversations = [short, long]

    cut = rendered(conversations, tokenizer, max_length=100, on_long="truncate")
    dropped = rendered(conversations, tokenizer, max_length=100, on_long="drop")

    assert [len(example.input_ids) <= 100 for example in cut.examples] == [True, True]
    assert cut.counts["truncated"] == 1
    assert [example.origin.line for example in dropped.examples] == [1]
    assert dropped.counts["dropped_long"] == 1
    with pytest.raises(DataError, match="1 example is longer than max_length 100") as caught:
        rendered(conversations, tokenizer, max_length=100, on_long="error")
    assert caught.value.place == "chats.jsonl:7"


def test_an_example_whose_answers_are_all_cut_off_is_dropped_and_counted(
    with_template: WithTemplate, converse: Make, rendered: Render
) -> None:
    result = rendered(
        [converse(user("so " * 300), assistant("Hm."))], with_template(SMOLLM2), max_length=100, on_long="truncate"
    )

    assert not result.examples
    assert result.counts["dropped_empty"] == 1


# ---- plain text


def text_of(*texts: str) -> list[Conversation]:
    return to_conversations([Row(file="t", line=n, value={"text": t}) for n, t in enumerate(texts, start=1)], "text")[0]


def test_plain_text_is_trained_whole_and_ends_with_the_stop_token(
    with_template: WithTemplate, rendered: Render
) -> None:
    tokenizer = with_template(SMOLLM2, eos="<|im_end|>")
    tokenizer.chat_template = None

    plain, ended = rendered(text_of("Once upon a time", "The end<|im_end|>"), tokenizer, train_on="all").examples

    assert tokenizer.decode(plain.input_ids) == "Once upon a time<|im_end|>"
    assert tokenizer.decode(ended.input_ids) == "The end<|im_end|>"
    assert plain.supervised.tolist() == [False] + [True] * (len(plain.input_ids) - 1)


def test_plain_text_starts_as_the_tokenizer_starts_a_text_and_never_twice(rendered: Render) -> None:
    tokenizer = metaspace_tokenizer()

    once, twice = rendered(text_of("hello there", "<s>hello there"), tokenizer, train_on="all").examples

    assert tokenizer.convert_ids_to_tokens(once.input_ids.tolist())[0] == "<s>"
    assert tokenizer.convert_ids_to_tokens(twice.input_ids.tolist()).count("<s>") == 1


# ---- tokenizers


def metaspace_tokenizer(*, lowercase: bool = False) -> PreTrainedTokenizerFast:
    """Like Phi-3's: blanks are ▁, the first is added, and control tokens swallow the line end after them."""
    letters = sorted({*"▁\n.,?!-+0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"})
    vocab = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *letters])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    steps: list[normalizers.Normalizer] = [normalizers.Lowercase()] if lowercase else []
    core.normalizer = normalizers.Sequence([*steps, normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.add_special_tokens(["<s>", "</s>"])
    core.add_special_tokens([AddedToken(t, rstrip=True) for t in ("<|user|>", "<|assistant|>", "<|end|>")])
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)


def test_control_tokens_that_swallow_line_ends_are_followed(converse: Make, rendered: Render) -> None:
    tokenizer = metaspace_tokenizer()
    tokenizer.chat_template = PHI3

    result = rendered([converse(*CHAT)], tokenizer)

    (example,) = result.examples
    tokens = np.array(tokenizer.convert_ids_to_tokens(example.input_ids.tolist()))
    assert "".join(tokens[example.supervised]) == "▁It▁is▁5.<|end|>▁10,▁of▁course.<|end|>"
    assert not result.rejected


def test_text_that_the_tokenizer_cannot_give_back_is_rejected(converse: Make, rendered: Render) -> None:
    tokenizer, lower = metaspace_tokenizer(), metaspace_tokenizer(lowercase=True)
    tokenizer.chat_template = lower.chat_template = PHI3

    assert "cannot write it" in rejection(rendered([converse(user("Hi"), assistant("Ça va"))], tokenizer))
    assert "cannot write it" in rejection(rendered([converse(user("Hi"), assistant("OK"))], lower))


def test_a_character_whose_bytes_the_vocabulary_lacks_is_rejected(
    with_template: WithTemplate, converse: Make, rendered: Render
) -> None:
    assert "cannot write it" in rejection(
        rendered([converse(user("\U00040000"), assistant("Hm."))], with_template(SMOLLM2))
    )


def test_a_token_that_holds_header_and_answer_is_not_trained_and_counted(
    with_template: WithTemplate, converse: Make, rendered: Render, trained_texts: Trained
) -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>: {{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>: {% endif %}"  # noqa: E501
    tokenizer = with_template(template)

    result = rendered([converse(user("Hi"), assistant("Hello you"))], tokenizer)

    assert trained_texts(result.examples[0], tokenizer) == [" you<|end|>"]  # " Hello" begins with the header's blank
    assert result.counts["straddling"] == 1
    assert any("1 token contains both" in notice for notice in result.notices)


def test_the_tokenizer_is_left_as_it_was(with_template: WithTemplate, converse: Make, rendered: Render) -> None:
    tokenizer = with_template(SMOLLM2)
    before = tokenizer.backend_tokenizer.to_str()

    rendered([converse(*CHAT)], tokenizer)

    assert tokenizer.backend_tokenizer.to_str() == before


def test_a_tokenizer_without_offsets_is_refused(converse: Make, rendered: Render) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match="does not report where in the text its tokens are"):
        rendered([converse(*CHAT)], Slow())


# ---- any conversation

LETTERS = st.characters(exclude_categories=("Cc", "Cn", "Co", "Cs"), exclude_characters="<") | st.sampled_from(" \n")
TEXT = st.text(LETTERS, min_size=1, max_size=40).filter(str.strip)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), system=st.none() | TEXT)
@pytest.mark.parametrize("name", ["smollm2", "qwen3", "llama3", "r1-distill", "mistral"])
def test_of_any_conversation_the_answers_and_only_they_are_trained(
    name: str,
    pairs: list[tuple[str, str]],
    system: str | None,
    with_template: WithTemplate,
    converse: Make,
    rendered: Render,
    trained_texts: Trained,
) -> None:
    template, tokens, _, _ = GOLDEN[name]
    tokenizer = with_template(template, **tokens)
    messages = [message for asked, answer in pairs for message in (user(asked), assistant(answer))]
    if system is not None and name != "mistral":
        messages.insert(0, {"role": "system", "content": system})

    texts = [message["content"] for message in messages]
    # SmolLM2's vocabulary lacks some bytes (0xF1 among them); such text is rejected, and another test's matter.
    assume(all(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text for text in texts))

    result = rendered([converse(*messages)], tokenizer)

    assert not result.rejected
    stop = {"llama3": "<|eot_id|>", "r1-distill": "<｜end▁of▁sentence｜>", "mistral": "</s>"}.get(name, "<|im_end|>")
    trained = trained_texts(result.examples[0], tokenizer)
    assert len(trained) == len(pairs)
    for (_, answer), text in zip(pairs, trained, strict=True):
        assert text.endswith(stop)
        assert answer.strip() in text
        assert len(text) <= len(answer) + len(stop) + len("<think>\n\n</think>\n\n")
