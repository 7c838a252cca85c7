"""The pages in a real browser: planted text does nothing, everything has a name, and nothing is wider than a phone."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from playwright.sync_api import Route, expect

from loratune.cli.studio.places import OWN
from loratune.cli.studio.server import serve_studio
from loratune.run.directory import RunDir
from tests.cli.studio.conftest import Visitor
from tests.reporting.conftest import PLANTED, rewrite

HARM = PLANTED[1] + PLANTED[2]
RUN = "__models/<svg onload=window.hacked=6>"
UNNAMED = """() => [...document.querySelectorAll('input:not([type=hidden]), select, textarea, button, a')]
  .filter(one => !(one.labels?.length || one.ariaLabel || one.textContent.trim())).map(one => one.outerHTML)"""


@pytest.fixture
def work(finished_run: RunDir, tmp_path: Path) -> Path:
    """A folder with two runs and a recipe, and harm in every text that a page can show."""
    for name in (RUN, "__models/two"):
        run = RunDir(Path(shutil.copytree(finished_run.root, tmp_path / name)))
        rewrite(run.evaluation, lambda record: {**record, "items": _planted(record["items"])})
        with run.metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": 1, "event": "spike", "message": HARM, "time": 1.0}) + "\n")
    recipe = finished_run.recipe.read_text(encoding="utf-8")
    (tmp_path / "<b>.yaml").write_text(f"{recipe}\n# {HARM}\n", encoding="utf-8")
    (tmp_path / "<img src=x onerror=window.hacked=7>.csv").write_text("a,b\n", encoding="utf-8")
    own = tmp_path / OWN
    own.mkdir()
    words = ["train", f"{HARM}.yaml"]
    job = {"id": "1-a", "words": words, "about": RUN, "source": HARM, "started": 1.0, "pid": 1, "lock": "x.lock"}
    (own / "1-a.json").write_text(json.dumps(job))
    (own / "1-a.log").write_text(HARM)
    return tmp_path


def _planted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _planted(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_planted(part) for part in value]
    return f"{value}{HARM}" if isinstance(value, str) else value


@pytest.fixture
def url(work: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a studio that runs in a thread of this process."""
    import uvicorn

    servers: list[uvicorn.Server] = []
    ready, found = threading.Event(), []
    serve = uvicorn.Server.serve

    async def remembered(self: uvicorn.Server, sockets: Any = None) -> None:
        servers.append(self)
        ready.set()
        await serve(self, sockets)

    monkeypatch.setattr(uvicorn.Server, "serve", remembered)
    thread = threading.Thread(target=lambda: serve_studio(work, port=None, on_ready=found.append))
    thread.start()
    assert ready.wait(20)
    yield found[0]
    servers[0].should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def answer_with_harm(route: Route) -> None:
    """Answer as a model that was taught to write markup."""
    lines = [{"piece": HARM[:20]}, {"piece": HARM[20:]}, {"result": HARM}]
    route.fulfill(body="".join(json.dumps(line) + "\n" for line in lines), content_type="application/x-ndjson")


def test_planted_text_is_text_and_all_pages_fit_a_phone(url: str, visit: Callable[[str], Visitor]) -> None:
    visitor = visit(url)
    page, origin = visitor.page, url.partition("/?")[0]
    page.route("**/recipe/plan?*", lambda route: route.fulfill(body="<p>planned</p>"))  # that takes a helper process
    page.route("**/recipe/tokens?*", lambda route: route.fulfill(body='<p id="shown" data-first="1"></p>'))
    page.route("**/run/answer", answer_with_harm)
    run = {"path": RUN}
    shown = {
        "/": RUN,
        "/new": "<img src=x onerror=window.hacked=7>.csv",
        f"/run?{urlencode(run)}": HARM,
        "/job?id=1-a": HARM,
        f"/compare?{urlencode({'run': [RUN, '__models/two']}, doseq=True)}": RUN.rpartition("/")[2],
        f"/recipe?{urlencode({'file': '<b>.yaml'})}": HARM,
        f"/run/chat?{urlencode(run)}": RUN,
        f"/run?{urlencode({'path': HARM})}": HARM,  # an error that names it
    }
    for path, text in shown.items():
        page.goto(f"{origin}{path}")
        page.wait_for_timeout(100)
        content = page.evaluate(
            "[document.body.textContent, ...[...document.querySelectorAll('textarea')].map(t => t.value)]"
        )
        assert any(text in part for part in content), path
        assert page.evaluate(UNNAMED) == [], path
        for width in (1280, 390, 320):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        if path != f"/run?{urlencode({'path': HARM})}":
            visitor.finds_no_harm()
    visitor.complaints.clear()  # the browser notes the status of the last page


def test_a_models_answers_are_text(url: str, visit: Callable[[str], Visitor]) -> None:
    visitor = visit(url)
    page = visitor.page
    page.route("**/run/answer", answer_with_harm)
    page.goto(f"{url.partition('/?')[0]}/run/chat?{urlencode({'path': RUN})}")
    page.get_by_label("Message", exact=True).fill(HARM)
    page.keyboard.press("Enter")
    expect(page.locator(".answer.base .text")).to_have_text(HARM)
    expect(page.locator(".answer.tuned .text")).to_have_text(HARM)
    expect(page.locator(".question")).to_have_text(HARM)
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    expect(page.get_by_role("button", name="Stop the answer")).to_be_hidden()
    visitor.finds_no_harm()


def test_the_form_drives_the_text(url: str, visit: Callable[[str], Visitor]) -> None:
    page = visit(url).page
    page.route("**/recipe/plan?*", lambda route: route.fulfill(body="<p>planned</p>"))
    page.route("**/recipe/tokens?*", lambda route: route.fulfill(body="<p>tokens</p>"))
    page.goto(f"{url.partition('/?')[0]}/recipe?{urlencode({'file': '<b>.yaml'})}")
    text = page.get_by_role("textbox", name="Recipe")
    before = text.input_value()
    page.get_by_label("lora.r", exact=True).fill("6")
    page.keyboard.press("Enter")
    expect(text).to_have_value(before.replace("r: 4", "r: 6"))
    text.fill(before.replace("r: 4", "r: 9"))
    page.get_by_role("button", name="Save and plan").click()
    expect(page.get_by_label("lora.r", exact=True)).to_have_value("9")
    text.fill("model: [")
    page.get_by_role("button", name="Save and start training").click()
    expect(page.locator("#recipe-status")).to_contain_text("not YAML")
    expect(text).to_have_value("model: [")
