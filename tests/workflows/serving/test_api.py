"""The server's answers to requests, good and bad, over HTTP."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loratune.run.directory import RunDir, read_json
from loratune.run.progress import NO_PROGRESS
from loratune.workflows.serving.engine import Engine
from loratune.workflows.serving.models import ServedModel, load_first, open_source, served_model

uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install uvicorn")
pytest.importorskip("starlette", reason="starlette is not installed: pip install starlette")

from loratune.workflows.serving.api import BUSY_STATUS, Api  # noqa: E402 - needs starlette

KEY = "correct-key-of-the-test"


@pytest.fixture
def api(engine: Engine, tiny: ServedModel) -> Api:
    def open_model(path: str, name: str) -> tuple[ServedModel, Path]:
        source = open_source(path)
        return served_model(source, load_first(source, NO_PROGRESS)[1]), source.folder

    return Api(engine=engine, models={"base": tiny, "tiny": tiny}, open_model=open_model, positions=512)


class Send:
    """Sends requests to a port of this machine."""

    def __init__(self, port: int) -> None:
        self.port = port

    def connect(self, path: str, body: Any, **headers: str) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if isinstance(body, bytes) else json.dumps(body)
        given = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        connection.request("GET" if body is None else "POST", path, None if body is None else content, given)
        return connection

    def __call__(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        connection = self.connect(path, body, **headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, json.loads(text) if text.startswith("{") else text


@pytest.fixture
def send(api: Api) -> Iterator[Send]:
    """Sends a request to the API, listening in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(api.app(), log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        yield Send(listening.getsockname()[1])
        server.should_exit = True
        thread.join(60)


def chat(model: str = "tiny", text: str = "Describe thing 1", **fields: Any) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 6,
        **fields,
    }


def test_models_answer_whole_and_in_pieces(send: Send, finished_run: RunDir) -> None:
    assert send("/health")[0] == 200
    assert [model["id"] for model in send("/v1/models")[1]["data"]] == ["base", "tiny"]
    item = next(i for i in read_json(finished_run.evaluation)["items"] if i["base"]["text"] != i["tuned"]["text"])
    for name, side in (("base", "base"), ("tiny", "tuned")):
        status, record = send("/v1/chat/completions", chat(name, item["question"]))
        assert (status, record["choices"][0]["message"]["content"]) == (200, item[side]["text"])
        assert record["usage"]["completion_tokens"] <= 6
        _, text = send(
            "/v1/chat/completions",
            chat(name, item["question"], stream=True, stream_options={"include_usage": True}),
        )
        events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert events[-1] == "[DONE]"
        chunks = [json.loads(event) for event in events[:-1]]
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == item[side]["text"]
        assert chunks[-2]["choices"][0]["finish_reason"] == record["choices"][0]["finish_reason"]
        assert chunks[-1]["usage"] == record["usage"]


def test_a_long_answer_comes_in_several_pieces_that_make_the_whole(send: Send) -> None:
    body = chat(max_tokens=60, temperature=1.0, seed=5)
    whole = send("/v1/chat/completions", body)[1]["choices"][0]["message"]["content"]
    _, text = send("/v1/chat/completions", {**body, "stream": True})
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    pieces = [c["choices"][0]["delta"]["content"] for c in chunks if c["choices"][0]["delta"].get("content")]
    assert "".join(pieces) == whole
    assert len(pieces) > 1


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "words"),
    [
        ("/v1/chat/completions", chat("nobody"), {}, 404, "no model 'nobody' is served"),
        ("/v1/chat/completions", chat(logit_bias={"1": 2}), {}, 400, "logit_bias is not supported"),
        ("/v1/chat/completions", chat(text="word " * 600), {}, 400, "tokens, the model 512 positions"),
        ("/v1/chat/completions", b"{", {}, 400, "not JSON"),
        ("/v1/chat/completions", b" " * (16 * 2**20 + 1), {}, 413, "larger than"),
        ("/v1/chat/completions", chat(), {"Content_Type": "text/plain"}, 415, "application/json"),
        ("/v1/chat/completions", chat(), {"Host": "evil.example"}, 403, "not to evil.example"),
        ("/v1/models", None, {"Host": "evil.example:80"}, 403, "not to evil.example"),
        ("/v1/load_lora_adapter", {"lora_name": "x"}, {}, 400, "lora_name and lora_path"),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/nowhere"}, {}, 400, "neither a run nor"),
        ("/v1/load_lora_adapter", {"lora_name": "tiny", "lora_path": "/nowhere"}, {}, 400, "served already"),
        ("/v1/unload_lora_adapter", {"lora_name": "x"}, {}, 404, "no adapter 'x' is served"),
    ],
)
def test_a_bad_request_is_told_why(
    send: Send, path: str, body: Any, headers: dict[str, str], status: int, words: str
) -> None:
    got, record = send(path, body, **headers)
    assert got == status
    assert words in record["error"]["message"]


def test_an_adapter_is_loaded_asked_and_unloaded(send: Send, other_adapter: Path) -> None:
    before = send("/v1/chat/completions", chat())[1]["choices"][0]["message"]["content"]
    assert send("/v1/load_lora_adapter", {"lora_name": "late", "lora_path": str(other_adapter)})[0] == 200
    assert [model["id"] for model in send("/v1/models")[1]["data"]] == ["base", "late", "tiny"]
    status, record = send("/v1/chat/completions", chat("late"))
    assert status == 200
    assert record["choices"][0]["message"]["content"] != before
    assert send("/v1/unload_lora_adapter", {"lora_name": "late"})[0] == 200
    assert send("/v1/chat/completions", chat("late"))[0] == 404
    assert send("/v1/chat/completions", chat())[1]["choices"][0]["message"]["content"] == before


def test_a_full_queue_is_status_503_with_a_time_to_ask_again(send: Send, engine: Engine) -> None:
    together, statuses = threading.Barrier(12), []

    def ask(number: int) -> None:
        together.wait()
        statuses.append(send("/v1/chat/completions", chat("base", max_tokens=200, temperature=1.0, seed=number))[0])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(statuses) == 12
    assert set(statuses) == {200, BUSY_STATUS}
    assert send("/v1/chat/completions", chat())[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_nobody_waits_for_is_dropped(send: Send, engine: Engine, stream: bool) -> None:
    connection = send.connect("/v1/chat/completions", chat("base", max_tokens=450, stream=stream))
    while not engine.load[0]:
        time.sleep(0.001)
    (job,) = engine._active
    connection.close()
    while engine.load[0]:
        time.sleep(0.001)
    assert job.cancelled
    assert job.num_tokens < 450, "it was not generated to its end"
    assert send("/health") == (200, {"status": "ok", "answering": 0, "waiting": 0})


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_while_it_waits_leaves_its_place(send: Send, engine: Engine, stream: bool) -> None:
    running = [send.connect("/v1/chat/completions", chat("base", max_tokens=450)) for _ in range(2)]
    while engine.load[0] < 2:
        time.sleep(0.001)
    jobs = list(engine._active)
    waiting = [send.connect("/v1/chat/completions", chat(stream=stream)) for _ in range(2)]
    while engine.load[1] < 2:
        time.sleep(0.001)
    for connection in waiting:
        connection.close()
    while engine.load[1]:
        time.sleep(0.001)
    assert all(job.num_tokens < 450 for job in jobs), "its place was free before its turn came"
    for connection in running:
        connection.close()


def test_a_key_is_required_of_everything_but_health(api: Api, send: Send) -> None:
    api.key, api.local_only = KEY, False
    for given in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Bearer "}):
        status, record = send("/v1/chat/completions", chat(), **given)
        assert (status, KEY in json.dumps(record)) == (401, False)
    assert send("/v1/models")[0] == 401
    assert send("/health")[0] == 200
    assert send("/v1/chat/completions", chat(), Authorization=f"Bearer {KEY}", Host="a.example")[0] == 200
