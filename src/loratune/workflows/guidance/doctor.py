"""`doctor`: what this machine can do, what is missing, and the command that fixes it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil
from packaging.requirements import Requirement
from packaging.version import Version
from rich.markup import escape
from rich.table import Table

from loratune.recipe.recipe import Recipe
from loratune.run.errors import plural
from loratune.run.extras import install_package, pip_install
from loratune.run.html_table import ShownList
from loratune.workflows.guidance.shipped import missing_rows, shipped_recipes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loratune.run.directory import Record

State = Literal["good", "missing", "optional"]

QUICKSTART_MEMORY_BYTES = 3 * 2**30
"""Peak memory of the quickstart, measured (see the recipe)."""
QUICKSTART_DISK_BYTES = 2**30
"""Disk space of the quickstart: imported model (0.54 GB in float32), checkpoints and adapter, rounded up."""
HUB_SECONDS = 3.0
REINSTALL = "pip install --force-reinstall --no-deps"

EXTRAS = {
    "tensorboard": ("train.report_to: [tensorboard]", "pip install tensorboard"),
    "wandb": ("train.report_to: [wandb]", "pip install wandb"),
    "mlflow": ("train.report_to: [mlflow]", "pip install mlflow"),
    "trackio": ("train.report_to: [trackio]", "pip install trackio"),
    "llama_cpp": ("verifying GGUF exports with llama.cpp itself", "gguf"),
    "mlx_lm": ("verifying MLX exports with MLX itself", "pip install 'mlx-lm>=0.32' 'mlx[cpu]'"),
    "fastapi": ("loratune serve with transformers serve", "serve"),
    "starlette": ("loratune studio", "studio"),
    "vllm": ("loratune serve with vLLM", "pip install vllm  # in a separate environment: it pins torch"),
    "bitsandbytes": ("model.quantization: nf4, int8", "bitsandbytes"),
    "compressed_tensors": ("checkpoints of compressed-tensors", "compressed-tensors"),
    "torchao": ("model.quantization: kinds ending in _weight_only", "torchao"),
    "sacrebleu": ("evaluate.metric: bleu", "bleu"),
    "openpyxl": ("data in .xlsx files", "excel"),
    "ray": ("loratune train --engine ray", "ray"),
    "lm_eval": ("loratune evaluate --harness", "harness"),
}
"""Module → what it enables, and the extra or the command that installs it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Result of one check.

    Attributes:
        name: What was checked.
        state: `good`; `missing`: the quickstart needs it; `optional`: only something else needs it.
        found: What was found.
        fix: Command that fixes it; empty if it is good or no command can fix it.
    """

    name: str
    state: State
    found: str
    fix: str = ""

    def as_dict(self) -> Record:
        """Return the record that `--json` prints."""
        return asdict(self)


def doctor() -> list[Check]:
    """Run all checks. Takes some seconds, at most three of them waiting for the Hub."""
    python = Check(name="Python", state="good", found=f"{platform.python_version()} at {sys.executable}")
    checks = [python, *_packages()]
    if all(check.state == "good" for check in checks):  # the next checks import torch and the others
        checks += [*_devices(), _compiler(), _attention()]
    return ShownList(
        [*checks, _memory(), *_disks(), *_hub(), *_quickstart(), *_extras()],
        title="This machine",
        columns={
            "check": lambda check: check.name,
            "state": lambda check: check.state,
            "found": lambda check: check.found,
            "fix": lambda check: check.fix,
        },
    )


def _packages() -> Iterator[Check]:
    """Check every required package; one line if all are good."""
    required = [Requirement(text) for text in importlib.metadata.requires("loratune") or ()]
    required = [requirement for requirement in required if requirement.marker is None]
    found: dict[str, str] = {}
    for requirement in required:
        try:
            found[requirement.name] = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(
                name=requirement.name, state="missing", found="not installed", fix=f"pip install '{requirement}'"
            )
            continue
        if not requirement.specifier.contains(Version(found[requirement.name]), prereleases=True):
            yield Check(
                name=requirement.name,
                state="missing",
                found=f"{found[requirement.name]}, but {requirement.specifier} is needed",
                fix=f"pip install '{requirement}'",
            )
    shown = ("torch", "transformers", "trl", "peft", "datasets")
    versions = ", ".join(f"{name} {found[name]}" for name in shown if name in found)
    if len(found) == len(required):
        yield Check(name="packages", state="good", found=f"{len(required)} required; {versions}")


def _devices() -> Iterator[Check]:
    import torch

    from loratune.model.device import choose_dtype

    cores = psutil.cpu_count(logical=False) or os.cpu_count()
    flags = torch.backends.cpu.get_cpu_capability()
    processor = f"{cores} cores, {flags}, {plural(torch.get_num_threads(), 'thread')}"
    yield Check(name="CPU", state="good", found=f"{processor}; {choose_dtype('auto', 'cpu').reason}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = (properties.major, properties.minor)
        abilities = [
            f"bf16 {_yes(capability >= (8, 0))}",
            f"fp8 {_yes(capability >= (8, 9))}",
            f"SM {capability[0]}.{capability[1]}",
        ]
        memory = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        found = ", ".join([properties.name, memory, *abilities])
        yield Check(name=f"CUDA {index}", state="good", found=found)
    if torch.backends.mps.is_available():
        yield Check(name="MPS", state="good", found="Apple GPU, float32")
    elif not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi")
        if driver and torch.version.cuda is None:
            fix = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"
            yield Check(name="GPU", state="optional", found="driver found, but torch is built without CUDA", fix=fix)
        else:
            yield Check(name="GPU", state="optional", found="torch finds none; training runs on the CPU")


def _yes(condition: bool) -> str:
    return "yes" if condition else "no"


def _compiler() -> Check:
    """Check for a C++ compiler, which torch.compile needs at run time."""
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        path = shutil.which(name) if name else None
        if path:
            return Check(name="C++ compiler", state="good", found=f"{path}; torch.compile can be used")
    fix = "xcode-select --install" if sys.platform == "darwin" else "apt install g++"
    return Check(name="C++ compiler", state="optional", found="none; torch.compile cannot be used", fix=fix)


def _attention() -> Check:
    """Check how packed attention runs: one kernel per micro-batch on CUDA, one block per example elsewhere."""
    import torch

    name = "packed attention"
    if not torch.cuda.is_available():
        return Check(name=name, state="good", found="one block per example, as on every CPU")
    if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        return Check(name=name, state="good", found="torch.nn.attention.varlen")
    found = "this build of torch has no torch.nn.attention.varlen"
    return Check(name=name, state="optional", found=found, fix="pip install --upgrade torch")


def _memory() -> Check:
    memory = psutil.virtual_memory()
    found = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    if memory.available >= QUICKSTART_MEMORY_BYTES:
        return Check(name="memory", state="good", found=found)
    found += f"; the quickstart takes {QUICKSTART_MEMORY_BYTES / 2**30:.0f}"
    return Check(name="memory", state="missing", found=found, fix="close other programs")


def _disks() -> Iterator[Check]:
    from loratune.run.cache_folder import cache_dir

    for name, folder in (("disk, current folder", Path.cwd()), ("disk, cache", cache_dir())):
        existing = folder
        while not existing.exists():
            existing = existing.parent
        free = shutil.disk_usage(existing).free
        found = f"{free / 2**30:.1f} GiB free in {folder}"
        if not os.access(existing, os.W_OK):
            fix = f"chmod u+w {existing}"
            yield Check(name=name, state="missing", found=f"{existing} is not writable", fix=fix)
        elif free < QUICKSTART_DISK_BYTES:
            yield Check(
                name=name, state="missing", found=found, fix=f"du -sh {existing}/* | sort -h  # then delete files"
            )
        else:
            yield Check(name=name, state="good", found=found)


def _hub() -> Iterator[Check]:
    from huggingface_hub import constants, get_token

    from loratune.data.rows.hub import hub_answers

    name = "Hugging Face Hub"
    if constants.HF_HUB_OFFLINE:
        found = "HF_HUB_OFFLINE is set: only cached models and data"
        yield Check(name=name, state="optional", found=found, fix="unset HF_HUB_OFFLINE")
    elif hub_answers(HUB_SECONDS):
        yield Check(name=name, state="good", found=f"{constants.ENDPOINT} answers")
    else:
        found = f"{constants.ENDPOINT} does not answer: local models and data only"
        yield Check(name=name, state="optional", found=found, fix=f"curl -I {constants.ENDPOINT}  # or set HTTPS_PROXY")
    if get_token():
        yield Check(name="Hub token", state="good", found="found (not verified)")
    else:
        yield Check(name="Hub token", state="optional", found="none: no gated models, no push", fix="hf auth login")


def _quickstart() -> Iterator[Check]:
    """Check the quickstart's recipe, data and model."""
    path = shipped_recipes().get("quickstart")
    if path is None:
        fix = f"{REINSTALL} the wheel of loratune"
        yield Check(name="quickstart", state="missing", found="the installed package has no recipes", fix=fix)
        return
    recipe = Recipe.load(path)
    missing = missing_rows(recipe)
    if missing:
        found, fix = f"no {', '.join(missing)}", f"{REINSTALL} the wheel of loratune"
        yield Check(name="quickstart's data", state="missing", found=found, fix=fix)
    else:
        found = "there; `loratune init quickstart` writes the recipe and its rows"
        yield Check(name="quickstart's data", state="good", found=found)
    package, _, file = recipe.model.name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if any((Path(folder) / file).is_file() for folder in folders):
        yield Check(name="quickstart's model", state="good", found=recipe.model.name)
    else:
        found = f"{recipe.model.name} is not installed"
        yield Check(name="quickstart's model", state="missing", found=found, fix=install_package(package))


def _extras() -> Iterator[Check]:
    for name, (enables, extra) in EXTRAS.items():
        fix = extra if extra.startswith("pip ") else pip_install(extra)
        if importlib.util.find_spec(name) is None and shutil.which(name) is None:
            yield Check(name=name, state="optional", found=f"not installed; enables {enables}", fix=fix)
        else:
            yield Check(name=name, state="good", found=enables)


def diagnosis_table(checks: list[Check]) -> Table:
    """Return a table with one row per check, and the fix below what was found."""
    marks = {"good": "[green]✓[/green]", "missing": "[red]✗[/red]", "optional": "[yellow]○[/yellow]"}
    table = Table(show_header=False, box=None, padding=(0, 1))
    for column in ("", "", ""):
        table.add_column(column, overflow="fold")
    for check in checks:
        fix = f"\n[bold]{escape(check.fix)}[/bold]" if check.fix else ""
        table.add_row(marks[check.state], escape(check.name), escape(check.found) + fix)
    return table
