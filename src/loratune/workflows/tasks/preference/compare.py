"""Base vs. fine-tuned for a model that learned preferences: which answer of held-out pairs it finds likelier, its own
answers, and their lengths."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

from loratune.model.device import free_memory
from loratune.recipe.sections.preference import WITH_REFERENCE
from loratune.run.directory import read_json
from loratune.workflows.tasks.generation.compare import compare_answers
from loratune.workflows.tasks.preference.measures import add_pair_measures
from loratune.workflows.tasks.preference.reference import (
    LogProbs,
    load_reference,
    log_probs,
    pairs_of,
    reference_key,
)

if TYPE_CHECKING:
    from loratune.data.examples import PairExample
    from loratune.training.held_out_loss import Nll
    from loratune.workflows.tasks.preference.loss import PreferenceLoss
    from loratune.workflows.tasks.task import Compared, Comparison


def compare_preferences(comparison: Comparison) -> Compared:
    """Measure held-out pairs and answers of the same loaded model with the adapter off and on."""
    pairs = pairs_of(comparison.prepared.data.eval)
    loss = cast("PreferenceLoss", comparison.loss)
    budget, progress = comparison.budget, comparison.progress
    free_memory()
    with loss.model.disable_adapter():
        base = log_probs(loss, pairs, budget, progress, "base")
    tuned = log_probs(loss, pairs, budget, progress, "fine-tuned")
    base_nll, tuned_nll = _chosen_nll(pairs, base), _chosen_nll(pairs, tuned)
    compared = compare_answers(replace(comparison, base_nll=base_nll, tuned_nll=tuned_nll))
    add_pair_measures(
        compared.record,
        comparison.prepared.recipe.preference,
        pairs,
        base=base,
        tuned=tuned,
        reference=_reference(comparison, pairs, base),
    )
    return compared


def _chosen_nll(pairs: list[PairExample], values: LogProbs) -> Nll:
    """Return the loss of each chosen answer, in the form of `evaluate_nll`."""
    return [(-logp, int(p.sequences[0].supervised.sum())) for p, (logp, _) in zip(pairs, values.tolist(), strict=True)]


def _reference(comparison: Comparison, pairs: list[PairExample], base: LogProbs) -> LogProbs | None:
    """Return the held-out log-probabilities before training; None if the loss has no reference, or it is lost."""
    if comparison.prepared.recipe.preference.loss not in WITH_REFERENCE:
        return None
    run, progress = comparison.run, comparison.progress
    if "start" not in read_json(run.lock)["inputs"]:  # the recipe of a finished run no longer says where it began
        return base  # a fresh adapter changes nothing
    stored = load_reference(run, reference_key(run), progress)
    if stored is None or len(stored["eval"]) != len(pairs):
        progress.warn("no rewards are measured: log p under the adapter of lora.start_from is in RUN/reference no more")
        return None
    return stored["eval"]
