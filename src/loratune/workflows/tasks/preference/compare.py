"""Base vs. fine-tuned for a model that learned preferences: how likely it finds the answers of held-out rows, and what
it answers itself."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from loratune.model.device import free_memory
from loratune.recipe.sections.preference import WITH_REFERENCE
from loratune.run.directory import read_json
from loratune.workflows.tasks.generation.compare import compare_answers
from loratune.workflows.tasks.preference import judged_measures, measures
from loratune.workflows.tasks.preference.log_probs import answers_of, log_probs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rich.table import Table

    from loratune.training.held_out_loss import Nll
    from loratune.workflows.tasks.preference.loss import PreferenceLoss
    from loratune.workflows.tasks.task import Compared, Comparison


class Measures(NamedTuple):
    """What is measured on one kind of preferences.

    Attributes:
        names: Measures that gates may use.
        good_nll: Returns the loss of the chosen or good answer of each example; none of its tokens if it has no such.
        add: Adds the measures to `evaluation.json`.
        table: Returns them as a table for a terminal.
    """

    names: tuple[str, ...]
    good_nll: Callable[[Any, Any], Nll]
    add: Callable[..., None]
    table: Callable[[Mapping[str, Any]], Table]


_PAIRS = Measures(measures.MEASURES, measures.chosen_nll, measures.add_pair_measures, measures.preference_table)
_JUDGED = Measures(
    judged_measures.NAMES, judged_measures.good_nll, judged_measures.add_measures, judged_measures.judged_table
)


def measures_of(loss: str) -> Measures:
    """Return what is measured where this loss trains."""
    return _JUDGED if loss == "kto" else _PAIRS


def compare_preferences(comparison: Comparison) -> Compared:
    """Measure held-out rows and answers of the same loaded model as it began and as it is."""
    examples = answers_of(comparison.prepared.data.eval)
    section = comparison.prepared.recipe.preference
    own = measures_of(section.loss)
    loss = cast("PreferenceLoss", comparison.loss)
    budget, progress = comparison.budget, comparison.progress
    free_memory()
    with comparison.before():
        base = log_probs(loss, examples, budget, progress, "initial")
    tuned = log_probs(loss, examples, budget, progress, "fine-tuned")
    base_nll, tuned_nll = own.good_nll(examples, base), own.good_nll(examples, tuned)
    has_reference = section.loss in WITH_REFERENCE
    begun_elsewhere = "start" in read_json(comparison.run.lock)["inputs"]  # with an adapter that is lost
    good_base, good_tuned = ([one for one in losses if one[1]] for losses in (base_nll, tuned_nll))
    compared = compare_answers(replace(comparison, base_nll=good_base, tuned_nll=good_tuned))
    compared.record["num_examples"] = len(examples)
    own.add(
        compared.record,
        section,
        examples,
        base=base,
        tuned=tuned,
        reference=base if has_reference and (comparison.started or not begun_elsewhere) else None,
    )
    return replace(compared, base_nll=base_nll, tuned_nll=tuned_nll)
