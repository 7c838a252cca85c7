"""Serve a run through an OpenAI-compatible API, with an existing server: vLLM, or else `transformers serve`.

Several runs and adapters are served by loratune's own server: see `workflows.serving`.

This module exports what the server loads, with a certificate; starts the server; waits until the fine-tuned model
answers; and forwards signals.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from loratune.exporting.transformers_serve import BASE_NAME, ServerCommand, served_name, transformers_command
from loratune.exporting.vllm import serve_words
from loratune.model.device import device_here
from loratune.planning.lock import model_fingerprint
from loratune.recipe.tasks import require_text
from loratune.run.digest import file_sha256
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import MachineError, RecipeError, RunError
from loratune.run.extras import pip_install
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.workflows.export import export, write_served_layout
from loratune.workflows.finished import recipe_of
from loratune.workflows.serving.listening import Service, check_access, choose_port, service_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

START_SECONDS = 1800.0
"""How long the server may take to load the weights and, with vLLM on a GPU, to compile."""
STOP_SECONDS = 20.0
"""How long the server may take to exit after SIGTERM before it is killed."""
SERVE_PACKAGES = ("fastapi", "uvicorn", "openai")
"""The packages that `transformers serve` needs: the extra `serve`."""

_STDERR = 2
# Without a proxy: the server is on this machine.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def serve(
    root: str | Path,
    *,
    server: str = "auto",
    host: str = "127.0.0.1",
    port: int | None = None,
    api_key: str | None = None,
    progress: Progress = NO_PROGRESS,
    on_ready: Callable[[Service], None] = lambda _: None,
) -> None:
    """Serve the base and the fine-tuned model until SIGINT or SIGTERM.

    Args:
        root: The run directory.
        server: `vllm`, `transformers`, or `auto`: vLLM where it is installed.
        host: The address to listen on.
        port: The port to listen on; None for 8000, or a free port where 8000 is taken.
        api_key: The key that requests must send; None for no key.
        progress: The listener for progress and warnings.
        on_ready: Called when the fine-tuned model answers.

    Raises:
        RecipeError: The run is not finished, or other machines could send requests without a key.
        MachineError: No server is installed, or the port is taken.
        RunError: The certificate fails, or the server exits by itself.
    """
    run = RunDir.open(root)
    run.require_adapter()
    require_text(
        recipe_of(run),
        "loratune serve",
        f"loratune merge {root} OUT, which transformers' text-classification pipeline loads",
    )
    chosen = choose_server(server)
    check_access(chosen, host, api_key)
    port = choose_port(host, port)
    name = served_name(run.root.name)
    command = _command(run, chosen, host=host, port=port, api_key=api_key, progress=progress)
    service = service_at(host, port, server=chosen, models=(BASE_NAME, name), needs_key=api_key is not None)
    with _run_server(command) as process, _forward_signals(process) as stopped:
        with progress.task(f"starting {chosen}", None, "s") as task:
            _wait_until_ready(service, process, stopped, task.advance)
        if not stopped.is_set():
            on_ready(service)
        code = process.wait()
    if code and not stopped.is_set():
        raise RunError(f"{chosen} exited with code {code}", fix="see its messages above")


def choose_server(wanted: str, *, several: bool = False) -> str:
    """Choose the server to use.

    Args:
        wanted: `vllm`, `transformers`, `loratune` or `auto`.
        several: Whether several models are to be served.

    Raises:
        MachineError: It is not installed.
        RecipeError: It cannot serve several models.
    """
    if several and wanted != "loratune":
        raise RecipeError(
            f"--server {wanted} is started with one run",
            fix="--server loratune; or export each run with --to vllm and give vllm serve all of them: "
            "--lora-modules A=FOLDER B=FOLDER",
        )
    has_vllm = shutil.which("vllm") is not None
    missing = [name for name in SERVE_PACKAGES if find_spec(name) is None]
    if wanted == "vllm" and not has_vllm:
        raise MachineError("vLLM is not installed", fix="pip install vllm, or --server transformers")
    if wanted not in ("transformers", "loratune") and has_vllm:
        return "vllm"
    if missing:
        own = wanted == "loratune"
        raise MachineError(
            f"{'packages are missing' if own else 'no server is installed'}: "
            f"{'the server' if own else 'transformers serve'} needs {', '.join(missing)}",
            fix=pip_install("serve"),
        )
    return "loratune" if wanted == "loratune" else "transformers"


def _command(
    run: RunDir, server: str, *, host: str, port: int, api_key: str | None, progress: Progress
) -> ServerCommand:
    """Export what the server loads, unless it is there already; return the command that starts it."""
    if server == "vllm":
        folder = run.exports / "vllm"
        if not _is_current(run, folder, progress):
            progress.line(export(run.root, to="vllm", out=folder, progress=progress).summary)
        script = (folder / "serve.sh").read_text(encoding="utf-8")
        words = serve_words(script.partition("exec ")[2], base_name=BASE_NAME, host=host, port=port)
        return ServerCommand(words=words, environment={"VLLM_API_KEY": api_key} if api_key else {})
    folder = run.exports / "served"
    if not _is_current(run, folder, progress):
        progress.line(write_served_layout(run.root, folder, progress=progress).summary)
    recipe = recipe_of(run)
    device = device_here(recipe.train.device)
    return transformers_command(folder, host=host, port=port, device=device, dtype=recipe.model.dtype)


def _is_current(run: RunDir, folder: Path, progress: Progress) -> bool:
    """Return whether the folder has a certificate of this adapter and base. Remove it if it is of others."""
    file = folder / "parity.json"
    if not file.is_file():
        return False
    inputs = read_json(run.lock)["inputs"]
    adapter = read_json(file).get("adapter_sha256")
    if adapter == file_sha256(run.adapter_weights) and model_fingerprint(Path(inputs["model_path"])) == inputs["model"]:
        return True
    progress.line(f"{folder} is of another adapter or base; it is replaced")
    shutil.rmtree(folder)
    return False


@contextmanager
def _run_server(command: ServerCommand) -> Iterator[subprocess.Popen[bytes]]:
    """Start the server and stop it at the end of the block."""
    process = subprocess.Popen(  # noqa: S603 - our own command
        command.words,
        cwd=command.folder,
        env={**os.environ, **command.environment},
        stdout=_STDERR,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # so that Ctrl-C reaches the server through us only, not from the terminal as well
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def _forward_signals(process: subprocess.Popen[bytes]) -> Iterator[threading.Event]:
    """Forward SIGINT and SIGTERM to the server, and set the event on the first one. A second one kills the server."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def on_signal(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        process.send_signal(signal.SIGKILL if stopped.is_set() else number)
        stopped.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_until_ready(
    service: Service, process: subprocess.Popen[bytes], stopped: threading.Event, on_second: Callable[[int], None]
) -> None:
    """Wait until the server is healthy and has loaded the fine-tuned model."""
    deadline = time.monotonic() + START_SECONDS
    root = service.url.removesuffix("/v1")
    while not stopped.is_set():
        code = process.poll()
        if code is not None:
            raise RunError(f"{service.server} exited with code {code} while starting", fix="see its messages above")
        if _is_healthy(root):
            break
        if time.monotonic() > deadline:
            raise RunError(
                f"{service.server} did not answer within {START_SECONDS:,.0f} s", fix="see its messages above"
            )
        time.sleep(1)
        on_second(1)
    if service.server == "transformers" and not stopped.is_set():
        _load_model(root, service.models[1])


def _is_healthy(root: str) -> bool:
    try:
        with _direct.open(f"{root}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _load_model(root: str, model: str) -> None:
    """Make `transformers serve` load a model now: the first request does not wait, and errors show at the start."""
    request = urllib.request.Request(  # noqa: S310 - our own server
        f"{root}/load_model", json.dumps({"model": model}).encode(), {"Content-Type": "application/json"}
    )
    last = ""
    try:
        with _direct.open(request, timeout=START_SECONDS) as response:
            for line in response:  # events: progress, and at the end `ready` or `error`
                last = line.decode().removeprefix("data: ").strip() or last
        loaded = json.loads(last)["status"] == "ready"
    except (OSError, ValueError) as error:
        loaded, last = False, f"{error} {last}"
    if not loaded:
        raise RunError(f"transformers serve cannot load {model}: {last}", fix="see its messages above")
