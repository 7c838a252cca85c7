"""Rows with a better and a worse answer → verified pairs of token sequences, and the data report.

Both conversations of a pair are rendered and masked as those of supervised fine-tuning are, with the same two ways of
finding the trained tokens. Then the tokens before the first trained one must be the same in both.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loratune.data.examples import Example, PairExample
from loratune.data.findings import check_conversations, findings_in_words, places
from loratune.data.masking.policy import Policy
from loratune.data.masking.render import Rendered, render
from loratune.data.masking.tokenizer import backend_of
from loratune.data.prepared import PreparedData
from loratune.data.prompt_checks import compare_with_prompts, shared_prompts
from loratune.data.report import (
    account_for_rows,
    overlap_report,
    places_by_key,
    row_notices,
    row_report,
    size_report,
    unread_notices,
    unread_report,
)
from loratune.data.rows.reading import Reader, ReadSide, apply_policy, held_out_sources, hold_out
from loratune.data.rows.row import Origin, Rejected
from loratune.data.statistics import histogram, scripts
from loratune.run.errors import DataError, plural
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.workflows.tasks.preference.rows import SIDES, Pair, read_pairs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from loratune.data.rows.conversation import Conversation
    from loratune.recipe.recipe import DataSection

LENGTH_BIAS = 0.6
"""The share of pairs whose chosen answer is the longer one from which the report speaks of a length bias; 0.5: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _SidePlace(Origin):
    """Where one side of a pair was read, so that messages name it and its example is found again."""

    number: int
    side: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.side})"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Encoded:
    """The results of the pairs of a side of the data."""

    examples: list[PairExample]
    pairs: list[Pair]
    """The pair of each example."""
    rejected: list[Rejected]
    dropped: list[Origin]
    """Pairs left out for their length."""
    rendered: Rendered


def prepare_pairs(
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    seed: int,
    progress: Progress = NO_PROGRESS,
) -> PreparedData:
    """Read, validate, render and verify the pairs of a run.

    Args:
        data: The recipe's data section.
        tokenizer: The tokenizer of the base model.
        max_length: The maximum length of prompt and answer together, in tokens.
        seed: Seed for the rows that a fractional weight picks, and for the pairs that are held out.
        progress: Receives progress, lines and warnings.

    Returns:
        The examples, which are `PairExample`, and the report. The conversations of held-out examples are those with the
        chosen answer.

    Raises:
        DataError: A row is not a pair and `on_bad_row` is `error`; nothing is left; or a mask cannot be verified.
        MachineError: The Hub does not answer.
    """
    backend_of(tokenizer)  # fail early if the tokenizer is not a fast one
    held_out = held_out_sources(data)
    read = Reader(data, seed, progress)
    train = read_pairs(read, data.train)
    evaluation: ReadSide[Pair] | None = None
    if isinstance(held_out, float):
        train, evaluation = hold_out(train, held_out, seed)
    elif held_out:
        evaluation = read_pairs(read, held_out)
    policy = Policy.of(data, max_length)
    encoded = _encode("train", train, read, tokenizer, policy)
    encoded_eval = _encode("eval", evaluation, read, tokenizer, policy) if evaluation else None
    report: dict[str, Any] = {
        "train_on": data.train_on,
        "thinking": data.thinking,
        "max_length": max_length,
        "on_long": data.on_long,
        "mask": {"method": encoded.rendered.method, "verified": len(encoded.examples)},
        "train": _side_report(train, encoded, tokenizer),
        "eval": _side_report(evaluation, encoded_eval, tokenizer) if evaluation and encoded_eval else None,
        "overlap": overlap_report(_places(train), _places(evaluation)) if evaluation else [],
    }
    report["notices"] = list(_notices(report, train, encoded))
    _add_prompts(report, data, tokenizer, encoded, encoded_eval)
    return PreparedData(
        train=[*encoded.examples],
        eval=[*encoded_eval.examples] if encoded_eval else [],
        eval_conversations=[pair.chosen for pair in encoded_eval.pairs] if encoded_eval else [],
        report=report,
    )


# ---- tokens


def _encode(
    name: str, side: ReadSide[Pair], read: Reader, tokenizer: PreTrainedTokenizerBase, policy: Policy
) -> _Encoded:
    conversations = [
        replace(
            conversation,
            origin=_SidePlace(file=pair.origin.file, line=pair.origin.line, number=number, side=SIDES[i]),
        )
        for number, pair in enumerate(side.items)
        for i, conversation in enumerate(pair.sides)
    ]
    with read.progress.task(f"preparing {name} data", len(conversations), "answers") as task:
        rendered = render(conversations, tokenizer, policy, progress=task.advance)
    found: dict[int, dict[str, Example]] = {}
    for example in rendered.examples:
        assert isinstance(example.origin, _SidePlace)
        found.setdefault(example.origin.number, {})[example.origin.side] = example
    refused: dict[int, str] = {}
    for row in rendered.rejected:
        assert isinstance(row.origin, _SidePlace)
        refused.setdefault(row.origin.number, f"{row.origin.side}: {row.reason}")
    encoded = _Encoded(examples=[], pairs=[], rejected=[], dropped=[], rendered=rendered)
    for number, pair in enumerate(side.items):
        _add(encoded, pair, found.get(number, {}), refused.get(number, ""), tokenizer, policy)
    apply_policy(encoded.rejected, read.data)
    if not encoded.examples:
        reasons = Counter(row.reason for row in [*side.rejected, *encoded.rejected])
        raise DataError(
            f"no {name} pair is left of {plural(side.num_rows, 'row')}: {len(encoded.dropped)} dropped for their length"
            + "".join(f"; {number} × {reason}" for reason, number in reasons.most_common(3)),
            fix="see the reasons; raise data.max_length if the length is one of them",
        )
    return encoded


def _add(
    encoded: _Encoded,
    pair: Pair,
    sides: dict[str, Example],
    reason: str,
    tokenizer: PreTrainedTokenizerBase,
    policy: Policy,
) -> None:
    """Add a pair where it belongs: to the examples, the rejected or the dropped ones."""
    if not reason and len(sides) < len(SIDES):  # `on_long` left one out, or cut off all of its trained tokens
        encoded.dropped.append(pair.origin)
        return
    if not reason:
        chosen, rejected = (sides[name] for name in SIDES)
        if np.array_equal(chosen.input_ids, rejected.input_ids):
            if len(chosen.input_ids) == policy.max_length:
                encoded.dropped.append(pair.origin)  # both were cut before they differ
                return
            reason = "chosen and rejected have the same tokens, so there is nothing to prefer"
        else:
            reason = _prompt_difference(chosen, rejected, tokenizer)
    if reason:
        encoded.rejected.append(Rejected(origin=pair.origin, reason=reason))
        return
    encoded.examples.append(PairExample.of(chosen, rejected, pair.origin))
    encoded.pairs.append(pair)


def _prompt_difference(chosen: Example, rejected: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """Describe how the tokens before the two answers differ; "" if they are the same."""
    prompts = [side.input_ids[: int(side.supervised.argmax())] for side in (chosen, rejected)]
    if np.array_equal(prompts[0], prompts[1]):
        return ""
    length = min(map(len, prompts))
    differs = np.flatnonzero(prompts[0][:length] != prompts[1][:length])
    at = int(differs[0]) if len(differs) else length
    texts = [str(tokenizer.decode(prompt[max(0, at - 1) : at + 12])) for prompt in prompts]
    return (
        "the tokens before the two answers differ, so they are not answers to the same prompt: "
        f"{texts[0]!r} before chosen, {texts[1]!r} before rejected"
    )


# ---- the report


def _places(side: ReadSide[Pair]) -> dict[Any, list[Origin]]:
    return places_by_key(side.keys, (pair.origin for pair in side.items))


def _side_report(side: ReadSide[Pair], encoded: _Encoded, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    counts, rejected = encoded.rendered.counts, [*side.rejected, *encoded.rejected]
    sequences = [sequence for example in encoded.examples for sequence in example.sequences]
    conversations = [conversation for pair in side.items for conversation in pair.sides]
    size = size_report(
        side,
        sequences,
        num_turns=sum(len(conversation.messages) for conversation in conversations),
        num_supervised=sum(int(sequence.supervised.sum()) for sequence in sequences),
    )
    size["length"]["histogram"] = histogram([len(sequence.input_ids) for sequence in sequences])
    findings = check_conversations([pair.chosen for pair in side.items], tokenizer)
    return {
        **size,
        "conversations": len(encoded.examples),
        "pairs": _lengths(encoded.examples),
        "truncated": counts.get("truncated", 0),
        "dropped": len(encoded.dropped),
        "dropped_for_length": len(encoded.dropped),
        "dropped_with_nothing_to_train_after_truncation": 0,
        "verified": len(encoded.examples),
        "straddling_tokens": counts.get("straddling", 0),
        "answers_with_thoughts": counts.get("thoughts", 0),
        "special_tokens_in_text": counts.get("special_tokens_in_text", 0),
        **row_report(_places(side), rejected),
        **account_for_rows(side, len(encoded.examples), num_rejected=len(rejected), num_dropped=len(encoded.dropped)),
        **unread_report(side, {}),
        "scripts": scripts([message.get("content") or "" for c in conversations for message in c.messages]),
        "findings": [finding.as_record() for finding in findings],
    }


def _lengths(examples: list[PairExample]) -> dict[str, Any]:
    """Compare the lengths of chosen and rejected answers."""
    lengths = np.array([[int(part.supervised.sum()) for part in example.sequences] for example in examples])
    chosen, rejected = lengths.T
    return {
        "chosen_tokens": float(chosen.mean()),
        "rejected_tokens": float(rejected.mean()),
        "chosen_longer": float(((chosen > rejected) + 0.5 * (chosen == rejected)).mean()),
    }


def _notices(report: dict[str, Any], train: ReadSide[Pair], encoded: _Encoded) -> Iterator[str]:
    yield from encoded.rendered.notices
    yield from unread_notices(train, "train")
    yield from row_notices(report, len(train.items), kind="pair", measure="the accuracy")
    pairs = report["train"]["pairs"]
    if pairs["chosen_longer"] >= LENGTH_BIAS:
        yield (
            f"the chosen answer is the longer one in {pairs['chosen_longer']:.0%} of the pairs (on average "
            f"{pairs['chosen_tokens']:.0f} and {pairs['rejected_tokens']:.0f} tokens): preferences also teach length "
            "(Park et al. 2024, arXiv 2403.19159); evaluation.json compares the lengths of the answers."
        )
    for name in ("train", "eval"):
        side = report[name]
        if side and side["dropped"]:
            where = f": {places(encoded.dropped)}" if name == "train" else ""
            number = plural(side["dropped"], "pair was", "pairs were")
            yield (
                f"{name}: {number} left out because of {report['max_length']:,} tokens (data.max_length): an answer is "
                f"too long, or both are cut before they differ{where}."
            )
        if side and side["truncated"]:
            number = plural(side["truncated"], "answer is", "answers are")
            yield f"{name}: {number} cut at {report['max_length']:,} tokens (data.max_length)."


def _add_prompts(
    report: dict[str, Any],
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    train: _Encoded,
    evaluation: _Encoded | None,
) -> None:
    """Add what is known of the prompts to the data report, and a notice for each finding."""
    conversations: list[list[Conversation]] = [
        [pair.chosen for pair in side.pairs] if side else [] for side in (train, evaluation)
    ]
    for name, chosen in zip(("train", "eval"), conversations, strict=True):
        report["notices"] += findings_in_words(check_conversations(chosen, tokenizer), name)
    shared = shared_prompts(*conversations)
    report["shared_prompts"] = [{"eval": one.as_record(), "train": other.as_record()} for one, other in shared]
    if shared:
        have = plural(len(shared), "held-out pair has", "held-out pairs have")
        report["notices"].append(
            f"{have} the same prompt as a training pair, with another answer: {places([one for one, _ in shared])}."
        )
    chosen_examples = [example.sequences[0] for example in train.examples]
    check = compare_with_prompts(chosen_examples, conversations[0], tokenizer, thinking=data.thinking)
    report["prompts"] = check.as_record()
