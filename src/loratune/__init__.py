"""LoRA fine-tuning you can trust: `from loratune import Recipe, plan, train, resume, evaluate`."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
import warnings
from typing import TYPE_CHECKING, Any

from loratune.run import compile_later

# The libraries read these once, when they are imported: no telemetry, no advertisements.
for _name in (
    "HF_HUB_DISABLE_TELEMETRY",
    "DO_NOT_TRACK",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS",
    "TRL_EXPERIMENTAL_SILENCE",
):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
# Large pages for torch's tensors on a CPU: a step of SmolLM2-135M took a sixth less time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# Two caches of prepared products, one entry for each shape that occurs, 1,024 by default: where lengths vary, the
# quickstart grew by 17 MiB a step with them, and with 256 entries did not, at the same speed.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
os.environ.setdefault("LRU_CACHE_CAPACITY", "256")

# bitsandbytes says at every 8-bit product that its input is rounded, and at its import, which PEFT does wherever it
# is installed, which kernel it does without; torchao, likewise imported, which of its files are for GPUs, and by
# torch that one of its calls is old.
for _name in (
    "bitsandbytes.autograd._functions",
    "bitsandbytes.backends.cpu.ops",
    "torchao",
    "torch.utils._pytree",
    "transformers.utils.generic",  # 5.24: that `past_key_values` is called `cache` now, which 5.23 does not know
):
    logging.getLogger(_name).setLevel(logging.ERROR)
compile_later.install()

_ROOMS = {
    "bench": "workflows.bench",
    "certify": "workflows.certify_target:certify_target",
    "compare": "reporting.html",
    "export": "workflows.export",
    "export_types": "workflows.export_types",
    "merge": "workflows.export",
    "diff": "reporting.run_diff",
    "doctor": "workflows.guidance.doctor",
    "eject": "workflows.guidance.eject",
    "explain": "workflows.guidance.explain",
    "init": "workflows.guidance.init",
    "evaluate": "workflows.evaluate",
    "plan": "workflows.plan",
    "push": "workflows.push",
    "open_result": "workflows.result",
    "report": "reporting.html",
    "reproduce": "workflows.reproduce",
    "extend": "workflows.extend",
    "resume": "workflows.resume",
    "runs": "reporting.run_list:list_runs",
    "sample": "workflows.sample",
    "SampleSettings": "workflows.sample",
    "schema": "recipe.schema:recipe_schema",
    "selftest": "workflows.selftest",
    "serve": "workflows.serve",
    "sweep": "workflows.search.sweep",
    "train": "workflows.train",
    "tune": "workflows.search.tune",
    "NO_PROGRESS": "run.progress",
    "Recipe": "recipe.recipe",
}
"""Name → the module that has it, with its name there where that is another."""

if TYPE_CHECKING:
    from loratune.recipe.recipe import Recipe
    from loratune.recipe.schema import recipe_schema as schema
    from loratune.reporting.html import compare, report
    from loratune.reporting.run_diff import diff
    from loratune.reporting.run_list import list_runs as runs
    from loratune.run.progress import NO_PROGRESS
    from loratune.workflows.bench import bench
    from loratune.workflows.certify_target import certify_target as certify
    from loratune.workflows.evaluate import evaluate
    from loratune.workflows.export import export, merge
    from loratune.workflows.export_types import export_types
    from loratune.workflows.extend import extend
    from loratune.workflows.guidance.doctor import doctor
    from loratune.workflows.guidance.eject import eject
    from loratune.workflows.guidance.explain import explain
    from loratune.workflows.guidance.init import init
    from loratune.workflows.plan import plan
    from loratune.workflows.push import push
    from loratune.workflows.reproduce import reproduce
    from loratune.workflows.result import open_result
    from loratune.workflows.resume import resume
    from loratune.workflows.sample import SampleSettings, sample
    from loratune.workflows.search.sweep import sweep
    from loratune.workflows.search.tune import tune
    from loratune.workflows.selftest import selftest
    from loratune.workflows.serve import serve
    from loratune.workflows.train import train

__all__ = [
    "NO_PROGRESS",
    "Recipe",
    "SampleSettings",
    "__version__",
    "bench",
    "certify",
    "compare",
    "diff",
    "doctor",
    "eject",
    "evaluate",
    "explain",
    "export",
    "export_types",
    "extend",
    "init",
    "merge",
    "open_result",
    "plan",
    "push",
    "report",
    "reproduce",
    "resume",
    "runs",
    "sample",
    "schema",
    "selftest",
    "serve",
    "sweep",
    "train",
    "tune",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import on first use: `loratune --help` must not wait for torch."""
    if name in _ROOMS:
        module, _, other = _ROOMS[name].partition(":")
        found = getattr(importlib.import_module(f"loratune.{module}"), other or name)
        globals()[name] = found if name in ("Recipe", "NO_PROGRESS") else _showing_progress(found)
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, so that they can be completed before they are imported."""
    return sorted({*globals(), *__all__})


def _showing_progress(verb: Any) -> Any:
    """Return a verb that shows its progress on stderr unless it is told otherwise, as by `progress=NO_PROGRESS`."""
    if "progress" not in inspect.signature(verb).parameters:
        return verb

    @functools.wraps(verb)
    def run(*arguments: Any, **options: Any) -> Any:
        if "progress" not in options:
            options["progress"] = importlib.import_module("loratune.cli.notebook").progress_here()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # for the developers of other libraries
            return verb(*arguments, **options)

    return run
