"""parity.json: the proof that what was exported is the model that was trained."""

from __future__ import annotations

from typing import Literal

from pydantic import RootModel

from loratune.run.records.base import FileRecord, Part


class PromptParity(Part):
    """Token ids of prompts."""

    num_prompts: int
    """Prompts compared; for a classifier, texts."""
    same_token_ids: int
    """Those with the same token ids as in training."""
    first_difference: str | None
    """First difference, in words; null if there is none."""
    compared_by: Literal["token ids", "number of tokens"] = "token ids"
    """`number of tokens` if a server reports only how many tokens it read."""


class StopTokens(Part):
    """Tokens that end an answer."""

    ids: tuple[int, ...]
    """Those of training."""
    missing: tuple[int, ...]
    """Those at which the target does not stop."""


class DistributionParity(Part):
    """Next-token distributions; for a classifier, class distributions."""

    num_examples: int
    """Examples compared."""
    num_positions: int
    """Positions compared."""
    top1_agreement: float
    """Fraction of positions with the same most likely token, 0 to 1."""
    base_kl: float = 0.0
    """Mean of KL(training ‖ base without the adapter) at the same positions, in nats."""
    rounding_kl: float = 0.0
    """Mean of KL(training ‖ training with weights rounded as the target's are), in nats; 0 if none are rounded."""
    num_decided: int
    """Positions where the most likely token leads by at least the tolerance's margin."""
    num_flipped: int = 0
    """How many of them have a different most likely token."""
    decided_agreement: float
    """Fraction of the decided positions with the same most likely token, 0 to 1."""
    mean_kl: float | None
    """Mean of KL(training ‖ target), in nats; null if logits are not finite."""
    max_kl: float | None
    """Largest of these divergences, in nats."""


class WeightsProof(Part):
    """Weights of the target vs. base and update. B: base, D: update, W: written weights, all in float32."""

    num_changed: int
    """Tensors that the adapter changes."""
    num_unchanged: int
    """Tensors that it does not change."""
    types: tuple[str, ...]
    """Types in which tensors were written."""
    relative_error: float
    """‖W − B − D‖ / ‖D‖, over all changed tensors."""
    kept: float
    """Share of the update that survived rounding: ⟨W − rounded(B), D⟩ / ‖D‖², over all changed tensors; for types that
    only llama.cpp's quantizer writes, estimated by least squares."""
    unproven: float = 0.0
    """Share of ‖D‖² in tensors that are quantized too coarsely to tell whether they contain their update, 0 to 1."""
    least_kept: float
    """Share of the update in the tensor that kept the least."""
    least_kept_tensor: str | None
    """Name of that tensor; null if no tensor was changed."""
    largest_deviation: float
    """Largest ‖W − rounded(B + D)‖ / ‖rounded(B + D) − rounded(B)‖ of a tensor: 0 is right, 1 is a lost update."""
    problems: tuple[str, ...]
    """What is missing or superfluous, or belongs to another base or another update."""
    fixes: tuple[str, ...] = ()
    """What to do about each of the problems, in the same order."""


class ToleranceUsed(Part):
    """Largest differences that are accepted."""

    mean_kl: float
    """Largest mean KL divergence, in nats: twice `rounding_kl`, plus what arithmetic explains."""
    margin: float
    """Lead of the most likely token, in nats, below which a swap does not count."""
    top1: float
    """Smallest accepted agreement at the decided positions, 0 to 1, from a binomial bound."""
    reason: str
    """Where the differences come from."""


class ScoreDifference(Part):
    """A difference with its interval, by a paired bootstrap over prompts."""

    value: float
    """The target minus the run."""
    low: float
    """Lower end of the interval of 95 %."""
    high: float
    """Upper end."""


class AnswerScores(Part):
    """The metric on the same held-out prompts, answered by the target and by the run."""

    score: float
    """Score of the target's answers, 0 to 1, or 0 to 100 for `bleu`."""
    run_score: float
    """Score of the run's own answers."""
    difference: ScoreDifference
    """What the export costs: negative if the target is worse."""


class AnswerParity(Part):
    """Greedy answers of the target vs. those of the run's evaluation."""

    num_prompts: int
    """Prompts answered."""
    same_text: int
    """Answers with the same text."""
    same: int
    """Answers with the same text or, if the metric is `json`, the same value."""
    share: float
    """`same` as a fraction, 0 to 1."""
    metric: str
    """Metric of the run."""
    tokens_per_second: float | None = None
    """Generated tokens per second, one answer at a time, without reading the prompt; null if none was generated."""
    scores: AnswerScores | None = None
    """The metric on these answers; null if there is none, or if it is the user's own."""


class GreedyParity(Part):
    """Greedy answers of a server to chats, up to where the trained model's lead is small."""

    num_prompts: int
    """Prompts compared."""
    same: int
    """Answers that begin like the trained model's."""
    base_same: int
    """How many answers of the base without the adapter do."""
    num_changed: int
    """Prompts that the base answers differently."""
    as_base: int
    """How many answers to these prompts are the base's."""


class ServedParity(Part):
    """What a server answered."""

    model: str
    """Name of the model in requests."""
    way: str | None
    """How the server returns log-probabilities: `prompt_logprobs`, `echo` or `one token at a time`; null if it
    does not."""
    num_unread: int
    """Positions for which it returned nothing, or whose tokens it reads differently."""
    share: float | None
    """How much of what training changed shows in its outputs, by least squares over log-probabilities: 1 for the
    trained model, 0 for the base; null if that cannot be measured."""
    share_error: float | None
    """Standard error of `share`."""
    greedy: GreedyParity | None
    """Comparison of greedy answers; null if none could be compared."""


class CertificateRecord(FileRecord):
    """A certificate: `parity.json` of an exported folder."""

    kind: str
    """What was written, such as `merge` or `gguf`; `endpoint`: a server."""
    run: str
    """Run directory."""
    path: str
    """Folder that was written, or URL of the server."""
    adapter_sha256: str
    """SHA-256 of the adapter's weights."""
    passed: bool
    """Whether it is the same model: `verdict` is `same`."""
    verdict: Literal["same", "different", "undecided"] = "same"
    """`undecided`: nothing differs, but the base without the adapter would have passed too."""
    reason: str = ""
    """What the verdict is based on, or why there is none."""
    fix: str = ""
    """What to do about it; empty for `same`."""
    complaints: tuple[str, ...]
    """What differs by more than the tolerance."""
    checked_with: str
    """Program and version that loaded it back."""
    template: PromptParity
    """Comparison of prompts."""
    stop_tokens: StopTokens
    """Comparison of stop tokens."""
    distributions: DistributionParity | None
    """Comparison of distributions; null for a server without log-probabilities. For a server, over the tokens that it
    returns, with all others together as one."""
    weights: WeightsProof | None = None
    """Comparison of weights; null if they cannot be compared."""
    tolerance: ToleranceUsed
    """Largest differences that are accepted."""
    loratune: str
    """Version of loratune."""
    compared_on: str
    """`held-out`, `training` or `held-out and training` examples."""
    compares: str | None = None
    """Classifiers only: `classes`."""
    served: ServedParity | None = None
    """Servers only: what was asked and answered."""
    answers: AnswerParity | None = None
    """Comparison of full answers by llama.cpp; null if there are none."""


class Certificates(RootModel[tuple[CertificateRecord, ...]]):
    """`parity.json` of the run: the newest certificate for each place."""
