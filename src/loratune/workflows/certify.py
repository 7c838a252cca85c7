"""Every way out of a run ends with a certificate, or with nothing.

What leaves a run is written under a temporary name, loaded back with the code that will serve it, compared with the
adapter on its base in training's own code, and only then gets its name.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loratune.data.prompts import stop_token_ids
from loratune.evaluation.scoring import score
from loratune.exporting.adapter_matrices import LowRank, Replaced, read_adapter, read_replaced
from loratune.exporting.certificate import (
    ReferenceOutputs,
    Target,
    Tolerance,
    certify,
    choose_examples,
    choose_questions,
    reference_outputs,
    summary,
)
from loratune.exporting.gguf.model import is_quantised
from loratune.exporting.load_back import LlamaCppReader
from loratune.exporting.merge_weights import DTYPES, weight_files
from loratune.exporting.staging import atomic_folder
from loratune.model.adapter.attach import load_adapter
from loratune.model.device import device_here, torch_dtype
from loratune.model.gguf_import import file_sha256
from loratune.model.load import download_weights, gguf_file, load_config, load_model
from loratune.planning.lock import differences
from loratune.planning.preparation import Preparation
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.recipe.tasks import require_text
from loratune.reporting.html import report_or_warn
from loratune.run.directory import Record, RunDir, read_json, write_json
from loratune.run.errors import DataError, RecipeError, RunError
from loratune.run.progress import Progress
from loratune.training.loss import make_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written.

    Attributes:
        folder: Where.
        certificate: `parity.json`.
        usage: Commands that use it.
    """

    folder: Path
    certificate: Record
    usage: tuple[str, ...]

    @property
    def summary(self) -> str:
        """The certificate in one line."""
        return summary(self.certificate)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """A finished run, and what it was trained on.

    Attributes:
        run: Its directory.
        prepared: Its data, tokenizer and recipe.
        base: The folder with the base's weights.
        config: Of the base.
        updates: Module name → what the adapter adds.
        replaced: Tensor name → what the adapter has in its place.
        stops: The tokens that end an answer.
        source: The GGUF file that the base was imported from, if it was one.
        progress: Who is told how it goes.
    """

    run: RunDir
    prepared: Preparation
    base: Path
    config: Any
    updates: Mapping[str, LowRank]
    replaced: Mapping[str, Replaced]
    stops: tuple[int, ...]
    source: Path | None
    progress: Progress

    @property
    def name(self) -> str:
        """What people call the run: the name of its folder."""
        return self.run.root.name

    @property
    def base_bytes(self) -> int:
        """The size of the base's weights."""
        return sum((self.base / file).stat().st_size for file in weight_files(self.base))


def open_finished(root: str | Path, progress: Progress) -> FinishedRun:
    """Open a finished run of a model that writes text, whose base and template are still those of training.

    Raises:
        RecipeError: As `open_run`, or it is a classifier.
    """
    require_text(recipe_of(root), "this", f"loratune merge {root} OUT, which transformers loads")
    run, prepared = open_run(root, progress)
    recipe = prepared.recipe
    return FinishedRun(
        run=run,
        prepared=prepared,
        base=download_weights(prepared.model.base),
        config=load_config(prepared.model.base, recipe.model),
        updates=read_adapter(run.adapter),
        replaced=read_replaced(run.adapter),
        stops=stop_token_ids(prepared.model.tokenizer),
        source=gguf_file(recipe.model),
        progress=progress,
    )


def recipe_of(root: str | Path) -> Recipe:
    """The effective recipe of a run.

    Raises:
        RecipeError: There is no run.
    """
    run = RunDir.open(root)
    return Recipe.parse(read_json(run.lock)["recipe"], file=run.lock)


def open_run(root: str | Path, progress: Progress) -> tuple[RunDir, Preparation]:
    """A finished run whose base and template are still those of training, and what it was trained on.

    Raises:
        RecipeError: The run is not finished, or its base or template changed.
    """
    run = RunDir.open(root)
    if not run.has_adapter:
        raise RecipeError("the run has no adapter yet", file=run.root, fix=f"`loratune resume {root}`")
    lock = read_json(run.lock)
    recipe = Recipe.parse(lock["recipe"], file=run.lock)
    here = recipe.train.model_copy(update={"device": device_here(recipe.train.device)})
    recipe = recipe.model_copy(update={"train": here})
    prepared = prepare(recipe, progress)
    now = prepared.as_lock()
    known = lock["inputs"]["model"]
    now["inputs"]["model"] = {name: value for name, value in now["inputs"]["model"].items() if name in known}
    changed = differences(lock, now, keys=("model", "template"))
    if changed:
        raise RecipeError(
            f"changed since the run: {', '.join(changed)}", file=run.lock, fix="restore the base model, or train anew"
        )
    return run, prepared


def compute_reference(finished: FinishedRun) -> ReferenceOutputs:
    """What the adapter on its base says, in training's own code. The model is gone afterwards."""
    prepared = finished.prepared
    recipe = prepared.recipe
    held_out = choose_examples(prepared.data.eval or prepared.data.train)
    base = load_model(
        prepared.model.base, recipe.model, dtype=torch_dtype(recipe.model.dtype), device=recipe.train.device
    )
    model = load_adapter(base, finished.run.adapter)
    loss, _ = make_loss(model, prepared.data.train)
    model.eval()
    questions = choose_questions(prepared.data.eval_conversations, prepared.model.tokenizer)
    with finished.progress.task("asking the adapter on its base", len(held_out), "examples") as task:
        return reference_outputs(loss, held_out, questions, prepared.model.tokenizer, task.advance)


Load = Callable[[ReferenceOutputs], Target]
"""Loads back what was written; told what will be asked."""


def export_with_certificate(
    finished: FinishedRun,
    kind: str,
    target: Path,
    write: Callable[[Path], tuple[Load, Tolerance]],
    usage: tuple[str, ...],
    num_answers: int = 0,
) -> Exported:
    """Write, load back, compare, and only then give it its name."""
    with atomic_folder(target) as folder:
        load, tolerance = write(folder)
        certificate = _certificate(finished, load, tolerance, whole="adapter" not in kind, num_answers=num_answers)
        certificate = write_certificate(finished.run, kind, target, folder, certificate)
    missing = certificate["stop_tokens"]["missing"]
    if missing:
        texts = ", ".join(finished.prepared.model.tokenizer.convert_ids_to_tokens(missing))
        finished.progress.warn(
            f"the base does not end answers at {texts}, as training does: tell your server to stop there"
        )
    record(finished.run, certificate, finished.progress)
    return Exported(folder=target.absolute(), certificate=certificate, usage=usage)


def write_certificate(run: RunDir, kind: str, target: Path, folder: Path, certificate: Record) -> Record:
    """Write the certificate into the folder.

    Args:
        run: Whose model it is.
        kind: Of what was written.
        target: The folder by the name that it will have.
        folder: By the name that it has.
        certificate: From `certify`.

    Raises:
        RunError: It was not passed.
    """
    certificate = {
        "kind": kind,
        "run": str(run.root),
        "path": str(target.absolute()),
        "adapter_sha256": file_sha256(run.adapter_weights),
        **certificate,
    }
    write_json(folder / "parity.json", certificate)
    if not certificate["passed"]:
        raise RunError(
            f"what was written is not the model that was trained: {'; '.join(certificate['complaints'])}",
            file=target,
            fix="nothing was kept; serve base and adapter with PEFT, and report this as a bug of loratune",
        )
    return certificate


def _certificate(finished: FinishedRun, load: Load, tolerance: Tolerance, *, whole: bool, num_answers: int) -> Record:
    """Ask training, then what was written: one model in memory at a time."""
    expected = compute_reference(finished)
    gc.collect()
    reader = load(expected)
    with finished.progress.task("asking what was written", len(expected.examples), "examples") as task:
        certificate = certify(expected, reader, tolerance, stops_required=whole, progress=task.advance)
    certificate["compared_on"] = "held-out" if finished.prepared.data.eval else "training"
    if isinstance(reader, LlamaCppReader):
        certificate["answers"] = _compare_answers(finished, reader, num_answers)
        reader.close()
    return certificate


def _compare_answers(finished: FinishedRun, reader: LlamaCppReader, limit: int) -> Record | None:
    """The run's own greedy answers to held-out prompts, against llama.cpp's; None where the run has none."""
    run, tokenizer = finished.run, finished.prepared.model.tokenizer
    recipe = finished.prepared.recipe
    items = read_json(run.evaluation)["items"][:limit] if run.evaluation.is_file() else []
    if not items:
        return None
    same_text = same = 0
    with finished.progress.task("answering", len(items), "prompts") as task:
        for item in items:
            ids = tokenizer(item["prompt"], add_special_tokens=False)["input_ids"]
            text = str(tokenizer.decode(reader.answer(ids, recipe.evaluate.max_new_tokens)))
            wanted = item["tuned"]["text"]
            same_text += text == wanted
            same += text == wanted or (recipe.evaluate.metric == "json" and _same_json(text, wanted))
            task.advance()
    return {
        "num_prompts": len(items),
        "same_text": same_text,
        "same": same,
        "share": same / len(items),
        "metric": recipe.evaluate.metric,
    }


def _same_json(text: str, wanted: str) -> bool:
    try:
        return bool(score("json", text, wanted))
    except DataError:  # the answer to compare with is no JSON
        return False


def merged_dtype(prepared: Preparation, dtype: str) -> torch.dtype | None:
    """The type to write a merged model in; None: each tensor's own.

    Args:
        prepared: Of the run.
        dtype: `float32`, `bfloat16`, `float16`; or `auto`: as in the base's files, and bfloat16 where these are a quantised GGUF.
    """
    if dtype != "auto":
        return DTYPES[dtype]
    source = gguf_file(prepared.recipe.model)
    return torch.bfloat16 if source is not None and is_quantised(source) else None


def record(run: RunDir, certificate: Record, progress: Progress) -> None:
    """Add to the run's own list of certificates, the newest of each place, and to its report."""
    others = [
        other
        for other in (read_json(run.parity) if run.parity.is_file() else [])
        if other["path"] != certificate["path"]
    ]
    write_json(run.parity, [*others, certificate])
    report_or_warn(run, progress)
