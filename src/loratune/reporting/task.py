"""What the report and the model card need from a task. The defaults are those of a model that generates text."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from loratune.recipe.roles import as_written, roles_in_words
from loratune.recipe.tasks import TASKS, load_task

if TYPE_CHECKING:
    from loratune.run.records.evaluation import EvaluationRecord
    from loratune.run.records.lock import LockRecord
    from loratune.run.records.plan import PlannedData


class ReportedTask:
    """The words of a task in the report, the comparison page and the model card.

    Attributes:
        example: An example, in a word.
        training_example: A training example, in one or two words.
        prompt: Label of what the model is asked.
        reference: Label of the correct answer.
        nats: Unit of losses.
        short_nats: The same in a table.
        curve: Unit of the loss that is trained.
        marks_differences: Whether words of an answer that differ from the reference are marked.
        pipeline: The Hub's name of the task.
        auto_class: Ending of the class that loads the model: `AutoModelFor…`.
    """

    example = "conversation"
    training_example = "conversation"
    prompt = "prompt"
    reference = "reference"
    nats = "nats per trained token"
    short_nats = "nats per token"
    curve = "nats per trained token"
    marks_differences = True
    pipeline = "text-generation"
    auto_class = "CausalLM"

    def trained_on(self, lock: LockRecord) -> str:
        """Return what the loss is computed on, for the report."""
        return roles_in_words(lock.recipe["data"]["train_on"])

    def trained_on_with_counts(self, lock: LockRecord, data: PlannedData) -> str:
        """Return what the loss is computed on, for the model card."""
        return (
            f"{data.num_supervised_tokens:,} of {data.num_tokens:,} tokens trained, `train_on: "
            f"{as_written(lock.recipe['data']['train_on'])}`"
        )

    def load_options(self, lock: LockRecord) -> str:  # noqa: ARG002 - a classifier's depend on it
        """Return further arguments of `from_pretrained`, with a comma in front."""
        return ""

    def intended_use(self) -> str:
        """Return what the model card says about the input, after the name of the data."""
        return ", in the chat template saved with the adapter"

    def failures(self, record: EvaluationRecord, num_regressions: int, limit: str) -> str:
        """Return a summary of the wrong answers.

        Args:
            record: The evaluation.
            num_regressions: Wrong answers where the model before the run is correct.
            limit: The longest answer, in words.
        """
        wrong = [item for item in record.items if not item.tuned.score]
        cut = sum(not item.tuned.stopped for item in wrong)
        return (
            f"The fine-tuned model answers {len(wrong):,} of {len(record.items):,} prompts wrong; "
            f"{record.model_before} answers {num_regressions:,} of these correctly. {cut:,} wrong "
            f"{'answer' if cut == 1 else 'answers'} hit the limit of {limit}."
        )


def reported_task(lock: LockRecord | None) -> ReportedTask:
    """Return the task of a run; of a damaged lock, or of a task that this version does not have, the default."""
    recipe = getattr(lock, "recipe", {})
    name = recipe.get("model", {}).get("task")
    return cast("ReportedTask", load_task(name)) if str(name) in TASKS else ReportedTask()
