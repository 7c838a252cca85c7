"""Arguments that several verbs share."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from loratune.__main__ import app
from loratune.cli.options import as_seconds, one_out
from loratune.run.directory import RunDir
from loratune.run.errors import RecipeError


def test_out_is_given_by_position_or_by_name_and_not_twice() -> None:
    one, other = Path("one"), Path("other")
    assert one_out(one, None) == one_out(None, one) == one
    assert one_out(None, None) is None
    with pytest.raises(RecipeError, match="OUT is one, and --out is other"):
        one_out(one, other)


def test_a_report_is_written_where_its_second_argument_says(finished_run: RunDir, tmp_path: Path) -> None:
    for number, words in enumerate(([], ["--out"])):
        page = tmp_path / f"{number}.html"
        done = CliRunner().invoke(app, ["report", str(finished_run.root), *words, str(page)])
        assert done.exit_code == 0, done.output
        assert page.is_file()
    both = ["report", str(finished_run.root), "a.html", "--out", "b.html"]
    assert CliRunner().invoke(app, both).exit_code == 2


@pytest.mark.parametrize(
    "verb", [["export"], ["merge"], ["report"], ["reproduce"], ["sample"], ["adapter", "convert"], ["adapter", "merge"]]
)
def test_out_stands_behind_what_is_read(verb: list[str]) -> None:
    output = CliRunner().invoke(app, [*verb, "--help"], env={"COLUMNS": "200"}).output
    line = next(line for line in output.splitlines() if "Usage:" in line)
    words = [word.strip("[]") for word in line.split() if word.strip("[]").isupper()]
    assert words[-1] == "OUT", line


def test_times_have_a_unit() -> None:
    assert [as_seconds(text) for text in ("90s", "1.5m", "2 h", "3min")] == [90, 90, 7200, 180]
    for text in ("90", "0s", "soon"):
        with pytest.raises(RecipeError, match="not a time"):
            as_seconds(text)


@pytest.mark.parametrize("option", ["--at-once", "--queue"])
def test_options_of_loratunes_own_server_are_refused_with_another(option: str, finished_run: RunDir) -> None:
    done = CliRunner().invoke(app, ["serve", str(finished_run.root), option, "3"])
    assert done.exit_code == 2
    assert f"{option} is an option of loratune's own server" in done.stderr
    assert "--server loratune" in done.stderr
