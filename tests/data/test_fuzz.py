"""Data as it comes: whatever rows, templates and recipes hold, the outcome is right or an error of our tree.

The default profile is small and always the same. The long one draws anew each time:

    python -m pytest -m slow tests/data/test_fuzz.py
"""

from __future__ import annotations

import copy
import json
import string
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import example as with_example
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from loratune.data.examples import Example
from loratune.data.masking import template_sandbox
from loratune.data.prepare import prepare_data
from loratune.data.prepared import PreparedData
from loratune.data.rows.conversation import split_thoughts
from loratune.recipe.recipe import DataSection, Recipe
from loratune.run.errors import LoratuneError, RecipeError
from tests.data.conftest import TRL_TEMPLATES

SMALL = settings(
    max_examples=60, derandomize=True, deadline=None, database=None,
    suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate, Phase.shrink),
)  # fmt: skip
LONG = settings(SMALL, max_examples=3000, derandomize=False, print_blob=True)

# ---- rows

AWKWARD = (
    "", " ", "\n", "\x00", "\u200b", "\ufeff", "\u202eabc", "مرحبا", "👩‍👩‍👧‍👦", "🏳️‍🌈", "e\u0301", "\ud800", "\udfff x",
    "<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "<think>", "</think>", "<think>\n\n</think>\n\n", "{{ 7*7 }}",  # noqa: E501
    "{% for", "Qk0cZ", "Qk1aZ", "\U000f0000", "[/bold]", "\x1b[31m", "a" * 3000, "\u2028", "ﷺ" * 9, "\\ud83d", "[" * 5000, '{"a":' * 3000, "9" * 5000, "\"'\\", "\r\n",  # noqa: E501
)  # fmt: skip
TEXT = st.sampled_from(AWKWARD) | st.text(max_size=30) | st.lists(st.sampled_from(AWKWARD), max_size=4).map("".join)
DEEP = st.integers(1, 600).map(lambda depth: json.loads("[" * depth + "]" * depth))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | DEEP,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
ODDLY = st.one_of(TEXT, TEXT, TEXT, TEXT, JSON)  # mostly what belongs there
ROLE = st.sampled_from(("user", "assistant", "assistant", "system", "tool", "developer", "User", "king", "")) | ODDLY
FUNCTION = st.fixed_dictionaries({"name": ODDLY, "arguments": st.dictionaries(TEXT, JSON, max_size=2) | JSON})
CALLS = st.lists(st.fixed_dictionaries({"function": FUNCTION}) | FUNCTION | JSON, max_size=2) | JSON
TOOLS = st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": FUNCTION}) | JSON, max_size=2) | JSON
PART = st.fixed_dictionaries({"type": st.sampled_from(("text", "image")) | ODDLY}, optional={"text": ODDLY})
MESSAGE = st.fixed_dictionaries(
    {"role": ROLE, "content": ODDLY | st.lists(PART, max_size=3)},
    optional={"tool_calls": CALLS, "reasoning_content": ODDLY, "name": ODDLY, "tool_call_id": ODDLY, "x": JSON},
)
GOOD = st.lists(TEXT, min_size=2, max_size=6).map(
    lambda texts: [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
)
TURN = st.fixed_dictionaries(
    {"from": st.sampled_from(("human", "gpt", "function_call", "Bing")) | ODDLY, "value": ODDLY}
)
SHAPES = {
    "messages": st.fixed_dictionaries({"messages": GOOD | GOOD | st.lists(MESSAGE, max_size=5) | JSON}, optional={"tools": TOOLS, "system": ODDLY}),  # noqa: E501
    "sharegpt": st.fixed_dictionaries({"conversations": st.lists(TURN, max_size=5) | JSON}, optional={"tools": TOOLS}),
    "prompt_completion": st.fixed_dictionaries({"prompt": ODDLY | GOOD, "completion": ODDLY | GOOD}, optional={"response": ODDLY}),  # noqa: E501
    "alpaca": st.fixed_dictionaries({"instruction": ODDLY, "output": ODDLY}, optional={"input": ODDLY, "system": ODDLY}),  # noqa: E501
    "text": st.fixed_dictionaries({"text": ODDLY}, optional={"messages": JSON}),
}  # fmt: skip
ROWS = st.sampled_from(sorted(SHAPES)).flatmap(
    lambda form: st.tuples(st.just(form), st.lists(SHAPES[form] | SHAPES[form] | SHAPES[form] | JSON, min_size=1, max_size=5))  # noqa: E501
)  # fmt: skip
POLICY = st.fixed_dictionaries(
    {
        "train_on": st.sampled_from(("assistant", "last", "all", ["user"], ["user", "assistant"], ["system", "tool"])),
        "thinking": st.sampled_from(("keep", "strip", "error")),
        "special_tokens_in_text": st.sampled_from(("error", "as_text")),
        "on_long": st.sampled_from(("truncate", "drop", "error")),
        "detect": st.booleans(),
        "max_length": st.sampled_from((20, 300, 4096)),
    }
)

TrainedTexts = Callable[[Example, PreTrainedTokenizerBase], list[str]]


def prepare(file: Path, form: str, policy: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreparedData | None:
    """None: the data was refused, with a text that says what is wrong."""
    policy = {**policy, "train_on": "all"} if form == "text" else dict(policy)
    detect, max_length = policy.pop("detect"), policy.pop("max_length")
    section = DataSection.model_validate(
        {"train": str(file), "eval": "none", "format": "auto" if detect else form, "on_bad_row": "skip", **policy}
    )
    try:
        return prepare_data(section, tokenizer, max_length=max_length, seed=0, processes=1)
    except LoratuneError as error:
        check_error(error)
        return None


def check_error(error: LoratuneError) -> None:
    assert len(error.problem) > 8
    assert len(str(error)) < 5000
    str(error).encode()  # it can be printed


def check_rows(
    rows: list[Any],
    form: str,
    policy: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    trained_texts: TrainedTexts,
) -> None:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prepared = prepare(file, form, policy, tokenizer)
    if prepared is None:
        return
    part = prepared.report["train"]
    json.dumps(prepared.report, ensure_ascii=False).encode()  # `data.json` can be written
    assert part["rows"] == len(rows)
    assert part["conversations"] + part["num_rejected"] + part["dropped"] == len(rows)
    lines = [example.origin.line for example in prepared.train] + [rejected["line"] for rejected in part["rejected"]]
    assert len(set(lines)) == len(lines)
    assert all(rejected["reason"] and len(rejected["reason"]) < 3000 for rejected in part["rejected"])
    for made in prepared.train:
        assert not made.supervised[0]
        assert made.supervised.any()
        if part["format"] == "messages" and not part["truncated"]:
            roles = {"assistant": ["assistant"]}.get(str(policy["train_on"]), policy["train_on"])
            if isinstance(roles, list):
                check_answers(rows[made.origin.line - 1], made, tokenizer, trained_texts, roles)


def check_answers(
    row: Any, made: Example, tokenizer: PreTrainedTokenizerBase, trained_texts: TrainedTexts, roles: list[str]
) -> None:
    """What is trained is the messages of these roles, each with the stop token, and nothing else."""
    turns = row.get("messages") or row.get("conversations")
    if not isinstance(turns, list) or any(turn.keys() - {"role", "content"} for turn in turns):
        return  # tool calls and thoughts in fields of their own: the templates' own forms are in test_templates.py
    turns = [{**turn, "role": {"developer": "system"}.get(turn["role"], turn["role"])} for turn in turns]
    answers = [turn["content"] for turn in turns if turn["role"] in roles]
    if not all(isinstance(answer, str) for answer in answers) or any(split_thoughts(answer) for answer in answers):
        return
    answers = [answer for answer in answers if answer.strip()]  # a message of nothing but blanks has nothing to train
    trained = trained_texts(made, tokenizer)
    expected = [f"{answer}<|im_end|>" for answer in answers]
    assert trained == expected or [text.strip() for text in trained] == [text.strip() for text in expected]


@SMALL
@given(rows=ROWS, policy=POLICY)
def test_rows(
    rows: tuple[str, list[Any]],
    policy: dict[str, Any],
    smollm2_tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
    trained_texts: TrainedTexts,
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    check_rows(rows[1], rows[0], policy, smollm2_tokenizer, folder, trained_texts)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@LONG
@given(rows=ROWS, policy=POLICY)
def test_many_rows(
    rows: tuple[str, list[Any]],
    policy: dict[str, Any],
    smollm2_tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
    trained_texts: TrainedTexts,
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    check_rows(rows[1], rows[0], policy, smollm2_tokenizer, folder, trained_texts)


FILES = st.sampled_from((".jsonl", ".json", ".csv", ".tsv", ".parquet")).flatmap(
    lambda suffix: st.tuples(st.just(suffix), st.binary(max_size=60) | st.text(max_size=80).map(lambda t: t.encode("utf-8", "replace"))  # noqa: E501
    | st.text(alphabet='{}[]",:\\ \nau0-e.\t', max_size=80).map(str.encode)
    | st.integers(900, 5000).map(lambda depth: b"[" * depth) | st.integers(900, 5000).map(lambda depth: b'{"a":' * depth))  # noqa: E501
)  # fmt: skip


@settings(SMALL, max_examples=150)
@given(file=FILES)
def test_files(
    file: tuple[str, bytes], smollm2_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / f"data{file[0]}"
    path.write_bytes(file[1])
    policy = {"train_on": "assistant", "detect": True, "max_length": 300}
    prepared = prepare(path, "auto", policy, smollm2_tokenizer)
    assert prepared is None or prepared.train


# ---- templates

SNIPPETS = (
    "{{ messages }}", "{{ messages[0] }}", "{{ messages[0]['content'] }}", "{{ messages[-1].content * 3 }}", "{% if false %}",  # noqa: E501
    "{% endif %}", "{{ raise_exception('no') }}", "{{ 1/0 }}", "{{ x.y.z }}", "{% for m in messages[1:] %}", "{% endfor %}",  # noqa: E501
    "<|im_end|>", "<|im_start|>assistant\n", "{% generation %}", "{% endgeneration %}", "{{ eos_token }}", "{{ bos_token }}",  # noqa: E501
    "{{ messages[0].content | upper }}", "{{ messages | tojson }}", "{% set messages = messages[1:] %}", "{# c #}", "{{", "\x00",  # noqa: E501
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ 'a' * 10**10 }}", "{{ strftime_now('%Y') }}",  # noqa: E501
    "{{ messages[1].content | replace('a', '') }}", "{{ messages | map('upper') | list }}", "{% break %}", "{{ loop.index }}", "🙂",  # noqa: E501
)  # fmt: skip
NAMES = sorted(path.stem for path in TRL_TEMPLATES.glob("*.jinja"))
EDIT = st.tuples(st.floats(0, 1), st.integers(0, 60), st.sampled_from(("", *SNIPPETS)))
MUTATED = st.tuples(st.sampled_from(NAMES), st.lists(EDIT, min_size=1, max_size=3))
INVENTED = st.lists(st.sampled_from(SNIPPETS), max_size=6).map("".join)


def mutate(name: str, edits: list[tuple[float, int, str]]) -> str:
    source = (TRL_TEMPLATES / f"{name}.jinja").read_text("utf-8")
    for place, length, snippet in edits:
        start = int(place * len(source))
        source = source[:start] + snippet + source[start + length :]
    return source


def check_template(source: str, control_tokenizer: PreTrainedTokenizerBase, folder: Path, *roles: str) -> None:
    """Every answer is trained with a stop token after it, or the template or the row is refused. Within seconds.

    The same of messages of other roles, but for the stop token.
    """
    tokenizer = copy.copy(control_tokenizer)
    tokenizer.chat_template = source
    answers = ("Sure thing", "So long then")
    chat = [("user", "Hello there"), ("assistant", answers[0]), ("user", "Bye now"), ("assistant", answers[1])]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]}]
    file = folder / "rows.jsonl"
    file.write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    policy = {"train_on": [*roles] or "assistant", "detect": True, "max_length": 4096}
    started = time.monotonic()
    prepared = prepare(file, "messages", policy, tokenizer)
    assert time.monotonic() - started < 20
    if prepared is None:
        return
    (example,) = prepared.train
    trained = tokenizer.decode(example.input_ids[example.supervised], skip_special_tokens=False)
    context = tokenizer.decode(example.input_ids[~example.supervised], skip_special_tokens=False)
    for role, text in chat:
        assert text in (trained if role in (roles or ("assistant",)) else context)
        assert text not in (context if role in (roles or ("assistant",)) else trained)


@SMALL
@given(template=MUTATED)
def test_mutated_templates(
    template: Any, control_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template_sandbox, "TIME_LIMIT_SECONDS", 0.5)
        folder = tmp_path_factory.mktemp("fuzz")
        check_template(mutate(*template), control_tokenizer, folder)
        check_template(mutate(*template), control_tokenizer, folder, "user")


@SMALL
@with_example(source="{{ messages }}{% set messages = messages[1:] %}{{ messages[0]['content'] }}")  # refuses a prompt
@given(source=INVENTED)
def test_invented_templates(
    source: str, control_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template_sandbox, "TIME_LIMIT_SECONDS", 0.5)
        folder = tmp_path_factory.mktemp("fuzz")
        check_template(source, control_tokenizer, folder)
        check_template(source, control_tokenizer, folder, "user")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(LONG, max_examples=1500)
@given(source=INVENTED | MUTATED.map(lambda template: mutate(*template)))
def test_many_templates(
    source: str, control_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template_sandbox, "TIME_LIMIT_SECONDS", 0.5)
        folder = tmp_path_factory.mktemp("fuzz")
        check_template(source, control_tokenizer, folder)
        check_template(source, control_tokenizer, folder, "user")


# ---- recipes

FIELDS = [
    f"{name}.{field}" for name, section in Recipe.model_fields.items() for field in section.annotation.model_fields  # type: ignore[union-attr]
]  # fmt: skip
VALUE = st.one_of(
    JSON,
    st.sampled_from(("auto", "none", "epoch", "never", "1e-4", "1_000", "0x10", "~", "yes", "&a [*a]", "2001-99-99", "[" * 2000, "9" * 5000, "2001-01-01", ".inf", ".nan", "[", "{a: 1")),  # noqa: E501
    st.integers(-(2**70), 2**70),
    st.sampled_from((0, -1, 1, 0.5, 1e308, -0.0, float("inf"), float("nan"), 2**63)),
)  # fmt: skip
SETTINGS = st.dictionaries(
    st.sampled_from((*FIELDS, "train.frobnicate", "nowhere.at_all")), VALUE, min_size=1, max_size=3
)
RAW = st.text(alphabet=string.ascii_lowercase + ":{}[]&*!|>%@`'\"#\n\t -?,.0", max_size=60) | st.binary(max_size=30)


def check_recipe(load: Callable[[], Recipe], folder: Path) -> None:
    try:
        recipe = load()
    except RecipeError as error:
        check_error(error)
        return
    again = folder / "again.yaml"
    again.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.load(again) == recipe
    json.dumps(recipe.model_dump(mode="json"), allow_nan=False)


@settings(SMALL, max_examples=150)
@given(changes=SETTINGS, raw=RAW, override=st.booleans())
def test_recipes(
    changes: dict[str, Any], raw: str | bytes, *, override: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    values: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, _, field = name.partition(".")
        values.setdefault(section, {})[field] = value
    check_recipe(lambda: Recipe.parse(values), folder)
    file = folder / "recipe.yaml"
    file.write_text("{}" if override else yaml.safe_dump(values), encoding="utf-8")
    overrides = [
        f"{name}={json.dumps(value) if not isinstance(value, str) else value}" for name, value in changes.items()
    ]
    check_recipe(lambda: Recipe.load(file, overrides if override else ()), folder)
    file.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    check_recipe(lambda: Recipe.load(file), folder)


# ---- sizes


@pytest.mark.parametrize("megabytes", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_one_large_row_is_prepared_whole(
    megabytes: int, smollm2_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, trained_texts: TrainedTexts
) -> None:
    size = megabytes * 10**6
    answer = " ".join(f"word{n % 5000} é🙂" for n in range(size // 8))[:size]
    file = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "Write."}, {"role": "assistant", "content": answer}]}
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    started = time.process_time()
    section = DataSection.model_validate({"train": str(file), "eval": "none"})
    prepared = prepare_data(section, smollm2_tokenizer, max_length=2**31, seed=0, processes=1)
    assert time.process_time() - started < 10 * megabytes
    assert trained_texts(prepared.train[0], smollm2_tokenizer) == [f"{answer}<|im_end|>"]


@pytest.mark.slow
def test_100_000_tiny_rows_are_prepared_in_a_minute(smollm2_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with file.open("w", encoding="utf-8") as stream:
        for n in range(100_000):
            row = {"prompt": f"{n}?", "completion": f"{n}."} if n % 1000 else {"prompt": None}
            stream.write(json.dumps(row) + "\n")
    started = time.monotonic()
    section = DataSection.model_validate({"train": str(file), "eval": "none", "on_bad_row": "skip"})
    prepared = prepare_data(section, smollm2_tokenizer, max_length=512, seed=0)
    assert (len(prepared.train), prepared.report["train"]["num_rejected"]) == (99_900, 100)
    assert time.monotonic() - started < 120
