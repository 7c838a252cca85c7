"""Disks that are full, read-only or have a quota: it is reported, nothing is lost, and the run resumes bit for bit."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir
from loratune.run.errors import MachineError
from loratune.run.progress import NoProgress
from loratune.training.checkpoint import latest_checkpoint
from loratune.workflows.resume import resume
from loratune.workflows.train import train
from tests.conftest import recipe_maker
from tests.invariants.test_same_mathematics import assert_same

MakeRecipe = Callable[..., Recipe]
SETTINGS = {
    "lora__dropout": 0.1,
    "train__epochs": 1,
    "train__save_every": 1,
    "evaluate__metric": "exact_match",
    "evaluate__max_new_tokens": 2,
}


class Moment(NoProgress):
    """Acts when a task begins, or at its n-th advance; training first advances by the steps that are already done."""

    def __init__(self, name: str, act: Callable[[], object], *, at: int = 0) -> None:
        self._name, self._act, self._at = name, act, at
        self._advanced: dict[str, int] = {}
        self.lines: list[str] = []

    @contextmanager
    def task(self, name: str, total: int | None, unit: str = "") -> Iterator[NoProgress]:
        outer = self

        class Task(NoProgress):
            done = 0

            def advance(self, amount: int = 1, note: str = "") -> None:
                self.done += 1
                if name == outer._name and self.done == outer._at:
                    outer._act()

        if name == self._name and not self._at:
            self._act()
        yield Task()

    def line(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    """The longest file that this process may write, in bytes; lifted afterwards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size if size >= 0 else soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("work", "at", "size", "file", "step"),
    [
        # between the adapter's file and the optimizer's
        pytest.param("training", 3, 6_000, "checkpoints/2", 1, marks=pytest.mark.slow),
        pytest.param("held-out loss", 1, 100, "metrics.jsonl", 2, marks=pytest.mark.slow),
        # the tokenizer has more than the adapter
        pytest.param("training", 4, 150_000, "adapter", 3, marks=pytest.mark.slow),
        ("tuned answers", 0, 1_000, "evaluation.json", 3),
    ],
)
def test_a_file_that_cannot_be_written_is_told_and_the_run_goes_on_to_the_same_bits(
    tiny_recipe: MakeRecipe,
    whole: RunDir,
    tmp_path: Path,
    limit: Callable[[int], None],
    work: str,
    at: int,
    size: int,
    file: str,
    step: int,
) -> None:
    recipe = tiny_recipe(**SETTINGS)
    root = tmp_path / "run"
    with pytest.raises(MachineError, match="cannot write") as error:
        train(recipe, progress=Moment(work, lambda: limit(size), at=at))
    limit(-1)
    assert error.value.exit_code == 4
    assert str(root / file) in str(error.value.file)
    assert "disk space" in error.value.fix
    assert not list((root / "checkpoints").glob(".*.tmp"))
    assert latest_checkpoint(root / "checkpoints")[0] == root / "checkpoints" / str(step)
    run = resume(root).run
    assert_same(whole, run, tolerance=0)
    assert run.evaluation.read_bytes() == whole.evaluation.read_bytes()
    assert not list(root.rglob(".*.tmp"))


@pytest.fixture(scope="module")
def whole(tiny_model: Path, chat_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The same run on a disk that has room."""
    return train(recipe_maker(tiny_model, chat_files, tmp_path_factory.mktemp("whole"))(**SETTINGS)).run


def test_a_report_and_a_cache_that_cannot_be_written_are_told_and_stop_nothing(
    tiny_recipe: MakeRecipe, tmp_path: Path, limit: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    limit(2_000)
    listener = Moment("tuned answers", lambda: limit(50_000))
    run = train(tiny_recipe(**SETTINGS), progress=listener, on_plan=lambda _: limit(-1)).run
    limit(-1)
    assert any("the prepared examples could not be cached" in line for line in listener.lines)
    assert any("no report was written: MachineError" in line for line in listener.lines)
    assert run.evaluation.is_file()
    assert not run.is_complete
    resume(run.root)
    assert run.is_complete
    assert run.report.is_file()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], check=False).returncode
    ):
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_and_a_read_only_one(tiny_recipe: MakeRecipe, whole: RunDir, small_disk: Path) -> None:
    root = small_disk / "run"
    ballast = small_disk / "ballast"

    def fill() -> None:
        descriptor = os.open(ballast, os.O_CREAT | os.O_WRONLY)
        with suppress(OSError):
            while True:
                os.write(descriptor, b"x" * 2**12)
        os.close(descriptor)

    recipe = tiny_recipe(**SETTINGS, train__output_dir=str(root))
    with pytest.raises(MachineError, match="No space left on device"):
        train(recipe, progress=Moment("training", fill, at=2))
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(MachineError, match="Read-only file system"):
        resume(root)
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert_same(whole, resume(root).run, tolerance=0)
