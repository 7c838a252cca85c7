"""evaluation.json: base vs. fine-tuned on held-out data."""

from __future__ import annotations

from typing import Literal

from loratune.run.records.base import FileRecord, Part

SIDES_BEFORE = {"base": "base", "start": "before"}
"""`before` → the title of its column."""


class DifferenceRecord(Part):
    """Fine-tuned minus base."""

    value: float
    """The difference, in the measure's unit."""
    low: float | None = None
    """Lower end of its confidence interval; missing if a task has no score per document."""
    high: float | None = None
    """Upper end of its confidence interval."""


class IntervalMethod(Part):
    """How confidence intervals were computed."""

    level: float
    """Confidence, 0 to 1."""
    method: str
    """Name of the method."""
    resamples: int
    """Number of resamples."""


class AnswerRecord(Part):
    """An answer of one model."""

    text: str
    """The answer; for a classifier, the predicted class."""
    score: float | None
    """Score by the metric, 0 to 1, or 0 to 100 for `bleu`; null without a metric."""
    num_tokens: int
    """Length of the answer, in tokens."""
    stopped: bool
    """Whether it ended with a stop token, not at `evaluate.max_new_tokens`."""
    probability: float | None = None
    """Classifiers only: probability of the predicted class, 0 to 1."""


class Item(Part):
    """A held-out prompt, its reference, and both answers."""

    file: str
    """File of the row."""
    line: int | None
    """Line of the row."""
    prompt: str
    """The prompt, as the chat template writes it."""
    question: str
    """The last user message of the prompt, for human readers."""
    reference: str
    """The reference answer; for a classifier, the true class."""
    references: tuple[str, ...] | None = None
    """Several references only: all of them."""
    base: AnswerRecord
    """Answer of the base model."""
    tuned: AnswerRecord
    """Answer of the fine-tuned model."""


class ComparisonRecord(Part):
    """Losses of base and fine-tuned model on some conversations."""

    num_examples: int
    """Conversations."""
    base: dict[str, float]
    """Measure → value of the base model."""
    tuned: dict[str, float]
    """Measure → value of the fine-tuned model."""
    difference: dict[str, DifferenceRecord]
    """Measure → fine-tuned minus base."""


class FinalAdapter(Part):
    """Which adapter the run ended with."""

    kind: str
    """`last`, `best` (lowest held-out loss) or `mean` (of several checkpoints)."""
    steps: tuple[int, ...]
    """Step or steps that it comes from."""


class TaskMeasure(Part):
    """A measure of a task of lm-evaluation-harness."""

    base: float
    """Value of the base model."""
    tuned: float
    """Value of the fine-tuned model."""
    difference: DifferenceRecord
    """Fine-tuned minus base."""


class Harness(Part):
    """Tasks of lm-evaluation-harness."""

    version: str
    """Version of lm-evaluation-harness."""
    chat_template: bool
    """Whether the prompts of tasks used the chat template."""
    tasks: dict[str, dict[str, TaskMeasure]]
    """Task → measure → values."""


class GateResult(Part):
    """A threshold of `--gate` and whether it was met."""

    gate: str
    """The gate as given."""
    value: float
    """Measured value."""
    passed: bool
    """Whether the value meets the threshold."""


class Majority(Part):
    """The result of predicting the most frequent class for every text."""

    label: str
    """Most frequent class of the training data."""
    accuracy: float
    """Its accuracy on the held-out texts, 0 to 1."""
    f1: float
    """Its macro F1, 0 to 1."""


class ClassMeasures(Part):
    """Scores of the fine-tuned model on one class."""

    label: str
    """The class."""
    num_examples: int
    """Number of its held-out texts."""
    precision: float | None
    """Precision, 0 to 1; null if the class was never predicted."""
    recall: float | None
    """Recall, 0 to 1; null if no held-out text has the class."""
    f1: float | None
    """F1, 0 to 1."""


class Confusion(Part):
    """Confusion matrices: rows are true classes, columns are predicted ones."""

    labels: tuple[str, ...]
    """Classes, in the order of rows and columns."""
    base: tuple[tuple[int, ...], ...]
    """Texts, base model."""
    tuned: tuple[tuple[int, ...], ...]
    """Texts, fine-tuned model."""


class Rewards(Part):
    """Implicit rewards, beta × (log p - log p under the reference), on held-out answers; zero before training. With
    `kto`, good answers are the chosen ones and bad answers the rejected ones."""

    chosen: float
    """Mean reward of the chosen answers."""
    rejected: float
    """Mean reward of the rejected answers."""
    margin: DifferenceRecord
    """Mean difference of the two, with its confidence interval."""
    accuracy: DifferenceRecord
    """Share of pairs whose chosen answer has the higher reward, 0 to 1, with its confidence interval; ties count
    half. With `kto`, the share of good answers whose reward is positive and bad ones whose reward is negative."""


class LengthsOfAnswers(Part):
    """Lengths of answers, in tokens, to see whether length was learned."""

    chosen: float
    """Mean length of the held-out pairs' chosen answers; with `kto`, of the good answers."""
    rejected: float
    """Mean length of their rejected answers; with `kto`, of the bad answers."""
    base: float | None
    """Mean length of the base model's own answers; null if nothing was generated."""
    tuned: float | None
    """Mean length of the fine-tuned model's own answers; null if nothing was generated."""
    num_chosen_shorter: int
    """Held-out pairs whose chosen answer is the shorter one; 0 with `kto`, which has no pairs."""
    base_accuracy_where_shorter: float | None
    """Share of these whose chosen answer the base model finds likelier, 0 to 1; null without such pairs."""
    tuned_accuracy_where_shorter: float | None
    """The same for the fine-tuned model."""


class PreferenceMeasures(Part):
    """What was learned from preferences: pairs of answers, or judged answers."""

    loss: str
    """Loss of a pair or an answer, `preference.loss`."""
    beta: float
    """Strength of the preference, `preference.beta`."""
    rewards: Rewards | None
    """Implicit rewards; null for a loss without a reference."""
    lengths: LengthsOfAnswers
    """Lengths of answers."""


class EvaluationRecord(FileRecord):
    """`evaluation.json`: base vs. fine-tuned."""

    metric: str
    """Metric of the answers; `none` if they are not scored."""
    task: str | None = None
    """Classifiers only: `sequence_classification`."""
    before: Literal["base", "start"] = "base"
    """What `base` means in this file: `base`, the base model; `start`, the base with the adapter of `lora.start_from`,
    which is what the model was before the run."""
    num_examples: int
    """Held-out examples."""
    base: dict[str, float]
    """Measure → value of the base model: `nll` (nats per trained token), `perplexity`, and the metric."""
    tuned: dict[str, float]
    """The same for the fine-tuned model."""
    difference: dict[str, DifferenceRecord]
    """Measure → fine-tuned minus base."""
    signature: str | None = None
    """`bleu` only: sacreBLEU's signature."""
    majority: Majority | None = None
    """Classifiers only: the majority class."""
    note: str | None = None
    """Classifiers only: how to interpret the base model's results."""
    classes: tuple[ClassMeasures, ...] | None = None
    """Classifiers only: measures per class."""
    confusion: Confusion | None = None
    """Classifiers only: confusion matrices."""
    preference: PreferenceMeasures | None = None
    """Preferences only: rewards and lengths."""
    interval: IntervalMethod
    """How confidence intervals were computed."""
    items: tuple[Item, ...]
    """Held-out prompts with both answers."""
    forgetting: ComparisonRecord | None = None
    """Losses on `evaluate.forgetting`."""
    sources: dict[str, ComparisonRecord] | None = None
    """Several held-out sources only: source → losses on it."""
    adapter: FinalAdapter
    """Which adapter was evaluated."""
    harness: Harness | None = None
    """Tasks of lm-evaluation-harness."""
    gates: tuple[GateResult, ...] | None = None
    """Thresholds of the last `loratune evaluate`."""

    @property
    def side_before(self) -> str:
        """The name of the model before the run, over a column."""
        return SIDES_BEFORE[self.before]

    @property
    def model_before(self) -> str:
        """The name of the model before the run, in a sentence."""
        return "the base model" if self.before == "base" else "the model before this run"
