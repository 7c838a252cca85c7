"""Dockerfile, workflow and development container: parsed, with every path, option and command in them.

No image is built, since there is no Docker here. The wheel is built and installed by the slow test.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from loratune import __main__ as cli
from loratune.recipe.recipe import Recipe
from loratune.run.cache_folder import CACHE_VARIABLE
from tests.test_first_hour import commands

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
INSTRUCTIONS = {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "ENV", "USER", "ENTRYPOINT", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile with their arguments, continued lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines]


def copied() -> set[str]:
    """Return the files and folders that the Dockerfile copies."""
    return {word for name, text in instructions() if name == "COPY" for word in text.split()[:-1]}


def test_the_image_gets_everything_that_the_wheel_is_built_from() -> None:
    assert {name for name, _ in instructions()} <= INSTRUCTIONS
    assert instructions()[0][0] == "FROM"
    assert all((ROOT / path).exists() for path in copied())
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    project = PROJECT["project"]
    needed = {
        "pyproject.toml",
        project["readme"],
        *project["license-files"],
        *wheel["packages"],
        *wheel["force-include"],
    }
    assert {path.partition("/")[0] for path in needed} <= copied()
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert ignored[0] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == copied(), "the context has what is copied"


def test_the_image_runs_the_command_on_the_python_that_is_supported() -> None:
    parts = dict(instructions())
    assert json.loads(parts["ENTRYPOINT"]) == ["loratune"]
    assert "loratune" in PROJECT["project"]["scripts"]
    (verb,) = json.loads(parts["CMD"])
    assert verb == "doctor"
    version = re.fullmatch(r"python:(3\.\d+)-slim", parts["FROM"])
    assert version is not None
    assert f"Programming Language :: Python :: {version[1]}" in PROJECT["project"]["classifiers"]
    assert f"{CACHE_VARIABLE}=/cache/" in parts["ENV"]
    commands = [command.split() for name, text in instructions() if name == "RUN" for command in text.split("&&")]
    installs = [words for words in commands if words[:2] == ["pip", "install"]]
    assert len(installs) == 3
    assert all(words[words.index("--constraint") + 1] == "constraints.txt" for words in installs)


def test_the_development_container_makes_a_target_of_the_makefile() -> None:
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    words = shlex.split(container["postCreateCommand"])
    assert words[0] == "make"
    assert f"\n{words[1].replace('.venv', '$(VENV)')}:" in (ROOT / "Makefile").read_text(encoding="utf-8")


WORKFLOW = yaml.safe_load((ROOT / "examples" / "ci" / "github-actions.yml").read_text(encoding="utf-8"))


def workflow_lines() -> list[str]:
    """Return the commands of the workflow's job."""
    (job,) = WORKFLOW["jobs"].values()
    return [line for step in job["steps"] for line in step.get("run", "").splitlines() if line]


def test_the_workflow_installs_plans_trains_gates_and_merges() -> None:
    lines = workflow_lines()
    assert [line.split()[0] for line in lines[:2]] == ["pip", "pip"]
    assert [line.split()[1] for line in lines[2:]] == ["plan", "train", "evaluate", "merge"]
    (job,) = WORKFLOW["jobs"].values()
    *_, upload = job["steps"]
    assert upload["if"] == "always()", "the report of a run that missed its gate is what one wants to see"


@pytest.mark.slow
def test_the_commands_of_the_workflow_work(
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    variables = {**WORKFLOW["env"], "RECIPE": "recipes/mine.yaml"}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    recipe = tiny_recipe(train__output_dir=variables["RUN"], evaluate__samples=2, evaluate__max_new_tokens=4)
    (tmp_path / variables["RECIPE"]).write_text(recipe.to_yaml(), encoding="utf-8")
    for line in workflow_lines()[2:]:
        words = shlex.split(re.sub(r"\$(\w+)", lambda found: variables[found[1]], line))
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, f"{line}\n{capsys.readouterr().err}"
    (job,) = WORKFLOW["jobs"].values()
    for path in job["steps"][-1]["with"]["path"].replace("${{ env.RUN }}", variables["RUN"]).split():
        assert (tmp_path / path).exists(), path


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtualenv with the build backend."""
    folder = tmp_path_factory.mktemp("builder")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin" / "pip", "install", "--quiet", *PROJECT["build-system"]["requires"]], check=True)
    return folder / "bin"


def build(builder: Path, source: Path, out: Path) -> dict[str, bytes]:
    """Build sdist and wheel; their bytes by name."""
    subprocess.run([builder / "hatchling", "build", "--directory", out], cwd=source, check=True, capture_output=True)
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.slow
def test_two_builds_have_the_same_bytes_and_hold_what_is_needed(builder: Path, tmp_path: Path) -> None:
    first = build(builder, ROOT, tmp_path / "first")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for path in filter(None, names):
        (tmp_path / "copy" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / "copy" / path, follow_symlinks=False)
    assert build(builder, tmp_path / "copy", tmp_path / "again") == first, "other times, another folder, no git"
    (sdist,) = (content for name, content in first.items() if name.endswith(".tar.gz"))
    with tarfile.open(fileobj=io.BytesIO(sdist)) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path / "unpacked", filter="data")
    assert {"pyproject.toml", "README.md", "LICENSE", "recipes/chat.yaml", "examples/quickstart/train.jsonl"} <= held
    assert not [name for name in held if fnmatch(name, "__models/*") or fnmatch(name, "site/*")]
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel = next(name for name in first if name.endswith(".whl"))
    assert build(builder, unpacked, tmp_path / "from-sdist")[wheel] == first[wheel]


@pytest.mark.slow
def test_the_installed_wheel_is_the_command(builder: Path, tmp_path: Path, tiny_model: Path) -> None:
    """As the Dockerfile installs it, but for the dependencies, which are those of this environment; and from a table to
    a report with ten answers, by the commands that it prints, on a tiny model."""
    build(builder, ROOT, tmp_path / "dist")
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    subprocess.run([builder / "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    (packages,) = (builder.parent / "lib").glob("python*/site-packages")
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    (packages / "dependencies.pth").write_text(f"{ours}\n", encoding="utf-8")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def loratune(*words: str, also: str = "stdout") -> str:
        done = subprocess.run(
            [builder / "loratune", *words],
            cwd=elsewhere, env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return str(getattr(done, also))

    assert PROJECT["project"]["version"] in loratune("--version")
    assert "qwen3-8b" in loratune("init", "--help")
    loratune("init", "llama-3.1-8b")
    assert "meta-llama/Llama-3.1-8B-Instruct" in (elsewhere / "llama-3.1-8b.yaml").read_text(encoding="utf-8")
    loratune("doctor")

    rows = "".join(f"What is {n}?,{n} is the number after {n - 1}; right after it comes {n + 1}.\n" for n in range(60))
    (elsewhere / "faq.csv").write_text(f"question,answer\n{rows}", encoding="utf-8")
    printed = commands(loratune("init", "faq.csv", also="stderr"))
    recipe = (elsewhere / "faq.yaml").read_text(encoding="utf-8")
    recipe = re.sub(r"^  name: .*$", f"  name: {tiny_model}", recipe, count=1, flags=re.MULTILINE)
    (elsewhere / "faq.yaml").write_text(recipe.replace("epochs: 3", "epochs: 1"), encoding="utf-8")
    assert "⟦" in loratune(*shlex.split(printed["plan"])[1:])
    printed = commands(loratune(*shlex.split(printed["train"])[1:]))
    loratune(*shlex.split(printed["report"])[1:])
    page = (elsewhere / "__models" / "faq" / "report.html").read_text(encoding="utf-8")
    assert page.count('class="sample"') == 10
    loratune(*shlex.split(printed["merge"])[1:])
