"""Asks `loratune serve RUN1 RUN2 …` more than one client would, and checks every answer.

    python benchmarks/serve_load.py RUN RUN [--clients 16] [--requests 2000] [--tokens 24] [--json]

Starts the server and, before any load, asks each model each prompt once, alone. Then:

load       --clients threads send --requests requests, streamed and not, greedy and sampled with a seed; every answer
           must be the one that a single client got
killed     clients that close the connection in mid-answer, among others whose answers must still be right
changes    while clients ask, an adapter is loaded, asked and unloaded again and again
full       more requests at once than --at-once and --queue allow: each is answered rightly or with status 503,
           some of them with 503, and the next request is answered

Exits with 1 if one thing was not so. Runs anywhere; times depend on the machine and are not what it is for.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BUSY = 503
QUESTIONS = (
    "could you move the dentist to friday, 3 pm?",
    "cancel tomorrow's stand-up",
    "book a table for four on the 3rd",
    "What is the capital of France?",
    "remind me to water the plants every monday",
    "Ünïcode 日本語 🙂, please",
)


@dataclass(frozen=True, slots=True)
class Question:
    """One request, and how it is sent."""

    model: str
    text: str
    sampled: bool

    def body(self, tokens: int, *, stream: bool) -> dict[str, Any]:
        """Return the request's body."""
        chosen = {"temperature": 1.0, "top_p": 0.9, "seed": 7} if self.sampled else {"temperature": 0}
        messages = [{"role": "user", "content": self.text}]
        return {"model": self.model, "messages": messages, "max_tokens": tokens, "stream": stream, **chosen}


@dataclass(slots=True)
class Client:
    """Sends requests to the server."""

    port: int
    tokens: int

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        """Return status and body of an answer."""
        connection = self.connect(path, body)
        try:
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def connect(self, path: str, body: dict[str, Any]) -> http.client.HTTPConnection:
        """Send a request; return the connection before the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        return connection

    def ask(self, question: Question, *, stream: bool = False) -> tuple[int, str]:
        """Return the status, and the text of the answer and why it ended."""
        status, text = self.post("/v1/chat/completions", question.body(self.tokens, stream=stream))
        if status != 200:
            return status, text
        return status, _streamed(text) if stream else _whole(json.loads(text))

    def kill(self, question: Question, number: int) -> None:
        """Ask, and close the connection in mid-answer, or before it; every other time without a farewell."""
        connection = self.connect("/v1/chat/completions", question.body(self.tokens, stream=number % 3 != 0))
        if number % 3 == 1:
            connection.getresponse().read(40)
        if number % 2 and connection.sock is not None:
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()


def _whole(record: dict[str, Any]) -> str:
    (choice,) = record["choices"]
    return f"{choice['message']['content']}|{choice['finish_reason']}"


def _streamed(text: str) -> str:
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        return f"no end: {text[-200:]}"
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    said = "".join(choice["delta"].get("content", "") for choice in choices)
    return f"{said}|{choices[-1]['finish_reason']}"


@dataclass
class Tally:
    """What was seen."""

    alone: dict[Question, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, part: str, what: str, problem: str = "") -> None:
        """Count something, and keep what is wrong about it."""
        with self.lock:
            self.counts.setdefault(part, Counter())[what] += 1
            if problem:
                self.problems.append(f"{part}: {problem}")

    def check(self, part: str, question: Question, status: int, text: str) -> None:
        """Compare an answer with the one that a single client got."""
        if status != 200:
            self.note(part, f"status {status}", f"{question}: status {status}: {text[:200]}")
        elif text != self.alone[question]:
            self.note(part, "other answer", f"{question}: {text!r}, alone {self.alone[question]!r}")
        else:
            self.note(part, "same answer")


def under_load(client: Client, tally: Tally, clients: int, requests: int) -> None:
    """Send requests from several clients."""
    questions = list(tally.alone)

    def send(number: int) -> None:
        question = questions[number * 7 % len(questions)]
        try:
            tally.check("load", question, *client.ask(question, stream=number % 2 == 0))
        except OSError as error:
            tally.note("load", "lost", f"{question}: {error!r}")

    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(send, range(requests)))


def with_killed_clients(client: Client, tally: Tally, clients: int, requests: int) -> None:
    """Every other client closes its connection."""
    questions = list(tally.alone)

    def send(number: int) -> None:
        question = questions[number % len(questions)]
        if number % 2:
            client.kill(question, number // 2)
            tally.note("killed", "killed")
        else:
            tally.check("killed", question, *client.ask(question, stream=number % 4 == 0))

    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(send, range(requests)))


def with_changing_adapters(client: Client, tally: Tally, adapter: Path, twin: str, changes: int) -> None:
    """Load and unload a further adapter while other clients ask; `twin` is the same adapter under its first name."""
    done = threading.Event()
    questions = [question for question in tally.alone if not question.sampled]

    def keep_asking(first: int) -> None:
        number = first
        while not done.is_set():
            question = questions[number % len(questions)]
            tally.check("changes", question, *client.ask(question, stream=number % 2 == 0))
            number += 1

    def late(question: Question) -> None:
        # Either accepted, then answered rightly although the adapter is about to go, or refused by name.
        status, text = client.ask(Question("late", question.text, sampled=False))
        if status == 404:
            tally.note("changes", "404 after unloading")
        else:
            tally.check("changes", question, status, text)

    with ThreadPoolExecutor(8) as threads:
        asking = [threads.submit(keep_asking, first) for first in range(4)]
        try:
            for number in range(changes):
                status, text = client.post("/v1/load_lora_adapter", {"lora_name": "late", "lora_path": str(adapter)})
                tally.note("changes", f"load {status}", "" if status == 200 else text)
                own = [question for question in questions if question.model == twin]
                lates = [threads.submit(late, own[(number + k) % len(own)]) for k in range(3)]
                time.sleep(0.05 * (number % 3))
                status, text = client.post("/v1/unload_lora_adapter", {"lora_name": "late"})
                tally.note("changes", f"unload {status}", "" if status == 200 else text)
                for result in lates:
                    result.result()
                status, text = client.ask(Question("late", QUESTIONS[0], sampled=False))
                tally.note("changes", f"gone {status}", "" if status == 404 else text)
        finally:
            done.set()
        for one in asking:
            one.result()


def with_a_full_queue(client: Client, tally: Tally, room: int) -> None:
    """Send twice as many requests at once as there is room for."""
    questions = [question for question in tally.alone if not question.sampled]
    together = threading.Barrier(2 * room)

    def send(number: int) -> None:
        question = questions[number % len(questions)]
        together.wait()
        status, text = client.ask(question)
        if status == BUSY:
            tally.note("full", f"status {BUSY}")
        else:
            tally.check("full", question, status, text)

    with ThreadPoolExecutor(2 * room) as threads:
        list(threads.map(send, range(2 * room)))
    if not tally.counts["full"][f"status {BUSY}"]:
        tally.problems.append("full: no request found the queue full")
    tally.check("full", questions[0], *client.ask(questions[0]))


@contextmanager
def server(runs: list[Path], *, at_once: int, queue: int) -> Iterator[dict[str, Any]]:
    """`loratune serve --json` as a program of its own, ended by SIGINT."""
    words = [sys.executable, "-m", "loratune", "serve", *map(str, runs), "--server", "loratune", "--json"]
    words += ["--at-once", str(at_once), "--queue", str(queue)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        stdout = process.stdout or sys.stdin  # never None with PIPE
        text = ""
        while (line := stdout.readline()) and line != "}\n":
            text += line
        if not line:
            raise SystemExit(f"the server ended with code {process.wait()}")
        try:
            yield {**json.loads(f"{text}}}"), "pid": process.pid}
        finally:
            process.send_signal(signal.SIGINT)
            code = process.wait(60)
    if code != 0:
        raise SystemExit(f"the server ended with code {code}")


def run(runs: list[Path], *, clients: int, requests: int, tokens: int, changes: int, room: int) -> Tally:
    """Do all of it; return what was seen."""
    tally = Tally()

    def timed(name: str, work: Callable[[], None]) -> None:
        start = time.monotonic()
        work()
        sys.stderr.write(f"{name}: {dict(tally.counts[name])} in {time.monotonic() - start:.0f} s\n")

    with server(runs, at_once=max(1, room - room // 2), queue=max(clients, room // 2)) as service:
        client = Client(int(service["url"].rpartition(":")[2].removesuffix("/v1")), tokens)
        for model in service["models"]:
            for sampled in (False, True):
                for text in QUESTIONS:
                    question = Question(model, text, sampled)
                    status, tally.alone[question] = client.ask(question)
                    tally.note("alone", f"status {status}", "" if status == 200 else tally.alone[question])
        adapter = runs[-1] / "adapter" if (runs[-1] / "adapter").is_dir() else runs[-1]
        timed("load", lambda: under_load(client, tally, clients, requests))
        timed("killed", lambda: with_killed_clients(client, tally, clients, requests // 10))
        timed("changes", lambda: with_changing_adapters(client, tally, adapter, service["models"][-1], changes))
        full = max(1, room - room // 2) + max(clients, room // 2)
        timed("full", lambda: with_a_full_queue(client, tally, full))
    greedy = {
        model: tuple(t for q, t in tally.alone.items() if q.model == model and not q.sampled)
        for model in service["models"]
    }
    if len(set(greedy.values())) < len(greedy):
        tally.problems.append("alone: two models give the same answers, so a mix-up would not show")
    return tally


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description="Load test of loratune's own server.")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--changes", type=int, default=20, help="times that an adapter is loaded and unloaded")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    tally = run(
        given.runs,
        clients=given.clients,
        requests=given.requests,
        tokens=given.tokens,
        changes=given.changes,
        room=8,
    )
    record = {"counts": {part: dict(counts) for part, counts in tally.counts.items()}, "problems": tally.problems}
    sys.stdout.write(json.dumps(record, indent=2) + "\n" if given.json else f"{len(tally.problems)} problems\n")
    for problem in tally.problems[:20]:
        sys.stderr.write(f"{problem}\n")
    raise SystemExit(1 if tally.problems else 0)


if __name__ == "__main__":
    main()
