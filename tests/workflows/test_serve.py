"""Serving, asked by the official client."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from loratune.evaluation.generate import generate_answers
from loratune.exporting.transformers_serve import served_name
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import MachineError, RecipeError, RunError
from loratune.workflows.serve import choose_server, serve
from loratune.workflows.serving.listening import Service, check_access, choose_port

EVERYWHERE = "0.0.0.0"  # noqa: S104 - what is refused
openai = pytest.importorskip("openai", reason="openai is not installed: pip install openai")


@pytest.fixture(scope="module")
def service(finished_run: RunDir) -> Iterator[dict[str, Any]]:
    """`loratune serve --json` as a program of its own; ended by Ctrl-C."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "loratune", "serve", finished_run.root, "--port", str(port), "--json"],
        env={**os.environ, "PATH": "/usr/bin"},  # no vLLM
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    text = ""
    while (line := process.stdout.readline()) and line != "}\n":
        text += line
    if not line:
        pytest.fail(process.communicate()[1])
    yield {**json.loads(f"{text}}}"), "port": port}
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    with socket.create_server(("127.0.0.1", port)):
        pass  # the server itself is gone too


def ask(service: dict[str, Any], model: str, text: str, **options: Any) -> Any:
    client = openai.OpenAI(base_url=service["url"], api_key="none")
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model=model, messages=messages, temperature=0, **options)


def test_base_and_tuned_are_listed_and_answer_as_in_evaluation(service: dict[str, Any], finished_run: RunDir) -> None:
    client = openai.OpenAI(base_url=service["url"], api_key="none")
    assert {model.id for model in client.models.list()} == {"base", "tiny"} == set(service["models"])
    item = next(i for i in read_json(finished_run.evaluation)["items"] if i["base"]["text"] != i["tuned"]["text"])
    for name, side in (("base", "base"), ("tiny", "tuned")):
        answer = ask(service, name, item["question"], max_tokens=6)
        assert answer.choices[0].message.content == item[side]["text"]
        assert answer.usage.prompt_tokens == len(ids_of(finished_run, item["prompt"]))


def test_an_answer_comes_in_pieces_and_ends_at_the_stop_token(service: dict[str, Any], finished_run: RunDir) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(str(finished_run.adapter))
    tokenizer = AutoTokenizer.from_pretrained(finished_run.adapter)
    item = read_json(finished_run.evaluation)["items"][0]
    prompt = type("P", (), {"input_ids": ids_of(finished_run, item["prompt"])})
    (ours,) = generate_answers(model, tokenizer, [prompt], max_new_tokens=40, stop_token_ids=(2,))
    chunks = list(ask(service, "tiny", item["question"], max_tokens=40, stream=True))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert len(pieces) > 1
    assert "".join(pieces) == ours.text
    assert chunks[-1].choices[0].finish_reason == ("stop" if ours.stopped else "length")


def ids_of(run: RunDir, prompt: str) -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(run.adapter)(prompt, add_special_tokens=False)["input_ids"]
    return ids


def test_what_is_served_has_a_certificate_and_is_kept(service: dict[str, Any], finished_run: RunDir) -> None:
    certificate = read_json(finished_run.exports / "served" / "parity.json")
    assert certificate["passed"]
    assert certificate in read_json(finished_run.parity)
    assert (finished_run.exports / "served" / "models" / "tiny" / "model.safetensors").is_symlink()


@pytest.mark.parametrize(
    ("server", "host", "key", "words"),
    [
        ("transformers", EVERYWHERE, None, "--host 0\\.0\\.0\\.0: transformers serve does not support API keys"),
        ("transformers", EVERYWHERE, "k", "--host 0\\.0\\.0\\.0: transformers serve does not support API keys"),
        ("transformers", "127.0.0.1", "k", "--api-key: transformers serve does not support API keys"),
        ("vllm", EVERYWHERE, None, "there is no API key"),
    ],
)
def test_nobody_else_can_ask_without_a_key(server: str, host: str, key: str | None, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        check_access(server, host, key)


def test_a_key_lets_vllm_listen_for_others_and_nobody_needs_one_here() -> None:
    check_access("vllm", EVERYWHERE, "k")
    check_access("vllm", "127.0.0.1", None)
    check_access("transformers", "localhost", None)


def test_a_port_that_is_taken_is_named_and_none_given_finds_another(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(MachineError, match=f"cannot listen on 127.0.0.1:{taken}"):
            choose_port("127.0.0.1", taken)
        monkeypatch.setattr("loratune.workflows.serving.listening.DEFAULT_PORT", taken)
        assert choose_port("127.0.0.1", None) != taken


def test_without_vllm_it_is_transformers_and_asking_for_vllm_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert choose_server("auto") == "transformers"
    with pytest.raises(MachineError, match="vLLM is not installed"):
        choose_server("vllm")
    monkeypatch.setattr("loratune.workflows.serve.SERVE_PACKAGES", ("no_such_package",))
    with pytest.raises(MachineError, match="no_such_package") as error:
        choose_server("auto")
    assert "fastapi>=" in error.value.fix


@pytest.mark.parametrize(
    ("name", "served"),
    [("tiny", "tiny"), ("my run: no. 2", "my-run-no.-2"), ("base", "tuned"), ("…", "tuned"), ("a--b..c", "a-b-c")],
)
def test_names_are_those_that_the_hub_allows(name: str, served: str) -> None:
    assert served_name(name) == served


STAND_IN = """#!{python}
# In the place of vLLM: notes how it was called, is healthy, and ends when it was asked twice.
import http.server, json, os, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
with open({note!r}, "w") as file:
    json.dump({{"words": sys.argv[1:], "key": os.environ.get("VLLM_API_KEY")}}, file)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *words):
        pass
with http.server.HTTPServer(("127.0.0.1", port), Handler) as server:
    server.handle_request()
sys.exit({code})
"""


def stand_in(folder: Path, code: int) -> Path:
    folder.mkdir()
    note = folder / "note.json"
    (folder / "vllm").write_text(STAND_IN.format(python=sys.executable, note=str(note), code=code))
    (folder / "vllm").chmod(0o755)
    return note


def test_vllm_is_started_with_both_names_the_template_and_the_key(
    finished_run: RunDir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """vLLM itself cannot be installed here; a program of its name notes how it is called."""
    note = stand_in(tmp_path / "bin", code=0)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    ready: list[Service] = []
    serve(finished_run.root, api_key="secret", on_ready=ready.append)
    called = json.loads(note.read_text())
    words = called["words"]
    assert words[0] == "serve"
    assert words[words.index("--served-model-name") + 1] == "base"
    folder = finished_run.exports / "vllm"
    assert words[words.index("--lora-modules") + 1] == f"tiny={folder}"
    assert words[words.index("--chat-template") + 1] == str(folder / "chat_template.jinja")
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert called["key"] == "secret"
    assert "secret" not in " ".join(words), "other users of the machine can read the words"
    (service,) = ready
    assert (service.server, service.models, service.needs_key) == ("vllm", ("base", "tiny"), True)
    assert "Bearer" in service.curl
    # the export is kept, and a server that fails is an error
    made = (folder / "parity.json").stat().st_mtime_ns
    stand_in(tmp_path / "failing", code=3)
    monkeypatch.setenv("PATH", str(tmp_path / "failing"))
    with pytest.raises(RunError, match="exited with code 3"):
        serve(finished_run.root)
    assert (folder / "parity.json").stat().st_mtime_ns == made
