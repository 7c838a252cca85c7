"""The named changes of the source still fit it; `benchmarks/named_mutants.py` makes them and runs their tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_each_change_has_its_place_and_its_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # which holds a module that it imports
    spec = importlib.util.spec_from_file_location("named_mutants", ROOT / "benchmarks" / "named_mutants.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert len(module.MUTANTS) >= 30
    for name, (file, text, replacement), tests in module.MUTANTS:
        source = (ROOT / "src" / "loratune" / file).read_text(encoding="utf-8")
        assert source.count(text) == 1, f"{name}: {file} has {text!r} {source.count(text)} times"
        assert replacement != text
        assert all((ROOT / path).is_file() for path in tests if path.endswith(".py")), name
