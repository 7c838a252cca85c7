"""A merged classifier, loaded back by transformers."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from loratune.data.examples import LabelledExample


class ClassifierReader:
    """A folder with a classifier and its tokenizer, as a `Target` of `parity`: places are examples, tokens are classes.

    Args:
        folder: With the model and its tokenizer.
        examples: That will be asked about; they know which text of a pair a token is of.
        max_length: Where training cut texts.
        device: Where.
        trust_remote_code: Whether Python files that come with the model may run.
    """

    def __init__(
        self,
        folder: Path,
        examples: Sequence[LabelledExample],
        *,
        max_length: int,
        device: str,
        trust_remote_code: bool,
    ) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        options = {"trust_remote_code": trust_remote_code}
        model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto", **options)
        self._model = model.to(device).eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, **options)
        self._max_length = max_length
        self._types = {tuple(example.input_ids.tolist()): example.token_types for example in examples}
        self.checked_with = f"transformers {importlib.metadata.version('transformers')}"

    @property
    def names(self) -> list[str]:
        """Of the classes, as the folder's configuration has them."""
        return [self._model.config.id2label[number] for number in range(self._model.config.num_labels)]

    def prompt_ids(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None) -> list[int]:
        """The tokens of a text, or of the two of a pair: the contents of the messages."""
        texts = [message["content"] for message in messages]
        ids: list[int] = self._tokenizer(*texts, truncation=True, max_length=self._max_length)["input_ids"]
        return ids

    @torch.no_grad()
    def logits(self, input_ids: Sequence[int], places: Sequence[int]) -> torch.Tensor:
        """Float32 [1, C] of an example."""
        types = self._types[tuple(input_ids)]
        ids = torch.tensor([list(input_ids)], device=self._model.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if types is not None:
            inputs["token_type_ids"] = torch.from_numpy(types).long()[None].to(ids.device)
        output: torch.Tensor = self._model(**inputs).logits
        assert len(places) == len(output)
        return output.float()

    def ends_with(self, token_id: int) -> bool:
        """Nothing ends: no text is written."""
        return True
