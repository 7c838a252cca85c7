"""The proof by a server's answers: are they those of the trained model, and would the base's have passed too?

*Distributions.* A server names the likeliest tokens of a position. Together with all others as one, they are the
cells on which three distributions are compared: T of the trained model, B of its base, and S, the server's. KL(T ‖ S)
on cells is at most that on tokens, and KL(T ‖ B) on the same cells is its yardstick. How the server's weights were
rounded is unknown, and noise moves S away from T whatever the model is. So whether it is another model is decided by
where S is *in the direction of training*: the share of log T - log B that log S - log B has, by least squares. It is 1
for the trained model, also under the noise of 4 bits, and 0 for the base.

*Greedy answers* to chats, up to where the trained model's own lead is small. They also show the template and the stop
tokens that the server uses. Only prompts that the base answers differently say anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from loratune.exporting.certificate import NEARER_THAN_BASE, ROUNDED
from loratune.exporting.verdict import SURPRISE, allowed_flips

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.exporting.endpoint.reader import ChatAnswer
    from loratune.exporting.endpoint.reference import GreedyAnswer
    from loratune.exporting.endpoint.tokens import TopTokens
    from loratune.run.directory import Record

_SMALLEST = 1e-6
"""The probability below which a cell says nothing: log-probabilities come with five digits."""
DEVIATIONS = 4.0
"""Standard errors between a share and one half that are no accident."""


@dataclass(slots=True, kw_only=True)
class ServedDistributions:
    """Sums over positions at which a server named the likeliest tokens.

    Attributes:
        served_kl: KL(T ‖ S) of each position, in nats.
        base_kl: KL(T ‖ B).
        same_top: Whether T and S have the same likeliest token.
        decided: Whether T's likeliest token leads by the margin of the tolerance.
        shares: Per example ⟨S - B, T - B⟩ and ‖T - B‖² of log-probabilities, weighted by probability.
        num_unread: Positions that the server reads differently, or says nothing about.
    """

    served_kl: list[float] = field(default_factory=list)
    base_kl: list[float] = field(default_factory=list)
    same_top: list[bool] = field(default_factory=list)
    decided: list[bool] = field(default_factory=list)
    shares: list[tuple[float, float]] = field(default_factory=list)
    num_unread: int = 0

    def add(self, trained_SV: torch.Tensor, base_SV: torch.Tensor, tops: Sequence[TopTokens | None]) -> None:
        """Add the positions of one example.

        Args:
            trained_SV: The trained model's log-probabilities.
            base_SV: The base's.
            tops: What the server says at each position.
        """
        along, size = 0.0, 0.0
        for trained_V, base_V, top in zip(trained_SV, base_SV, tops, strict=True):
            known = {token: value for token, value in (top or {}).items() if token < len(trained_V)}
            if not known:
                self.num_unread += 1
                continue
            ids = torch.tensor(list(known))
            T, B = _cells(trained_V.double()[ids]), _cells(base_V.double()[ids])
            S = _cells(torch.tensor(list(known.values()), dtype=torch.float64))
            self.served_kl.append(float((T.exp() * (T - S)).sum()))
            self.base_kl.append(float((T.exp() * (T - B)).sum()))
            first_two = trained_V.topk(2)
            self.same_top.append(max(known, key=known.__getitem__) == int(first_two.indices[0]))
            self.decided.append(float(first_two.values[0] - first_two.values[1]) >= ROUNDED.margin)
            weights = (T.exp() + B.exp()) / 2
            learned = T - B - (weights * (T - B)).sum()
            along += float((weights * (S - B) * learned).sum())
            size += float((weights * learned * learned).sum())
        if size > 0:
            self.shares.append((along, size))

    @property
    def mean_kl(self) -> float:
        return _mean(self.served_kl)

    @property
    def mean_base_kl(self) -> float:
        return _mean(self.base_kl)

    @property
    def limit(self) -> float:
        """The largest mean KL divergence of the trained model, rounded in a way that is unknown."""
        return max(ROUNDED.mean_kl, NEARER_THAN_BASE * self.mean_base_kl)

    @property
    def share(self) -> tuple[float, float]:
        """How much of what training changed the server's outputs have, and its standard error by the jackknife."""
        along, size = (sum(values) for values in zip(*self.shares, strict=True)) if self.shares else (0.0, 0.0)
        if size == 0:
            return 0.0, math.inf
        count = len(self.shares)
        if count < 3:
            return along / size, math.inf
        left_out = [(along - one) / (size - other) for one, other in self.shares if size > other]
        mean = _mean(left_out)
        spread = sum((value - mean) ** 2 for value in left_out) * (count - 1) / count
        return along / size, math.sqrt(spread)

    def record(self) -> Record | None:
        """Return the fields of a certificate; None without positions."""
        if not self.served_kl:
            return None
        flipped = sum(d and not s for d, s in zip(self.decided, self.same_top, strict=True))
        num_decided = sum(self.decided)
        return {
            "num_examples": len(self.shares),
            "num_positions": len(self.served_kl),
            "top1_agreement": _mean([float(same) for same in self.same_top]),
            "num_decided": num_decided,
            "num_flipped": flipped,
            "decided_agreement": 1 - flipped / num_decided if num_decided else 1.0,
            "mean_kl": max(0.0, self.mean_kl),
            "max_kl": max(self.served_kl),
            "base_kl": max(0.0, self.mean_base_kl),
            "rounding_kl": 0.0,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedAnswers:
    """Greedy answers of a server, beside those of training.

    Attributes:
        wanted: What the trained model answers.
        given: What the server answers, None where it does not.
    """

    wanted: Sequence[GreedyAnswer]
    given: Sequence[ChatAnswer | None]

    @property
    def _pairs(self) -> list[tuple[GreedyAnswer, ChatAnswer]]:
        """The answers of which the trained model's beginning is clear."""
        pairs = zip(self.wanted, self.given, strict=True)
        return [(wanted, given) for wanted, given in pairs if given is not None and wanted.clear]

    @property
    def num_compared(self) -> int:
        return len(self._pairs)

    @property
    def num_same(self) -> int:
        """Answers that begin as the trained model's do."""
        return sum(given.text.strip().startswith(wanted.clear) for wanted, given in self._pairs)

    @property
    def num_base_same(self) -> int:
        """Those of the base that do: what the base would reach in the same test."""
        return sum(wanted.base.startswith(wanted.clear) for wanted, _ in self._pairs)

    @property
    def num_as_base(self) -> int:
        """Answers, among those that training changed, that begin as the base's."""
        pairs = [(wanted.base, given.text.strip()) for wanted, given in self._changed]
        return sum(text.startswith(base) if base else not text for base, text in pairs)  # a server may go on for longer

    @property
    def num_changed(self) -> int:
        """Answers that training changed."""
        return len(self._changed)

    @property
    def num_changed_same(self) -> int:
        """Those of them that the server gives as the trained model."""
        return sum(given.text.strip().startswith(wanted.clear) for wanted, given in self._changed)

    @property
    def _changed(self) -> list[tuple[GreedyAnswer, ChatAnswer]]:
        return [(wanted, given) for wanted, given in self._pairs if not wanted.base.startswith(wanted.clear)]

    @property
    def missing_stops(self) -> list[int]:
        """Stop tokens after which most answers continue that are the trained model's up to there."""
        ended: dict[int, list[bool]] = {}
        for wanted, given in self._pairs:
            if wanted.stop is not None and given.text.strip().startswith(wanted.clear):
                right = given.ended and given.text.strip() == wanted.clear
                ended.setdefault(wanted.stop, []).append(right)
        return [stop for stop, found in ended.items() if sum(found) * 2 < len(found)]

    @property
    def num_stops_seen(self) -> int:
        """Answers that show whether the server stops where training does."""
        return sum(
            wanted.stop is not None and given.text.strip().startswith(wanted.clear) for wanted, given in self._pairs
        )

    @property
    def is_same(self) -> bool:
        """Whether no more answers differ than chance explains."""
        count = self.num_compared
        return count > 0 and count - self.num_same <= allowed_flips(count, 0)

    @property
    def has_power(self) -> bool:
        """Whether the base would have failed."""
        count = self.num_compared
        return count - self.num_base_same > allowed_flips(count, 0)

    @property
    def is_other(self) -> bool:
        """Whether significantly fewer than half of the answers that training changed are the trained model's."""
        below = sum(math.comb(self.num_changed, same) for same in range(self.num_changed_same + 1))
        return below / 2**self.num_changed < SURPRISE

    def record(self) -> Record | None:
        """Return the fields of a certificate; None if no answer could be compared."""
        if not self.num_compared:
            return None
        return {
            "num_prompts": self.num_compared,
            "same": self.num_same,
            "base_same": self.num_base_same,
            "num_changed": self.num_changed,
            "as_base": self.num_as_base,
        }


def _cells(listed: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of the listed tokens and, last, of all others together."""
    listed = listed.clamp(min=math.log(_SMALLEST))
    rest = (1 - listed.exp().sum()).clamp(min=_SMALLEST)
    cells = torch.cat([listed, rest.log().reshape(1)])
    return cells - cells.logsumexp(0)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
