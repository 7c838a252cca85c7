"""The documentation works: commands and programs run on a tiny run, links and paths exist, options are those of the
verbs.

Commands that are not run are listed below with the reason.
"""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trl
import typer

from loratune import __main__ as cli
from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir
from loratune.workflows.guidance import init
from loratune.workflows.tiny_model import conversation
from loratune.workflows.train import train
from tests.classifiers import class_recipe, intent, make_base
from tests.conftest import some, write_jsonl

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = ("use-your-model.md", "report.md")
GUIDES = (
    *("first-adapter.md", "tool-calling.md", "thinking.md", "bigger-than-memory.md", "worse.md", "how-many-rows.md"),
    *("hardware.md", "containers.md", "quickstart.md", "before-you-train.md", "install.md", "coming-from.md"),
    *("classification.md", "preferences.md", "tuning.md", "when-it-stops.md", "scaling.md", "../README.md"),
)
"""Pages whose commands take a minute; they are run by a slow test."""
REASONED = ("processes.md", "performance.md", "studio.md")
"""Pages of which nothing can be run here."""
NOT_RUN = {
    "pip install": "installing is the reader's",
    "hf auth login": "asks for a token",
    "llama-cli": "a program of llama.cpp; tests/exporting asks llama.cpp by its Python package",
    "mlx_lm.chat": "runs until it is stopped: tests/exporting/test_mlx.py asks MLX where it is installed",
    "ollama": "a program that is not installed here; tests/exporting reads the Modelfile",
    "sh RUN/exports/vllm/serve.sh": "starts vLLM, which is not installed here",
    "loratune serve": "runs until Ctrl-C: tests/workflows/test_serve.py and tests/workflows/serving",
    "curl": "asks a running server: tests/workflows/serving",
    "LORATUNE_API_KEY=… loratune serve": "needs vLLM: tests/workflows/test_serve.py has its command line",
    "loratune studio": "runs until Ctrl-C: tests/cli/studio",
    "loratune push RUN OWNER/NAME": "needs a Hub: tests/workflows/test_push.py",
    "make": "takes minutes, or installs; README shows what `make demo` printed",
    "loratune resume": "needs an interrupted run: tests/workflows/test_resume.py",
    "loratune extend": "needs a run with checkpoints: tests/workflows/test_extend.py",
    "loratune tune": "takes as long as its budget: tests/workflows/search/test_tune.py",
    "loratune sweep recipe.yaml train.learning_rate=1e": "instead of the sweep before it: tests/workflows/search",
    "loratune sample": "needs a model that answers right: tests/workflows/test_sample.py",
    'loratune evaluate RUN --gate "accuracy': "needs a good classifier: tests/workflows/tasks/test_classification.py",
    "loratune train recipes/classify.yaml model.name=": "needs the Hub",
    "loratune bench": "times both engines: tests/workflows/test_bench.py",
    "loratune train recipes/quickstart.yaml --processes": "starts processes: tests/invariants/test_processes.py",
    "loratune train RECIPE --engine ray": "starts Ray: tests/invariants/test_ray.py",
    "torchrun": "starts processes: tests/invariants/test_processes.py",
    "accelerate": "as torchrun",
    "export MASTER_ADDR": "asks Slurm: tests/test_jobs.py reads the job scripts",
    "srun": "a program of Slurm",
    "python benchmarks": "takes minutes; docs/results has what it printed",
    "benchmarks/gpu/run": "takes minutes: tests/test_gpu_benchmark.py",
    ".venv/bin/python": "runs these tests, or kills processes for minutes",
    "docker": "there is no Docker where the tests run: tests/test_containers.py",
    "loratune export RUN --to gguf --outtype q4_k_m": "needs llama-cpp-python: tests/workflows/test_export_types.py",
    "loratune export RUN --to gguf --llama-cpp": "needs llama.cpp: tests/workflows/test_export_converted.py",
    "loratune certify RUN http": "needs a server: tests/workflows/test_certify_endpoint.py",
    "loratune export RUN --to ollama": "needs a base that is a GGUF file: tests/exporting/test_gguf.py",
}
"""Commands, or their beginning, that are not run → why."""
SLOW = "loratune export"
"""Commands that take seconds each; tests/exporting runs the same exports."""
PYTHON_NOT_RUN = {"openai": "needs a server: tests/workflows/test_serve.py"}
RUN_WITH = {"--dry-run", "--merged", "--harness"}
"""Options with which a command above can be run after all."""

REPLACED = {
    "RUN": "__models/quickstart",
    "RECIPE": "my.yaml",
    "FOLDER": "OUT",
    "TARGET": "OUT",
    "OTHER": "__models/balanced",
    "A": "__models/a/adapter",
    "B": "__models/b/adapter",
}
"""What the pages leave open → what it is here."""
MINE: dict[str, Callable[[int], dict[str, Any]]] = {
    "classification.md": intent,
    "preferences.md": lambda i: {"prompt": f"Name {i}", "chosen": f"It is {i}.", "rejected": f"No idea, {i} times."},
}
"""Page → the rows of its mine.jsonl."""
OTHER_TOOLS = {
    "axolotl.yaml": "base_model: {model}\nadapter: lora\ndatasets: [{{path: chats.jsonl}}]\nlora_r: 8\n",
    "sft.yaml": "model_name_or_path: {model}\nstage: sft\nfinetuning_type: lora\ndataset: mine\nlora_rank: 8\n",
    "arguments.json": '{{"dataset_name": "chats.jsonl", "learning_rate": 2e-4, "r": 8, "use_dora": true}}',
}
"""Files of other tools, on a model."""

Run = Callable[[str], None]


def commands(page: str) -> list[str]:
    """Return the commands of a page: indented lines, without comments."""
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
    """Run a command of a page in a folder that has what the pages mention."""
    models = tmp_path / "__models"
    for name in ("quickstart", "balanced", "a", "b"):
        shutil.copytree(finished_run.root, models / name, ignore=shutil.ignore_patterns("exports"))
    (tmp_path / "own.py").write_text("def longer(answer, reference):\n    return len(answer) > len(reference)\n")
    (tmp_path / "colors.jsonl").write_text(
        "".join(json.dumps({"question": f"Describe thing {i}", "answer": i % 2}) + "\n" for i in range(4))
    )
    (tmp_path / "colors.yaml").write_text(
        "task: colors\ndataset_path: json\ndataset_kwargs: {data_files: {test: colors.jsonl}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: [red, green]\n'
        'doc_to_target: "{{answer}}"\nmetric_list: [{metric: acc}]\n'
    )
    monkeypatch.chdir(tmp_path)
    copy_data(tmp_path)

    def run(command: str) -> None:
        words = shlex.split(command)
        monkeypatch.setattr(sys, "argv", [REPLACED.get(word, word) for word in words if not word.startswith("[")])
        monkeypatch.setattr(sys, "stdin", io.StringIO("Describe thing 7\n/both\nShorter.\n"))
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, f"{command}\n{capsys.readouterr().err}"

    return run


def copy_data(folder: Path) -> None:
    """Write the rows that the guides have."""
    called = {"function": {"name": "get_weather", "arguments": {"city": "Oslo"}}, "type": "function"}
    tool = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    rows: dict[str, Callable[[int], dict[str, Any]]] = {
        "rows": conversation,
        "chats": conversation,
        "thoughts": lambda i: {
            "messages": [
                {"role": "user", "content": f"What is {i} plus 1?"},
                {"role": "assistant", "reasoning_content": f"{i} and 1 make {i + 1}.", "content": f"{i + 1}"},
            ]
        },
        "tools": lambda i: {
            "messages": [
                {"role": "user", "content": f"How warm is it in Oslo at {i}?"},
                {"role": "assistant", "content": "", "tool_calls": [called]},
                {"role": "tool", "name": "get_weather", "content": f"{i} C"},
                {"role": "assistant", "content": f"It is {i} degrees in Oslo."},
            ],
            "tools": [{"type": "function", "function": tool}],
        },
    }
    for name, row in rows.items():
        write_jsonl(folder / f"{name}.jsonl", [row(i) for i in range(40)])
    lines = ["question;answer", *(f"What comes after {i}?;{i + 1} is what comes next" for i in range(40))]
    (folder / "faq.csv").write_text("\n".join(lines), encoding="utf-8")
    lines[0] = "Left;Right"
    (folder / "table.csv").write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture
def guided(
    run_command: Run,
    tiny_model: Path,
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """As `run_command`, with a recipe, and a model whose template knows tools and thoughts."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    (model / "chat_template.jinja").write_text(template.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(init, "choose_model", lambda: (str(model), "tiny, for a test"))
    monkeypatch.setattr("webbrowser.open", lambda address: True)
    recipe = tiny_recipe(data__train=str(tmp_path / "rows.jsonl"), data__max_length="auto")
    (tmp_path / "recipes").mkdir()
    for path in ("my.yaml", "recipe.yaml", "recipes/quickstart.yaml"):
        (tmp_path / path).write_text(recipe.to_yaml(), encoding="utf-8")
    classes = class_recipe(make_base(tmp_path / "bert", "bert"), tmp_path / "classes")
    (tmp_path / "recipes" / "classify.yaml").write_text(classes.to_yaml(), encoding="utf-8")
    for name, text in OTHER_TOOLS.items():
        (tmp_path / name).write_text(text.format(model=model), encoding="utf-8")
    return run_command


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDES)
def test_the_commands_of_a_guide_work_in_their_order(page: str, guided: Run) -> None:
    if page in MINE:
        write_jsonl(Path("mine.jsonl"), [MINE[page](i) for i in range(40)])
    ran = [guided(command) for command in commands(page) if not reason_not_to_run(command)]
    assert ran


def test_the_home_page_shows_commands_of_the_first_guide() -> None:
    assert set(commands("index.md")) <= set(commands("first-adapter.md"))
    assert commands("index.md")


@pytest.mark.filterwarnings("ignore")  # of the harness and its packages
@pytest.mark.parametrize("page", some(PAGES, "report.md"))
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
    assert ran == 7


def test_every_command_is_run_or_has_a_reason() -> None:
    pages = (*PAGES, *GUIDES, *REASONED)
    for page in pages:
        for command in commands(page):
            assert command.startswith("loratune") or reason_not_to_run(command), f"{page}: {command}"
    assert all(reason_not_to_run(command) for page in REASONED for command in commands(page))
    shown = "\n".join(command for page in pages for command in commands(page))
    assert all(start in shown or start == "pip install" for start in NOT_RUN), "a reason for a command that is gone"


TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md"), *(ROOT / "examples").glob("*/README.md")]


def test_the_programs_of_the_readme_work(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder where recipes/quickstart.yaml is on the tiny model, after `make demo`, which stands before them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    recipe = tiny_recipe(data__max_length="auto", train__output_dir="__models/quickstart")
    (tmp_path / "recipes" / "quickstart.yaml").write_text(recipe.to_yaml())
    train("recipes/quickstart.yaml")
    programs = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(programs) == 2
    for program in programs:
        exec(program, {})  # noqa: S102 - our own page
    together: dict[str, object] = {}
    for program in re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text("utf-8"), flags=re.DOTALL):
        exec(program, together)  # noqa: S102 - our own page
    assert len(together["rows"]) == 40  # type: ignore[arg-type]


def test_the_readme_has_a_caption_for_every_folder_of_the_package() -> None:
    package = ROOT / "src" / "loratune"
    folders = {f.name for f in package.iterdir() if (f / "__init__.py").is_file()}
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("\nsrc/loratune/\n")[2].partition("\n```")[0]
    captions = dict(re.findall(r"^ {2}(\w+)/ +(\S.*)$", tree, flags=re.MULTILINE))
    assert set(captions) == folders


def test_every_link_leads_to_a_file() -> None:
    for page in TEXTS:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_file_of_the_repository_that_a_command_names_exists() -> None:
    named = {
        (page.name, path)
        for page in [*TEXTS, *(DOCS / "results").glob("*.md")]
        for line in re.findall(r"^ {4}\S.*", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for path in re.findall(r"(?<![\w./])(?:tests|benchmarks|docs|examples|recipes)/[\w./-]+", line)
    }
    assert len(named) > 30
    assert not {(page, path) for page, path in named if not (ROOT / path).exists()}


def test_every_path_on_the_map_exists() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"`?((?:[\w]+/)+[\w]*(?:\.\w+)?)`", text)) | set(re.findall(r"(\w+/[\w/]+\.py)", text))
    assert len(paths) > 50
    for path in paths:
        assert any((base / path).exists() for base in (ROOT, ROOT / "src" / "loratune", ROOT / "src")), path


def test_every_shown_option_is_one_of_its_verb() -> None:
    verbs = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    shown = 0
    for page in TEXTS:
        for line in re.findall(r"loratune ([a-z]+(?: [^\n`#]*)?)", page.read_text(encoding="utf-8")):
            words = line.split()
            if words[0] not in verbs:
                continue
            verb = verbs[words[0]]
            verb = verb.commands[words[1]] if hasattr(verb, "commands") and len(words) > 1 else verb
            options = {option for parameter in verb.params for option in parameter.opts}
            options |= {option for parameter in verb.params for option in parameter.secondary_opts}
            for word in words:
                if re.fullmatch(r"--[a-z][a-z-]*", word):
                    assert word in options, f"{page.name}: loratune {line}"
                    shown += 1
    assert shown > 20
