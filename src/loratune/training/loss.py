"""The loss of a micro-batch: the sum over its supervised tokens of -log p, or of its label-smoothed form.

    input_ids [1, T]  → decoder, examples packed end to end     → hidden states [1, T, H]
                      → only positions that predict a           → [S, H]
                        supervised token
                      → output head and cross-entropy in chunks → one float32 scalar

This is the fast path. Its reference is the model's own forward with labels, as `SFTTrainer` calls it; `make_loss`
compares the two on the user's own model and data before a run starts, and packs only where they agree.

Shapes: T tokens of a micro-batch, S of them supervised, H hidden width, V vocabulary.
"""

from __future__ import annotations

from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from loratune.data.batch import MicroBatch, collate
from loratune.data.examples import Example
from loratune.data.shared_prefixes import share_prefixes
from loratune.model.adapter.attach import use_fast_layers
from loratune.model.adapter.modules_to_save import head_weights
from loratune.model.kernels.attention import PACKED, PackingUnsupportedError, observe_attention, register
from loratune.model.kernels.cross_entropy import Head, cross_entropy_per_token, head_logits, sum_cross_entropy
from loratune.model.kernels.dropout import rows_of_forward
from loratune.run.errors import RunError
from loratune.training.packing_support import decoder_of, longest_packed, obstacle, refuses_boundaries

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from peft import PeftModel

    from loratune.run.directory import Record
    from loratune.training.neftune import EmbeddingNoise
    from loratune.training.token_budget import TokenBudget

CHECK_TOKENS = 24
"""Tokens of each of the two examples on which the fast path is compared with the plain one."""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.03}
"""Type of the frozen weights → largest accepted root mean square difference of the tokens' losses, in nats.

With SmolLM2-135M in bfloat16 the plain path differs from float32 by 0.069, the packed one by 0.073, and the two differ
by 0.078: each rounds in its own way.
"""


def output_head(causal_lm: Any) -> Head:
    """Return the output head of a causal language model, as it is now: trained or not, adapter on or off.

    Raises:
        RunError: The head is adapted or not a linear layer, which the fast path does not support.
    """
    layer = causal_lm.get_output_embeddings()
    weights = head_weights(layer)
    if weights is None:
        raise RunError(
            f"the fast engine does not support this output head: an adapted or unknown {type(layer).__name__}",
            fix="leave it out of lora.targets, or train.engine=trl",
        )
    config = causal_lm.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # Falcon H1
    softcap = getattr(config, "final_logit_softcapping", None)
    return weights._replace(logit_scale=float(scale), softcap=float(softcap) if softcap else None)


def use_packed_attention(causal_lm: Any) -> None:
    """Make a model's attention keep packed examples apart.

    Raises:
        PackingUnsupportedError: transformers cannot replace the model's attention.
    """
    register()
    try:
        causal_lm.set_attn_implementation(PACKED)
    except ValueError as error:
        raise PackingUnsupportedError(f"transformers cannot replace the model's attention: {error}") from error


class SupervisedLoss:
    """The loss of a model with an adapter, for training (`sum`) and for measuring (`per_token`, `logits`).

    Args:
        model: The adapted model.
        packed: Whether the examples of a micro-batch share one forward. False: one forward per example, with the
            model's own attention.

    Attributes:
        compiled: Whether the chunks of the cross-entropy run compiled.
        smoothing: Label smoothing ε in [0, 1), in `sum` alone.
        noise: NEFTune noise on the embeddings while the model is in training mode; None: no noise.
        longest_packed: Tokens of the longest example whose micro-batch may share one forward; None: no limit.
        why_unpacked: Why not all micro-batches share a forward; empty if they do.
        slow_attention: Why packed attention does not run in the device's fastest kernel; empty if it does.
        pads: Whether examples that are not packed are padded to one length, and not taken one at a time.
        sharded: Whether ranks share the model's layers (`fsdp`), so that all must call it equally often.
        shares_prefixes: Whether training lays out equal prefixes of a micro-batch's sequences once.
        why_separate: Why it does not, although the recipe wants it; empty if it does, or need not.
    """

    compiled = False
    smoothing = 0.0
    noise: EmbeddingNoise | None = None
    longest_packed: int | None = None
    why_unpacked = ""
    slow_attention = ""
    pads = False
    sharded = False
    shares_prefixes = False
    why_separate = ""

    def __init__(self, model: PeftModel, *, packed: bool = True) -> None:
        causal_lm = model.get_base_model()
        self.model = model
        self.packed = packed
        output_head(causal_lm)  # raises now, not at the first step
        self.decoder: Any = decoder_of(causal_lm)
        self._own_attention = causal_lm.config._attn_implementation
        if packed:
            use_packed_attention(causal_lm)

    @property
    def packing(self) -> Record:
        """The record `packing` of plan.json."""
        return {"packed": self.packed, "why_unpacked": self.why_unpacked, "slow_attention": self.slow_attention}

    @property
    def tolerance(self) -> float:
        """The largest root mean square difference of the tokens' losses that rounding explains, in nats."""
        return TOLERANCE[loss_dtype(self.model)]

    @property
    def head(self) -> Head:
        """The current output head, which differs with the adapter on and off if it is trained."""
        return output_head(self.model.get_base_model())

    def sum(self, batch: MicroBatch, each: torch.Tensor | None = None) -> torch.Tensor:
        """Sum the loss over the supervised tokens of a micro-batch; return a float32 scalar with a gradient.

        Args:
            batch: The micro-batch.
            each: float32 [S], filled with the loss of each supervised token.
        """
        head, distinct = self.head, batch.distinct
        settings: dict[str, Any] = {"smoothing": self.smoothing, "compiled": self.compiled}
        if distinct is None or head.is_trained:
            return sum_cross_entropy(self._predictions(batch), head, batch.targets, each_S=each, **settings)
        once_U = torch.empty_like(distinct.counts_U)
        hidden_UH, targets_U = self._predictions(batch, distinct.first_U), batch.targets[distinct.first_U]
        total = sum_cross_entropy(hidden_UH, head, targets_U, counts_S=distinct.counts_U, each_S=once_U, **settings)
        if each is not None:
            each.copy_(once_U[distinct.of_S])
        return total

    @torch.no_grad()
    def per_token(self, batch: MicroBatch) -> torch.Tensor:
        """Return -log p of each supervised token of a micro-batch, float32 [S]."""
        return cross_entropy_per_token(self._predictions(batch), self.head, batch.targets)

    @torch.no_grad()
    def logits(self, batch: MicroBatch) -> torch.Tensor:
        """Return the logits that predict each supervised token of a micro-batch, float32 [S, V]."""
        return head_logits(self._predictions(batch), self.head)

    def _predictions(self, batch: MicroBatch, chosen: torch.Tensor | None = None) -> torch.Tensor:
        """Return the hidden states at the positions that predict a supervised token, [S, H]; or the chosen of these."""
        if self._shares_forward(batch):
            hidden = self._hidden(batch.input_ids, batch)
        else:
            assert batch.tree is None, "shared prefixes in a micro-batch that does not share a forward"
            ends = batch.host_boundaries.tolist()
            rows = [None if batch.rows is None else batch.rows[a:b] for a, b in pairwise(ends)]
            examples = [batch.input_ids[:, a:b] for a, b in pairwise(ends)]
            hidden = torch.cat([self._hidden(ids, rows=own) for ids, own in zip(examples, rows, strict=True)], dim=1)
        return hidden[0, batch.predictors if chosen is None else batch.predictors[chosen]]

    def before_step(self, step: int, budget: TokenBudget) -> None:
        """Compute what the loss of a step needs of all its examples, on all ranks; here: nothing.

        Args:
            step: The step, counted from 0.
            budget: Cuts examples into micro-batches.
        """

    def may_share(self, batch: MicroBatch) -> bool:
        """Tell whether equal prefixes of this micro-batch's sequences may be laid out once."""
        return self.shares_prefixes and (self.longest_packed is None or batch.max_length <= self.longest_packed)

    def micro_batch(self, examples: Sequence[Example]) -> MicroBatch:
        """Return a micro-batch to measure these examples on, on the model's device."""
        batch = collate(examples)
        return (share_prefixes(batch) if self.may_share(batch) else batch).to(self.model.device)

    def _shares_forward(self, batch: MicroBatch) -> bool:
        """Tell whether the examples share one forward, and set the model's attention accordingly where that varies."""
        if not self.packed or self.longest_packed is None:
            return self.packed
        shares = batch.max_length <= self.longest_packed
        causal_lm: Any = self.model.get_base_model()
        attention = PACKED if shares else self._own_attention
        # Not put back afterwards: gradient checkpointing runs layers again in the backward pass.
        if causal_lm.config._attn_implementation != attention:
            causal_lm.set_attn_implementation(attention)
        return shares

    def _hidden(
        self, input_ids: torch.Tensor, batch: MicroBatch | None = None, *, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run the decoder; `batch` gives the boundaries of packed examples, None is one example alone with `rows`."""
        boundaries: dict[str, Any] = {}
        if batch is not None:
            rows = batch.rows
            boundaries = {
                "position_ids": batch.position_ids,
                "cu_seq_lens_q": batch.boundaries,
                "cu_seq_lens_k": batch.host_boundaries if batch.tree is None else batch.tree,
                "max_length_q": batch.max_length,
                "max_length_k": batch.max_length,
            }
        if self.noise is not None:
            self.noise.lengths = batch.boundaries.diff().long() if batch is not None else None
        with rows_of_forward(rows):
            hidden: torch.Tensor = self.decoder(input_ids=input_ids, use_cache=False, **boundaries)[0]
        return hidden


L = TypeVar("L", bound=SupervisedLoss)


def make_loss(model: PeftModel, examples: Sequence[Example]) -> tuple[SupervisedLoss, str]:
    """Return the fastest loss that equals the plain one on this model, and why it does not pack if it does not.

    Args:
        model: The adapted model.
        examples: The training examples; the first tokens of the first and the last are compared.

    Raises:
        RunError: Neither packed nor separate examples reproduce the model's own loss.
    """
    return make_loss_of(SupervisedLoss, model, examples)


def make_loss_of(kind: type[L], model: PeftModel, examples: Sequence[Example]) -> tuple[L, str]:
    """Return the same for a class whose log-probabilities are those of `SupervisedLoss`."""
    short_examples = _first_tokens_of(examples)
    return fastest_loss(
        kind,
        kind.per_token,
        model,
        short_examples,
        _plain_losses(model, short_examples),
        longest=max(len(sequence.input_ids) for example in examples for sequence in example.sequences),
    )


def fastest_loss(
    kind: type[L],
    ask: Callable[[L, MicroBatch], torch.Tensor],
    model: PeftModel,
    short_examples: Sequence[Example],
    expected: torch.Tensor,
    *,
    longest: int,
    may_pack: bool = True,
) -> tuple[L, str]:
    """Return the packed loss if it computes what is expected, else the one that does not pack, and the reason.

    Args:
        kind: The class of the loss.
        ask: Computes the compared values from a loss and a micro-batch.
        model: The adapted model; its PEFT layers get the fast `forward`.
        short_examples: Short examples to compare on.
        expected: The same values from the model's own forward.
        longest: Tokens of the longest training example.
        may_pack: Whether to try the packed loss.

    Raises:
        RunError: Neither loss computes what is expected, or the packed one failed on a model that should support it.
    """
    base: Any = model.get_base_model()
    own_attention = base.config._attn_implementation
    use_fast_layers(model)
    batch = collate(short_examples).to(model.device)
    tolerance, reason = TOLERANCE[loss_dtype(model)], obstacle(base) if may_pack else ""
    if may_pack and not reason:
        try:
            with observe_attention() as observed:
                loss = kind(model, packed=True)
                difference = _difference(loss, ask, batch, expected)
            windows = observed.mask_only_windows
            if difference <= tolerance:
                _rehearse(loss, batch)
                loss.slow_attention = "; ".join(sorted(observed.slow_because))
                loss.longest_packed, reason = longest_packed(base.config, windows)
                return loss, reason if loss.longest_packed is not None and longest > loss.longest_packed else ""
            reason = longest_packed(base.config, windows)[1]
            reason = reason or f"packed examples differ from separate ones by {difference:.2g}"
        except PackingUnsupportedError as error:
            reason = str(error)
        except TypeError as error:
            if not refuses_boundaries(error):  # a fault of ours or of torch's: going on slowly would hide it
                raise
            reason = f"the model's code does not take the examples' boundaries: {error}"
        base.set_attn_implementation(own_attention)
    loss = kind(model, packed=False)
    difference = _difference(loss, ask, batch, expected)
    if not difference <= tolerance:  # so written, NaN fails too
        raise RunError(
            f"the fast engine's loss differs from {type(base).__name__}'s own by {difference:.2g} (root mean square)",
            fix="train.engine=trl",
        )
    return loss, reason


def loss_dtype(model: PeftModel) -> torch.dtype:
    """Return the type of the frozen weights."""
    dtype = model.get_base_model().dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def _first_tokens_of(examples: Sequence[Example]) -> list[Example]:
    """Return the first tokens of the first and the last example, with every token supervised."""
    # Of different lengths, so that a kernel that mixes up the boundaries cannot agree by chance.
    return [
        Example(
            input_ids=example.input_ids[: CHECK_TOKENS - 5 * i],
            supervised=example.supervised[: CHECK_TOKENS - 5 * i] | True,
            origin=example.origin,
        )
        for i, example in enumerate((*examples[:1], *examples[-1:]))
    ]


@torch.no_grad()
def _plain_losses(model: PeftModel, examples: Sequence[Example]) -> torch.Tensor:
    """Return the losses of the model's own forward, one example at a time with full logits, as `SFTTrainer` sees it."""
    losses = []
    with _in_mode(model, training=False):
        for example in examples:
            input_ids = torch.from_numpy(example.input_ids).long()[None].to(model.device)
            logits = model(input_ids=input_ids, use_cache=False).logits[0].float()
            losses.append(torch.nn.functional.cross_entropy(logits[:-1], input_ids[0, 1:], reduction="none"))
    return torch.cat(losses)


@torch.no_grad()
def _rehearse(loss: SupervisedLoss, batch: MicroBatch) -> None:
    """Run one forward in training mode, where some models do more that packing may not support (attention dropout)."""
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
