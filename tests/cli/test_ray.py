"""What can be checked of the Ray launcher without a cluster. With one: tests/invariants/test_ray.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratune.cli import ray
from loratune.cli.ray_cluster import Mailbox
from loratune.run.errors import RecipeError


def test_storage_is_a_folder_next_to_the_run_unless_given(tmp_path: Path) -> None:
    assert ray._storage(None, tmp_path / "run") == str(tmp_path / "ray")
    assert ray._storage(str(tmp_path / "own"), tmp_path / "run") == str(tmp_path / "own")
    url = (tmp_path / "records").as_uri()
    assert ray._storage(url, tmp_path / "run") == url


def test_a_storage_that_ray_cannot_write_to_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Ray cannot write to --storage nosuch://bucket"):
        ray._storage("nosuch://bucket", tmp_path / "run")


def test_the_first_error_of_the_workers_is_kept_and_output_is_drained() -> None:
    mailbox = Mailbox()
    mailbox.write("one ")
    mailbox.write("two")
    assert (mailbox.drain(), mailbox.drain()) == ("one two", "")
    first, second = RecipeError("first"), RecipeError("second")
    mailbox.fail(first)
    mailbox.fail(second)
    assert mailbox.failure() is first
