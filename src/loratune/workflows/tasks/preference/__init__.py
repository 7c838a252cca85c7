"""`model.task: preference`: the model learns to prefer better answers, from pairs of them or from judged ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratune.recipe.sections.lora import BEGINS_AS_BASE
from loratune.recipe.sections.preference import WITH_REFERENCE
from loratune.run.errors import RecipeError
from loratune.workflows.tasks.generation import TextGeneration
from loratune.workflows.tasks.task import Compared, Comparison, Started, TaskStarter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from peft import PeftModel
    from rich.console import RenderableType
    from transformers import PreTrainedTokenizerBase

    from loratune.data.examples import Example
    from loratune.data.prepared import PreparedData
    from loratune.data.rows.reading import Converted
    from loratune.data.rows.row import Row
    from loratune.evaluation.user_metric import UserMetric
    from loratune.model.device import Choice
    from loratune.planning.preparation import Preparation
    from loratune.recipe.recipe import Recipe
    from loratune.run.directory import Record
    from loratune.run.progress import Progress
    from loratune.run.records.lock import LockRecord
    from loratune.run.records.plan import PlannedData
    from loratune.training.loss import SupervisedLoss
    from loratune.training.trainer import RunTrainer, TrainerSetup

COLUMNS = ("messages", "conversations", "prompt", "instruction", "input", "system", "tools", "chosen", "rejected")
"""The names of `data.columns` that pairs are read from."""

JUDGED_COLUMNS = (
    *("messages", "conversations", "prompt", "completion", "question", "answer", "instruction", "input", "output"),
    *("system", "tools", "label"),
)
"""The names of `data.columns` that answers with a label are read from."""

_REFUSED: tuple[tuple[str, tuple[Any, ...], str, str], ...] = (
    ("data.train_on", ("all",), "the answers of a pair are trained, not their prompt", "data.train_on=assistant"),
    ("data.on_long", ("split",), "a pair cannot be divided", "data.on_long=drop or truncate"),
    ("data.streaming", (True,), "the reference is computed for all pairs before step 1", "data.streaming=auto"),
    ("lora.variant", ("eva",), "its initialization is made for conversations", "lora.variant=plain"),
    (
        "lora.variant",
        ("loftq",),
        "its rewards would begin elsewhere than at the base",
        "lora.variant=plain",
    ),
)
"""Setting, the values that are refused, why, and the fix."""

_FROZEN = (
    "the loss of preferences needs a frozen output head; an adapter that has trained modules or tokens is merged first "
    "(`loratune merge`), and the merged model is trained"
)

_OFF: tuple[tuple[str, str], ...] = (
    ("train.label_smoothing", "it smooths tokens; preference.label_smoothing is for pairs"),
    ("train.neftune_noise_alpha", "its noise would be in the likelihood of both answers"),
    ("lora.modules_to_save", _FROZEN),
    ("lora.new_tokens", _FROZEN),
)
"""Settings that must be off, and why."""


class Preference(TextGeneration):
    """A model that prefers the better of two answers."""

    name = "preference"
    is_supervised = False
    example = "pair"
    training_example = "pair"
    reference = "chosen answer"
    nats = "nats per token of the chosen answer"
    curve = "loss of a pair"

    def problems(self, recipe: Any) -> Iterator[tuple[str, str]]:
        for setting, values, why, fix in _REFUSED:
            value = _value(recipe, setting)
            if value in values:
                shown = str(value).lower() if isinstance(value, bool) else value
                yield f"{setting} is {shown}, which model.task {self.name} does not have: {why}", fix
        for setting, why in _OFF:
            if value := _value(recipe, setting):
                shown = f"{value:g}" if isinstance(value, float) else list(value)
                yield f"{setting} is {shown}, which model.task {self.name} does not have: {why}", f"leave {setting} out"
        if isinstance(recipe.data.train_on, tuple) and recipe.data.train_on != ("assistant",):
            yield f"data.train_on is {list(recipe.data.train_on)}, but pairs train answers", "data.train_on=assistant"
        if recipe.data.format != "auto":
            yield f"data.format is {recipe.data.format}, but pairs have a form of their own", "data.format=auto"
        if recipe.train.engine == "trl":
            yield from self._problems_of_trl(recipe)
        yield from self._problems_of_rows(recipe)

    def _problems_of_rows(self, recipe: Any) -> Iterator[tuple[str, str]]:
        judged = recipe.preference.loss == "kto"
        known = JUDGED_COLUMNS if judged else COLUMNS
        for column in recipe.data.columns:
            if column not in known:
                yield (
                    f"data.columns names {column}, but {'judged answers' if judged else 'pairs'} have "
                    f"{', '.join(known)}",
                    f"data.columns={{prompt: …, {'completion: …, label: …' if judged else 'chosen: …, rejected: …'}}}",
                )
        if judged and recipe.train.batch_size == 1:
            yield (
                "train.batch_size is 1, but kto compares the answers of a step: its baseline is estimated from prompts "
                "with the answers to others",
                "train.batch_size=8",
            )

    def _problems_of_trl(self, recipe: Any) -> Iterator[tuple[str, str]]:
        fix, section = "train.engine=fast", recipe.preference
        if section.loss not in WITH_REFERENCE:
            yield f"train.engine is trl, whose DPOTrainer has no {section.loss} (preference.loss)", fix
        if section.label_smoothing or section.sft_weight:
            name = "label_smoothing" if section.label_smoothing else "sft_weight"
            yield f"train.engine is trl, whose losses are not compared with ours for preference.{name}", fix
        if recipe.lora.variant not in BEGINS_AS_BASE:
            # TRL adds an adapter for its reference, and PEFT then takes the start out of the base once more.
            yield f"train.engine is trl, whose reference would change the base of {recipe.lora.variant}", fix

    def choices(self, recipe: Recipe) -> dict[str, Choice]:
        from loratune.workflows.tasks.preference.objective import beta_choice

        return beta_choice(recipe.preference)

    def untrained_passes(self, recipe: Recipe, epochs: float) -> tuple[float, float]:
        # kto: as many mismatches as examples in each epoch, under the reference and under the model
        mismatches = 2 * epochs if recipe.preference.loss == "kto" else 0
        return (1 + mismatches, 1) if recipe.preference.loss in WITH_REFERENCE else (0, 0)

    def read_data(
        self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress
    ) -> tuple[Choice, PreparedData]:
        from loratune.model.device import Choice
        from loratune.workflows.tasks.preference.data import prepare_preferences

        data = prepare_preferences(
            recipe.preference,
            recipe.data,
            tokenizer,
            max_length=max_length,
            seed=recipe.train.seed,
            progress=progress,
        )
        return Choice("false"), data

    def render_again(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
        from loratune.workflows.tasks.preference.data import prepare_preferences

        section, seed = recipe.preference, recipe.train.seed
        return prepare_preferences(section, recipe.data, tokenizer, max_length=max_length, seed=seed).train

    def trained_on(self, lock: LockRecord) -> str:
        section = lock.recipe["preference"]
        what = (
            "which answers are good and which are bad" if section["loss"] == "kto" else "which of two answers is better"
        )
        return f"{what} ({section['loss']}, beta {section['beta']:g})"

    def trained_on_with_counts(self, lock: LockRecord, data: PlannedData) -> str:
        return (
            f"{data.num_supervised_tokens:,} of {data.num_tokens:,} tokens are in answers; "
            f"trained on {self.trained_on(lock)}"
        )

    def make_loss(self, model: PeftModel, examples: Sequence[Example], recipe: Recipe) -> tuple[SupervisedLoss, str]:
        from loratune.training.loss import make_loss_of
        from loratune.workflows.tasks.preference.loss import loss_class

        loss, reason = make_loss_of(loss_class(recipe.preference), model, examples)
        loss.section = recipe.preference
        return loss, f"examples go through the model one at a time: {reason}" if reason else ""

    def plain_loss(self, model: PeftModel, recipe: Recipe) -> SupervisedLoss:
        from loratune.workflows.tasks.preference.loss import loss_class

        loss = loss_class(recipe.preference)(model, packed=False)
        loss.section = recipe.preference
        return loss

    def before_training(self, started: Started) -> Preparation:
        from loratune.workflows.tasks.preference.reference import with_reference

        has_reference = started.prepared.recipe.preference.loss in WITH_REFERENCE
        return with_reference(started) if has_reference else started.prepared

    def reference_trainer(self, setup: TrainerSetup) -> RunTrainer:
        from loratune.workflows.tasks.preference.loss import JudgedLoss
        from loratune.workflows.tasks.preference.trl_judged_trainer import TrlJudgedTrainer
        from loratune.workflows.tasks.preference.trl_trainer import TrlPreferenceTrainer

        return TrlJudgedTrainer(setup) if isinstance(setup.loss, JudgedLoss) else TrlPreferenceTrainer(setup)

    def measures(self, recipe: Recipe, metric: UserMetric | None) -> list[str]:
        from loratune.workflows.tasks.preference.compare import measures_of

        return [*measures_of(recipe.preference.loss).names, *super().measures(recipe, metric)]

    def compare(self, comparison: Comparison) -> Compared:
        from loratune.workflows.tasks.preference.compare import compare_preferences

        return compare_preferences(comparison)

    def tables(self, evaluation: Record) -> list[RenderableType]:
        from loratune.workflows.tasks.preference.compare import measures_of

        return [measures_of(evaluation["preference"]["loss"]).table(evaluation), *super().tables(evaluation)]

    def starter_settings(self, rows: Sequence[Row]) -> TaskStarter | None:
        from loratune.workflows.tasks.preference.judged_rows import is_judged, to_judged
        from loratune.workflows.tasks.preference.rows import to_pairs

        found: Converted[Any] = to_pairs(rows)
        unit, settings = "pair", {"model.task": (self.name, f"the rows have {found.format}")}
        if not found.items and all(is_judged(row.value) for row in rows):
            found, unit = to_judged(rows), "answer"
            settings = {
                "model.task": (self.name, f"the rows have {found.format}"),
                "preference.loss": ("kto", "it learns from single answers that are good or bad"),
            }
            if len({item.label for item in found.items}) < 2:  # all good: to be trained as they are
                return None
        if 2 * len(found.items) <= len(rows):
            return None
        return TaskStarter(settings=settings, num_rows=len(found.items), unit=unit, of_what=found.format)

    def check_script(self, recipe: Recipe) -> None:
        """Refuse what a script for pairs cannot follow."""
        if recipe.lora.variant not in BEGINS_AS_BASE:
            # TRL adds an adapter for its reference, and PEFT then takes the start out of the base once more.
            raise RecipeError(
                f"lora.variant is {recipe.lora.variant}, and TRL's reference would change the base of it",
                fix="lora.variant=plain",
            )
        if recipe.train.early_stopping is not None or recipe.train.final_adapter == "best":
            name = "early_stopping" if recipe.train.early_stopping is not None else "final_adapter"
            raise RecipeError(
                f"train.{name} is {getattr(recipe.train, name)}, which a script for pairs cannot follow: TRL's "
                "held-out loss is a mean over batches",
                fix=f"leave train.{name} out",
            )


def _value(recipe: Any, setting: str) -> Any:
    section, _, field = setting.partition(".")
    return getattr(getattr(recipe, section), field)


TASK = Preference()
