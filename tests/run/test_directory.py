from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loratune.run.directory import RunDir, read_json, write_json
from loratune.run.errors import MachineError, RecipeError, RunError


def test_a_new_directory_is_made_and_a_used_one_is_not_touched(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", overwrite=False)
    write_json(run.lock, {"a": 1})
    with pytest.raises(RecipeError, match="already contains a run") as error:
        RunDir.create(tmp_path / "run", overwrite=False)
    assert error.value.fix.startswith(f"`loratune resume {run.root}` to continue it, --overwrite")
    run.adapter.mkdir()
    write_json(run.adapter / "adapter_config.json", {})
    with pytest.raises(RecipeError, match="already contains a run") as error:
        RunDir.create(tmp_path / "run", overwrite=False)
    assert error.value.fix.startswith(f"`loratune extend {run.root} train.epochs=N` to train it further, --overwrite")
    assert read_json(run.lock) == {"a": 1}
    RunDir.create(tmp_path / "run", overwrite=True)
    assert not run.lock.exists()


def test_what_a_kill_left_before_a_run_began_is_no_run(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", overwrite=False)
    with run.exclusive():
        run.recipe.write_text("model: {}")
        (run.root / ".plan.json.tmp").write_text("{")
    with pytest.raises(RecipeError, match=r"no lock\.json") as error:
        RunDir.open(run.root)
    assert "loratune train" in error.value.fix
    RunDir.create(tmp_path / "run", overwrite=False)
    assert not run.recipe.exists()
    (run.root / "thesis.tex").write_text("ten years of work")
    with pytest.raises(RecipeError, match="already contains a run"):
        RunDir.create(tmp_path / "run", overwrite=False)


def test_a_recipe_in_place_of_its_run_is_answered_with_where_the_run_is(tmp_path: Path) -> None:
    (tmp_path / "faq.yaml").write_text("model: {}")
    with pytest.raises(RecipeError, match="is a file, not a run directory") as error:
        RunDir.open(tmp_path / "faq.yaml")
    assert "train.output_dir" in error.value.fix
    assert "`loratune runs`" in error.value.fix


def test_a_directory_of_something_else_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("ten years of work")
    with pytest.raises(RecipeError, match="not a run of loratune"):
        RunDir.create(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "ten years of work"


def test_a_run_that_another_process_uses_is_refused(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", overwrite=False)
    code = (
        "import sys; from loratune.run.directory import RunDir; from pathlib import Path\n"
        "with RunDir(Path(sys.argv[1])).exclusive(): print('in', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        other.stdout.readline()
        with pytest.raises(RecipeError, match=f"process {other.pid}"), run.exclusive():
            pass
        with pytest.raises(RecipeError, match="another run is using"):
            RunDir.check(run.root, overwrite=True)
        other.stdin.close()
    with run.exclusive():
        pass


def test_metrics_survive_a_line_cut_short_and_can_be_rewound(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", overwrite=False)
    for step in (1, 2, 3):
        run.append_metrics({"step": step, "epoch": 0.5, "eval_nll": 1.0 / step, "seconds": 0.1})
    with run.metrics.open("a") as stream:
        stream.write('{"step": 4, "lo')
    assert [record["step"] for record in run.read_metrics()] == [1, 2, 3]
    run.rewind_metrics(2)
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2]


def test_records_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    with pytest.raises(MachineError, match="cannot write"):
        write_json(tmp_path / "no" / "plan.json", {})


def test_missing_and_damaged_records_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such file"):
        read_json(tmp_path / "lock.json")
    (tmp_path / "lock.json").write_text('{"a":')
    with pytest.raises(RunError, match="damaged"):
        read_json(tmp_path / "lock.json")
    with pytest.raises(RecipeError, match=r"no lock\.json"):
        RunDir.open(tmp_path / "elsewhere")
