"""The page of `loratune tune`: one search of two sweeps, started once, stopped and continued, and what it chose."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from loratune.cli.studio import search_views, tune_views
from loratune.cli.studio.helper import Helper
from loratune.cli.studio.jobs import Job, Jobs
from loratune.cli.studio.places import StudioFolder
from loratune.cli.studio.tunes import find_searches, read_tune
from loratune.run.errors import RecipeError
from loratune.run.records.files import write_record
from loratune.run.records.sweep import SweepPlanRecord, TrialLosses, TuneRecord
from loratune.workflows.search.folder import SweepDir, TuneDir
from tests.cli.studio.conftest import ORIGIN
from tests.reporting.conftest import PLANTED

JSON = {"origin": ORIGIN, "accept": "application/json"}
HTML = {"origin": ORIGIN}
NAME = "__models/x-tune"


def begin(sweep: SweepDir, setting: str, losses: dict[str, float]) -> None:
    """Write a sweep whose trials have these losses at its only rung, and directories."""
    SweepDir.create(sweep.root, overwrite=False)
    trials = [{setting: value} for value in losses]
    write_record(sweep.plan, SweepPlanRecord, {"recipe": {}, "trials": trials, "rungs": [1.0], "dtype": "float32"})
    for number, loss in enumerate(losses.values(), 1):
        rows = [(loss * tokens, tokens) for tokens in (3, 4, 5, 3)]
        values = {"step": 4, "is_final": True, "losses": rows, "seconds": 1.0}
        write_record(sweep.losses(number, 0), TrialLosses, values)
        trial = sweep.trial(number)
        trial.root.mkdir(parents=True)
        trial.lock.write_text("{}")


def finish(folder: TuneDir) -> None:
    """Write what was chosen."""
    sweep = {"state": "finished", "best": 1, "recipe": "r", "num_examples": 4, "level": 0.95, "rungs": [1.0]}
    rates = {**sweep, "folder": "f", "page": "p", "trials": [], "sensitivity": [], "sentences": ["s"]}
    reasons = ["train.learning_rate=1e-3: the lowest held-out loss", f"lora.r=8: {PLANTED[1]}"]
    settings = {"train.learning_rate": "1e-3", "lora.r": "8"}
    chosen = {"settings": settings, "reasons": reasons, "rates": rates, "shapes": None}
    write_record(folder.result, TuneRecord, {**chosen, "folder": str(folder.root), "recipe": str(folder.recipe)})
    folder.recipe.write_text("model:\n  name: x\n")


@pytest.fixture
def folder(tmp_path: Path) -> TuneDir:
    """A search that was stopped after its rates."""
    found = TuneDir(tmp_path / NAME)
    begin(found.rates, "train.learning_rate", {"1e-4": 2.0, "1e-3": 1.5})
    return found


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The commands that the studio would have run."""
    found: list[Job] = []

    async def where(self: Helper, do: str, **values: Any) -> str:
        assert do == "where"
        return f"__models/{Path(values['recipe']).stem}"

    monkeypatch.setattr(Jobs, "_spawn", lambda self, job, lock, descriptor: found.append(job))
    monkeypatch.setattr(Helper, "ask", where)
    return found


def plain(text: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", text).split())


def test_both_sweeps_are_one_search_as_far_as_it_went(folder: TuneDir) -> None:
    found = read_tune(folder)
    assert found.state == "stopped"
    assert found.summary.startswith("Learning rate: So far: learning_rate=1e-3 is best: held-out loss 1.5000")
    begin(folder.shapes, "lora.r", {"8": 1.4, "32": 1.2})
    with folder.exclusive():
        found = read_tune(folder)
    assert (found.state, len(found.trials)) == ("running", 4)
    assert found.summary.startswith("Rank and target modules: So far: r=32 is best")
    alone = SweepDir.create(folder.root.with_name("y-sweep"), overwrite=False)
    begin(alone, "lora.r", {"8": 1.0})
    roots = [folder.rates.root, folder.shapes.root, alone.root]
    assert [(search.verb, search.folder) for search in find_searches(roots, folder.root.parent)] == [
        ("tune", folder.root),
        ("sweep", alone.root),
    ]
    inside = list(find_searches(roots[:1], folder.rates.root))
    assert [search.verb for search in inside] == ["sweep"], "for a studio in its folder, it is a sweep of its own"
    with pytest.raises(RecipeError, match="not a folder of `loratune tune`"):
        read_tune(TuneDir(alone.root))


def test_what_was_chosen_is_shown_with_the_reasons_and_the_recipe(user: TestClient, folder: TuneDir) -> None:
    finish(folder)
    home = user.get("/").text
    assert home.count("/tune?path=__models%2Fx-tune") == 1
    assert "/sweep?path=" not in home
    page = user.get("/tune", params={"path": NAME}).text
    assert "Chosen: learning_rate=1e-3, r=8" in plain(page)
    assert "train.learning_rate=1e-3: the lowest held-out loss" in page
    assert "/recipe?file=__models%2Fx-tune%2Ftuned.yaml" in page
    assert "/sweep?path=__models%2Fx-tune%2Frates" in page
    assert "window.hacked=2" in page
    assert "<script>window" not in page
    with folder.exclusive():
        assert read_tune(folder).reasons == (), "it is being searched again"
    assert read_tune(folder, works=True).state == "running"
    folder.result.write_text("{")
    assert (read_tune(folder).state, read_tune(folder).summary[:18]) == ("damaged", "tune.json: damaged")
    folder.rates.plan.write_text("{")
    folder.result.unlink()
    assert "Learning rate: sweep.json: damaged" in plain(user.get("/").text)
    assert user.get("/tune", params={"path": NAME}).status_code == 200
    for path in ("__models", "..", ""):
        assert user.get("/tune", params={"path": path}).status_code == 400


def test_it_is_started_once_with_its_time(user: TestClient, tmp_path: Path, started: list[Job]) -> None:
    (tmp_path / "r.yaml").write_text("model:\n  name: x\n")
    form = {"file": "r.yaml", "tune_budget": "15 m"}
    for budget in ("soon", "15", "-1m", "0m", "15m --overwrite"):
        answer = user.post("/tune/start", data={**form, "tune_budget": budget}, headers=JSON)
        assert answer.status_code == 400
        assert "not a time" in answer.json()["problem"]
    answer = user.post("/tune/start", data=form, headers=HTML, follow_redirects=False)
    assert answer.headers["location"] == "/tune?path=__models%2Fr-tune"
    assert started[0].words == ("tune", "r.yaml", "--budget", "15m")
    assert started[0].page == "/tune"
    with TuneDir(tmp_path / "__models/r-tune").exclusive():
        again = user.post("/tune/start", data=form, headers=HTML, follow_redirects=False)
    assert again.headers["location"] == answer.headers["location"], "its page shows how far it is"
    assert len(started) == 1, "another shell works on it"
    page = plain(user.get("/recipe", params={"file": "r.yaml"}).text)
    assert "$ loratune tune r.yaml --budget 15m" in page


def test_it_is_stopped_and_continued_by_the_same_words(
    user: TestClient, folder: TuneDir, tmp_path: Path, started: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = user.post("/tune/continue", data={"path": NAME}, headers=JSON)
    assert refused.json()["problem"] == "the search was not started here"
    refused = user.post("/tune/stop", data={"path": NAME}, headers=JSON)
    assert refused.json()["problem"] == "nothing is running here"
    assert "The command that started the search continues it." in user.get("/tune", params={"path": NAME}).text
    own = tmp_path / ".loratune_studio"
    own.mkdir()
    words = ["tune", "r.yaml", "--budget", "15m"]
    job = {"id": "1-a", "words": words, "about": NAME, "source": "r.yaml", "started": 1.0, "pid": 7, "lock": "x.lock"}
    (own / "1-a.json").write_text(json.dumps(job))
    (own / "1-a.log").write_text("stopped after step 3")
    page = plain(user.get("/tune", params={"path": NAME}).text)
    assert "Continue runs loratune tune r.yaml --budget 15m" in page
    assert "stopped after step 3" in page
    user.post("/tune/continue", data={"path": NAME}, headers=HTML, follow_redirects=False)
    assert [job.words for job in started] == [tuple(words)]
    stopped: list[Path] = []
    monkeypatch.setattr(Jobs, "stop", lambda self, run: stopped.append(run.root))
    with folder.exclusive():
        answer = user.post("/tune/stop", data={"path": NAME}, headers=HTML, follow_redirects=False)
        refused = user.post("/tune/continue", data={"path": NAME}, headers=JSON)
    assert answer.headers["location"] == "/tune?path=__models%2Fx-tune"
    assert stopped == [folder.root]
    assert refused.json()["problem"].startswith("another command is working on")
    assert len(started) == 1
    assert {route.path for route in search_views.ROUTES} >= {"/tune/stop", "/sweep/continue"}


def test_the_page_says_when_it_begins_and_when_it_failed_there(
    user: TestClient, folder: TuneDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(id="1", words=("tune", "r.yaml"), about=NAME, source="", started=1.0, pid=1, code=2)
    monkeypatch.setattr(Jobs, "all", lambda self, about=None: [job] if about in (None, NAME) else [])
    folder.rates.plan.unlink()
    with user.stream("GET", "/tune/events", params={"path": NAME, "state": "starting"}) as answer:
        (line,) = [line for line in answer.iter_lines() if line]
    assert json.loads(line.removeprefix("data: "))["state"] == "failed"
    assert "The command ended before the first trial." in user.get("/tune", params={"path": NAME}).text
    job = Job(id="1", words=("tune", "r.yaml"), about=NAME, source="", started=1.0, pid=1, is_running=True)
    assert "Preparing the data" in user.get("/tune", params={"path": NAME}).text
    plan = {"recipe": {}, "trials": [{"lora.r": "8"}], "rungs": [1.0], "dtype": "float32"}
    write_record(folder.rates.plan, SweepPlanRecord, plan)
    page = user.get("/tune", params={"path": NAME}).text
    assert 'data-state="running"' in page, "the command has not locked the folder yet"
    assert tune_views.ROUTES[0].path == "/tune"


def test_a_command_that_failed_does_not_look_like_what_was_found_before_it(
    user: TestClient, folder: TuneDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as another one with the recipe that was found, whose folder is the same."""
    finish(folder)
    began = folder.result.stat().st_mtime
    job = Job(id="1", words=("tune", "r.yaml"), about=NAME, source="", started=began + 1, pid=1, code=2)
    monkeypatch.setattr(Jobs, "all", lambda self, about=None: [job] if about in (None, NAME) else [])
    page = user.get("/tune", params={"path": NAME}).text
    assert "failed The last command ended with exit code 2; its output is below. Found before it: Chosen" in plain(page)
    assert "Recipe with these settings" not in page
    job = Job(id="1", words=("tune", "r.yaml"), about=NAME, source="", started=began - 1, pid=1, code=0)
    assert "Recipe with these settings" in user.get("/tune", params={"path": NAME}).text


def test_the_page_of_one_of_its_sweeps_leads_back_and_offers_no_recipe(
    user: TestClient, folder: TuneDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep of rates is without metric and answers, and the lowest loss is not what `tune` chooses."""
    folder.rates.best.write_text("model:\n  name: x\n")
    finish(folder)
    job = Job(id="1", words=("tune", "r.yaml"), about=NAME, source="", started=1.0, pid=1, code=0)
    monkeypatch.setattr(Jobs, "all", lambda self, about=None: [job] if about in (None, NAME) else [])
    page = user.get("/sweep", params={"path": f"{NAME}/rates"}).text
    assert "/tune?path=__models%2Fx-tune" in page
    assert "best.yaml" not in page
    assert "$ loratune tune r.yaml : done" in plain(page)
    with folder.exclusive():  # which leaves a file
        pass
    places = StudioFolder.of(tmp_path)
    assert places.data_files() == [], "what it writes is not offered as data"
    assert places.recipes() == [f"{NAME}/tuned.yaml"]


def test_links_do_not_lead_out_of_the_folder(user: TestClient, folder: TuneDir, tmp_path: Path) -> None:
    outside = tmp_path.with_name("outside")
    begin(SweepDir(outside), "lora.r", {"8": 1.0})
    folder.shapes.root.symlink_to(outside)
    for page in ("/", "/tune"):
        shown = user.get(page, params={"path": NAME}).text
        assert "Learning rate" in shown
        assert "Rank and target modules" not in shown
