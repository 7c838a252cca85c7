"""The package where it is installed: without the modules of one system, and from a wheel outside of the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

IMPORT_ALL = """
import importlib, pkgutil, sys
import datasets, gguf, peft, torch, torch.distributed.run, transformers, transformers.trainer
import trl, trl.trainer.sft_trainer
optional = ("bitsandbytes", "lm_eval", "ray.train", "sacrebleu", "torchao")  # which may need these modules themselves
for name in optional:
    try:
        importlib.import_module(name)
    except ImportError:
        pass
sys.modules["fcntl"] = sys.modules["resource"] = sys.modules["readline"] = None  # an import of these fails
import loratune
needs = {name.partition(".")[0] for name in optional}
number = 0
for module in pkgutil.walk_packages(loratune.__path__, "loratune."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        assert error.name.partition(".")[0] in needs, f"{module.name} needs {error.name}"
    number += 1
print(number)
"""


def test_everything_can_be_imported_without_the_modules_that_windows_lacks() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 150


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    """What a wheel holds, by the build's own settings, in a folder of its own."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    folder = tmp_path / "site-packages"
    (package,) = wheel["packages"]
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / package, folder / Path(package).name, ignore=skip)
    for source, target in wheel["force-include"].items():
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, folder / target, ignore=skip)
        else:
            shutil.copyfile(ROOT / source, folder / target)
    return folder


def test_from_a_wheel_the_quickstart_can_be_written_with_its_rows(unpacked: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}

    def loratune(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "loratune", *words],
            cwd=elsewhere, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    done = loratune("init", "quickstart")
    assert done.returncode == 0, done.stderr
    assert "$ loratune plan quickstart.yaml" in done.stderr
    rows = Path("examples") / "quickstart" / "train.jsonl"
    assert (elsewhere / rows).read_bytes() == (ROOT / rows).read_bytes()
    asked = "from loratune.workflows.guidance.doctor import _quickstart; print([c.state for c in _quickstart()])"
    found = subprocess.run(
        [sys.executable, "-c", asked], cwd=elsewhere, env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "['good', 'good']"
