"""The pages of sweeps: ranked while they run as at their end, and started once, with the words that are shown."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from loratune.cli.studio import draft_views, sweep_views
from loratune.cli.studio.helper import Helper
from loratune.cli.studio.jobs import Job, Jobs
from loratune.cli.studio.places import StudioFolder
from loratune.cli.studio.sweeps import read_or_damaged, read_sweep
from loratune.cli.studio.tunes import find_searches
from loratune.run.directory import RunDir
from loratune.run.errors import RecipeError
from loratune.run.records.files import write_record
from loratune.run.records.sweep import SweepPlanRecord, SweepRecord, TrialLosses
from loratune.workflows.search.folder import SweepDir
from tests.cli.studio.conftest import ORIGIN
from tests.reporting.conftest import PLANTED

JSON = {"origin": ORIGIN, "accept": "application/json"}
NAME = "__models/<i>x-sweep"
TRIALS = ({"lora.r": "4"}, {"lora.r": "8"}, {"lora.r": PLANTED[1]})


OLD: dict[str, Any] = {
    "state": "time is up",
    "best": None,
    "recipe": None,
    "num_examples": 6,
    "level": 0.95,
    "rungs": [0.5, 1.0],
    "trials": [
        {"number": 1, "run": "x", "settings": {"lora.r": "4"}, "state": "waiting", "rungs": [], "to_best": None}
    ],
    "sensitivity": [],
    "sentences": ["an older result"],
}


def measure(folder: SweepDir, number: int, rung: int, loss: float, **values: Any) -> None:
    """Write what a trial's held-out losses are at a rung: six rows, of different lengths."""
    losses = [(loss * tokens, tokens) for tokens in (3, 4, 5, 3, 4, 5)]
    record = {"step": 4 * (rung + 1), "is_final": rung == 1, "losses": losses, "seconds": 1.0, **values}
    write_record(folder.losses(number, rung), TrialLosses, record)


@pytest.fixture
def folder(tmp_path: Path) -> SweepDir:
    """A sweep of three trials at its first rung, where the third has failed."""
    found = SweepDir.create(tmp_path / NAME, overwrite=False)
    plan = {"recipe": {"lora": {}}, "trials": TRIALS, "rungs": [0.5, 1.0], "dtype": "float32"}
    write_record(found.plan, SweepPlanRecord, plan)
    measure(found, 1, 0, 2.0)
    measure(found, 2, 0, 1.5)
    measure(found, 3, 0, 0.0, losses=[], problem=f"out of memory {PLANTED[2]}")
    for number in (1, 2, 3):
        trial = found.trial(number)
        trial.root.mkdir(parents=True)
        trial.lock.write_text("{}")
    return found


def plain(text: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", text).split())


def test_a_sweep_that_was_stopped_is_ranked_with_intervals_as_far_as_it_went(folder: SweepDir) -> None:
    found = read_sweep(folder)
    assert (found.state, [trial.state for trial in found.trials]) == ("stopped", ["paused", "paused", "failed"])
    assert found.summary == "So far: r=8 is best: held-out loss 1.5000 nats per token after step 4."
    table = found.page.sections[0].blocks[1]
    assert [row[0] for row in table.rows] == ["2", "1", "3"]  # type: ignore[union-attr]
    assert table.rows[1][-1].startswith("+0.5 ± ")  # type: ignore[union-attr]
    measure(folder, 1, 0, 1.0)
    assert "r=4 is best" in read_sweep(folder).summary


def test_while_it_runs_the_trial_in_turn_is_named_and_no_older_result_is_shown(folder: SweepDir) -> None:
    so_far = read_sweep(folder).summary
    write_record(folder.result, SweepRecord, {**OLD, "folder": str(folder.root), "page": str(folder.page)})
    assert read_sweep(folder).summary == "an older result"
    with folder.exclusive(), folder.trial(2).exclusive():
        found = read_sweep(folder)
    assert found.summary == so_far
    assert (found.state, [trial.state for trial in found.trials]) == ("running", ["paused", "running", "failed"])
    for path in folder.all_losses():
        path.unlink()
    folder.result.unlink()
    with folder.exclusive(), folder.trial(2).exclusive():
        found = read_sweep(folder)
    assert (found.summary, found.trials[1].state, found.page.sections) == ("0 of 3 trials are done", "running", ())


def test_a_damaged_result_is_named_and_so_is_a_damaged_plan(folder: SweepDir, tmp_path: Path) -> None:
    result = {"trials": [{"number": 1, "rungs": [{"step": 4}], "settings": "x"}], "state": "finished"}
    folder.result.write_text(json.dumps(result))
    found = read_sweep(folder)
    assert found.state == "stopped"
    assert found.page.sections[0].title == "Missing data"
    assert "r=8 is best" in found.summary, "ranked from the losses"
    assert len(list(find_searches([folder.root, tmp_path], tmp_path))) == 1, "a folder that is not a sweep is left out"
    folder.plan.write_text("{")
    damaged = read_or_damaged(folder)
    assert damaged.state == "damaged"
    assert damaged.summary.startswith("sweep.json: damaged: Expecting property name")


def test_sweeps_are_listed_and_their_trials_lead_to_their_runs(user: TestClient, folder: SweepDir) -> None:
    home = user.get("/").text
    assert "__models/&lt;i&gt;x-sweep" in home
    assert "So far: r=8 is best" in home
    page = user.get("/sweep", params={"path": NAME}).text
    assert "/run?path=__models%2F%3Ci%3Ex-sweep%2Ftrials%2F02" in page
    assert page.count('type="checkbox" name="run"') == 3
    assert "The command that started the search continues it." in page
    assert "window.hacked=2" in page
    assert "<script>window" not in page
    assert "<i>" not in page
    whole = user.get("/sweep/page", params={"path": NAME})
    assert "style-src 'sha256-" in whole.headers["content-security-policy"]
    assert "r=8 is best" in whole.text
    assert user.get("/sweep", params={"path": "__models"}).status_code == 400
    assert user.get("/sweep", params={"path": ".."}).status_code == 400


def test_the_files_of_a_sweep_are_not_offered_as_data_but_its_recipe_is(folder: SweepDir, tmp_path: Path) -> None:
    folder.best.write_text("model:\n  name: x\n")
    places = StudioFolder.of(tmp_path)
    assert places.data_files() == []
    assert places.recipes() == [f"{NAME}/best.yaml"]
    assert places.sweeps() == [folder.root]
    assert len(places.runs()) == 3


def test_events_say_what_is_new_until_the_state_changes(user: TestClient, folder: SweepDir) -> None:
    with user.stream("GET", "/sweep/events", params={"path": NAME, "state": "running"}) as answer:
        (line,) = [line for line in answer.iter_lines() if line]
    news = json.loads(line.removeprefix("data: "))
    assert news["state"] == "stopped"
    assert "r=8 is best" in plain(news["live"])
    assert user.post("/sweep/stop", data={"path": NAME}, headers=JSON).json()["problem"] == "nothing is running here"


def test_a_sweep_is_started_once_with_the_words_that_are_shown(
    user: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is not run here: `tests/cli/studio/test_in_browser.py` runs one."""
    started: list[Job] = []

    def spawn(self: Jobs, job: Job, lock: str, descriptor: int) -> Job:
        started.append(job)
        return job

    async def where(self: Helper, do: str, **values: Any) -> str:
        assert do == "where"
        return f"__models/{Path(values['recipe']).stem}"

    monkeypatch.setattr(Jobs, "_spawn", spawn)
    monkeypatch.setattr(Helper, "ask", where)
    (tmp_path / "-r.yaml").write_text("model:\n  name: x\n")
    form = {"file": "-r.yaml", "settings": "train.learning_rate=1e-4,3e-4 'lora.r=8, 32'"}
    answer = user.post(
        "/sweep/start", data={**form, "sweep_budget": " 2 h"}, headers={"origin": ORIGIN}, follow_redirects=False
    )
    assert answer.headers["location"] == "/sweep?path=__models%2F-r-sweep"
    varied = ("train.learning_rate=1e-4,3e-4", "lora.r=8, 32")
    assert started[0].words == ("sweep", "./-r.yaml", *varied, "--budget", "2h")
    assert started[0].page == "/sweep"
    wrong = user.post("/sweep/start", data={**form, "sweep_budget": "soon"}, headers=JSON)
    assert wrong.json()["problem"] == "--budget soon: not a time"
    for settings in ("", "--overwrite", "lora.r=4 --out=/etc", "lora.r", "'"):
        wrong = user.post("/sweep/start", data={**form, "settings": settings}, headers=JSON)
        assert wrong.status_code == 400
    with SweepDir.create(tmp_path / "__models/-r-sweep", overwrite=False).exclusive():
        again = user.post("/sweep/start", data=form, headers={"origin": ORIGIN}, follow_redirects=False)
    assert again.headers["location"] == answer.headers["location"], "its page shows how far it is"
    assert len(started) == 1, "another shell works on it"
    assert draft_views.ROUTES[-1].path == "/sweep/start"
    page = user.get("/recipe", params={"file": "-r.yaml"}).text
    assert f"$ loratune sweep {shlex.quote('./-r.yaml')}" in plain(page)


def test_a_sweep_that_was_started_here_is_continued_by_the_same_words(
    user: TestClient, folder: SweepDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = user.post("/sweep/continue", data={"path": NAME}, headers=JSON)
    assert refused.json()["problem"] == "the search was not started here"
    own = tmp_path / ".loratune_studio"
    own.mkdir()
    words = ["sweep", "r.yaml", "lora.r=4,8"]
    job = {"id": "1-a", "words": words, "about": NAME, "source": "r.yaml", "started": 1.0, "pid": 1, "lock": "x.lock"}
    (own / "1-a.json").write_text(json.dumps(job))
    (own / "1-a.log").write_text("stopped after step 3")
    page = plain(user.get("/sweep", params={"path": NAME}).text)
    assert "Continue runs loratune sweep r.yaml lora.r=4,8" in page
    assert "stopped after step 3" in page
    started: list[tuple[str, ...]] = []
    monkeypatch.setattr(Jobs, "_spawn", lambda self, job, lock, descriptor: started.append(job.words))
    user.post("/sweep/continue", data={"path": NAME}, headers={"origin": ORIGIN}, follow_redirects=False)
    assert started == [tuple(words)]


def test_a_sweep_that_failed_before_its_plan_says_so(user: TestClient, folder: SweepDir, tmp_path: Path) -> None:
    own = tmp_path / ".loratune_studio"
    own.mkdir()
    job = {"id": "1-a", "words": ["sweep", "r.yaml", "a=1,2"], "about": NAME, "source": "r.yaml", "started": 1.0}
    (own / "1-a.json").write_text(json.dumps({**job, "pid": 1, "lock": "x.lock"}))
    (own / "1-a.log").write_text("RecipeError: a is not a setting")
    shutil.rmtree(folder.root)
    page = plain(user.get("/sweep", params={"path": NAME}).text)
    assert "The command ended before the first trial." in page
    assert "a is not a setting" in page
    with pytest.raises(RecipeError, match="not a sweep"):
        read_sweep(SweepDir(RunDir.at(tmp_path).root))
    assert sweep_views.ROUTES[0].path == "/sweep"
