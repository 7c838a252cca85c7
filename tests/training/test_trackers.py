"""Experiment trackers get the losses of a run; TensorBoard is in tests/planning/test_prepare.py."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import TrainerCallback

from loratune.recipe.recipe import Recipe
from loratune.training.trackers import Trackers
from loratune.workflows.train import train

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trackers


def test_trackers_get_every_event_that_transformers_has() -> None:
    own = vars(Trackers)
    assert all(name in own for name in dir(TrainerCallback) if name.startswith("on_"))


@pytest.fixture
def trained_with(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], list[float]]:
    """Train two epochs with a tracker, where it is installed; returns the losses of the run's own metrics."""

    def run(name: str) -> list[float]:
        pytest.importorskip(name, reason=f"{name} is not installed: pip install {name}")
        monkeypatch.chdir(tmp_path)
        done = train(tiny_recipe(train__report_to=[name], train__log_every=1, train__epochs=1)).run
        return [line["loss"] for line in done.read_metrics() if "loss" in line]

    return run


def test_wandb_offline(
    trained_with: Callable[[str], list[float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    losses = trained_with("wandb")
    import wandb

    wandb.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert b"train/loss" in content
    assert b"eval/nll" in content
    assert losses


def test_mlflow_in_files(
    trained_with: Callable[[str], list[float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    losses = trained_with("mlflow")
    import mlflow

    mlflow.end_run()
    (file,) = tmp_path.glob("mlruns/*/*/metrics/loss")
    written = [float(line.split()[1]) for line in file.read_text().splitlines()]
    assert written == pytest.approx(losses, rel=1e-4)


def test_trackio_here(
    trained_with: Callable[[str], list[float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    losses = trained_with("trackio")
    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        lines = [json.loads(text) for (text,) in database.execute("select metrics from metrics order by id")]
    written = [line["train/loss"] for line in lines if "train/loss" in line]
    assert written == pytest.approx(losses, rel=1e-4)
