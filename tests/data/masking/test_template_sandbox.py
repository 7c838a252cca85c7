"""Templates that want to do harm end in an error within seconds, in every thread and process that renders."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from loratune.data.masking import template_sandbox
from loratune.data.masking.render import CHUNK, Rendered
from loratune.data.masking.template import ChatTemplate
from loratune.data.masking.template_sandbox import compile_template, limited, render_template
from loratune.data.rows.conversation import Conversation
from loratune.evaluation.sampling import Sampling
from loratune.run.errors import BadRow, DataError
from loratune.workflows.chat import Chat

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(s='ab') %}{% for a in range(60) %}{% set n.s = n.s OP n.s %}{% endfor %}"
HARM = {
    "loops": LOOPS,
    "a long range": "{% for a in range(10**9) %}{% for b in range(10**9) %}{% endfor %}{% endfor %}",
    "a longer range": "{% for a in range(1000000000) %}{% endfor %}",
    "doubling with ~": DOUBLING.replace("OP", "~"),
    "doubling with +": DOUBLING.replace("OP", "+"),
    "doubling a list": DOUBLING.replace("OP", "+").replace("'ab'", "[1, 2]"),
    "doubling a block": "{% set s = 'ab' %}" + "{% set s %}{{ s }}{{ s }}{% endset %}" * 45,
    "a product": "{{ 'a' * 20000000000 }}",
    "a product at run time": "{{ messages[0].content * 20000000000 }}",
    "a power": "{{ 10 ** 10 ** 10 }}",
    "powers in turns": "{% set n = namespace(i=3) %}{% for a in range(99) %}{% set n.i = n.i ** 9 %}{% endfor %}",
    "a filter": "{{ 'a' | center(20000000000) }}",
    "another filter": "{{ 'a\nb' | indent(width=20000000000) }}",
    "a method": "{{ 'a'.ljust(20000000000) }}",
    "a format": "{{ '%20000000000d' % 1 }}",
    "a format with a computed width": "{{ '{:>{}}'.format(1, 20000000000) }}",
    "a starred format": "{{ '%*d' % (20000000000, 1) }}",
    "another format": "{{ '{:>20000000000}'.format(1) }}",
    "a format filter": "{{ '%20000000000d' | format(1) }}",
    "replacing": "{% set s = 'a' * 100000 %}{{ s.replace('a', s) }}",
    "replacing by a filter": "{% set s = 'a' * 100000 %}{{ s | replace('a', s) }}",
    "joining": "{% set s = 'a' * 1000000 %}{{ s.join(range(90000) | list) }}",
    "joining by a filter": "{% set s = 'a' * 1000000 %}{{ range(90000) | list | join(s) }}",
    "lipsum": "{{ lipsum(n=1000000000) }}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "deep brackets": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "deep loops": "{% for a in [1] %}" * 60 + "{% endfor %}" * 60,
    "a huge source": "x" * (template_sandbox.SOURCE_LIMIT + 1),
    "Python's classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "no such function": "{{ frobnicate() }}",
    "no template": "{% for %}",
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "TIME_LIMIT_SECONDS", 0.6)
    monkeypatch.setattr(template_sandbox, "MEMORY_LIMIT_BYTES", 300 * 2**20)


def rendering(source: str) -> str:
    """As `ChatTemplate` does it: what the template raises becomes a rejected row, what the limits raise stops the
    run."""
    text, _ = render_template(compile_template(source), [{"role": "user", "content": "Hello"}], None)
    return text


# hypothesis has a callback at the garbage collector, where an exception is ignored; the watchdog raises again
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", HARM)
def test_a_template_that_wants_to_do_harm_is_stopped(name: str, smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = copy.copy(smollm2_tokenizer)
    hidden = "{% if 'there' in messages[0].content %}" + HARM[name] + "{% endif %}"
    for source in (CHATML + HARM[name], CHATML + hidden):
        tokenizer.chat_template = source
        started = time.monotonic()
        with pytest.raises((DataError, BadRow)) as caught:
            ChatTemplate(tokenizer).render([{"role": "user", "content": "Hello there"}])
        assert "chat template" in str(caught.value)
        assert len(str(caught.value)) < 1000
        assert time.monotonic() - started < 30  # half a second where memory comes fast


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_it_is_stopped_again_when_the_first_time_was_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "TIME_LIMIT_SECONDS", 0.3)
    monkeypatch.setattr(template_sandbox, "_AGAIN_SECONDS", 0.2)

    class Swallows:
        """Python ignores what is raised in a destructor."""

        def __del__(self) -> None:
            ends = time.monotonic() + 0.6
            while time.monotonic() < ends:
                pass

    def work() -> None:
        Swallows()
        while True:
            pass

    with pytest.raises(DataError, match=r"takes longer than 0\.3 seconds"):
        template_sandbox.limited(work)


def test_helpers_stop_it_too(
    smollm2_tokenizer: PreTrainedTokenizerBase, converse: Callable[..., Conversation], rendered: Callable[..., Rendered]
) -> None:
    tokenizer = copy.copy(smollm2_tokenizer)
    tokenizer.chat_template = CHATML + "{% if 'harm' in messages[0].content %}" + LOOPS + "{% endif %}"
    harmless, harm = (
        converse({"role": "user", "content": text}, {"role": "assistant", "content": "Hi"}) for text in ("no", "harm")
    )
    with pytest.raises(DataError, match="chat template takes longer than"):
        rendered([harmless] * CHUNK + [harm] * CHUNK + [harmless] * CHUNK, tokenizer, processes=3)


def test_the_conversation_with_a_model_stops_it_too(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = copy.copy(smollm2_tokenizer)
    tokenizer.chat_template = CHATML + "{% if 'harm' in messages[0].content %}" + LOOPS + "{% endif %}"
    chat = Chat(None, tokenizer, Sampling())  # type: ignore[arg-type] # it is not asked
    with pytest.raises(DataError, match="takes longer than"):
        chat.prompt_ids("tuned", "harm")
    assert chat.prompt_ids("tuned", "none")


def test_a_limit_is_for_its_own_thread_and_nothing_comes_later() -> None:
    """Renderings that end about when they are stopped leave no exception behind, and none hits another thread."""
    outcomes: list[str] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for seconds in (0.55, 0.65, 0.6, 1.0, 0.1, 0.62):
                try:
                    limited(lambda seconds=seconds: _busy(seconds))
                    outcomes.append("done")
                except DataError:
                    outcomes.append("stopped")
                _busy(0.02)
        except BaseException as error:  # noqa: BLE001 - an exception that came too late may be any
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    _busy(2)
    for thread in threads:
        thread.join()
    assert not failures
    assert len(outcomes) == 18
    assert {"done", "stopped"} == set(outcomes)


def _busy(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_the_watchdog_ends_when_nothing_is_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "_IDLE_SECONDS", 0.2)
    assert rendering("{{ messages[0].content }}") == "Hello"
    time.sleep(0.6)
    assert not [thread for thread in threading.enumerate() if thread.name == "template watchdog"]
    with pytest.raises(DataError, match="takes longer than"):
        rendering(LOOPS)


@pytest.mark.parametrize("name", ["qwen3", "llama3_2", "gptoss", "gemma3", "cohere2", "deepseekv3", "nemotron_3_nano"])
def test_limits_change_no_rendering(name: str, with_template: Callable[..., PreTrainedTokenizerBase]) -> None:
    tokenizer = with_template(name)
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Hello 100 % {curly} {:>9}"},
        {"role": "assistant", "content": "Hi"},
    ]
    expected = tokenizer.apply_chat_template(messages, tokenize=False)
    text, _ = render_template(
        compile_template(str(tokenizer.chat_template)),
        messages,
        None,
        add_generation_prompt=False,
        **tokenizer.special_tokens_map,
    )
    assert text == expected


def test_what_python_hides_from_templates_stays_hidden() -> None:
    for source in ("{{ raise_exception.__globals__ }}", "{{ lipsum.__code__ }}"):
        assert rendering(source) == ""


def test_a_file_beside_the_template_cannot_be_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for source in ("{% include '" + str(secret) + "' %}", "{% import '" + str(secret) + "' as x %}"):
        with pytest.raises(Exception, match="loader"):
            rendering(source)
