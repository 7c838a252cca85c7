"""What the server computes: each answer as if nobody else asked, while requests and adapters come and go."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from loratune.evaluation.sampling import Sampling
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import RecipeError, RunError
from loratune.workflows.serving.engine import Engine, GenerationJob, QueueFullError, UnknownModelError
from loratune.workflows.serving.models import ServedModel


class Asked:
    """A request, and what came of it."""

    def __init__(self, tiny: ServedModel, model: str, text: str, *, prompt: list[int] | None = None, **how: Any):
        self.tokens: list[int] = []
        self.error: Exception | None = None
        self.ended, self.begun, self.hold = threading.Event(), threading.Event(), threading.Event()
        self.hold.set()
        self.job = GenerationJob(
            model=model,
            prompt=prompt or tiny.prompt_ids([{"role": "user", "content": text}]),
            sampling=Sampling(**{"max_new_tokens": 6, **how}),
            stops=tiny.stops,
            on_tokens=self._take,
            on_end=self._end,
        )
        self._tiny = tiny

    def _take(self, tokens: list[int]) -> None:
        self.tokens += tokens
        self.begun.set()
        self.hold.wait()  # the engine's thread stands still here

    def _end(self, error: Exception | None) -> None:
        self.error = error
        self.ended.set()

    def text(self) -> str:
        assert self.ended.wait(60)
        if self.error is not None:
            raise self.error
        return self._tiny.text_of(self.tokens)


def asked(engine: Engine, tiny: ServedModel, model: str, text: str, **how: Any) -> Asked:
    request = Asked(tiny, model, text, **how)
    engine.submit(request.job)
    return request


@pytest.fixture
def held(engine: Engine, tiny: ServedModel) -> Any:
    """The engine standing still in the first turn of a long answer, to be released by the test."""
    request = Asked(tiny, "tiny", "Describe thing 1", max_new_tokens=100, temperature=1.0)
    request.hold.clear()
    engine.submit(request.job)
    assert request.begun.wait(60)
    yield request
    request.hold.set()


def test_base_and_adapter_answer_as_in_the_evaluation(engine: Engine, tiny: ServedModel, finished_run: RunDir) -> None:
    item = next(i for i in read_json(finished_run.evaluation)["items"] if i["base"]["text"] != i["tuned"]["text"])
    requests = [asked(engine, tiny, name, item["question"]) for name in ("base", "tiny", "base", "tiny")]
    assert [request.text() for request in requests] == [
        item[side]["text"] for side in ("base", "tuned", "base", "tuned")
    ]


def test_a_sampled_answer_is_the_same_alone_and_among_others(engine: Engine, tiny: ServedModel) -> None:
    how = {"temperature": 1.0, "max_new_tokens": 40, "seed": 3}
    alone = asked(engine, tiny, "tiny", "Describe thing 1", **how).text()
    another = asked(engine, tiny, "base", "Describe thing 2", temperature=1.0, max_new_tokens=60)
    assert asked(engine, tiny, "tiny", "Describe thing 1", **how).text() == alone
    assert asked(engine, tiny, "tiny", "Describe thing 1", **{**how, "seed": 4}).text() != alone
    another.text()


def test_a_full_queue_refuses_and_answers_the_others(engine: Engine, tiny: ServedModel, held: Any) -> None:
    waiting = [asked(engine, tiny, "base", f"Describe thing {n}") for n in range(3)]
    with pytest.raises(QueueFullError, match="the queue is full: 1 being answered, 3 waiting"):
        asked(engine, tiny, "base", "Describe thing 9")
    engine.cancel(waiting[1].job)  # makes room, without an answer
    late = asked(engine, tiny, "base", "Describe thing 9")
    held.hold.set()
    answers = [waiting[0].text(), waiting[2].text(), late.text()]
    assert answers == [asked(engine, tiny, "base", f"Describe thing {n}").text() for n in (0, 2, 9)]
    assert not waiting[1].ended.is_set()


def test_a_cancelled_answer_ends_after_its_turn(engine: Engine, tiny: ServedModel, held: Any) -> None:
    engine.cancel(held.job)
    held.hold.set()
    asked(engine, tiny, "tiny", "Describe thing 2").text()
    assert len(held.tokens) < 100
    assert not held.ended.is_set()


def test_a_request_that_fails_leaves_the_others_alone(engine: Engine, tiny: ServedModel) -> None:
    right = asked(engine, tiny, "tiny", "Describe thing 2", max_new_tokens=40)
    wrong = asked(engine, tiny, "tiny", "", prompt=[10**6])  # not a token
    with pytest.raises(IndexError):
        wrong.text()
    assert right.text() == asked(engine, tiny, "tiny", "Describe thing 2", max_new_tokens=40).text()


def test_an_adapter_comes_and_goes(engine: Engine, tiny: ServedModel, other_adapter: Path) -> None:
    before = asked(engine, tiny, "tiny", "Describe thing 1").text()
    engine.add("other", other_adapter)
    assert engine.names == ("base", "other", "tiny")
    other = asked(engine, tiny, "other", "Describe thing 1").text()
    assert other not in (before, asked(engine, tiny, "base", "Describe thing 1").text())
    with pytest.raises(RecipeError, match="'other' is served already"):
        engine.add("other", other_adapter)
    engine.remove("tiny")
    engine.remove("other")
    with pytest.raises(UnknownModelError, match="no model 'tiny' is served"):
        asked(engine, tiny, "tiny", "Describe thing 1")
    with pytest.raises(UnknownModelError, match="no adapter 'base' is served"):
        engine.remove("base")
    asked(engine, tiny, "base", "Describe thing 1").text()  # with no adapter left
    engine.add("again", other_adapter)
    assert asked(engine, tiny, "again", "Describe thing 1").text() == other


@pytest.mark.parametrize("name", ["half", "v1.2", "default", "loaded_1"])
def test_an_adapter_may_have_any_name(engine: Engine, tiny: ServedModel, other_adapter: Path, name: str) -> None:
    """Those of torch's methods included, and PEFT's own."""
    before = asked(engine, tiny, "tiny", "Describe thing 1").text()
    engine.add(name, other_adapter)
    assert asked(engine, tiny, name, "Describe thing 1").text() != before
    engine.remove(name)
    assert asked(engine, tiny, "tiny", "Describe thing 1").text() == before


def test_what_was_accepted_is_answered_before_an_adapter_goes(
    engine: Engine, tiny: ServedModel, held: Any, other_adapter: Path
) -> None:
    waiting = asked(engine, tiny, "tiny", "Describe thing 1", max_new_tokens=40)
    going = threading.Thread(target=engine.remove, args=("tiny",))
    going.start()
    while "tiny" in engine.names:
        pass
    with pytest.raises(UnknownModelError):
        asked(engine, tiny, "tiny", "Describe thing 1")
    with pytest.raises(RecipeError, match="'tiny' is served already"):
        engine.add("tiny", other_adapter)  # until it has gone
    held.hold.set()
    waiting.text()
    held.text()
    going.join(60)
    assert not going.is_alive()
    engine.add("tiny", other_adapter)


def test_an_adapter_that_does_not_load_leaves_nothing_behind(
    engine: Engine, tiny: ServedModel, tmp_path: Path, other_adapter: Path
) -> None:
    before = asked(engine, tiny, "tiny", "Describe thing 1").text()
    (tmp_path / "adapter_config.json").write_text((other_adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(Exception, match=r"(?i)header|deserializ"):
        engine.add("broken", tmp_path)
    assert engine.names == ("base", "tiny")
    engine.add("broken", other_adapter)
    assert asked(engine, tiny, "tiny", "Describe thing 1").text() == before


def test_a_server_that_ends_tells_those_who_wait(engine: Engine, tiny: ServedModel, held: Any) -> None:
    waiting = asked(engine, tiny, "tiny", "Describe thing 1")
    ending = threading.Thread(target=engine.stop)
    ending.start()
    while engine.is_alive:
        pass
    held.hold.set()
    ending.join(60)
    for request in (held, waiting):
        with pytest.raises(RunError, match="stopped before the answer"):
            request.text()
    with pytest.raises(RunError, match="about to end"):
        asked(engine, tiny, "tiny", "Describe thing 1")
