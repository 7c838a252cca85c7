"""The parts of a prepared run, in the order in which `prepare` finds them out: model, adapter, data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.model.device import Choice
from loratune.model.load import BaseModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from loratune.data.prepared import PreparedData
    from loratune.model.classifier import Classes
    from loratune.planning.parameters import ParameterCount


@dataclass(frozen=True, slots=True, kw_only=True)
class RunModel:
    """The base model, before any weights are loaded.

    Attributes:
        base: Where the base model's files are.
        skeleton: The model on the meta device, with rows for the new tokens.
        tokenizer: The base model's tokenizer, with the new tokens.
        new_tokens: Their token ids.
        classes: Names and head of a model that classifies; None for one that generates text.
        positions: The most tokens of a sequence; None if the model states no limit.
        max_length: The most tokens of an example, and why.
        device: cpu, cuda or mps, and why.
        data: The examples, if the task had to read them to know the model.
        notes: What a user would not expect of the model, a sentence each.
        num_added_parameters: Parameters of the embedding rows of the new tokens.
    """

    base: BaseModel
    skeleton: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    new_tokens: tuple[int, ...]
    classes: Classes | None
    positions: int | None
    max_length: Choice
    device: Choice
    data: PreparedData | None = field(repr=False)
    notes: tuple[str, ...]
    num_added_parameters: int

    @property
    def text_config(self) -> Any:
        """The configuration of the part that reads text."""
        return self.skeleton.config.get_text_config()

    @property
    def head(self) -> tuple[str, ...]:
        """Modules of a classification head, which are trained in full."""
        return self.classes.head if self.classes else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunAdapter:
    """What is trained.

    Attributes:
        targets: Full names of the adapted modules.
        targets_in_words: The same, for people.
        parameters: Exact counts.
        start: Folder of the adapter to start from; None for a fresh one.
    """

    targets: tuple[str, ...] = field(repr=False)
    targets_in_words: str
    parameters: ParameterCount = field(repr=False)
    start: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunParts:
    """Model, adapter and data: what memory and time are estimated from."""

    model: RunModel
    adapter: RunAdapter
    data: PreparedData

    @classmethod
    def of_configuration(
        cls, skeleton: PreTrainedModel, targets: tuple[str, ...], parameters: ParameterCount, data: PreparedData
    ) -> RunParts:
        """Return the parts of a run whose model is a configuration alone, without files and tokenizer.

        Args:
            skeleton: The model on the meta device.
            targets: Full names of the adapted modules.
            parameters: What is trained.
            data: Examples; without prompts, since there is no tokenizer.
        """
        tokenizer: Any = None
        model = RunModel(
            base=BaseModel(name="", path=Path()),
            skeleton=skeleton,
            tokenizer=tokenizer,
            new_tokens=(),
            classes=None,
            positions=None,
            max_length=Choice(""),
            device=Choice(""),
            data=None,
            notes=(),
            num_added_parameters=0,
        )
        adapter = RunAdapter(targets=targets, targets_in_words="", parameters=parameters, start=None)
        return cls(model=model, adapter=adapter, data=data)
