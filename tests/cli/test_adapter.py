"""`loratune adapter` on the command line: what it prints, and its records."""

from __future__ import annotations

import json
from pathlib import Path

from jsonschema import validate
from typer.testing import CliRunner

from loratune.__main__ import app
from loratune.cli import adapter
from loratune.run.directory import RunDir
from loratune.run.records import adapters as records
from loratune.run.records.schemas import OUTPUTS, schema_of


def test_the_verbs_print_what_their_schemas_say(finished_run: RunDir, tmp_path: Path) -> None:
    run, out = str(finished_run.adapter), tmp_path / "out"
    calls = {
        "inspect": [run],
        "combine": [run, run, f"{out}-sum", "--weights", "0.5,0.5"],
        "resize": [run, f"{out}-small", "--energy", "0.9"],
        "convert": [run, f"{out}-plain"],
        "certify": [run, f"{out}-plain"],
        "diff": [run, f"{out}-sum"],
        "merge": [run, f"{out}-merged"],
    }
    assert {f"adapter {verb}" for verb in (*calls, "extract")} == {verb for verb in OUTPUTS if " " in verb}
    for verb, words in calls.items():
        shown = CliRunner().invoke(app, ["adapter", verb, *words, "--json"])
        assert shown.exit_code == 0, (verb, shown.output)
        record = json.loads(shown.stdout)
        validate(record, schema_of(f"adapter {verb}"))
        if verb == "diff":  # half of it twice
            assert record["relative_difference"] < 1e-6
    for verb, words, expected in (
        ("inspect", [run], "effective rank"),
        ("resize", [run, f"{out}-tiny", "--rank", "1"], "discarded:"),
        ("diff", [run, f"{out}-tiny"], "cosine"),
        ("extract", [f"{out}-merged", _base(finished_run), f"{out}-back", "--rank", "4"], "rank 4"),
    ):
        shown = CliRunner().invoke(app, ["adapter", verb, *words])
        assert shown.exit_code == 0, (verb, shown.output)
        assert expected in shown.stdout
    different = CliRunner().invoke(app, ["adapter", "certify", run, f"{out}-tiny"])
    assert different.exit_code == 1
    assert "different" in different.stdout


def test_wrong_words_are_refused_with_their_fix() -> None:
    for words, fix in (
        (["x", "y", "z", "--weights", "a"], "--weights 0.7,0.3"),
        (["x"], "combine ADAPTER ADAPTER OUT"),
    ):
        shown = CliRunner().invoke(app, ["adapter", "combine", *words])
        assert shown.exit_code == 2
        assert fix in shown.stderr


def test_every_verb_has_help() -> None:
    assert [command.callback.__name__ for command in adapter.app.registered_commands if command.callback] == [
        *("inspect", "combine", "resize", "extract", "convert", "merge", "certify", "diff")
    ]
    assert records.AdapterOutput.__doc__


def _base(run: RunDir) -> str:
    settings: dict[str, str] = json.loads((run.adapter / "adapter_config.json").read_text())
    return settings["base_model_name_or_path"]
