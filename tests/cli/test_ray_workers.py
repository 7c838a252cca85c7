"""What can be checked of a sweep's Ray workers without a cluster. With one: tests/invariants/test_ray_sweep.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[train]'")

from loratune.cli import ray_workers as module
from loratune.cli.ray import RayOptions
from loratune.cli.ray_cluster import Mailbox
from loratune.cli.terminal import TerminalProgress
from loratune.recipe.recipe import Recipe
from loratune.run.errors import MachineError


def test_lines_name_their_trial_once_and_warnings_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    mailbox = Mailbox()
    actor: Any = SimpleNamespace(write=SimpleNamespace(remote=mailbox.write))
    monkeypatch.setattr(module.ray, "get", lambda value: value)
    progress = module._TrialProgress(actor, 3)
    progress.line("trial 3, r=8: to step 4")
    progress.line("step 2 of 4")
    progress.warn("one\ntwo")
    with progress.task("training", 4):
        pass
    sent = mailbox.drain().splitlines()
    assert sent == ["trial 3, r=8: to step 4", "trial 3: step 2 of 4", "! trial 3: one", "! two"]


def test_a_machine_without_a_gpu_does_not_plan_for_workers_that_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = list[bool]()
    monkeypatch.setattr(module, "connect", lambda *_: None)
    monkeypatch.setattr(module, "uses_gpus", lambda _: True)
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module.ray, "cluster_resources", lambda: {"GPU": 2})
    monkeypatch.setattr(module.ray, "shutdown", lambda: ended.append(True))
    with (
        pytest.raises(MachineError, match="this machine, which plans the trials, has none"),
        module.ray_workers(Recipe(), RayOptions(workers=2), TerminalProgress()),
    ):
        pytest.fail("nothing may start")
    assert ended == [True]


def test_more_workers_than_gpus_are_refused_on_a_cluster_that_no_machine_will_join(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module.ray, "cluster_resources", lambda: {"GPU": 2.0})
    options = RayOptions(workers=3)
    with pytest.raises(MachineError, match="--workers 3 need a GPU each, and this machine has 2"):
        module.check_placeable(options, gpus=True, is_own=True)
    monkeypatch.setattr(module.ray, "cluster_resources", dict)
    with pytest.raises(MachineError, match=r"this machine has 0\n  fix: train\.device=cpu or auto"):
        module.check_placeable(options, gpus=True, is_own=True)
    monkeypatch.setattr(module.ray, "cluster_resources", lambda: {"GPU": 2.0})
    module.check_placeable(options, gpus=True, is_own=False)
    module.check_placeable(options, gpus=False, is_own=True)
    module.check_placeable(RayOptions(workers=2), gpus=True, is_own=True)


@pytest.mark.parametrize(
    ("cores", "workers", "expected"),
    [([8], 2, 4), ([8, 8, 8, 8], 2, 8), ([8, 8], 3, 4), ([2], 9, 1), ([64, 4], 3, 21), ([], 2, 1)],
)
def test_each_worker_has_the_most_cores_that_some_machine_can_give(
    cores: list[int], workers: int, expected: int
) -> None:
    assert module.cores_per_worker(cores, workers) == expected
