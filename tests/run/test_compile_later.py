"""Functions of a library that are compiled at their first call instead of at its import."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from loratune.run.compile_later import DECORATED, CompileAtFirstCall


def test_what_a_module_decorates_is_compiled_at_its_first_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def compile_now(function: Any, **options: Any) -> Any:
        asked.append((function.__name__, options))
        return lambda *arguments: -function(*arguments)

    (tmp_path / "decorates.py").write_text(
        "import torch\n\ndef add(a, b):\n    return a + b\n\nadd = torch.compile(add, dynamic=False)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch, "compile", compile_now)
    monkeypatch.setattr(sys, "meta_path", [CompileAtFirstCall("decorates"), *sys.meta_path])
    module = importlib.import_module("decorates")
    monkeypatch.delitem(sys.modules, "decorates")
    assert asked == []
    assert torch.compile is compile_now
    assert (module.add(1, 2), module.add(3, 4)) == (-3, -7)
    assert asked == [("add", {"dynamic": False})], "once"
    assert module.add.__name__ == "add"


def test_other_modules_are_found_as_ever() -> None:
    assert CompileAtFirstCall(DECORATED).find_spec("json", None) is None
    assert any(isinstance(finder, CompileAtFirstCall) for finder in sys.meta_path) or DECORATED in sys.modules


@pytest.mark.slow
def test_peft_and_bitsandbytes_come_without_the_compiler_of_torch() -> None:
    code = (
        "import sys, loratune, peft, bitsandbytes.backends.default.ops as ops, torch\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules\n"
        "assert torch.compile.__module__ == 'torch'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
