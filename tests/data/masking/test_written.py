"""What the chat template wrote is what the row said: calls, schemas, thoughts, and started answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from loratune.data.examples import Example
from loratune.data.masking.policy import Policy
from loratune.data.masking.render import Rendered, render
from loratune.data.masking.spans_by_prompting import put_thoughts_back
from loratune.data.masking.template import ChatTemplate
from loratune.data.masking.written import WrittenCheck, check_calls
from loratune.data.prompts import render_prompts
from loratune.data.rows.conversation import Conversation, thoughts_before
from loratune.data.rows.formats import to_conversations
from loratune.data.rows.row import Row
from loratune.run.errors import BadRow, DataError
from tests.data.conftest import TRL_TEMPLATES
from tests.data.masking.test_templates import OUTCOMES, TOOLS, assistant, user

Make = Callable[..., PreTrainedTokenizerBase]
Render = Callable[..., Rendered]
Texts = Callable[[Example, PreTrainedTokenizerBase], list[str]]
NAMES = sorted(path.stem for path in TRL_TEMPLATES.glob("*.jinja"))


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": "call00001", "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str, **more: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"city": {"type": "string", "description": "The city."}}}
    return {
        "type": "function",
        "function": {"name": name, "description": "It rains.", "parameters": parameters, **more},
    }


RESULT = {"role": "tool", "name": "rain", "tool_call_id": "call00001", "content": "wet"}


# ---- calls


@pytest.mark.parametrize(
    "calls",
    [
        [call("rain", city="Oslo"), call("rain", city="Bergen")],
        [call("rain", city="Oslo"), call("json", city="Oslo")],  # a word that the template writes
        [call("rain", city="Oslo"), call("rain", city="Oslo")],
        [call("rain"), call("assistant")],
    ],
)
def test_a_template_that_writes_one_call_of_two_is_refused(
    calls: list[Any], with_template: Make, converse: Callable[..., Conversation], rendered: Render
) -> None:
    row = converse(user("Rain?"), assistant(tool_calls=calls), RESULT, assistant("Wet."), tools=[tool("rain")])

    (rejected,) = rendered([row], with_template("gptoss", eos="<|return|>")).rejected
    assert "the chat template drops the tool call of message 2" in rejected.reason
    assert rendered([row], with_template("qwen2_5", eos="<|im_end|>")).examples


def test_a_template_that_writes_some_values_only_is_refused(
    with_template: Make, converse: Callable[..., Conversation], rendered: Render
) -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}{% for c in m.tool_calls %}"
        "{{ c.function.name }} {% for k, v in c.function.arguments.items() %}{% if CONDITION %}{{ k }}={{ v }} "
        "{% endif %}{% endfor %}{% endfor %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = converse(user("Rain?"), assistant(tool_calls=[call("rain", city="Oslo", days=3)]))
    for condition, reason in (
        ("true", ""),
        ("v is string", "drops the argument days of a tool call of message 2 (rain)"),
        ("v != 3", "drops or changes the argument 'days' of a tool call of message 2"),
        ("loop.first", "drops the argument days"),
    ):
        result = rendered([row], with_template(source.replace("CONDITION", condition), eos="<|im_end|>"))
        assert (reason in result.rejected[0].reason) if reason else result.examples, condition


def test_every_name_and_value_must_be_there_as_often_as_the_calls_have_it() -> None:
    two = {"tool_calls": [call("rain", city="Oslo"), call("rain", city="Oslo")]}
    check_calls(two, 'rain {"city": "Oslo"} rain {"city": "Oslo"}', 1)
    check_calls({"tool_calls": [call("f", x='"a"\n', n=0.5, b=True)]}, r'f {"x": "\"a\"\n", "n": 0.5, "b": true}', 1)
    with pytest.raises(BadRow, match="drops the tool call"):
        check_calls(two, 'rain {"city": "Oslo"} {"city": "Oslo"}', 1)
    with pytest.raises(BadRow, match="argument 'Oslo'"):
        check_calls(two, 'rain {"city": "Oslo"} rain {"city": ""}', 1)


# ---- schemas


@pytest.mark.parametrize("name", ["search", "user", "the", "a"])
def test_a_tool_that_only_the_user_mentions_is_not_written(
    name: str, with_template: Make, converse: Callable[..., Conversation], rendered: Render
) -> None:
    row = converse(user(f"Please {name} the web"), assistant("No."), tools=[tool(name)])

    (rejected,) = rendered([row], with_template("llama3", eos="<|eot_id|>")).rejected
    assert rejected.reason == f"the chat template drops the tools: {name} is not in its text"
    assert rendered([row], with_template("qwen3", eos="<|im_end|>")).examples


def test_what_a_template_does_not_write_of_a_schema_is_named(
    with_template: Make, converse: Callable[..., Conversation], rendered: Render
) -> None:
    row = converse(user("Hi"), assistant("No."), tools=[tool("rain", strict=True, returns={"description": "A depth."})])

    assert not any(
        "write everything" in notice for notice in rendered([row], with_template("qwen3", eos="<|im_end|>")).notices
    )
    result = rendered([row], with_template("gptoss", eos="<|return|>"))
    assert (
        "The chat template does not write everything that the tools say: strict (1), description (1)." in result.notices
    )
    check = WrittenCheck(ChatTemplate(with_template("gptoss", eos="<|return|>")))
    assert check(row.messages, [tool("rain")]) == ()


# ---- thoughts

THINKING_CHATS: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "two answers": ([user("A?"), assistant("One.", reasoning_content="Hm one."), user("B?"), assistant("Two.", reasoning_content="Hm two.")], None),  # noqa: E501
    "inline": ([user("A?"), assistant("<think>\nHm one.\n</think>\n\nOne."), user("B?"), assistant("Two.")], None),
    "call": ([user("Rain?"), assistant(tool_calls=[call("weather", city="Oslo")], reasoning_content="Hm call."), {**RESULT, "name": "weather"}, assistant("Wet.")], TOOLS),  # noqa: E501
    "call, then thoughts": ([user("Rain?"), assistant(tool_calls=[call("weather", city="Oslo")], reasoning_content="Hm call."), {**RESULT, "name": "weather"}, assistant("Wet.", reasoning_content="Hm two.")], TOOLS),  # noqa: E501
    "before another user": ([user("Rain?"), assistant(tool_calls=[call("weather", city="Oslo")], reasoning_content="Hm call."), {**RESULT, "name": "weather"}, assistant("Wet."), user("B?"), assistant("Two.", reasoning_content="Hm two.")], TOOLS),  # noqa: E501
}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["gptoss", "qwen3", "qwen3_5_think", "gemma4", "nemotron_3_nano", "deepseek_r1_distill", "smolvlm"]
)
@pytest.mark.parametrize("chat", THINKING_CHATS)
def test_a_turn_is_trained_as_the_template_writes_it_last(
    name: str,
    chat: str,
    with_template: Make,
    converse: Callable[..., Conversation],
    rendered: Render,
    trained_texts: Texts,
) -> None:
    messages, tools = THINKING_CHATS[chat]
    check_last_turns(
        converse(*messages, tools=tools),
        with_template(name, eos="<|return|>" if name == "gptoss" else "<EOS>"),
        trained_texts,
    )


def check_last_turns(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, trained_texts: Texts) -> bool:
    """Every trained answer has its texts and thoughts, and is what is trained if the conversation ends with it.

    Returns whether the conversation was trained on.
    """
    policy = Policy(train_on="assistant", thinking="keep", max_length=9999, on_long="error")
    try:
        result = render([conversation], tokenizer, policy, processes=1)
    except DataError:
        return False
    if not result.examples:
        assert result.rejected[0].reason
        return False
    trained = trained_texts(result.examples[0], tokenizer)
    answers = [n for n, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    assert len(trained) == len(answers)
    for text, turn in zip(trained, answers, strict=True):
        message = conversation.messages[turn]
        assert text.count(message.get("reasoning_content", "").strip()) >= 1
        assert message.get("content", "").partition("</think>")[2].strip() in text
        for made in message.get("tool_calls", ()):
            assert made["function"]["name"] in text
        ends = Conversation(
            messages=conversation.messages[: turn + 1], tools=conversation.tools, text=None, origin=conversation.origin
        )
        last = render([ends], tokenizer, policy, processes=1)
        if "reasoning_content" in message and last.examples:
            assert trained_texts(last.examples[0], tokenizer)[-1] == text
    return True


def test_a_restored_turn_that_differs_is_found(
    with_template: Make, converse: Callable[..., Conversation], monkeypatch: pytest.MonkeyPatch, rendered: Render
) -> None:
    messages, tools = THINKING_CHATS["call, then thoughts"]
    tokenizer = with_template("gptoss", eos="<|return|>")
    assert rendered([converse(*messages, tools=tools)], tokenizer).counts["thoughts_restored"] == 1

    def wrong(*arguments: Any) -> Any:
        text, spans = put_thoughts_back(*arguments)
        return text.replace("Hm call.", "Hm."), spans

    monkeypatch.setattr("loratune.data.masking.renderer.put_thoughts_back", wrong)
    (rejected,) = rendered([converse(*messages, tools=tools)], tokenizer).rejected
    assert "two ways of putting them back disagree" in rejected.reason


def test_thoughts_without_a_place_are_refused_or_left_to_the_template(
    with_template: Make, converse: Callable[..., Conversation], rendered: Render, trained_texts: Texts
) -> None:
    thinking = assistant("One.", reasoning_content="Hm.")
    tokenizer = with_template("gemma4", eos="<turn|>")
    (rejected,) = rendered([converse(user("A?"), thinking)], tokenizer).rejected
    assert "writes none in an answer without tool calls" in rejected.reason
    (example,) = rendered([converse(user("A?"), thinking)], tokenizer, thinking="strip").examples
    assert trained_texts(example, tokenizer) == ["One.<turn|>"]
    (example,) = rendered(
        [converse(user("A?"), thinking, user("B?"), assistant("Two."))], tokenizer, train_on="last"
    ).examples
    assert trained_texts(example, tokenizer) == ["Two.<turn|>"]


def test_thoughts_that_become_text_are_told(
    with_template: Make, converse: Callable[..., Conversation], rendered: Render
) -> None:
    row = converse(user("A?"), assistant("One.", reasoning_content="Hm."))
    result = rendered([row], with_template("qwen2_5", eos="<|im_end|>"))
    assert any("no place for thoughts: those of 1 answer are" in notice for notice in result.notices)
    for name, settings_ in (("qwen3", {}), ("qwen2_5", {"thinking": "strip"})):
        result = rendered([row], with_template(name, eos="<|im_end|>"), **settings_)
        assert not any("no place for thoughts" in notice for notice in result.notices)


def test_what_stands_before_an_answer_keeps_the_form_of_the_data_or_takes_that_of_the_prompt() -> None:
    assert thoughts_before("<think>a</think> b", opened=False) == "<think>a</think> "
    assert thoughts_before("a</think>b", opened=True) == "<think>\na\n</think>\n\n"


# ---- generated conversations, every template

WORD = st.text("abcdefg", min_size=3, max_size=8).map(str.capitalize)
VALUE = st.one_of(WORD, st.integers(10, 9999), st.lists(WORD, min_size=1, max_size=2), st.booleans())
CALLS = st.lists(
    st.tuples(st.sampled_from(("rain", "wind")), st.dictionaries(st.sampled_from(("city", "day")), VALUE, min_size=1)),
    min_size=1,
    max_size=2,
)
STEP = st.tuples(st.none() | CALLS, st.none() | WORD, WORD, st.none() | WORD)
CHATS = st.lists(st.tuples(WORD, st.lists(STEP, min_size=1, max_size=2)), min_size=1, max_size=2)


def conversation_of(chat: Any) -> Conversation:
    messages: list[dict[str, Any]] = []
    for asked, steps in chat:
        messages.append(user(asked))
        for calls, thoughts, said, content in steps:
            extra = {"reasoning_content": f"Thought {thoughts}"} if thoughts else {}
            if calls is None:
                continue
            made = [call(name, **arguments) for name, arguments in calls]
            messages.append(assistant(content or "", tool_calls=made, **extra))
            messages += [{**RESULT, "name": name, "content": f"Result {said}"} for name, _ in calls]
        _, thoughts, said, _ = steps[-1]
        messages.append(
            assistant(f"Answer {said}", **({"reasoning_content": f"Thought {thoughts}"} if thoughts else {}))
        )
    tools = (
        [tool(name) for name in ("rain", "wind")] if any(calls for _, steps in chat for calls, *_ in steps) else None
    )
    (made,), _ = to_conversations([Row(file="a", line=1, value={"messages": messages, "tools": tools})], "messages")
    return made


QUICK = settings(
    max_examples=3,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate, Phase.shrink),  # explaining a failure traces every line, for an hour
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("gptoss", "qwen3", "llama3_1") else pytest.mark.slow) for name in NAMES],
)
def test_generated_conversations_are_trained_as_they_are_or_refused(
    name: str, with_template: Make, trained_texts: Texts
) -> None:
    tokenizer = with_template(name)

    @QUICK
    @given(chat=CHATS)
    def check(chat: Any) -> None:
        check_last_turns(conversation_of(chat), tokenizer, trained_texts)

    check()


@pytest.mark.slow
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("name", NAMES)
def test_10_000_generated_conversations_over_all_templates(
    name: str, with_template: Make, trained_texts: Texts
) -> None:
    tokenizer = with_template(name)
    trained = 0

    @settings(QUICK, max_examples=-(-10_000 // len(NAMES)), derandomize=False, print_blob=True)
    @given(chat=CHATS)
    def check(chat: Any) -> None:
        nonlocal trained
        trained += check_last_turns(conversation_of(chat), tokenizer, trained_texts)

    check()
    print(f"{name}: {trained} trained")  # noqa: T201 - with -s, for docs/results/fuzz.md
    refused = str(OUTCOMES[name]["single"]).startswith("refused")
    assert bool(trained) is not refused


# ---- started answers


def pair(prompt: Any, completion: Any) -> Conversation:
    row = Row(file="a", line=1, value={"prompt": prompt, "completion": completion})
    (conversation,), rejected = to_conversations([row], "prompt_completion")
    assert not rejected
    return conversation


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "gemma", "qwen3"])
@pytest.mark.parametrize(
    ("start", "rest", "trained"),
    [("Sure, ", "here", " here"), ("Sure,", " here", " here"), ("One.\n", "Two.", "Two."), ("", "here", "here")],
)
def test_a_started_answer_goes_on_in_the_same_turn(
    name: str, start: str, rest: str, trained: str, with_template: Make, rendered: Render, trained_texts: Texts
) -> None:
    tokenizer = with_template(name, eos="<|im_end|>")
    conversation = pair([user("x"), assistant(start)] if start else [user("x")], rest)
    result = rendered([conversation], tokenizer)
    (text,) = trained_texts(result.examples[0], tokenizer)
    stop = ChatTemplate(tokenizer).stop_tokens[0]
    assert text.removesuffix(stop).lstrip("\n").removeprefix("<think>\n\n</think>\n\n") == trained
    whole = tokenizer.decode(result.examples[0].input_ids)
    assert whole.count(start + rest) == 1
    (prompt,) = render_prompts([conversation], tokenizer)
    assert prompt.text.endswith(start.rstrip())
    assert prompt.references == (rest.strip(),)


@pytest.mark.parametrize(
    ("prompt", "completion", "excluded"),
    [
        ([user("a"), assistant("b"), user("c")], "d", (1,)),
        ([user("a"), assistant("b"), user("c")], [assistant("d"), user("e"), assistant("f")], (1,)),
        (json.dumps([user("a"), assistant("b"), user("c")]), json.dumps([assistant("d")]), (1,)),
        ([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}], "d", (1,)),
        ([user("a")], [assistant("d")], ()),
        ("[1, 2]", "d", ()),
    ],
)
def test_answers_in_a_prompt_are_context(prompt: Any, completion: Any, excluded: tuple[int, ...]) -> None:
    conversation = pair(prompt, completion)
    assert (conversation.excluded, conversation.given, conversation.started) == (excluded, excluded, None)


def test_all_trains_a_prompt_as_well(with_template: Make, rendered: Render) -> None:
    conversation = pair([user("a"), assistant("b"), user("c")], "d")
    (example,) = rendered([conversation], with_template("qwen2_5", eos="<|im_end|>"), train_on="all").examples
    assert example.supervised[1:].all()


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ([user("a"), assistant("b", tool_calls=[call("f")])], "d"),
        ([user("a"), assistant("b", reasoning_content="Hm.")], "d"),
        ([user("a"), assistant("b")], [assistant("d", reasoning_content="Hm.")]),
        ([user("a"), assistant("b")], [assistant(tool_calls=[call("f")])]),
    ],
)
def test_an_answer_that_cannot_go_on_is_refused(prompt: Any, completion: Any) -> None:
    row = Row(file="a", line=1, value={"prompt": prompt, "completion": completion})
    _, (rejected,) = to_conversations([row], "prompt_completion")
    assert "the completion cannot continue it" in rejected.reason
