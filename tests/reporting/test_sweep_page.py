"""The page of a sweep, and its table for a terminal."""

from __future__ import annotations

import io
import json

from rich.console import Console

from loratune.reporting.html import render_page
from loratune.reporting.sweep_page import next_lines, sweep_page, trial_table
from loratune.run.records.sweep import RungResult, SweepRecord, TrialDifference, TrialResult
from loratune.workflows.search.results import rank_trials
from tests.workflows.search.test_halving import measured

PLANTED = "<script>window.hacked=1</script>[bold]"


def record(*names: str) -> SweepRecord:
    trials = [
        measured(1, 0.9, 0.7, is_final=True, **{"train.learning_rate": "1e-3", "lora.targets": names[0]}),
        measured(2, 1.2, **{"train.learning_rate": "1e-4", "lora.targets": names[1]}),
        measured(3, 1.5, problem="<b>nan</b>", **{"train.learning_rate": "1e-1", "lora.targets": names[0]}),
    ]
    values = rank_trials(trials, waiting=())
    where = {"folder": "f-sweep", "recipe": "f-sweep/best.yaml", "page": "f-sweep/sweep.html", "rungs": [0.5, 1.0]}
    return SweepRecord.model_validate_json(json.dumps({**values, **where}))


def test_the_page_has_table_words_and_charts_and_escapes_what_settings_say() -> None:
    page = render_page(sweep_page(record(PLANTED, "b")))
    assert "Sweep of 3 trials" in page
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "Trial 3: &lt;b&gt;nan&lt;/b&gt;." in page
    assert page.count("<svg") == 2  # the losses of three rates, and the curve of the trial that went on
    assert "loratune report trials/01" in page
    assert "What matters" in page


def test_the_table_shows_who_lost_where_and_by_how_much() -> None:
    console = Console(file=io.StringIO(), width=140)
    found = record(PLANTED, "b")
    console.print(trial_table(found))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    first, second, third = (line for line in shown.splitlines() if line.strip()[:1].isdigit())
    assert "learning_rate" in shown
    assert "train.learning_rate" not in shown, "a section is named where two have a field of the name"
    assert "best" in first
    assert "finished" in first
    assert "±" in second
    assert "dropped" in second
    assert "failed" in third
    assert PLANTED[:8] in shown.replace("\n", "")


def test_a_best_trial_that_is_not_finished_is_to_be_resumed() -> None:
    trial = TrialResult(
        number=1,
        run="t/01",
        settings={"lora.r": "8"},
        state="waiting",
        rungs=(RungResult(step=2, nll=1.0, seconds=3.0),),
        to_best=TrialDifference(step=2, value=0.0, low=0.0, high=0.0),
    )
    assert next_lines(record("a", "b"), trial)[0] == "loratune resume t/01"
