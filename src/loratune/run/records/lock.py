"""lock.json: every effective setting and input, so that resuming on changed inputs is noticed."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict

from loratune.run.records.base import FileRecord, Part
from loratune.run.records.plan import ChoiceRecord


class Fingerprints(Part):
    """SHA-256 of prepared examples."""

    tokens: str
    """SHA-256 of all token ids."""
    mask: str
    """SHA-256 of which tokens are trained."""
    classes: str | None = None
    """Classifiers only: SHA-256 of classes and token types."""


class StreamFingerprints(Part):
    """Fingerprints of streamed data, besides `rows` an entry per file: file → fingerprint of its rows."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, str]

    rows: int
    """Number of training rows."""


class Inputs(Part):
    """What the run is made from. A task may add entries of its own."""

    model_config = ConfigDict(extra="allow")

    model: dict[str, str]
    """File of the base model → SHA-256."""
    model_path: str
    """Folder of the base model on this machine."""
    model_revision: str | None
    """Commit of a Hub model; null for a local one."""
    template: str
    """SHA-256 of the chat template."""
    train: Fingerprints | StreamFingerprints
    """Training examples."""
    eval: Fingerprints
    """Held-out examples."""
    labels: tuple[str, ...] | None = None
    """Classifiers only: names of the classes, in their order."""
    start: dict[str, str] | None = None
    """File of the adapter that training starts from → SHA-256."""
    forgetting: Fingerprints | None = None
    """Examples of `evaluate.forgetting`."""


class AdapterSummary(Part):
    """The adapter."""

    targets: str
    """Adapted modules, in words."""
    trainable: int
    """Trained parameters."""


class Machine(Part):
    """The machine of the run."""

    platform: str
    """Operating system and its version."""
    processor: str
    """Architecture, such as `x86_64`."""
    threads: int
    """Threads of torch."""
    processes: int
    """Processes of the run."""


class Lineage(Part):
    """The run that this one extends."""

    run: str
    """Its directory."""
    step: int
    """Optimizer step of the checkpoint that this run starts from."""
    adapter: str
    """SHA-256 of the adapter in that checkpoint."""
    exact: bool
    """Whether this run equals (on a CPU, bit for bit) one that trains its recipe from the first step."""
    trained_on: tuple[str, ...]
    """Names of the data that it, and the runs that it extends, were trained on."""
    differs: tuple[str, ...]
    """What this run has otherwise: settings as `train.epochs (1 → 2)`, and inputs."""
    command: str
    """The command that extends it in this way."""


class LockRecord(FileRecord):
    """`lock.json`: every effective setting, and the fingerprints of all inputs."""

    recipe: dict[str, dict[str, Any]]
    """The recipe with every `auto` resolved: section → field → value, as in `loratune schema`."""
    choices: dict[str, ChoiceRecord]
    """Setting → automatic choice."""
    inputs: Inputs
    """Fingerprints of everything that decides the run."""
    adapter: AdapterSummary
    """The adapter."""
    versions: dict[str, str]
    """Package → version, and `python`."""
    machine: Machine
    """The machine."""
    written: dict[str, dict[str, Any]]
    """The recipe as written, with `auto`: section → field → value."""
    launch: str
    """Identity of the launch, the same when torchrun restarts the processes; empty without a launcher."""
    folder: str = ""
    """The working folder in which the run began, from which relative paths of its recipe start."""
    extends: Lineage | None = None
    """Extended runs only (`loratune extend`): the run that this one extends."""
