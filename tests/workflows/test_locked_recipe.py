"""A run is used from another working folder than the one it began in."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loratune.evaluation.sampling import Sampling
from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import RecipeError
from loratune.run.progress import NoProgress
from loratune.workflows.chat import open_chat
from loratune.workflows.evaluate import evaluate
from loratune.workflows.export import merge
from loratune.workflows.finished import recipe_here, recipe_of
from loratune.workflows.locked_recipe import located
from loratune.workflows.train import train


@pytest.fixture
def project(
    tiny_model: Path,
    chat_files: tuple[Path, Path],
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A folder with model, data and a run, all by relative paths; the tests start beside it."""
    folder = tmp_path / "project"
    shutil.copytree(tiny_model, folder / "model")
    for file in chat_files:
        shutil.copy(file, folder / file.name)
    monkeypatch.chdir(folder)
    settings: dict[str, Any] = {
        "model__name": "model",
        "data__train": chat_files[0].name,
        "data__eval": chat_files[1].name,
        "train__output_dir": "runs/a",
        "train__epochs": 1,
        "evaluate__metric": "none",
    }
    train(tiny_recipe(**settings))
    monkeypatch.chdir(tmp_path)
    return folder


class Heard(NoProgress):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_a_run_is_used_from_elsewhere_moved_and_without_its_training_rows(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = project / "runs" / "a"
    before = read_json(run / "evaluation.json")["tuned"]["nll"]
    assert evaluate(run).evaluation is not None
    assert read_json(run / "evaluation.json")["tuned"]["nll"] == pytest.approx(before)
    assert open_chat(run, Sampling()) is not None

    (project / "train.jsonl").unlink()
    heard = Heard()
    assert recipe_here(RunDir.open(run), heard).data.train == recipe_of(run).data.eval
    assert "train.jsonl no longer exists: the held-out rows stand in" in heard.warnings[0]
    evaluate(run)
    assert read_json(run / "evaluation.json")["tuned"]["nll"] == pytest.approx(before)
    assert merge(run, tmp_path / "merged") is not None

    moved = Path(shutil.move(project, tmp_path / "elsewhere"))
    monkeypatch.chdir(moved)
    evaluate(Path("runs/a"))
    assert read_json(moved / "runs/a/evaluation.json")["tuned"]["nll"] == pytest.approx(before)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"model.name is model: .*project/model, which no longer exists"):
        evaluate(moved / "runs" / "a")


def lock(folder: Path, **parts: Any) -> dict[str, Any]:
    recipe = {"model": {"name": "model"}, "data": {"train": [{"name": "rows.jsonl"}], "eval": "auto"}, "lora": {}}
    return {"recipe": {**recipe, **parts}, "folder": str(folder), "inputs": {"model_path": str(folder / "model")}}


def test_sections_of_other_tasks_that_an_earlier_version_wrote_are_left_out(tmp_path: Path) -> None:
    old = lock(tmp_path)
    (tmp_path / "model").mkdir()
    old["recipe"]["preference"] = {"loss": "dpo", "beta": "auto"}
    assert "preference" not in located(old)
    old["recipe"]["model"]["task"] = "preference"
    assert located(old)["preference"] == {"loss": "dpo", "beta": "auto"}


def test_a_path_from_here_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("then", "now"):
        (tmp_path / place / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "now")
    (tmp_path / "then" / "rows.jsonl").touch()
    found = located(lock(tmp_path / "then"))
    assert found["model"]["name"] == "model"
    assert found["data"]["train"][0]["name"] == str(tmp_path / "then" / "rows.jsonl")


@pytest.mark.parametrize("name", ["model", "org/model"])
def test_a_hub_id_and_a_package_stay_what_they_are(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    record = lock(tmp_path, model={"name": name}, lora={"start_from": "me/adapter"})
    record["inputs"]["model_path"] = str(tmp_path / "hub" / "snapshots" / "0123")
    assert located(record) == record["recipe"]


def test_a_run_that_did_not_record_its_folder_has_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "then" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    record = lock(tmp_path / "then")
    del record["folder"]
    assert located(record)["model"]["name"] == str(tmp_path / "then" / "model")
    assert record["recipe"]["model"]["name"] == "model", "the lock itself stays as it is"


@pytest.mark.parametrize("name", ["model", "model.gguf", "models/tiny"])
def test_a_base_by_any_relative_path_is_found_where_the_run_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A GGUF file is imported into the cache, so the recorded folder has another name."""
    base = tmp_path / "then" / name
    base.parent.mkdir(parents=True, exist_ok=True)
    base.touch() if name.endswith(".gguf") else base.mkdir()
    monkeypatch.chdir(tmp_path)
    record = lock(tmp_path / "then", model={"name": name})
    if name.endswith(".gguf"):
        record["inputs"]["model_path"] = str(tmp_path / "cache" / "model-0123")
    assert located(record)["model"]["name"] == str(base)


@pytest.mark.parametrize(
    ("part", "value", "find"),
    [
        ("data", {"eval": [{"name": "held-out.jsonl"}]}, lambda r: r["data"]["eval"][0]["name"]),
        ("data", {"train": [{"name": "../rows.jsonl"}]}, lambda r: r["data"]["train"][0]["name"]),
        ("evaluate", {"forgetting": [{"name": "general.jsonl"}]}, lambda r: r["evaluate"]["forgetting"][0]["name"]),
        ("lora", {"start_from": "runs/a/adapter"}, lambda r: r["lora"]["start_from"]),
    ],
)  # fmt: skip
def test_every_other_relative_path_is_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, value: dict[str, Any], find: Callable[[Any], str]
) -> None:
    began = tmp_path / "one" / "then"
    (began / "model").mkdir(parents=True)
    record = lock(began, **{part: value})
    there = began / find(record["recipe"])
    there.parent.mkdir(parents=True, exist_ok=True)
    there.touch()
    monkeypatch.chdir(tmp_path)
    assert Path(find(located(record))).samefile(there)
    there.unlink()
    assert find(located(record)) == find(record["recipe"]), "what is gone keeps the name that the recipe has"


def test_a_run_of_a_version_that_shared_no_prefixes_goes_on_without(finished_run: RunDir) -> None:
    """Sharing would change which masks dropout draws in the middle of a run."""
    lock = read_json(finished_run.lock)
    del lock["recipe"]["train"]["share_prefixes"]
    assert located(lock)["train"]["share_prefixes"] is False
    lock["recipe"]["train"]["share_prefixes"] = True
    assert located(lock)["train"]["share_prefixes"] is True
