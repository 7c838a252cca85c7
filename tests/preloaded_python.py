"""A stand-in for the interpreter whose processes begin with the large libraries imported, by forking.

`benchmarks/gpu/run.sh --dry-run` starts twenty processes, and most of their time is for importing torch and
transformers. The server imports them once; what is started as `PYTHON` passes its arguments, environment, folder and
output to it.

    server   python preloaded_python.py serve SOCKET
    client   SOCKET=… python preloaded_python.py run ARGUMENTS…     (ends with the process's exit code)
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "PRELOADED_PYTHON_SOCKET"
PRELOADED = (
    "loratune.workflows.export",
    "loratune.workflows.resume",
    "loratune.workflows.selftest",
    "trl.trainer.sft_trainer",
    "torch._dynamo.backends.debugging",
    "torch._functorch.aot_autograd",
    "torch._inductor.pattern_matcher",
    "torch._inductor.debug",
)
"""Modules that take long, loratune's first, since it sets what others read. `import trl` alone is not enough: its
parts, and with them torch, are imported at their first use."""


@contextmanager
def preloaded_python(folder: Path) -> Iterator[Path]:
    """Start the server; yield a program that can take the interpreter's place until then."""
    address, program = folder / "socket", folder / "preloaded"
    # -S and -E: nothing but the standard library, so that it starts in no time
    program.write_text(f'#!/bin/sh\nexec env {VARIABLE}={address} {sys.executable} -E -S {__file__} run "$@"\n')
    program.chmod(0o755)
    # read when a library is imported, thus here and not by what runs later
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, __file__, "serve", str(address)], env=environment)
    try:
        while not address.exists():
            assert server.poll() is None, "the server ended"
            time.sleep(0.05)
        yield program
    finally:
        server.kill()
        server.wait()


def run(arguments: list[str]) -> int:
    """Let the server run Python with these arguments; if this process is killed, so is that one."""
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(os.environ.pop(VARIABLE))
        wanted = {"arguments": arguments, "environment": dict(os.environ), "folder": str(Path.cwd())}
        socket.send_fds(link, [(json.dumps(wanted) + "\n").encode()], [0, 1, 2])
        answer = link.recv(16)
    return int(answer or b"1")


def serve(address: str) -> None:
    """Import what the steps need, and fork a process for each client."""
    for name in PRELOADED:
        importlib.import_module(name)

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that mind a client
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{address}.new")
        listener.listen()
        Path(f"{address}.new").rename(address)
        while True:
            link, _ = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                _mind(link)
                os._exit(0)
            link.close()


def _mind(link: socket.socket) -> None:
    """Run what a client asks for, and end it if the client is gone."""
    data, descriptors, _, _ = socket.recv_fds(link, 2**20, 3)
    while not data.endswith(b"\n"):
        data += link.recv(2**20)
    child = os.fork()
    if child == 0:
        os._exit(_python(json.loads(data), descriptors))
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            link.sendall(str(code if code >= 0 else 128 - code).encode())
            return
        if select.select([link], [], [], 0.05)[0]:  # nothing is sent any more: the client was closed
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            return


def _python(wanted: dict[str, object], descriptors: list[int]) -> int:
    """Be the interpreter: run a module or a script; return the exit code."""
    os.setsid()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    os.environ.clear()
    os.environ.update(wanted["environment"])  # type: ignore[arg-type]
    os.chdir(wanted["folder"])  # type: ignore[arg-type]
    arguments: list[str] = wanted["arguments"]  # type: ignore[assignment]
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).parent)
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    raise SystemExit(run(sys.argv[2:]))
