"""A run and an adapter of one base: what they answer differs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from loratune.exporting.transformers_serve import BASE_NAME
from loratune.run.directory import RunDir
from loratune.run.progress import NO_PROGRESS
from loratune.workflows.serving.engine import Capacity, Engine
from loratune.workflows.serving.models import ServedModel, load_first, open_source, served_model


@pytest.fixture(scope="session")
def other_adapter(finished_run: RunDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's adapter the other way round, in a folder of its own, as PEFT saves one."""
    folder = tmp_path_factory.mktemp("adapters") / "other"
    shutil.copytree(finished_run.adapter, folder)
    file = folder / "adapter_model.safetensors"
    tensors = {name: -t if "lora_B" in name else t for name, t in load_file(file).items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return folder


@pytest.fixture(scope="session")
def tiny(finished_run: RunDir) -> ServedModel:
    """The run's tokenizer and template."""
    source = open_source(str(finished_run.root))
    return served_model(source, load_first(source, NO_PROGRESS)[1])


@pytest.fixture
def engine(finished_run: RunDir) -> Iterator[Engine]:
    """An engine with the run's adapter, two requests at once, and room for two more."""
    model, _ = load_first(open_source(str(finished_run.root)), NO_PROGRESS)
    running = Engine(model, "tiny", base_name=BASE_NAME, capacity=Capacity(at_once=2, queue=2))
    yield running
    running.stop()
