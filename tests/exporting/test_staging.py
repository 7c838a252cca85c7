"""An export is there in full, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratune.exporting.staging import atomic_folder, check_target
from loratune.run.errors import MachineError, RecipeError


def test_a_folder_appears_when_it_is_finished(tmp_path: Path) -> None:
    target = tmp_path / "exports" / "out"
    with atomic_folder(target) as folder:
        (folder / "a.txt").write_text("a")
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert (target / "a.txt").read_text() == "a"


def write_half(folder: Path, error: Exception) -> None:
    (folder / "a.txt").write_text("a")
    raise error


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic_folder(tmp_path / "out") as folder:
        write_half(folder, KeyError())
    with pytest.raises(MachineError, match="No space left"), atomic_folder(tmp_path / "out") as folder:
        write_half(folder, OSError(28, "No space left on device"))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_or_folder_and_a_full_disk_are_refused(tmp_path: Path) -> None:
    check_target(tmp_path / "new" / "out", needed_bytes=1)
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    for taken in (tmp_path / "file", tmp_path):
        with pytest.raises(RecipeError, match="already exists"):
            check_target(taken)
    with pytest.raises(MachineError, match="MiB are free"):
        check_target(tmp_path / "out", needed_bytes=2**60)
