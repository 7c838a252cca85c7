"""docs/environment.md names every environment variable of the source, and every exit code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from loratune.run import errors

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
VARIABLE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+|CXX|RANK|NETRC")
NO_VARIABLES = {"NO_PROGRESS", "MEGATRON_LM", "PARALLELISM_CONFIG"}
"""A name of Python's, and two ends of `ACCELERATE_USE_…`."""
OF_LIBRARIES = {"HF_TOKEN", "HF_HOME", "HF_ENDPOINT", "HTTPS_PROXY"}
"""Read by huggingface_hub and its HTTP client."""


def variables(source: str) -> set[str]:
    """Return the texts that look like variables in a file that has to do with the environment."""
    if "environ" not in source:
        return set()
    texts = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return {text for text in texts if isinstance(text, str) and VARIABLE.fullmatch(text)} - NO_VARIABLES


def test_the_page_has_a_row_for_every_variable_of_the_source_and_no_others() -> None:
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    used = set().union(*map(variables, sources))
    assert len(used) > 30
    rows = {name for line in PAGE.splitlines() if line.startswith("|") for name in re.findall(r"`(\w+)`", line)}
    assert used <= rows
    assert {name for name in rows if VARIABLE.fullmatch(name)} == used | OF_LIBRARIES


def test_a_variable_that_the_page_lacks_is_found() -> None:
    assert variables('import os\nos.environ.get("LORATUNE_NEW")') == {"LORATUNE_NEW"}


def test_the_page_has_every_exit_code() -> None:
    codes = {
        kind.__name__: kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.LoratuneError) and kind is not errors.LoratuneError
    }
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", PAGE, flags=re.MULTILINE)
    assert {name: int(code) for code, name in rows} == codes
