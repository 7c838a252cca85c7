"""What the verbs print with `--json`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import RootModel

from loratune.run.records.base import FileRecord, Part
from loratune.run.records.certificate import AnswerScores, CertificateRecord
from loratune.run.records.data import DataRecord
from loratune.run.records.evaluation import EvaluationRecord
from loratune.run.records.plan import PlanRecord


class Cost(Part):
    """Cost of the run."""

    price_per_hour: float
    """Price as given with `--price-per-hour`."""
    cost: float
    """Cost of the run, in the same currency."""


class PlanOutput(PlanRecord):
    """`loratune plan`: `plan.json` with the data report."""

    cost: Cost | None = None
    """Cost of the run, with `--price-per-hour`."""
    data_report: DataRecord
    """The data report."""


class ResultOutput(FileRecord):
    """`loratune train`, `resume`, `extend` and `evaluate`: the run's results."""

    run: str
    """Run directory."""
    verdict: str
    """Whether the fine-tuned model is better than the model before the run, in one sentence."""
    evaluation: EvaluationRecord | None
    """`evaluation.json`; null without held-out data."""
    plan: PlanRecord
    """`plan.json`, with what was measured."""


class ExportedType(Part):
    """A merged GGUF model of one of several types."""

    outtype: str
    """Type, such as `q4_k_m`."""
    file_bytes: int
    """Size of the file, in bytes."""
    kept: bool
    """Whether the file was kept, in the folder named after the type."""
    verdict: Literal["same", "different", "undecided"] | None = None
    """Verdict of its certificate; null for a file that is larger than `--fit`."""
    mean_kl: float | None = None
    """Mean of KL(training ‖ file), in nats."""
    tokens_per_second: float | None = None
    """Speed of llama.cpp's answers; null without answers."""
    metric: str | None = None
    """Metric of the run; null without answers."""
    num_prompts: int | None = None
    """Prompts answered; null without answers."""
    scores: AnswerScores | None = None
    """The metric of these answers, and what the type costs; null without answers."""


class ExportOutput(FileRecord):
    """`loratune merge` and `export`: what was written, and the proof that it is the trained model."""

    folder: str
    """Folder that was written; for several types, the one that contains their folders."""
    certificate: CertificateRecord
    """The certificate; for several types, that of the first one kept."""
    usage: tuple[str, ...]
    """Commands that use it."""
    types: tuple[ExportedType, ...] = ()
    """Several types only: the result for each, in the order in which they were tried."""


class SampleOutput(Part):
    """`loratune sample`: answers that were drawn, and the rows made of them."""

    file: str
    """File with the rows."""
    metric: str
    """Metric that scored the answers."""
    num_rows: int
    """Number of rows written."""
    num_prompts: int
    """Number of prompts answered."""
    num_answers: int
    """Number of answers drawn."""
    mean_score: float
    """Mean score of all answers, 0 to 1."""
    solved: float
    """Share of prompts with a good enough answer, 0 to 1."""
    left_out: dict[str, int]
    """Why prompts gave no row, each with the number of prompts."""
    unusable: dict[str, int]
    """Why answers could not be used, each with the number of answers."""


class ReportOutput(Part):
    """`loratune report`: the page that was written."""

    report: str
    """HTML file."""


class ComparisonOutput(Part):
    """`loratune compare`: the page that was written."""

    comparison: str
    """HTML file."""


class ValueThatDiffers(Part):
    """A value in which two runs differ."""

    group: str
    """Group, such as `settings` or `results`."""
    name: str
    """Name inside the group, such as `lora.r`."""
    first: Any
    """Value of the first run; null if it has none."""
    second: Any
    """Value of the second run."""


class DiffOutput(RootModel[tuple[ValueThatDiffers, ...]]):
    """`loratune diff`: everything in which two runs differ."""


class ReproductionOutput(Part):
    """`loratune reproduce`: whether the same adapter came out."""

    run: str
    """Directory of the new run."""
    original: str
    """Directory of the run that was reproduced."""
    equal: bool
    """Whether the adapters are the same file, bit for bit."""
    largest_difference: float
    """Largest difference between two weights; `Infinity` if shapes differ."""
    num_different: int
    """Weights that differ."""
    num_weights: int
    """Weights compared."""


class ServiceOutput(Part):
    """`loratune serve`: where the server listens."""

    url: str
    """Base URL of the OpenAI-compatible API."""
    server: str
    """`vllm`, `transformers` or `loratune`."""
    models: tuple[str, ...]
    """Model names: base and fine-tuned, or several of them."""


class FilePushed(Part):
    """A file that goes to the Hub."""

    path: str
    """Path inside the repository."""
    num_bytes: int
    """Size, in bytes."""
    sha256: str
    """SHA-256 of its contents."""


class PushOutput(Part):
    """`loratune push`: what went to the Hub."""

    repo: str
    """Repository, as `OWNER/NAME`."""
    url: str
    """Commit; empty after a dry run."""
    private: bool
    """Whether the repository is private."""
    files: tuple[FilePushed, ...]
    """The files."""
