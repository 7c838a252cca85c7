"""The reference of a preference run: log p of every answer under the model as it is before step 1.

That model is the base with the adapter that the run begins with: a fresh adapter changes nothing, and the one of
`lora.start_from` belongs to it. Its log-probabilities are computed once, by the loss that training uses, and kept in
RUN/reference and in the cache, under a fingerprint of everything that decides them. What is read from there is compared
with the loaded model on a few examples before it is used.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from loratune.data.batch import collate
from loratune.data.cache import Cache
from loratune.recipe.sections.lora import BEGINS_AS_BASE
from loratune.run import processes
from loratune.run.cache_folder import cache_dir
from loratune.run.directory import read_json
from loratune.training.event_log import EventLog
from loratune.training.loss import TOLERANCE, loss_dtype
from loratune.training.token_budget import TokenBudget
from loratune.workflows.tasks.preference.baseline import baseline_of
from loratune.workflows.tasks.preference.log_probs import LogProbs, answers_of, log_probs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.data.examples import AnswersExample
    from loratune.planning.preparation import Preparation
    from loratune.run.directory import Record, RunDir
    from loratune.run.progress import Progress
    from loratune.workflows.tasks.preference.loss import JudgedLoss, PreferenceLoss
    from loratune.workflows.tasks.task import Started

CHECKED_EXAMPLES = 4
"""Examples on which a stored reference is compared with the loaded model."""


def with_reference(started: Started) -> Preparation:
    """Return the prepared run with the reference in its examples: stored log-probabilities, or computed now.

    Where the loss has a baseline (`kto`), it gets it with its reference.
    """
    prepared, run, progress = started.prepared, started.run, started.progress
    loss = cast("PreferenceLoss", started.loss)
    train, held_out = answers_of(prepared.data.train), answers_of(prepared.data.eval)
    baseline = baseline_of(prepared)
    key = reference_key(run) if processes.is_main() else ""
    # The first process decides for all: another machine's cache may have what this one has not.
    stored = processes.gather(load_reference(run, key, progress))[0]
    if stored is not None and (differs := processes.gather(_differs(loss, train, stored["train"]))[0]):
        progress.warn(f"the stored reference differs from the loaded model ({differs}), and is computed again")
        stored = None
    known = stored is not None
    if stored is None:
        events = EventLog(run, progress)
        budget = TokenBudget(prepared.estimate.memory.token_budget, events, together=loss.sharded)
        both = log_probs(loss, [*train, *held_out], budget, progress, "reference")
        stored = {"train": both[: len(train)], "eval": both[len(train) :]}
        if baseline is not None:
            stored["mismatched"] = baseline.measure(prepared.estimate.num_steps, loss, budget, progress)
    if key:  # the first process only
        for cache in _caches(run, progress):
            if not (known and cache.path(key).is_file()):
                cache.store(key, {name: np.ascontiguousarray(part) for name, part in stored.items()})
    if baseline is not None:
        baseline.reference = stored["mismatched"]
        cast("JudgedLoss", loss).baseline = baseline
    return _put(prepared, train, held_out, stored)


# ---- storage


def reference_key(run: RunDir) -> str:
    """Return the fingerprint of everything that decides the reference of a run; "" before its lock is written."""
    if not run.lock.is_file():
        return ""
    lock = read_json(run.lock)
    recipe, inputs = lock["recipe"], lock["inputs"]
    plain = recipe["lora"]["variant"] in BEGINS_AS_BASE and "start" not in inputs
    parts: Record = {
        "inputs": {name: inputs.get(name) for name in ("model", "template", "train", "eval", "start")},
        "model": {name: recipe["model"][name] for name in ("dtype", "quantization")},
        "adapter": None if plain else [recipe["lora"], recipe["train"]["seed"]],
        # What follows decides only how sums are rounded, but a run is repeated to the bit.
        "train": {name: recipe["train"][name] for name in ("device", "token_budget", "engine", "compile", "strategy")},
        "versions": lock["versions"],
        "machine": lock["machine"],
    }
    if recipe["preference"]["loss"] == "kto":  # which examples share a step decides the mismatches
        names = ("epochs", "max_steps", "batch_size", "seed")
        parts["steps"] = [*(recipe["train"][name] for name in names), recipe["data"]["max_length"]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def load_reference(run: RunDir, key: str, progress: Progress) -> dict[str, LogProbs] | None:
    """Return the stored reference of a run, from its directory or the cache; None if there is none."""
    for cache in _caches(run, progress) if key else ():
        stored = cache.load(key)
        if stored is not None:
            return stored
    return None


def _caches(run: RunDir, progress: Progress) -> tuple[Cache, ...]:
    return Cache(run.reference, progress), Cache(cache_dir() / "reference", progress)


def _differs(loss: PreferenceLoss, examples: Sequence[AnswersExample], stored: LogProbs) -> str:
    """Describe how a stored reference differs from the model as it is now; "" if it does not."""
    if len(stored) != len(examples):
        return f"{len(stored):,} examples instead of {len(examples):,}"
    numbers = np.unique(np.linspace(0, len(examples) - 1, CHECKED_EXAMPLES).round().astype(int)).tolist()
    was_training = loss.model.training
    loss.model.eval()
    try:
        with torch.no_grad():
            live = [loss.answers(collate([examples[i]]).to(loss.model.device)) for i in numbers]
    finally:
        loss.model.train(was_training)
    for number, answers in zip(numbers, live, strict=True):
        off = np.abs(answers.logps_PA.cpu().numpy()[0] - stored[number])
        # `TOLERANCE` is the rounding of one token, and that of a sum of independent ones grows with the root.
        allowed = [3 * TOLERANCE[loss_dtype(loss.model)] * math.sqrt(n) for n in answers.lengths_PA[0].tolist()]
        if not (off <= allowed).all():  # so written, NaN differs too
            return f"by {off.max():.3g} nats in {examples[number].origin}"
    return ""


def _put(
    prepared: Preparation, train: list[AnswersExample], held_out: list[AnswersExample], stored: dict[str, LogProbs]
) -> Preparation:
    """Return the prepared run with the log-probabilities in its examples."""

    def with_values(examples: list[AnswersExample], values: LogProbs) -> list[Any]:
        return [replace(example, reference=tuple(own)) for example, own in zip(examples, values.tolist(), strict=True)]

    train_with, held_out_with = with_values(train, stored["train"]), with_values(held_out, stored["eval"])
    return replace(prepared, data=replace(prepared.data, train=train_with, eval=held_out_with))
