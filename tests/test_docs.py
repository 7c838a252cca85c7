"""The commands of the guides work: each is run on a tiny run, or stands below with the reason why it is not."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loratune.cli import main as cli
from loratune.run.directory import RunDir

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("use-your-model.md", "report.md")
NOT_RUN = {
    "pip install": "installing is the reader's",
    "hf auth login": "asks for a token",
    "llama-cli": "a program of llama.cpp; tests/exporting asks llama.cpp by its Python package",
    "ollama": "a program that is not installed here; tests/exporting reads the Modelfile",
    "sh RUN/exports/vllm/serve.sh": "starts vLLM, which is not installed here",
    "loratune serve": "runs until Ctrl-C: tests/workflows/test_serve.py",
    "LORATUNE_API_KEY=… loratune serve": "needs vLLM: tests/workflows/test_serve.py has its command line",
    "loratune push RUN OWNER/NAME": "needs a hub: tests/workflows/test_push.py",
    "loratune export RUN --to ollama": "needs a base that is a GGUF file: tests/exporting/test_gguf.py",
}
"""Whole commands, or what they begin with."""
SLOW = "loratune export"
"""Each takes seconds; tests/exporting runs the same exports."""
PYTHON_NOT_RUN = {"openai": "needs a server: tests/workflows/test_serve.py"}
RUN_WITH = {"--dry-run", "--merged", "--harness"}
"""Words that make of a command above one that can be run."""

Run = Callable[[str], None]


def commands(page: str) -> list[str]:
    """The commands of a page: indented lines, without their comments."""
    text = re.sub(r"```.*?```", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return [line.partition("  #")[0].strip() for line in lines]


def programs(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def reason_not_to_run(command: str) -> str:
    words = set(command.split())
    if words & RUN_WITH and command.startswith("loratune"):
        missing = "--harness" in words and importlib.util.find_spec("lm_eval") is None
        return "lm-evaluation-harness is not installed" if missing else ""
    return next((why for start, why in NOT_RUN.items() if command.startswith(start)), "")


@pytest.fixture
def run_command(
    finished_run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Run a command of a page in a folder that has what the pages speak of."""
    models = tmp_path / "__models"
    for name in ("quickstart", "balanced"):
        shutil.copytree(finished_run.root, models / name, ignore=shutil.ignore_patterns("exports"))
    (tmp_path / "own.py").write_text("def longer(answer, reference):\n    return len(answer) > len(reference)\n")
    (tmp_path / "colours.jsonl").write_text(
        "".join(json.dumps({"question": f"Describe thing {i}", "answer": i % 2}) + "\n" for i in range(4))
    )
    (tmp_path / "colours.yaml").write_text(
        "task: colours\ndataset_path: json\ndataset_kwargs: {data_files: {test: colours.jsonl}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: [red, green]\n'
        'doc_to_target: "{{answer}}"\nmetric_list: [{metric: acc}]\n'
    )
    monkeypatch.chdir(tmp_path)

    def run(command: str) -> None:
        words = shlex.split(command)
        replaced = {"RUN": "__models/quickstart", "FOLDER": "OUT"}
        monkeypatch.setattr(sys, "argv", [replaced.get(word, word) for word in words])
        monkeypatch.setattr(sys, "stdin", io.StringIO("Describe thing 7\n/both\nShorter.\n"))
        before = signal.getsignal(signal.SIGPIPE)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        signal.signal(signal.SIGPIPE, before)
        assert not stop.value.code, f"{command}\n{capsys.readouterr().err}"

    return run


@pytest.mark.filterwarnings("ignore")  # of the harness and its packages
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_and_programs_of_a_page_work(page: str, run_command: Run, tmp_path: Path) -> None:
    ran = 0
    for command in commands(page):
        if not reason_not_to_run(command) and not command.startswith(SLOW):
            run_command(command)
            ran += 1
    assert ran >= 3
    for program in programs(page):
        if not any(word in program for word in PYTHON_NOT_RUN):
            exec(program.replace("RUN/", f"{tmp_path}/__models/quickstart/"), {})  # noqa: S102 - our own page


@pytest.mark.slow
def test_the_exports_of_a_page_work(run_command: Run) -> None:
    ran = 0
    for command in commands("use-your-model.md"):
        if command.startswith(SLOW) and not reason_not_to_run(command):
            run_command(command)
            ran += 1
    assert ran == 5


def test_every_command_is_run_or_has_a_reason() -> None:
    for page in PAGES:
        for command in commands(page):
            assert command.startswith("loratune") or reason_not_to_run(command), f"{page}: {command}"
    told = "\n".join(command for page in PAGES for command in commands(page))
    assert all(start in told or start == "pip install" for start in NOT_RUN), "a reason for what is no longer there"
