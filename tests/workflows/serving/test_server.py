"""`loratune serve RUN ADAPTER` under the load of `benchmarks/serve_load.py`, small."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from loratune.__main__ import app
from loratune.run.directory import RunDir
from loratune.run.errors import MachineError, RecipeError
from loratune.workflows.serve import choose_server
from loratune.workflows.serving.server import serve_adapters

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "serve_load.py"


@pytest.fixture
def serve_load(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve_load", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "serve_load", module)  # where its dataclasses look
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_mixed_up(
    serve_load: ModuleType, finished_run: RunDir, other_adapter: Path
) -> None:
    tally = serve_load.run([finished_run.root, other_adapter], clients=8, requests=120, tokens=12, changes=3, room=8)
    assert tally.problems == []
    assert tally.counts["load"] == {"same answer": 120}
    assert tally.counts["killed"]["killed"] == 6
    assert tally.counts["changes"]["load 200"] == tally.counts["changes"]["unload 200"] == 3
    assert tally.counts["full"]["status 503"] > 0


def test_the_load_test_sees_another_answer(serve_load: ModuleType) -> None:
    question = serve_load.Question("tiny", "Hi", sampled=False)
    tally = serve_load.Tally(alone={question: "right|stop"})
    tally.check("load", question, 200, "right|stop")
    assert tally.problems == []
    tally.check("load", question, 200, "wrong|stop")
    tally.check("load", question, 500, "right|stop")
    assert len(tally.problems) == 2


def test_several_need_the_server_that_can_do_it(finished_run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_server("loratune", several=True) == "loratune"
    for other in ("vllm", "transformers"):
        with pytest.raises(RecipeError, match=f"--server {other} is started with one run"):
            choose_server(other, several=True)
    result = CliRunner().invoke(app, ["serve", str(finished_run.root), "x", "--server", "vllm"])
    assert result.exit_code == 2
    monkeypatch.setattr("loratune.workflows.serve.SERVE_PACKAGES", ("no_such_package",))
    with pytest.raises(MachineError, match="the server needs no_such_package"):
        choose_server("loratune")


def test_others_need_a_key_and_names_are_checked_before_anything_loads(finished_run: RunDir) -> None:
    with pytest.raises(RecipeError, match="there is no API key"):
        serve_adapters([str(finished_run.root)], host="0.0.0.0")  # noqa: S104 - what is refused
    with pytest.raises(RecipeError, match="two models are named tiny"):
        serve_adapters([str(finished_run.root), str(finished_run.root)])
