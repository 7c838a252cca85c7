"""A merged classifier, loaded back by transformers."""

from __future__ import annotations

import importlib.metadata
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from loratune.model.arithmetic import float32_arithmetic

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from loratune.data.examples import LabeledExample


class ClassifierReader:
    """A folder with a classifier and its tokenizer, as a `Target` of the certificate: positions are examples, tokens
    are classes.

    Args:
        folder: The folder with model and tokenizer.
        examples: The examples to compare on; they know which text of a pair a token belongs to.
        max_length: The most tokens of a text; training cut longer ones.
        device: cpu, cuda or mps.
        trust_remote_code: Whether Python files that come with the model may run.
    """

    def __init__(
        self,
        folder: Path,
        examples: Sequence[LabeledExample],
        *,
        max_length: int,
        device: str,
        trust_remote_code: bool,
    ) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        options = {"trust_remote_code": trust_remote_code}
        model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto", **options)
        self._model = model.to(device).eval()
        self._arithmetic = ExitStack()
        self._arithmetic.enter_context(float32_arithmetic(self._model))
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, **options)
        self._max_length = max_length
        self._types = {tuple(example.input_ids.tolist()): example.token_types for example in examples}
        self.checked_with = f"transformers {importlib.metadata.version('transformers')}"

    @property
    def names(self) -> list[str]:
        """The class names in the folder's configuration."""
        return [self._model.config.id2label[number] for number in range(self._model.config.num_labels)]

    def prompt_ids(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None) -> list[int]:
        """Return the token ids of a text, or of the two of a pair, which are the contents of the messages."""
        texts = [message["content"] for message in messages]
        ids: list[int] = self._tokenizer(*texts, truncation=True, max_length=self._max_length)["input_ids"]
        return ids

    @torch.no_grad()
    def logits(self, input_ids: Sequence[int], places: Sequence[int]) -> torch.Tensor:
        """Return the logits of an example, float32 [1, C]."""
        types = self._types[tuple(input_ids)]
        ids = torch.tensor([list(input_ids)], device=self._model.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if types is not None:
            inputs["token_type_ids"] = torch.from_numpy(types).long()[None].to(ids.device)
        output: torch.Tensor = self._model(**inputs).logits
        assert len(places) == len(output)
        return output.float()

    def ends_with(self, token_id: int) -> bool:
        """Return True: a classifier has no stop token to lose."""
        return True
