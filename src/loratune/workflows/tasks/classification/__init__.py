"""`model.task: sequence_classification`: the model learns to name the class of a text or of a pair of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratune.recipe.tasks import require_text
from loratune.run.errors import plural
from loratune.workflows.tasks.task import Compared, Comparison, Task, TaskStarter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from peft import PeftModel
    from rich.console import RenderableType
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from loratune.data.examples import Example
    from loratune.data.prepared import PreparedData
    from loratune.data.prompts import Prompt
    from loratune.data.rows.row import Row
    from loratune.evaluation.user_metric import UserMetric
    from loratune.model.classifier import Classes
    from loratune.model.device import Choice
    from loratune.model.load import BaseModel
    from loratune.planning.task import StepCosts, TaskModel
    from loratune.recipe.recipe import Recipe
    from loratune.run.directory import Record
    from loratune.run.progress import Progress
    from loratune.run.records.evaluation import EvaluationRecord
    from loratune.run.records.lock import LockRecord
    from loratune.run.records.plan import PlannedData
    from loratune.training.loss import SupervisedLoss
    from loratune.training.trainer import RunTrainer, TrainerSetup
    from loratune.workflows.certify import Exported

COLUMNS = ("text", "sentence1", "sentence2", "label")
"""The names of `data.columns` that classification reads."""

_SUPPORTED = {
    "model": {"name", "revision", "dtype", "trust_remote_code", "task"},
    "data": {"train", "eval", "columns", "max_length", "on_long", "on_bad_row", "streaming"},
    "lora": {"r", "alpha", "dropout", "targets", "layers", "variant"},
    "train": {
        *("output_dir", "epochs", "learning_rate", "batch_size", "optimizer", "lora_plus_ratio", "schedule"),
        *("warmup_fraction", "weight_decay", "max_grad_norm", "seed", "engine", "device", "token_budget", "compile"),
        *("recompute", "eval_every", "save_every", "log_every", "keep_checkpoints", "final_adapter", "on_bad_step"),
        *("max_skipped_steps", "report_to", "strategy", "max_steps", "share_prefixes"),
    },
}
"""Settings that classification supports. Every other one must have its default, so a new setting is refused until it
is added here."""

_REFUSED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("data.streaming", (True,), "the names of the labels are found by reading all rows"),
    ("train.compile", (True,), "its layers run uncompiled"),
    ("lora.variant", ("pissa", "olora"), "its adapter is saved with the head, for the base as it is"),
    ("lora.variant", ("eva", "loftq"), "these initializations are made for models that generate text"),
    ("train.optimizer", ("muon",), "its head has vectors, and muon is for matrices"),
    ("train.strategy", ("fsdp",), "it trains in one process"),
)
"""Setting, the values that are refused, and why."""


class Classification(Task):
    """A model that names the class of a text."""

    name = "sequence_classification"
    writes_text = False
    trains_in_processes = False
    example = "text"
    training_example = "labeled text"
    prompt = "text"
    reference = "class"
    nats = "nats per text"
    short_nats = "nats per text"
    curve = "nats per text"
    marks_differences = False
    pipeline = "text-classification"
    auto_class = "SequenceClassification"

    def problems(self, recipe: Any) -> Iterator[tuple[str, str]]:
        for section in type(recipe).model_fields:
            part = getattr(recipe, section)
            for field, declared in type(part).model_fields.items():
                value, default = getattr(part, field), declared.get_default(call_default_factory=True)
                if field not in _SUPPORTED.get(section, ()) and value != default:
                    shown = list(value) if isinstance(value, tuple) else value
                    yield (
                        f"{section}.{field} is {shown}, which model.task {self.name} does not have",
                        f"leave {section}.{field} out" if default in (None, (), {}) else f"{section}.{field}={default}",
                    )
        for setting, values, why in _REFUSED:
            section, _, field = setting.partition(".")
            value = getattr(getattr(recipe, section), field)
            if value in values:
                shown = str(value).lower() if isinstance(value, bool) else value
                yield f"{setting} is {shown}, which model.task {self.name} does not have: {why}", f"leave {setting} out"
        for column in recipe.data.columns:
            if column not in COLUMNS:
                yield (
                    f"data.columns names {column}, but labeled rows have {', '.join(COLUMNS)}",
                    "data.columns={text: …, label: …}",
                )

    def positions(self, recipe: Recipe, config: Any) -> int | None:
        from loratune.workflows.tasks.classification.prepare import classifier_positions

        return classifier_positions(recipe, config)

    def resolve_model(
        self, recipe: Recipe, base: BaseModel, config: Any, max_length: int, progress: Progress
    ) -> TaskModel:
        from loratune.workflows.tasks.classification.prepare import prepare_classifier

        return prepare_classifier(recipe, base, config, max_length, progress)

    def skeleton(self, config: Any, *, trust_remote_code: bool) -> PreTrainedModel:
        from loratune.planning.parameters import skeleton

        return skeleton(config, trust_remote_code=trust_remote_code, classifier=True)

    def read_data(
        self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress
    ) -> tuple[Choice, PreparedData]:
        raise AssertionError("read by resolve_model, to know the classes")

    def render_again(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
        from loratune.workflows.tasks.classification.data import prepare_classified

        return prepare_classified(recipe.data, tokenizer, max_length=max_length, seed=recipe.train.seed).train

    def prompts(self, recipe: Recipe, data: PreparedData, tokenizer: PreTrainedTokenizerBase) -> tuple[Prompt, ...]:
        return ()

    def num_outputs(self, config: Any) -> int:
        return int(config.num_labels)

    def logits_rows(self, recipe: Recipe, config: Any, device: str) -> int:
        return recipe.train.batch_size

    def step_costs(self, model: Any) -> StepCosts:
        from loratune.model.classifier import is_decoder
        from loratune.planning.task import StepCosts

        decoder = is_decoder(model)
        return StepCosts(
            is_padded=not decoder,
            can_time_layers=decoder,
            times_head=False,
            why_uncompiled="the layers of a classifier run uncompiled",
        )

    def plan_entries(self, classes: Classes | None) -> Record:
        assert classes is not None
        return {"num_classes": len(classes.names)}

    def lock_entries(self, classes: Classes | None) -> Record:
        assert classes is not None
        return {"labels": list(classes.names)}

    def trained_on(self, lock: LockRecord) -> str:
        return f"the class of each text: {', '.join(lock.inputs.labels or ())}"

    def trained_on_with_counts(self, lock: LockRecord, data: PlannedData) -> str:
        return f"trained to predict the class of each: {', '.join(lock.inputs.labels or ())}"

    def load_options(self, lock: LockRecord) -> str:
        return f", num_labels={len(lock.inputs.labels or ())}"

    def intended_use(self) -> str:
        return ""

    def failures(self, record: EvaluationRecord, num_regressions: int, limit: str) -> str:
        num_wrong = sum(not item.tuned.score for item in record.items)
        return (
            f"The fine-tuned model misclassifies {num_wrong:,} of {len(record.items):,} texts; "
            f"{record.model_before} classifies {num_regressions:,} of these correctly."
        )

    def make_loss(self, model: PeftModel, examples: Sequence[Example], recipe: Recipe) -> tuple[SupervisedLoss, str]:
        from loratune.workflows.tasks.classification.loss import make_classification_loss

        loss, reason = make_classification_loss(model, examples)
        return loss, f"examples are padded: {reason}" if reason else ""

    def plain_loss(self, model: PeftModel, recipe: Recipe) -> SupervisedLoss:
        from loratune.workflows.tasks.classification.loss import ClassificationLoss

        return ClassificationLoss(model, packed=False)

    def reference_trainer(self, setup: TrainerSetup) -> RunTrainer:
        from loratune.workflows.tasks.classification.trl_trainer import TrlClassifierTrainer

        return TrlClassifierTrainer(setup)

    def measures(self, recipe: Recipe, metric: UserMetric | None) -> list[str]:
        from loratune.workflows.tasks.classification.measures import MEASURES

        if metric is not None:
            require_text(recipe, "--metric", "--gate accuracy>=0.9, or f1")
        return [*MEASURES]

    def compare(self, comparison: Comparison) -> Compared:
        from loratune.workflows.tasks.classification.compare import compare_classes

        return compare_classes(comparison)

    def tables(self, evaluation: Record) -> list[RenderableType]:
        from loratune.workflows.tasks.classification.measures import classification_table, confusion_table

        return [classification_table(evaluation), confusion_table(evaluation)]

    def merge(self, root: str | Path, target: Path, *, dtype: str, progress: Progress) -> Exported:
        from loratune.workflows.tasks.classification.merge import merge_classifier

        return merge_classifier(root, target, dtype=dtype, progress=progress)

    def starter_settings(self, rows: Sequence[Row]) -> TaskStarter | None:
        from loratune.workflows.tasks.classification.rows import labeled_texts

        texts, _ = labeled_texts(rows)
        labels = {text.label for text in texts}
        # labels are few, and each comes at least twice on average; otherwise `label` is a column of something else
        if not (2 * len(texts) > len(rows) and 2 <= len(labels) <= len(texts) / 2):
            return None
        is_pair = any(text.second is not None for text in texts)
        columns = "sentence1, sentence2 and label" if is_pair else "text and label"
        classes = plural(len(labels), "class", "classes")
        reason = f"the rows have {columns}, with {classes}"
        return TaskStarter(
            settings={"model.task": (self.name, reason)},
            num_rows=len(texts),
            unit="pair" if is_pair else "text",
            of_what=classes,
        )


TASK = Classification()
