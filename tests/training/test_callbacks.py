from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from loratune.run.directory import RunDir
from loratune.run.progress import NoProgress
from loratune.training.callbacks import RunCallback
from loratune.training.event_log import StepMetrics
from loratune.training.signals import StopRequest


def test_tokens_per_second_counts_all_tokens_of_a_step(tmp_path: Path) -> None:
    """Prompts are computed too: by supervised tokens alone, a step would look slower the longer its prompts are."""
    run = RunDir.create(tmp_path / "run", overwrite=False)
    callback = RunCallback(run, NoProgress(), NoProgress(), StopRequest(), num_per_epoch=4)
    metrics = StepMetrics(loss=1.0, num_tokens=1000, num_supervised_tokens=10, started=time.perf_counter() - 20)
    callback.watch(SimpleNamespace(step_metrics=metrics, held_out={}, pause=None, drop_checkpoint=lambda: None))
    args = TrainingArguments(output_dir=str(run.checkpoints), use_cpu=True, report_to=[], save_strategy="no")
    callback.on_step_end(args, TrainerState(global_step=1, max_steps=4, epoch=0.25), TrainerControl())
    (record,) = run.read_metrics()
    assert record["num_tokens"] == 1000
    assert record["num_supervised_tokens"] == 10
    assert record["tokens_per_second"] == pytest.approx(50, rel=0.1)
