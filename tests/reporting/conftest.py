"""A finished tiny run whose data would do harm on a careless page, and a browser to open pages in."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir
from loratune.workflows.train import train
from tests.conftest import conversation, write_jsonl

PLANTED = (
    "<script>window.hacked=1;alert(1)</script>",
    "</style></title></textarea></svg></script><script>window.hacked=2</script>",
    '"\'><img src=x onerror="window.hacked=3"><svg onload=window.hacked=4>',
    "{{ 7 * 191 }}{% include 'x' %}",
    '<link rel=stylesheet href="https://example.org/x.css"><iframe src="https://example.org"></iframe>',
    "<base href='https://example.org/'><meta http-equiv=refresh content='0;url=https://example.org'>",
    "<!-- ]]> &lt;b&gt; $x^2$",
)


@pytest.fixture(scope="package")
def finished_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Trained on conversations in which something is planted, and evaluated. Not to be changed."""
    folder = tmp_path_factory.mktemp("planted")
    rows = [conversation(number) for number in range(12)] + [_planted(text) for text in PLANTED]
    held_out = [_planted(text) for text in PLANTED] + [conversation(number) for number in range(100, 115)]
    recipe = Recipe.parse(
        {
            "model": {"name": str(tiny_model), "dtype": "float32"},
            "data": {
                "train": str(write_jsonl(folder / "<b>train.jsonl", rows)),
                "eval": str(write_jsonl(folder / "eval.jsonl", held_out)),
            },
            "lora": {"r": 4, "dropout": 0.0},
            "train": {
                "output_dir": str(folder / "<script>run"),
                "device": "cpu",
                "learning_rate": 1e-2,
                "epochs": 2,
                "batch_size": 4,
            },
            "evaluate": {"metric": "exact_match", "samples": 25, "max_new_tokens": 4},
        }
    )
    return train(recipe).run


def _planted(text: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"{text} yes"}]}


@pytest.fixture
def a_copy(finished_run: RunDir, tmp_path: Path) -> Callable[..., RunDir]:
    """Copy the run to a folder of its own, to damage it; `name` is the folder's."""

    def copy(name: str = "copy") -> RunDir:
        target = tmp_path / name
        shutil.copytree(finished_run.root, target)
        RunDir(target).report.unlink()
        return RunDir(target)

    return copy


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    """Replace what a JSON file holds."""
    path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")


@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    """The system's browser, without a window."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        reason = "there is no chromium: `make browser` as root installs it"
        pytest.fail(reason) if os.environ.get("LORATUNE_NEEDS_BROWSER") else pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@dataclass(kw_only=True)
class Opened:
    """A page in the browser, with everything it asked for and complained about."""

    page: Page
    requests: list[str] = field(default_factory=list)
    failed: list[tuple[str, str | None]] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@pytest.fixture
def open_page(chromium: Browser) -> Iterator[Callable[..., Opened]]:
    """Open a file; settings are those of a browser context: `color_scheme`, `viewport`, `bypass_csp`."""
    contexts = []

    def open_(path: Path, **settings: Any) -> Opened:
        context = chromium.new_context(**settings)
        contexts.append(context)
        opened = Opened(page=context.new_page())
        opened.page.on("request", lambda request: opened.requests.append(request.url))
        opened.page.on("requestfailed", lambda request: opened.failed.append((request.url, request.failure)))
        opened.page.on("console", lambda message: opened.complaints.append(message.text))
        opened.page.on("pageerror", lambda error: opened.complaints.append(str(error)))
        opened.page.on("dialog", lambda dialog: (opened.complaints.append(dialog.message), dialog.dismiss()))
        opened.page.goto(path.resolve().as_uri())
        return opened

    yield open_
    for context in contexts:
        context.close()
