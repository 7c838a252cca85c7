"""Run tasks of lm-evaluation-harness on the loaded model: base vs. fine-tuned."""

from __future__ import annotations

import importlib.metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from loratune.evaluation.generate import as_generator
from loratune.evaluation.record import paired_bootstrap
from loratune.run.errors import MachineError, RecipeError, RunError
from loratune.run.extras import pip_install

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from peft import PeftModel

    from loratune.run.directory import Record

_CODE_IN_YAML = ("!function", "unsafe_code")


def check_harness(tasks: Sequence[str], *, allow_code: bool) -> None:
    """Check the tasks before a model loads.

    Args:
        tasks: Names of tasks, or YAML files with tasks.
        allow_code: Whether tasks may contain Python code.

    Raises:
        MachineError: lm-evaluation-harness is not installed.
        RecipeError: A file is missing, or would run code.
    """
    if find_spec("lm_eval") is None:
        raise MachineError("lm-evaluation-harness is not installed", fix=pip_install("harness"))
    for task in tasks:
        file = Path(task).expanduser()
        if not is_file(task):
            continue
        if not file.is_file():
            raise RecipeError("the file of --harness does not exist", file=file, fix="check the path")
        text = file.read_text(encoding="utf-8")
        found = next((mark for mark in _CODE_IN_YAML if mark in text), None)
        if found is not None and not allow_code:
            raise RecipeError(
                f"the task runs Python code ({found}) with your permissions",
                file=file,
                fix="read it; if you trust it, add --allow-code",
            )


def is_file(task: str) -> bool:
    """Return whether a task is given as a YAML file, not by its name."""
    return task.endswith((".yaml", ".yml"))


def run_harness(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    before: Callable[[], AbstractContextManager[None]],
    allow_code: bool,
) -> Record:
    """Run tasks with the model before the run and with the fine-tuned one.

    Args:
        model: The base with its adapter.
        tokenizer: The tokenizer of training; its chat template, if any, renders the tasks.
        tasks: As for `check_harness`.
        before: Returns a context in which the model is the one before the run.
        allow_code: As for `check_harness`.

    Returns:
        `version`, `chat_template`, and for each task and measure `base`, `tuned`, and their `difference`, with an
        interval where the harness reports the score of each document.

    Raises:
        RunError: The harness fails.
    """
    with before():
        base = _evaluate(model, tokenizer, tasks, allow_code=allow_code)
    tuned = _evaluate(model, tokenizer, tasks, allow_code=allow_code)
    return {
        "version": importlib.metadata.version("lm_eval"),
        "chat_template": bool(tokenizer.chat_template),
        "tasks": {name: _compare(name, base, tuned) for name in tuned["results"]},
    }


def _evaluate(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], *, allow_code: bool
) -> Mapping[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    inner = model.get_base_model()
    assert isinstance(inner, PreTrainedModel)
    settings = GenerationConfig(pad_token_id=tokenizer.pad_token_id)  # type: ignore[no-untyped-call]
    with as_generator(inner, settings):
        try:
            found: Mapping[str, Any] = simple_evaluate(
                model=HFLM(pretrained=inner, tokenizer=tokenizer, batch_size=8),
                tasks=[str(Path(task).expanduser()) if is_file(task) else task for task in tasks],
                task_manager=TaskManager(include_defaults=not all(map(is_file, tasks))),
                apply_chat_template=bool(tokenizer.chat_template),
                confirm_run_unsafe_code=allow_code,
                bootstrap_iters=0,  # we compute the interval of the difference, over pairs
            )
        except Exception as error:  # tasks are third-party code and data, which may raise anything
            raise RunError(
                f"lm-evaluation-harness failed: {type(error).__name__}: {error}",
                fix="try the task with lm_eval itself; its built-in tasks need the Hub",
            ) from error
    return found


def _compare(task: str, base: Mapping[str, Any], tuned: Mapping[str, Any]) -> Record:
    """Return base, tuned and difference of each measure of a task."""
    measures: Record = {}
    for key, value in tuned["results"][task].items():
        measure, comma, chosen = key.partition(",")  # `acc,none`: the measure and its filter
        before = base["results"][task].get(key)
        if not comma or measure.endswith("_stderr") or not all(isinstance(v, int | float) for v in (value, before)):
            continue
        name = measure if chosen == "none" else f"{measure}.{chosen}"
        pairs = _scores(task, measure, chosen, base), _scores(task, measure, chosen, tuned)
        interval = paired_bootstrap(*pairs).as_dict() if _are_means(pairs, (before, value)) else {}
        measures[name] = {"base": before, "tuned": value, "difference": {"value": value - before, **interval}}
    return measures


def _scores(task: str, measure: str, chosen: str, results: Mapping[str, Any]) -> list[float]:
    """Return the score of each document; empty where the harness does not report numbers."""
    samples = [s for s in results.get("samples", {}).get(task, ()) if s.get("filter", "none") == chosen]
    values = [sample.get(measure) for sample in samples]
    return [float(value) for value in values] if all(isinstance(value, int | float) for value in values) else []


def _are_means(pairs: tuple[list[float], list[float]], totals: tuple[float, float]) -> bool:
    """Return whether the task's numbers are the means of these scores, so that the interval is of the same measure."""
    return len(pairs[0]) == len(pairs[1]) > 0 and all(
        abs(sum(scores) / len(scores) - total) < 1e-9 for scores, total in zip(pairs, totals, strict=True)
    )
