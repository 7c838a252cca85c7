"""Rows of preferences → verified examples, and the data report.

The conversations of a row, two of a pair or the one that was judged, are rendered and masked as those of supervised
fine-tuning are, with the same two ways of finding the trained tokens. In both of a pair, the tokens before the first
trained one must be the same. What differs between the kinds of rows is in `kinds`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

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
from loratune.workflows.tasks.preference.kinds import Kind, PreferenceRow, kind_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from loratune.data.examples import AnswersExample, Example
    from loratune.data.rows.conversation import Conversation
    from loratune.recipe.recipe import DataSection, PreferenceSection


@dataclass(frozen=True, slots=True, kw_only=True)
class _SidePlace(Origin):
    """Where one conversation of a row was read, so that messages name it and its example is found again."""

    number: int
    side: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.side})"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Encoded:
    """The results of the rows of a side of the data."""

    examples: list[AnswersExample]
    items: list[PreferenceRow]
    """The row of each example."""
    rejected: list[Rejected]
    dropped: list[Origin]
    """Rows left out for their length."""
    rendered: Rendered


def prepare_preferences(
    preference: PreferenceSection,
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    seed: int,
    progress: Progress = NO_PROGRESS,
) -> PreparedData:
    """Read, validate, render and verify the pairs or judged answers of a run.

    Args:
        preference: The recipe's preference section, whose loss decides what a row is.
        data: The recipe's data section.
        tokenizer: The tokenizer of the base model.
        max_length: The maximum length of prompt and answer together, in tokens.
        seed: Seed for the rows that a fractional weight picks, and for the rows that are held out.
        progress: Receives progress, lines and warnings.

    Returns:
        The examples, which are `PairExample` or `JudgedExample`, and the report. The conversations of held-out examples
        are those with the chosen, or a good answer.

    Raises:
        DataError: A row is of another kind and `on_bad_row` is `error`; nothing is left, or only answers of one label;
            or a mask cannot be verified.
        MachineError: The Hub does not answer.
    """
    backend_of(tokenizer)  # fail early if the tokenizer is not a fast one
    held_out, kind = held_out_sources(data), kind_of(preference)
    read = Reader(data, seed, progress)
    train = kind.read(read, data.train)
    evaluation: ReadSide[Any] | None = None
    if isinstance(held_out, float):
        train, evaluation = hold_out(train, held_out, seed, kind.stratum)
    elif held_out:
        evaluation = kind.read(read, held_out)
    policy = Policy.of(data, max_length)
    encoded = _encode("train", kind, train, read, tokenizer, policy)
    encoded_eval = _encode("eval", kind, evaluation, read, tokenizer, policy) if evaluation else None
    report: dict[str, Any] = {
        "train_on": data.train_on,
        "thinking": data.thinking,
        "max_length": max_length,
        "on_long": data.on_long,
        "mask": {"method": encoded.rendered.method, "verified": len(encoded.examples)},
        "train": _side_report(kind, train, encoded, tokenizer),
        "eval": _side_report(kind, evaluation, encoded_eval, tokenizer) if evaluation and encoded_eval else None,
        "overlap": overlap_report(_places(train), _places(evaluation)) if evaluation else [],
    }
    report["notices"] = list(_notices(kind, report, train, encoded, preference))
    _add_prompts(kind, report, data, tokenizer, encoded, encoded_eval)
    return PreparedData(
        train=[*encoded.examples],
        eval=[*encoded_eval.examples] if encoded_eval else [],
        eval_conversations=_shown(kind, encoded_eval),
        report=report,
    )


# ---- tokens


def _encode(
    name: str, kind: Kind, side: ReadSide[Any], read: Reader, tokenizer: PreTrainedTokenizerBase, policy: Policy
) -> _Encoded:
    conversations = [
        replace(
            conversation,
            origin=_SidePlace(file=item.origin.file, line=item.origin.line, number=number, side=kind.sides[i]),
        )
        for number, item in enumerate(side.items)
        for i, conversation in enumerate(item.sides)
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
    encoded = _Encoded(examples=[], items=[], rejected=[], dropped=[], rendered=rendered)
    for number, item in enumerate(side.items):
        made: AnswersExample | str | None = refused.get(number)
        if made is None and len(found.get(number, {})) == len(kind.sides):
            made = kind.example(item, found[number], tokenizer, policy.max_length)
        # else `on_long` left one out, or cut off all of its trained tokens
        _add(encoded, item, made)
    apply_policy(encoded.rejected, read.data)
    if not encoded.examples:
        reasons = Counter(row.reason for row in [*side.rejected, *encoded.rejected])
        raise DataError(
            f"no {name} {kind.word} is left of {plural(side.num_rows, 'row')}: {len(encoded.dropped)} dropped for "
            "their length" + "".join(f"; {number} × {reason}" for reason, number in reasons.most_common(3)),
            fix="see the reasons; raise data.max_length if the length is one of them",
        )
    return encoded


def _add(encoded: _Encoded, item: PreferenceRow, made: AnswersExample | str | None) -> None:
    """Add a row where it belongs: to the examples, the rejected or the dropped ones."""
    if made is None:
        encoded.dropped.append(item.origin)
    elif isinstance(made, str):
        encoded.rejected.append(Rejected(origin=item.origin, reason=made))
    else:
        encoded.examples.append(made)
        encoded.items.append(item)


# ---- the report


def _places(side: ReadSide[Any]) -> dict[Any, list[Origin]]:
    return places_by_key(side.keys, (item.origin for item in side.items))


def _shown(kind: Kind, encoded: _Encoded | None) -> list[Conversation]:
    """Return the conversations whose answers are references for the model's own."""
    found = [kind.shown(item) for item in encoded.items] if encoded else []
    return [conversation for conversation in found if conversation is not None]


def _side_report(
    kind: Kind, side: ReadSide[Any], encoded: _Encoded, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    counts, rejected = encoded.rendered.counts, [*side.rejected, *encoded.rejected]
    sequences = [sequence for example in encoded.examples for sequence in example.sequences]
    conversations = [conversation for item in side.items for conversation in item.sides]
    size = size_report(
        side,
        sequences,
        num_turns=sum(len(conversation.messages) for conversation in conversations),
        num_supervised=sum(int(sequence.supervised.sum()) for sequence in sequences),
    )
    size["length"]["histogram"] = histogram([len(sequence.input_ids) for sequence in sequences])
    findings = check_conversations([item.sides[0] for item in side.items], tokenizer)
    return {
        **size,
        "conversations": len(encoded.examples),
        **kind.report(encoded.examples),
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


def _notices(
    kind: Kind, report: dict[str, Any], train: ReadSide[Any], encoded: _Encoded, preference: PreferenceSection
) -> Iterator[str]:
    yield from encoded.rendered.notices
    yield from unread_notices(train, "train")
    yield from row_notices(report, len(train.items), kind=kind.word, measure="the accuracy")
    yield from kind.notices(report["train"], preference)
    for name in ("train", "eval"):
        side = report[name]
        if side and side["dropped"]:
            where = f": {places(encoded.dropped)}" if name == "train" else ""
            number = plural(side["dropped"], f"{kind.word} was", f"{kind.word}s were")
            cut = ", or both are cut before they differ" if len(kind.sides) > 1 else ""
            yield (
                f"{name}: {number} left out because of {report['max_length']:,} tokens (data.max_length): an answer is "
                f"too long{cut}{where}."
            )
        if side and side["truncated"]:
            number = plural(side["truncated"], "answer is", "answers are")
            yield f"{name}: {number} cut at {report['max_length']:,} tokens (data.max_length)."


def _add_prompts(
    kind: Kind,
    report: dict[str, Any],
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    train: _Encoded,
    evaluation: _Encoded | None,
) -> None:
    """Add what is known of the prompts to the data report, and a notice for each finding."""
    conversations: list[list[Conversation]] = [
        [item.sides[0] for item in side.items] if side else [] for side in (train, evaluation)
    ]
    for name, chosen in zip(("train", "eval"), conversations, strict=True):
        report["notices"] += findings_in_words(check_conversations(chosen, tokenizer), name)
    shared = shared_prompts(*conversations)
    report["shared_prompts"] = [{"eval": one.as_record(), "train": other.as_record()} for one, other in shared]
    if shared:
        have = plural(len(shared), f"held-out {kind.word} has", f"held-out {kind.word}s have")
        report["notices"].append(
            f"{have} the same prompt as a training {kind.word}, with another answer: "
            f"{places([one for one, _ in shared])}."
        )
    chosen_examples = [example.sequences[0] for example in train.examples]
    check = compare_with_prompts(chosen_examples, conversations[0], tokenizer, thinking=data.thinking)
    report["prompts"] = check.as_record()
