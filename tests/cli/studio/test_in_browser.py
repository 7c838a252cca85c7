"""The pages in a real browser: planted text does nothing, everything has a name, and nothing is wider than a phone."""

from __future__ import annotations

import http.server
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
from loratune.run.records.files import write_record
from loratune.run.records.sweep import SweepPlanRecord, TrialLosses
from loratune.workflows.search.folder import SweepDir
from tests.cli.studio.conftest import Visitor
from tests.reporting.conftest import PLANTED, rewrite

HARM = PLANTED[1] + PLANTED[2]
RUN = "__models/<svg onload=window.hacked=6>"
SWEEP = "__models/<b onclick=window.hacked=8>-sweep"
TUNE = "__models/<b onclick=window.hacked=9>-tune"
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
    plant_sweep(SweepDir.create(tmp_path / SWEEP, overwrite=False))
    plant_sweep(SweepDir.create(tmp_path / TUNE / "rates", overwrite=False))
    own = tmp_path / OWN
    own.mkdir()
    words = ["train", f"{HARM}.yaml"]
    job = {"id": "1-a", "words": words, "about": RUN, "source": HARM, "started": 1.0, "pid": 1, "lock": "x.lock"}
    (own / "1-a.json").write_text(json.dumps(job))
    (own / "1-a.log").write_text(HARM)
    return tmp_path


def plant_sweep(folder: SweepDir) -> None:
    """Make a sweep of three trials, stopped at its first rung, with harm in a setting and in what a trial failed of."""
    trials = [{"lora.r": "4"}, {"lora.r": "8"}, {"lora.r": HARM}]
    write_record(
        folder.plan, SweepPlanRecord, {"recipe": {}, "trials": trials, "rungs": [0.5, 1.0], "dtype": "float32"}
    )
    for number, loss in ((1, 2.0), (2, 1.5), (3, None)):
        losses = [(loss * tokens, tokens) for tokens in (3, 4, 5, 3)] if loss else []
        record = {"step": 4, "is_final": False, "losses": losses, "seconds": 1.0, "problem": "" if loss else HARM}
        write_record(folder.losses(number, 0), TrialLosses, record)


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
        f"/sweep?{urlencode({'path': SWEEP})}": HARM,
        f"/tune?{urlencode({'path': TUNE})}": HARM,
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


def test_a_file_that_is_dropped_in_is_opened(url: str, visit: Callable[[str], Visitor], work: Path) -> None:
    visitor = visit(url)
    page = visitor.page
    page.route("**/new?*", lambda route: route.fulfill(body="<p>opened</p>"))  # that takes a helper process
    page.goto(f"{url.partition('/?')[0]}/new")
    dropped = page.evaluate_handle(
        """() => {
          const data = new DataTransfer();
          data.items.add(new File(["q,a\\n1,2\\n"], "<i>mine.csv", {type: "text/csv"}));
          return data;
        }"""
    )
    page.dispatch_event("#drop", "dragover", {"dataTransfer": dropped})
    assert page.locator("#drop.over").count() == 1
    page.dispatch_event("#drop", "drop", {"dataTransfer": dropped})
    page.wait_for_url("**/new?data=*mine.csv")
    assert (work / "<i>mine.csv").read_text() == "q,a\n1,2\n"
    assert visitor.complaints == []


def test_enter_in_what_a_search_is_given_starts_the_search_and_not_a_training(
    url: str, visit: Callable[[str], Visitor]
) -> None:
    page = visit(url).page
    page.route("**/recipe/plan?*", lambda route: route.fulfill(body="<p>planned</p>"))
    page.route("**/recipe/tokens?*", lambda route: route.fulfill(body="<p>tokens</p>"))
    asked: list[str] = []

    def start(route: Route) -> None:
        asked.append(route.request.url.split("/", 3)[3])
        route.fulfill(body="<p>started</p>", content_type="text/html")

    page.route("**/start", start)
    page.goto(f"{url.partition('/?')[0]}/recipe?{urlencode({'file': '<b>.yaml'})}")
    page.get_by_label("Settings to vary").fill("lora.r=4,8 <b>")
    expect(page.locator("#swept")).to_have_text("lora.r=4,8 <b>")
    page.get_by_label("Time for the whole sweep").fill("2h")
    expect(page.locator("#sweep-title ~ pre")).to_contain_text("lora.r=4,8 <b> --budget 2h")
    page.keyboard.press("Enter")
    expect(page.get_by_text("started")).to_be_visible()
    page.go_back()
    page.get_by_label("Time for finding the settings").fill("30 m")
    expect(page.locator("#tune-title ~ pre")).to_contain_text("tune '<b>.yaml' --budget 30m")
    page.keyboard.press("Enter")
    expect(page.get_by_text("started")).to_be_visible()
    page.go_back()
    page.get_by_role("button", name="Save and start training").click()
    expect(page.get_by_text("started")).to_be_visible()
    assert asked == ["sweep/start", "tune/start", "start"]


def test_what_a_reader_unfolded_stays_open_when_the_page_is_renewed(url: str, visit: Callable[[str], Visitor]) -> None:
    page = visit(url).page
    page.goto(f"{url.partition('/?')[0]}/sweep?{urlencode({'path': SWEEP})}")
    part = "<details><summary>More</summary><p>text %s</p></details>"
    page.evaluate("html => showLive(document.querySelector('#live'), html)", part % "one")
    page.get_by_text("More").click()
    page.get_by_text("More").focus()
    page.evaluate("html => showLive(document.querySelector('#live'), html)", part % "two")
    expect(page.get_by_text("text two")).to_be_visible()
    expect(page.get_by_text("More")).to_be_focused()


def test_a_page_of_another_site_gets_nothing_and_changes_nothing(
    url: str, visit: Callable[[str], Visitor], work: Path, tmp_path: Path
) -> None:
    """In the browser that has the cookie: fetches, a form, a frame, a script and an image from another origin."""
    origin = url.partition("/?")[0]
    html = f"""<!DOCTYPE html><form id=f method=post action="{origin}/upload?name=evil.csv"></form>
    <iframe src="{origin}/"></iframe><script src="{origin}/static/studio.js"></script>"""

    class Evil(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(html.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Evil)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        page = visit(url).page
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        tried = page.evaluate(
            """async (origin) => {
              const found = [];
              for (const [path, settings] of [
                ["/", {}],
                ["/", {credentials: "include"}],
                ["/", {credentials: "include", mode: "no-cors"}],
                ["/upload?name=evil.csv", {method: "PUT", body: "x", credentials: "include"}],
                ["/start", {method: "POST", body: "file=%3Cb%3E.yaml", credentials: "include", mode: "no-cors"}],
              ]) {
                try {
                  const answer = await fetch(origin + path, settings);
                  found.push(answer.type === "opaque" ? "unreadable" : await answer.text());
                } catch (error) { found.push("refused"); }
              }
              return [...found, typeof editRecipe];
            }""",
            origin,
        )
        assert set(tried[:-1]) <= {"refused", "unreadable"}
        assert tried[-1] == "undefined", "its script was not loaded"
        framed = page.frames[1]
        assert "Runs" not in framed.evaluate("document.body.innerText")
        answers: list[int] = []
        page.on("response", lambda response: answers.append(response.status))
        page.evaluate("document.querySelector('#f').submit()")
        page.wait_for_url(f"{origin}/**")
        assert 403 in answers
    finally:
        server.shutdown()
        server.server_close()
    assert not (work / "evil.csv").exists()
    assert len(list((work / OWN).glob("*.json"))) == 1, "nothing was started"
