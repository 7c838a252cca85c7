"""A studio in a process of its own, as a person starts it, and a folder for it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Browser, Page
from starlette.testclient import TestClient

from loratune.cli.studio.server import studio_app
from tests.reporting.conftest import chromium  # noqa: F401 - a fixture

TOKEN, ORIGIN = "the-right-token", "http://127.0.0.1:8321"
HARMLESS = """() => ({
  hacked: window.hacked ?? null,
  elements: [...document.querySelectorAll('img, iframe, object, embed, base, script:not([src^="/static/"])')]
    .map(element => element.outerHTML),
  handlers: [...document.querySelectorAll('*')].flatMap(element => [...element.attributes])
    .filter(attribute => attribute.name.startsWith('on') || attribute.name === 'style')
    .map(attribute => attribute.name),
})"""
NOTHING = {"hacked": None, "elements": [], "handlers": []}


@pytest.fixture
def user(tmp_path: Path) -> Iterator[TestClient]:
    """A browser that has opened the URL of a studio on `tmp_path`."""
    with TestClient(studio_app(tmp_path, token=TOKEN, port=8321), base_url=ORIGIN) as client:
        client.get(f"/?token={TOKEN}")
        yield client


@dataclass(frozen=True, kw_only=True)
class Started:
    """A studio that runs.

    Attributes:
        url: What it printed: the address with the token.
        folder: Its folder.
        process: Its process.
    """

    url: str
    folder: Path
    process: subprocess.Popen[str]

    @property
    def origin(self) -> str:
        return self.url.partition("/?")[0]

    def close(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(20)


@pytest.fixture
def start_studio() -> Iterator[Callable[[Path], Started]]:
    """Start `loratune studio FOLDER`; what it started is ended with it."""
    started: list[Started] = []

    def start(folder: Path) -> Started:
        command = [sys.executable, "-m", "loratune", "studio", str(folder), "--no-open"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), url
        started.append(Started(url=url, folder=folder, process=process))
        return started[-1]

    yield start
    for one in started:
        own = _processes_in(one.folder)
        if one.process.poll() is None:
            one.close()
        assert one.process.stdout is not None
        one.process.stdout.close()
        for process in own:
            with suppress(psutil.Error):
                process.kill()


def _processes_in(folder: Path) -> list[psutil.Process]:
    """Return the processes of loratune that work in a folder."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cwd() == str(folder.resolve()) and "loratune" in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A folder with the tiny model in it."""
    root = tmp_path / "work <b>here"
    root.mkdir()
    shutil.copytree(tiny_model, root / "tiny")
    return root


class Visitor:
    """A page in the browser, with everything that it asked for and complained about."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.set_default_timeout(60_000)
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))

    def finds_no_harm(self) -> None:
        assert self.page.evaluate(HARMLESS) == NOTHING
        assert self.complaints == []


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Callable[[str], Visitor]]:  # noqa: F811 - the fixture above
    context = chromium.new_context(viewport={"width": 1280, "height": 900})

    def open_(url: str) -> Visitor:
        """Open the printed URL, which leads to the list of runs."""
        visitor = Visitor(context.new_page())
        visitor.page.goto(url)
        visitor.page.wait_for_url(lambda at: "token" not in at)
        return visitor

    yield open_
    context.close()
