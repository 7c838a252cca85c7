"""The audit of dependencies fails on a finding, and never says that all is well when it looked up nothing."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    path = Path(__file__).parents[1] / ".ci" / "audit"
    loader = importlib.machinery.SourceFileLoader("audit", str(path))
    spec = importlib.util.spec_from_loader("audit", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def answer(*packages: dict[str, Any]) -> str:
    return json.dumps({"dependencies": list(packages), "fixes": []})


GOOD = {"name": "rich", "version": "15.0.0", "vulns": []}
BAD = {
    "name": "jinja2",
    "version": "3.1.5",
    "vulns": [{"id": "CVE-2025-27516", "fix_versions": ["3.1.6"], "aliases": []}],
}
UNKNOWN = {"name": "torch", "skip_reason": "Dependency not found on PyPI"}


@pytest.mark.parametrize(
    ("stdout", "stderr", "code", "told"),
    [
        (answer(GOOD, UNKNOWN), "", 0, "1 packages, 0 findings; not known there: torch"),
        (answer(GOOD, BAD), "", 1, "jinja2 3.1.5: CVE-2025-27516, fixed in 3.1.6"),
        (answer(UNKNOWN), "", 0, "NOTHING WAS AUDITED: the advisory service knows none of the 1 packages"),
        ("", "requests.exceptions.ConnectionError: pypi.org", 0, "NOTHING WAS AUDITED"),
        ("", "error: unrecognized arguments", 1, "unrecognized arguments"),
    ],
)
def test_the_verdict(
    audit: ModuleType, stdout: str, stderr: str, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit.verdict(stdout, stderr) == code
    assert told in capsys.readouterr().out
