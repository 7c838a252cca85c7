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
from loratune.workflows.tasks.preference.reference import LogProbs, log_probs, pairs_of

if TYPE_CHECKING:
    from loratune.data.examples import PairExample
    from loratune.training.held_out_loss import Nll
    from loratune.workflows.tasks.preference.loss import PreferenceLoss
    from loratune.workflows.tasks.task import Compared, Comparison


def compare_preferences(comparison: Comparison) -> Compared:
    """Measure held-out pairs and answers of the same loaded model as it began and as it is."""
    pairs = pairs_of(comparison.prepared.data.eval)
    loss = cast("PreferenceLoss", comparison.loss)
    budget, progress = comparison.budget, comparison.progress
    free_memory()
    with comparison.before():
        base = log_probs(loss, pairs, budget, progress, "initial")
    tuned = log_probs(loss, pairs, budget, progress, "fine-tuned")
    base_nll, tuned_nll = _chosen_nll(pairs, base), _chosen_nll(pairs, tuned)
    has_reference = comparison.prepared.recipe.preference.loss in WITH_REFERENCE
    begun_elsewhere = "start" in read_json(comparison.run.lock)["inputs"]  # with an adapter that is lost
    compared = compare_answers(replace(comparison, base_nll=base_nll, tuned_nll=tuned_nll))
    add_pair_measures(
        compared.record,
        comparison.prepared.recipe.preference,
        pairs,
        base=base,
        tuned=tuned,
        reference=base if has_reference and (comparison.started or not begun_elsewhere) else None,
    )
    return compared


def _chosen_nll(pairs: list[PairExample], values: LogProbs) -> Nll:
    """Return the loss of each chosen answer, in the form of `evaluate_nll`."""
    return [(-logp, int(p.sequences[0].supervised.sum())) for p, (logp, _) in zip(pairs, values.tolist(), strict=True)]
