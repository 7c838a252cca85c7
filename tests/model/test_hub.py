"""A model on the Hub is planned for from what describes it; a small server stands for the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(folder: Path, sent: dict[str, int]) -> Iterator[str]:
    """Serve a folder as the model `tiny/llama`; counts the bytes sent of each file."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            if self.path.startswith(f"/api/models/tiny/llama/tree/{COMMIT}"):
                files = [
                    {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0"} for p in folder.iterdir()
                ]
                self._send(200, json.dumps(files).encode(), body=body)
                return
            if self.path.startswith("/api/models/tiny/llama"):
                siblings = [{"rfilename": path.name} for path in folder.iterdir()]
                self._send(
                    200, json.dumps({"id": "tiny/llama", "sha": COMMIT, "siblings": siblings}).encode(), body=body
                )
                return
            file = folder / self.path.partition("?")[0].rpartition("/")[2]
            if not self.path.startswith("/tiny/llama/resolve/") or not file.is_file():
                self._send(404, b"", body=body)
                return
            content = file.read_bytes()
            if "Range" in self.headers:
                first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
                content = content[int(first) : int(last) + 1]
            if body:
                sent[file.name] = sent.get(file.name, 0) + len(content)
            self._send(206 if "Range" in self.headers else 200, content, body=body, tag=file.name)

        def _send(self, status: int, content: bytes, *, body: bool, tag: str = "") -> None:
            self.send_response(status)
            for name, value in {
                "ETag": f'"{tag}"',
                "X-Repo-Commit": COMMIT,
                "Content-Length": str(len(content)),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_hub_model_is_planned_for_without_its_weights(
    tiny_model: Path, chat_files: tuple[Path, Path], tmp_path: Path
) -> None:
    sent: dict[str, int] = {}
    recipe = tmp_path / "hub.yaml"
    recipe.write_text(
        f"model: {{name: tiny/llama, dtype: bfloat16}}\n"
        f"data: {{train: {chat_files[0]}, eval: none, max_length: auto}}\n"
        f"train: {{device: cpu, output_dir: {tmp_path / 'run'}}}\n"
    )
    with hub(tiny_model, sent) as endpoint:
        done = subprocess.run(
            [sys.executable, "-m", "loratune", "plan", str(recipe), "--json"],
            env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    weights = tiny_model / "model.safetensors"
    assert 0 < sent["model.safetensors"] <= 100_001 < weights.stat().st_size
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    # The header alone says that they are float32, and so must be converted.
    assert plan["memory"]["loading_bytes"] == 4 * (plan["parameters"]["total"] - plan["parameters"]["trainable"])
