"""The loss of a micro-batch: the sum over its supervised tokens of -log p, where the recipe smooths of its smoothed form.

This is the fast path. Its plain counterpart is the model's own forward with labels, as `SFTTrainer` calls it;
`make_loss` compares the two on the user's own model and data before a run starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from peft import PeftModel

from loratune.data.batch import MicroBatch, collate
from loratune.data.examples import Example
from loratune.model.adapter.attach import use_fast_layers
from loratune.model.adapter.modules_to_save import head_weights
from loratune.model.kernels.attention import PACKED, PackingUnsupportedError, record_untold_windows, register
from loratune.model.kernels.cross_entropy import cross_entropy_per_token, head_logits, sum_cross_entropy
from loratune.run.errors import RunError
from loratune.training.neftune import EmbeddingNoise
from loratune.training.packing_support import decoder_of, longest_packed, obstacle

CHECK_TOKENS = 24
"""Tokens of each of the two examples on which the fast path is compared with the plain one."""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.03}
"""Largest root mean square of the differences of the tokens' losses, in nats. With SmolLM2-135M in bfloat16 the plain path is
0.069 from float32, the packed one 0.073, and they are 0.078 apart: each rounds in its own way."""


@dataclass(frozen=True, slots=True)
class Head:
    """How the model turns hidden states into logits: scale · (hidden·Wᵀ + bias), soft-capped; some rows of W perhaps others."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    logit_scale: float
    softcap: float | None
    rows: torch.Tensor | None
    numbers: torch.Tensor | None

    @classmethod
    def of(cls, causal_lm: Any) -> Head:
        """The output head of a causal language model.

        Raises:
            RunError: The head is no linear layer, or adapted, which the fast path does not do.
        """
        layer = causal_lm.get_output_embeddings()
        weights = head_weights(layer)
        if weights is None:
            raise RunError(
                f"the output head is an adapted or unknown {type(layer).__name__}",
                fix="leave it out, or train.engine=trl",
            )
        config = causal_lm.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # Falcon H1
        softcap = getattr(config, "final_logit_softcapping", None)
        capped = float(softcap) if softcap else None
        return cls(weights.weight, weights.bias, float(scale), capped, weights.rows, weights.numbers)


class SupervisedLoss:
    """Losses of a model with an adapter.

    Args:
        model: The adapted model.
        packed: Whether examples share one forward. False: one forward each, with the model's own attention.

    Attributes:
        compiled: Whether the chunks of the cross-entropy are computed by compiled code.
        smoothing: The part of each target that is spread over the vocabulary, in `sum` alone.
        noise: On the embeddings, while the model is in training; None: none.
        longest_packed: The longest example, in tokens, whose micro-batch shares one forward; None where all do.
        sharded: Whether the model's layers are shared with other processes (`shards`), so that all call it equally often.
    """

    compiled = False
    smoothing = 0.0
    noise: EmbeddingNoise | None = None
    longest_packed: int | None = None
    sharded = False

    def __init__(self, model: PeftModel, *, packed: bool = True) -> None:
        causal_lm = model.get_base_model()
        self.model = model
        self.packed = packed
        Head.of(causal_lm)  # refused now, not at the first step
        self.decoder: Any = decoder_of(causal_lm)
        self._own_attention = causal_lm.config._attn_implementation
        if packed:
            register()
            causal_lm.set_attn_implementation(PACKED)

    @property
    def head(self) -> Head:
        """The output head as it is now: another one where it is trained, and the adapter is switched off."""
        return Head.of(self.model.get_base_model())

    def sum(self, batch: MicroBatch, each: torch.Tensor | None = None) -> torch.Tensor:
        """Sum of the loss over the supervised tokens of a micro-batch, a float32 scalar with a gradient.

        Args:
            batch: The micro-batch.
            each: float32 [S], filled with what is summed.
        """
        head = self.head
        return sum_cross_entropy(
            self._predictions(batch),
            head.weight,
            head.bias,
            batch.targets,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            rows_NH=head.rows,
            numbers_N=head.numbers,
            smoothing=self.smoothing,
            compiled=self.compiled,
            each_S=each,
        )

    @torch.no_grad()
    def per_token(self, batch: MicroBatch) -> torch.Tensor:
        """-log p of each supervised token of a micro-batch, float32 [S]."""
        head = self.head
        return cross_entropy_per_token(
            self._predictions(batch),
            head.weight,
            head.bias,
            batch.targets,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            rows_NH=head.rows,
            numbers_N=head.numbers,
        )

    @torch.no_grad()
    def logits(self, batch: MicroBatch) -> torch.Tensor:
        """The logits that predict each supervised token of a micro-batch, float32 [S, V]."""
        head = self.head
        return head_logits(
            self._predictions(batch),
            head.weight,
            head.bias,
            head.logit_scale,
            head.softcap,
            head.rows,
            head.numbers,
        )

    def _predictions(self, batch: MicroBatch) -> torch.Tensor:
        """Hidden states at the positions that predict a supervised token, [S, H]."""
        if self._shares_forward(batch):
            hidden = self._hidden(batch.input_ids, batch)
        else:
            ends = batch.boundaries.tolist()
            examples = [batch.input_ids[:, a:b] for a, b in pairwise(ends)]
            hidden = torch.cat([self._hidden(ids) for ids in examples], dim=1)
        return hidden[0, batch.predictors]

    def _shares_forward(self, batch: MicroBatch) -> bool:
        """Whether the examples go through the model as one; its attention is set accordingly, where that varies."""
        if not self.packed or self.longest_packed is None:
            return self.packed
        shares = batch.max_length <= self.longest_packed
        causal_lm: Any = self.model.get_base_model()
        attention = PACKED if shares else self._own_attention
        if causal_lm.config._attn_implementation != attention:  # stays until the next forward: layers may be recomputed
            causal_lm.set_attn_implementation(attention)
        return shares

    def _hidden(self, input_ids: torch.Tensor, batch: MicroBatch | None = None) -> torch.Tensor:
        boundaries = (
            {
                "position_ids": batch.position_ids,
                "cu_seq_lens_q": batch.boundaries,
                "cu_seq_lens_k": batch.boundaries,
                "max_length_q": batch.max_length,
                "max_length_k": batch.max_length,
            }
            if batch is not None
            else {}
        )
        if self.noise is not None:
            self.noise.lengths = batch.boundaries.diff().long() if batch is not None else None
        hidden: torch.Tensor = self.decoder(input_ids=input_ids, use_cache=False, **boundaries)[0]
        return hidden


L = TypeVar("L", bound=SupervisedLoss)


def make_loss(model: PeftModel, examples: Sequence[Example]) -> tuple[SupervisedLoss, str]:
    """The fastest loss that equals the plain one on this model, and a reason where that is not the packed one.

    Args:
        model: The adapted model.
        examples: The training examples; the beginnings of the first and the last are used for the comparison.

    Raises:
        RunError: Neither way equals the model's own loss.
    """
    heads = _heads_of(examples)
    return fastest_loss(
        SupervisedLoss,
        SupervisedLoss.per_token,
        model,
        heads,
        _plain_losses(model, heads),
        longest=max(len(example.input_ids) for example in examples),
    )


def fastest_loss(
    kind: type[L],
    ask: Callable[[L, MicroBatch], torch.Tensor],
    model: PeftModel,
    heads: Sequence[Example],
    expected: torch.Tensor,
    *,
    longest: int,
    may_pack: bool = True,
) -> tuple[L, str]:
    """The packed loss where it says on some examples what is expected, else the one that does not pack, and the reason.

    Args:
        kind: Of the loss.
        ask: What of it is compared.
        model: The adapted model; PEFT's layers are replaced by fast ones.
        heads: The examples to ask about, short ones.
        expected: What the model's own forward says of them.
        longest: Tokens of the longest training example.
        may_pack: Whether to try.

    Raises:
        RunError: Neither way says what is expected.
    """
    base: Any = model.get_base_model()
    own_attention = base.config._attn_implementation
    use_fast_layers(model)
    batch = collate(heads).to(model.device)
    tolerance, reason = TOLERANCE[loss_dtype(model)], obstacle(base) if may_pack else ""
    if may_pack and not reason:
        try:
            with record_untold_windows() as untold:
                loss = kind(model, packed=True)
                difference = _difference(loss, ask, batch, expected)
            if difference <= tolerance:
                _rehearse(loss, batch)
                loss.longest_packed, reason = longest_packed(base.config, untold)
                return loss, reason if loss.longest_packed is not None and longest > loss.longest_packed else ""
            reason = longest_packed(base.config, untold)[1]
            reason = reason or f"packed examples differ from separate ones by {difference:.2g}"
        except (PackingUnsupportedError, TypeError, ValueError) as error:
            reason = str(error)
        base.set_attn_implementation(own_attention)
    loss = kind(model, packed=False)
    difference = _difference(loss, ask, batch, expected)
    if not difference <= tolerance:  # also when it is NaN
        raise RunError(
            f"the fast engine differs from {type(base).__name__}'s own by {difference:.2g} (root mean square)",
            fix="train.engine=trl",
        )
    return loss, reason


def loss_dtype(model: PeftModel) -> torch.dtype:
    """The type of the frozen weights."""
    dtype = model.get_base_model().dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def _heads_of(examples: Sequence[Example]) -> list[Example]:
    """The beginnings of the first and the last example, of different lengths, every token supervised."""
    return [
        Example(
            input_ids=example.input_ids[: CHECK_TOKENS - 5 * i],
            supervised=example.supervised[: CHECK_TOKENS - 5 * i] | True,
            origin=example.origin,
        )
        for i, example in enumerate((*examples[:1], *examples[-1:]))
    ]


@torch.no_grad()
def _plain_losses(model: PeftModel, heads: Sequence[Example]) -> torch.Tensor:
    """Losses by the model's own forward, one example at a time, full logits: what `SFTTrainer` would see."""
    losses = []
    with _in_mode(model, training=False):
        for example in heads:
            input_ids = torch.from_numpy(example.input_ids).long()[None].to(model.device)
            logits = model(input_ids=input_ids, use_cache=False).logits[0].float()
            losses.append(torch.nn.functional.cross_entropy(logits[:-1], input_ids[0, 1:], reduction="none"))
    return torch.cat(losses)


@torch.no_grad()
def _rehearse(loss: SupervisedLoss, batch: MicroBatch) -> None:
    """One forward as in training, where some models do more, such as attention dropout."""
    with _in_mode(loss.model, training=True), torch.random.fork_rng():
        loss.per_token(batch)


def _difference(
    loss: L, ask: Callable[[L, MicroBatch], torch.Tensor], batch: MicroBatch, expected: torch.Tensor
) -> float:
    with _in_mode(loss.model, training=False):
        return float((ask(loss, batch) - expected).square().mean().sqrt())


@contextmanager
def _in_mode(model: torch.nn.Module, *, training: bool) -> Iterator[None]:
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)
