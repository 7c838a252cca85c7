"""The pages, without a browser: what they show of a folder with a finished run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.table import Table
from starlette.testclient import TestClient

from loratune.cli.studio import draft_views, run_views
from loratune.cli.studio.exports import EXPORTS
from loratune.cli.studio.pages import as_block, read_static
from loratune.cli.studio.server import studio_app
from loratune.run.directory import RunDir
from tests.reporting.conftest import PLANTED, rewrite

TOKEN, ORIGIN = "the-right-token", "http://127.0.0.1:8321"
JSON = {"origin": ORIGIN, "accept": "application/json"}
NAME = "__models/<i>one"


@pytest.fixture
def work(finished_run: RunDir, tmp_path: Path) -> Path:
    """A folder with two finished runs, and a recipe."""
    for name in (NAME, "__models/two"):
        shutil.copytree(finished_run.root, tmp_path / name)
    shutil.copyfile(finished_run.recipe, tmp_path / "tiny.yaml")
    return tmp_path


@pytest.fixture
def user(work: Path) -> Iterator[TestClient]:
    with TestClient(studio_app(work, token=TOKEN, port=8321), base_url=ORIGIN) as client:
        client.get(f"/?token={TOKEN}")
        yield client


def test_the_runs_are_listed_with_their_verdicts_and_names_are_text(user: TestClient) -> None:
    text = user.get("/").text
    assert text.count('<span class="badge finished">') == 2
    assert "__models/&lt;i&gt;one" in text
    assert "<i>" not in text
    assert "held-out" in text or "exact match" in text


def test_a_finished_run_shows_its_verdict_and_has_a_button_with_its_command_for_all_that_follows(
    user: TestClient,
) -> None:
    text = user.get("/run", params={"path": NAME}).text
    assert "Verdict" in text
    assert "/run/chat?path=" in text
    for what, words, _ in EXPORTS.values():
        assert words[0] in text
        assert what in text
    assert "loratune export &#39;__models/&lt;i&gt;one&#39; --to gguf --merged" in text
    assert "<i>" not in text


def test_the_report_has_the_policy_of_the_report(user: TestClient) -> None:
    answer = user.get("/run/report", params={"path": NAME})
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert policy.endswith("frame-ancestors 'none'")
    assert "script" not in policy
    assert "&lt;i&gt;one" in answer.text


def test_two_runs_are_compared_and_more_open_the_page_of_compare(user: TestClient) -> None:
    text = user.get("/compare", params={"run": [NAME, "__models/two"]}).text
    assert "best first" in text
    assert "The two runs do not differ." in text
    page = user.get("/compare", params={"run": [NAME, "__models/two"], "page": "1"})
    assert "2 runs compared" in page.text
    assert "style-src 'sha256-" in page.headers["content-security-policy"]
    assert user.get("/compare", params={"run": NAME}).status_code == 400


def test_of_more_than_two_runs_every_setting_that_differs_is_shown(user: TestClient, work: Path) -> None:
    third = RunDir(Path(shutil.copytree(work / "__models/two", work / "__models/three")))
    rewrite(third.lock, lambda lock: {**lock, "recipe": {**lock["recipe"], "lora": {**lock["recipe"]["lora"], "r": 5}}})
    names = [NAME, "__models/two", "__models/three"]
    text = user.get("/compare", params={"run": names}).text
    (row,) = re.findall(r'<tr><th scope="row">lora.r</th>(.*?)</tr>', text, re.DOTALL)
    assert re.findall(r"<td>(.*?)</td>", row) == ["4", "4", "5"]
    intervals = re.findall(r"\[[^\]]+\]|±|\bto\b", re.sub(r"<[^>]+>", "", text))
    assert intervals, "the ranked table has intervals"


def test_a_run_that_stopped_can_be_resumed_and_its_events_say_how_far_it_is(user: TestClient, work: Path) -> None:
    run = RunDir(work / "__models/two")
    shutil.rmtree(run.adapter)
    text = user.get("/run", params={"path": "__models/two"}).text
    assert 'action="/run/resume"' in text
    assert "loratune resume __models/two" in text
    with user.stream("GET", "/run/events", params={"path": "__models/two", "state": "running"}) as answer:
        (line,) = [line for line in answer.iter_lines() if line]
    news = json.loads(line.removeprefix("data: "))
    assert news["state"] == "stopped"
    assert "step 30" in re.sub(r"<[^>]+>", "", news["live"])
    assert "<svg" in news["live"]
    assert user.post("/run/stop", data={"path": "__models/two"}, headers=JSON).json()["problem"] == (
        "nothing is running here"
    )


def test_a_live_view_shows_planted_text_as_text(work: Path) -> None:
    run = RunDir(work / NAME)
    event = {"step": 1, "event": "spike", "message": PLANTED[1], "time": 1.0}
    with run.metrics.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(event) + "\n")
    from loratune.reporting.run_files import read_run

    text = run_views._live(read_run(run))
    assert "window.hacked=2" in text
    assert "<script" not in text


def test_a_recipe_is_saved_only_if_it_is_one_and_nobody_changed_it(user: TestClient, work: Path) -> None:
    page = user.get("/recipe", params={"file": "tiny.yaml"}).text
    seen = re.search(r'name="seen" value="(\w+)"', page)
    assert seen is not None
    before = (work / "tiny.yaml").read_text()
    form = {"file": "tiny.yaml", "seen": seen[1], "text": before}
    changed = user.post("/recipe/field", data={"text": before, "name": "lora.r", "value": "8"}, headers=JSON).json()[
        "text"
    ]
    wrong = user.post("/recipe/save", data={**form, "text": changed.replace("r: 8", "rank: 8")}, headers=JSON)
    assert wrong.status_code == 400
    assert "rank" in wrong.json()["problem"]
    assert (work / "tiny.yaml").read_text() == before
    saved = user.post("/recipe/save", data={**form, "text": changed}, headers=JSON).json()
    assert saved["fields"]["lora.r"] == "8"
    assert (work / "tiny.yaml").read_text() == changed
    late = user.post("/recipe/save", data={**form, "text": before}, headers=JSON)
    assert "has changed since" in late.json()["problem"]
    assert (work / "tiny.yaml").read_text() == changed


@pytest.mark.parametrize(
    "question",
    ["", "[]", "{", '{"turns": []}', json.dumps({"side": "both", "text": "a", "system": "", "turns": []})],
)
def test_a_question_of_another_form_is_refused_before_a_model_is_loaded(user: TestClient, question: str) -> None:
    answer = user.post("/run/answer", data={"path": NAME, "request": question}, headers=JSON)
    assert answer.status_code == 400
    assert "question" in answer.json()["problem"]


def test_an_unknown_export_and_a_run_that_is_none_are_refused(user: TestClient, work: Path) -> None:
    assert user.post("/run/export", data={"path": NAME, "to": "x"}, headers=JSON).status_code == 400
    assert user.post("/run/resume", data={"path": "tiny.yaml"}, headers=JSON).status_code == 400
    assert user.get("/run", params={"path": "nothing"}).status_code == 400
    assert not (work / ".loratune_studio").exists()


def test_what_pages_load_is_in_the_package(user: TestClient) -> None:
    page = user.get("/").text
    for name in re.findall(r'(?:href|src)="/static/([^"]+)"', page):
        assert user.get(f"/static/{name}").content == read_static(name)
    assert user.get("/static/nothing.js").status_code == 404
    assert draft_views.SHOWN_EXAMPLES > 0


def test_a_table_of_the_terminal_becomes_one_of_the_page() -> None:
    table = Table("name", "value", title="T")
    table.add_row("[bold]a[/bold]", r"\[b]")
    table.add_row("c")
    block = as_block(table, "T")
    assert block.columns == ("name", "value")
    assert block.rows == (("a", "[b]"), ("c", ""))
