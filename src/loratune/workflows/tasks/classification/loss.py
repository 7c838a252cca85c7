"""The loss of labeled examples: the sum of -log p of their classes.

For decoders, examples are packed end to end as in `loss`, and the head reads the last token of each. For encoders, they
are padded to the longest and go through the model's own forward.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from loratune.data.batch import MicroBatch, collate
from loratune.data.examples import Example, LabeledExample
from loratune.model.classifier import is_decoder
from loratune.model.kernels.attention import PackingUnsupportedError
from loratune.model.kernels.dropout import rows_of_forward
from loratune.training.loss import CHECK_TOKENS, SupervisedLoss, fastest_loss, use_packed_attention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import PeftModel


class ClassificationLoss(SupervisedLoss):
    """The loss of a classifier with an adapter: `SupervisedLoss` with an example in place of a supervised token.

    Args:
        model: The adapted classifier.
        packed: Whether examples share one forward without padding, which decoders support. False: they are padded.

    Raises:
        PackingUnsupportedError: The architecture does not support packed examples.
    """

    pads = True

    def __init__(self, model: PeftModel, *, packed: bool = True) -> None:
        self._classifier: Any = model.get_base_model()
        self.model = model
        self.packed = packed
        self._own_attention = self._classifier.config._attn_implementation
        if packed:
            if not is_decoder(self._classifier):
                raise PackingUnsupportedError(
                    f"{type(self._classifier).__name__} is not a decoder with a head on its last token"
                )
            use_packed_attention(self._classifier)
        self.decoder: Any = self._classifier.base_model
        self._pad_token_id: int = self._classifier.config.get_text_config().pad_token_id

    def sum(self, batch: MicroBatch, each: torch.Tensor | None = None) -> torch.Tensor:
        """Sum -log p of the classes of a micro-batch; return a float32 scalar with a gradient.

        Args:
            batch: The micro-batch.
            each: float32 [E], filled with the loss of each example.
        """
        losses = cross_entropy(self._logits(batch), _labels(batch), reduction="none")
        if each is not None:
            each.copy_(losses.detach())
        return losses.sum()

    @torch.no_grad()
    def per_token(self, batch: MicroBatch) -> torch.Tensor:
        """Return -log p of each example's class, float32 [E]."""
        return cross_entropy(self._logits(batch), _labels(batch), reduction="none")

    @torch.no_grad()
    def logits(self, batch: MicroBatch) -> torch.Tensor:
        """Return the logits of the classes of each example, float32 [E, C]."""
        return self._logits(batch)

    def _logits(self, batch: MicroBatch) -> torch.Tensor:
        return (self._packed(batch) if self._shares_forward(batch) else self._padded(batch)).float()

    def _packed(self, batch: MicroBatch) -> torch.Tensor:
        hidden = self._hidden(batch.input_ids, batch)[0]
        logits: torch.Tensor = self._classifier.score(hidden[self._last_tokens(batch)])
        return logits

    def _last_tokens(self, batch: MicroBatch) -> torch.Tensor:
        """Return the position of each example's last token that is not the padding token, int64 [E].

        This is where transformers' own classifiers look, also if an example ends in the padding token.
        """
        ids, ends = batch.input_ids[0], batch.boundaries.long()
        places = torch.arange(len(ids), device=ids.device)
        starts = ends[:-1].repeat_interleave(ends.diff())
        seen = torch.where(ids != self._pad_token_id, places, starts)
        numbers = torch.arange(len(ends) - 1, device=ids.device).repeat_interleave(ends.diff())
        return ends[:-1].clone().scatter_reduce(0, numbers, seen, reduce="amax")

    def _padded(self, batch: MicroBatch) -> torch.Tensor:
        places = list(pairwise(batch.host_boundaries.tolist()))

        def rows(values: torch.Tensor, padding: int) -> torch.Tensor:
            return pad_sequence([values[0, a:b] for a, b in places], batch_first=True, padding_value=padding)

        inputs = {
            "input_ids": rows(batch.input_ids, self._pad_token_id),
            "attention_mask": rows(torch.ones_like(batch.input_ids), 0),
        }
        if batch.token_types is not None:
            inputs["token_type_ids"] = rows(batch.token_types, 0)
        numbers = None if batch.rows is None else rows(batch.rows[None], 0)
        with rows_of_forward(numbers):
            logits: torch.Tensor = self._classifier(**inputs).logits
        return logits


def make_classification_loss(model: PeftModel, examples: Sequence[Example]) -> tuple[ClassificationLoss, str]:
    """Return the fastest loss that equals the plain one on this model, and why a decoder's does not pack, if so.

    Args:
        model: The adapted classifier.
        examples: The training examples; the first tokens of the first and the last are compared.

    Raises:
        RunError: Neither packed nor padded examples reproduce the model's own logits.
    """
    heads = _heads_of(examples)
    plain = ClassificationLoss(model, packed=False)
    was_training = model.training
    model.eval()
    expected = torch.cat([plain.logits(collate([example]).to(model.device)) for example in heads])
    model.train(was_training)
    return fastest_loss(
        ClassificationLoss,
        ClassificationLoss.logits,
        model,
        heads,
        expected,
        longest=max(len(example.input_ids) for example in examples),
        may_pack=is_decoder(model.get_base_model()),
    )


def _labels(batch: MicroBatch) -> torch.Tensor:
    assert batch.labels is not None, "the examples have no labels"
    return batch.labels


def _heads_of(examples: Sequence[Example]) -> list[LabeledExample]:
    heads = []
    for number, example in enumerate((*examples[:1], *examples[-1:])):
        assert isinstance(example, LabeledExample)
        cut = slice(CHECK_TOKENS - 5 * number)
        types = None if example.token_types is None else example.token_types[cut]
        heads.append(
            replace(example, input_ids=example.input_ids[cut], supervised=example.supervised[cut], token_types=types)
        )
    return heads
