"""From a table of questions and answers to a report with ten answers, by the commands that the program prints."""

from __future__ import annotations

import csv
import io
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loratune import __main__ as cli
from loratune.workflows.guidance import init

Run = Callable[[str], tuple[str, str]]


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a line as it would be typed; stdout and stderr."""

    def run(line: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        assert not stop.value.code, f"{line}\n{captured.err}"
        return captured.out, captured.err

    return run


def commands(text: str) -> dict[str, str]:
    """Return the command lines that a text shows, by their verb."""
    lines = [line.removeprefix("$ ").partition("  # ")[0].strip() for line in text.splitlines() if line[:2] == "$ "]
    return {shlex.split(line)[1]: line for line in lines}


def test_from_a_csv_to_ten_answers(
    shell: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(init, "choose_model", lambda: (str(tiny_model), "tiny, for a test"))
    monkeypatch.setattr("webbrowser.open", lambda address: address.endswith("report.html"))
    with Path("my faq.csv").open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream, delimiter=";")  # as spreadsheets write it where the comma is in numbers
        table.writerow(["Frage", "Antwort"])
        table.writerows(
            [f"Was ist {n}?", f"{n} ist die Zahl nach {n - 1}; danach kommt gleich {n + 1}."] for n in range(60)
        )

    start, _ = shell("loratune --help")
    (first,) = re.findall(r"`(loratune init FILE[^`]*)`", " ".join(start.split()))
    _, told = shell(first.replace("FILE.csv", "'my faq.csv'"))
    recipe = Path("my faq.yaml").read_text(encoding="utf-8")
    assert "Frage" in recipe
    assert "__models/my faq" in recipe

    planned, told = shell(commands(told)["plan"])
    assert planned.index("⟦") < planned.index("base model") < planned.index("memory"), "rows first, costs next"
    assert "10 held out" in " ".join(planned.split())

    result, _ = shell(commands(told)["train"])
    assert re.search(r"^(better|not better|worse): held-out loss .* → ", result, re.MULTILINE), result
    after = commands(result)
    assert list(after) == ["chat", "report", "merge"]

    monkeypatch.setattr(sys, "stdin", io.StringIO("Was ist 3?\nquit\n"))
    answered, _ = shell(after["chat"])
    assert "chatting with" in answered
    shell(after["report"])
    page = (Path("__models") / "my faq" / "report.html").read_text(encoding="utf-8")
    assert page.index(">Verdict<") < page.index(">Samples<") < page.index("Base vs. fine-tuned</h2>")
    assert page.count('class="sample"') == 10
