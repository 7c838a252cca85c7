"""Commands that install optional packages."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from loratune.run.extras import pip_install, requirements_of

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("extra", [name for name in EXTRAS if name != "dev"])
def test_an_extra_is_installed_by_the_requirements_of_pyproject(extra: str) -> None:
    command, *rest = shlex.split(pip_install(extra))
    assert (command, rest[0]) == ("pip", "install")
    assert [Requirement(text) for text in rest[1:]] == [Requirement(text) for text in EXTRAS[extra]]


def test_an_unknown_extra_is_a_bug() -> None:
    with pytest.raises(KeyError):
        requirements_of("nothing")


def test_no_command_names_a_package_of_ours_that_is_not_on_the_index() -> None:
    files = [path for folder in ("src", "docs", "recipes", "examples") for path in (ROOT / folder).rglob("*.*")]
    texts = {path: path.read_text(encoding="utf-8") for path in files if path.suffix in (".py", ".md", ".yaml")}
    assert len(texts) > 100
    wrong = [
        f"{path.relative_to(ROOT)}: {line}"
        for path, text in texts.items()
        for line in text.splitlines()
        if "loratune[" in line and "EXTRA" not in line
    ]
    assert not wrong
