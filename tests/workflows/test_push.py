"""Push to a Hub of our own: a small server with the endpoints that huggingface_hub's upload uses."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from loratune.run.directory import RunDir, read_json, write_json
from loratune.run.errors import RecipeError
from loratune.workflows.push import push

TOKEN = "hf_test"


class Hub(ThreadingHTTPServer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.private: bool | None = None
        self.exists_public = False
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(200, {})

    def do_GET(self) -> None:
        if self._is_stranger():
            return
        if self.path.startswith("/api/models/me/tiny"):
            private = bool(self.server.private) and not self.server.exists_public
            self._answer(200, {"id": "me/tiny", "private": private, "sha": "0" * 40, "siblings": []})
        else:
            self._answer(404, {"error": f"no {self.path}"})

    def do_PUT(self) -> None:
        content = self._body()
        self.server.blobs[hashlib.sha256(content).hexdigest()] = content
        self._answer(200, {})

    def do_POST(self) -> None:
        if self._is_stranger():
            return
        body = self._body()
        if self.path == "/api/repos/create":
            self.server.private = json.loads(body).get("private", json.loads(body).get("visibility") == "private")
            self._answer(409 if self.server.exists_public else 200, {"url": f"{self.server.url}/me/tiny"})
        elif self.path == "/api/validate-yaml":
            ModelCard(json.loads(body)["content"])  # raises where the metadata cannot be read
            self._answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in files
            ]
            self._answer(200, {"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.server.url}/blob/{o['oid']}", "header": {}}}}
                for o in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            for line in body.decode().splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    self.server.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
                elif item["key"] == "lfsFile":
                    self.server.files[item["value"]["path"]] = self.server.blobs[item["value"]["oid"]]
            commit = f"{self.server.url}/me/tiny/commit/{'1' * 40}"
            self._answer(200, {"success": True, "commitOid": "1" * 40, "commitUrl": commit, "hookOutput": ""})
        else:
            self._answer(404, {"error": f"no {self.path}"})

    def _is_stranger(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return False
        self._answer(401, {"error": "who are you?"})
        return True

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, code: int, record: dict[str, Any]) -> None:
        content = json.dumps(record).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def pushed(run: RunDir, endpoint: str, *words: str, token: str = TOKEN, home: Path) -> subprocess.CompletedProcess[str]:
    """The command as a user types it. The files go as LFS objects, not by Xet, whose storage is another server."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))},
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "no_proxy": "*",
        **({"HF_TOKEN": token} if token else {}),
    }
    command = [sys.executable, "-m", "loratune", "push", str(run.root), "me/tiny", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_adapter_card_and_report_arrive_and_nothing_else(finished_run: RunDir, hub: Hub, tmp_path: Path) -> None:
    done = pushed(finished_run, hub.url, "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert hub.private is True
    assert record["url"].endswith("1" * 40)
    listed = {file["path"]: file for file in record["files"]}
    assert set(hub.files) == set(listed)
    assert {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "report.html",
    } <= set(listed)
    for path, content in hub.files.items():
        assert hashlib.sha256(content).hexdigest() == listed[path]["sha256"]
        assert len(content) == listed[path]["num_bytes"]
    assert hub.files["adapter_model.safetensors"] == finished_run.adapter_weights.read_bytes()
    folders = (str(finished_run.root.parent), read_json(finished_run.lock)["inputs"]["model_path"], str(Path.home()))
    for path, content in hub.files.items():
        for folder in folders:
            assert folder.encode() not in content, f"{path} tells where this machine keeps things"


def test_a_public_repository_of_that_name_is_not_written_to_unasked(
    finished_run: RunDir, hub: Hub, tmp_path: Path
) -> None:
    hub.exists_public = True
    done = pushed(finished_run, hub.url, home=tmp_path)
    assert done.returncode == 2
    assert "exists and is public" in done.stderr
    assert not hub.files


def test_a_token_that_is_refused_and_none_at_all_name_the_login(finished_run: RunDir, hub: Hub, tmp_path: Path) -> None:
    for token in ("hf_other", ""):
        done = pushed(finished_run, hub.url, token=token, home=tmp_path)
        assert done.returncode == 4
        assert "hf auth login" in done.stderr
    assert not hub.files


def test_a_hub_that_never_answers_is_an_error_within_seconds(finished_run: RunDir, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        started = time.perf_counter()
        done = pushed(finished_run, f"http://127.0.0.1:{silent.getsockname()[1]}", home=tmp_path)
        seconds = time.perf_counter() - started
    assert done.returncode == 4
    assert "does not answer" in done.stderr
    assert "check the network" in done.stderr
    assert seconds < 20, "ten, and the start of Python on a busy machine"


def test_a_dry_run_lists_what_would_go_without_network_or_token(finished_run: RunDir) -> None:
    listed = push(finished_run.root, "me/tiny", dry_run=True)
    assert listed.private
    assert not listed.url
    names = {file.path for file in listed.files}
    assert names - {"report.html"} == {
        file.path for file in push(finished_run.root, "me/tiny", dry_run=True, with_report=False).files
    }
    weights = next(file for file in listed.files if file.path == "adapter_model.safetensors")
    assert weights.sha256 == hashlib.sha256(finished_run.adapter_weights.read_bytes()).hexdigest()


def test_a_token_in_the_data_stays_here(finished_run: RunDir, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(finished_run.root, tmp_path / "run")))
    evaluation = read_json(run.evaluation)
    evaluation["items"][0]["question"] += " my token is hf_" + "a" * 34
    write_json(run.evaluation, evaluation)
    with pytest.raises(RecipeError, match="looks like a Hugging Face token: hf_aaa…") as error:
        push(run.root, "me/tiny", dry_run=True)
    assert "--no-report" in error.value.fix
    push(run.root, "me/tiny", dry_run=True, with_report=False)


def test_names_that_the_hub_does_not_take_are_refused(finished_run: RunDir) -> None:
    with pytest.raises(RecipeError, match="is not a repository name"):
        push(finished_run.root, "me/tiny/extra", dry_run=True)


def test_the_card_has_what_the_hub_reads(finished_run: RunDir, hub: Hub, tmp_path: Path) -> None:
    done = pushed(finished_run, hub.url, home=tmp_path)
    assert done.returncode == 0, done.stderr
    card = ModelCard(hub.files["README.md"].decode())
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    assert card.data.base_model is None, "a folder of this machine is not a model on the Hub"
    results = {result.metric_type: result.metric_value for result in card.data.eval_results or []}
    assert results == read_json(finished_run.evaluation)["tuned"]
    for words in ("Trained on 20 examples", "## Results", "## Intended use", "## Load it", "## Recipe", '"me/tiny"'):
        assert words in card.text, words
