"""What every verb has: --quiet, --verbose, -h, errors as JSON; and the options of `loratune` itself."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import pytest

from loratune import __main__ as cli
from loratune import __version__
from loratune.cli.terminal import TerminalProgress
from loratune.cli.verb import as_verb


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["loratune", *words])
    with pytest.raises(SystemExit) as stop:
        cli.app()
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_the_version(option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(capsys, monkeypatch, option) == (0, f"loratune {__version__}\n", "")


@pytest.mark.parametrize("words", [("-h",), ("train", "-h"), ("runs", "--help")])
def test_help_has_a_short_form_and_every_verb_is_quiet_on_request(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run(capsys, monkeypatch, *words)
    assert code == 0
    assert "Usage" in out
    assert words[0] == "-h" or ("--quiet" in out and "--verbose" in out)


@pytest.mark.parametrize("words", [("train", "--json"), ("plan", "a.yaml", "--nope", "--json")])
def test_a_wrong_argument_is_json_where_json_is_asked_for(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run(capsys, monkeypatch, *words)
    record = json.loads(out)
    assert code == record["exit_code"] == 2
    assert "RECIPE" in record["problem"] or "--nope" in record["problem"]
    assert record["fix"] == f"loratune {words[0]} --help"
    code, out, err = run(capsys, monkeypatch, *(word for word in words if word != "--json"))
    assert (code, out) == (2, "")
    assert err


def test_quiet_leaves_warnings(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TerminalProgress, "quiet", False)

    def work() -> None:
        progress = TerminalProgress()
        progress.line("a line")
        progress.warn("a warning")
        with progress.task("counting", 3) as task:
            task.advance()

    as_verb(work)(quiet=True)
    assert capsys.readouterr().err == "! a warning\n"
    as_verb(work)()
    assert "a line" in capsys.readouterr().err


def test_verbose_shows_where_an_error_arose_and_what_libraries_say(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
        monkeypatch.setenv(name, "warning")
    monkeypatch.setattr(TerminalProgress, "verbose", False)
    with warnings.catch_warnings():
        code, _, err = run(capsys, monkeypatch, "runs", "no-such-folder", "-v")
        assert not any(action == "ignore" for action, *_ in warnings.filters)
    assert code == 2
    assert "Traceback" in err
    assert "in list_runs" in err
    assert err.rstrip().splitlines()[-2].startswith("RecipeError no-such-folder: no such folder")
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
    code, _, err = run(capsys, monkeypatch, "runs", "no-such-folder")
    assert code == 2
    assert "Traceback" not in err


def test_a_schema_that_does_not_exist_is_an_error_as_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run(capsys, monkeypatch, "schema", "nothing")
    assert code == json.loads(out)["exit_code"] == 2


WRONG = {
    "init": "nothing",
    **dict.fromkeys(("plan", "explain", "eject", "train", "tune", "bench"), "no.yaml"),
    "sweep": "no.yaml train.learning_rate=1e-4,1e-3",
    **dict.fromkeys(("resume", "extend", "runs", "evaluate", "reproduce", "report", "export", "serve"), "no-run"),
    "merge": "no-run out",
    **dict.fromkeys(("certify", "sample"), "no-run target"),
    "push": "no-run owner/name",
    **dict.fromkeys(("compare", "diff"), "no-run other"),
}
"""Verb → arguments that are wrong."""
NEVER_WRONG = {"doctor", "selftest"}
"""Verbs with `--json` whose arguments cannot be wrong."""


def test_every_verb_that_prints_json_is_asked_for_an_error() -> None:
    verbs = [verb for group in cli.VERBS.values() for verb in group]
    assert {verb.__name__ for verb in verbs if "as_json" in verb.__annotations__} == {*WRONG, *NEVER_WRONG}


@pytest.mark.parametrize("verb", WRONG)
def test_an_error_is_json_on_stdout_and_words_on_stderr(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TerminalProgress, "quiet", False)
    code, out, err = run(capsys, monkeypatch, verb, *WRONG[verb].split(), "--json", "--quiet")
    record = json.loads(out)
    assert code == record["exit_code"] == 2
    assert record["error"] == "RecipeError"
    assert record["fix"]
    assert record["problem"] in err
