"""The data report: what was read, what it became, and what was left out. It is written to `data.json`.

Conversations and labeled texts share it: a side is a list of items with a key each, and the examples made of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loratune.data.rows.fields import unread_in_words
from loratune.data.rows.row import Origin, Rejected
from loratune.run.errors import plural

if TYPE_CHECKING:
    from loratune.data.examples import Example
    from loratune.data.rows.reading import ReadSide

_SHOWN = 10
"""Lines that a notice names before it counts the rest."""

Places = dict[Hashable, list[Origin]]
"""Key of an item → where items with this key were read. A row that a weight repeats was read once."""


def places_by_key(keys: Sequence[Hashable], origins: Iterable[Origin]) -> Places:
    """Return the distinct origins of each key, both in order."""
    places: dict[Hashable, dict[Origin, None]] = {}
    for key, origin in zip(keys, origins, strict=True):
        places.setdefault(key, {})[origin] = None
    return {key: list(found) for key, found in places.items()}


def size_report(
    side: ReadSide[Any], examples: Sequence[Example], *, num_turns: int, num_supervised: int
) -> dict[str, Any]:
    """Describe the sources and the size of a side.

    Args:
        side: The side as it was read.
        examples: The examples made of it.
        num_turns: Messages of all its conversations.
        num_supervised: Tokens that carry loss; for labeled texts, their labels.
    """
    lengths = np.array([len(example.input_ids) for example in examples])
    num_tokens = int(lengths.sum())
    return {
        "sources": side.sources,
        "format": side.format,
        "rows": side.num_rows,
        "conversations": len(examples),
        "turns": num_turns,
        "tokens": num_tokens,
        "supervised_tokens": num_supervised,
        "supervised_share": num_supervised / num_tokens,
        "length": {
            "p50": int(np.percentile(lengths, 50)),
            "p95": int(np.percentile(lengths, 95)),
            "max": int(lengths.max()),
        },
    }


def row_report(places: Places, rejected: Sequence[Rejected]) -> dict[str, Any]:
    """List duplicate and rejected rows.

    Args:
        places: Where each distinct item was read.
        rejected: The rows that cannot be trained on.
    """
    duplicates = [origins for origins in places.values() if len(origins) > 1]
    return {
        "duplicates": sum(len(origins) - 1 for origins in duplicates),
        "duplicate_rows": [[origin.as_record() for origin in origins] for origins in duplicates],
        "num_rejected": len(rejected),
        "rejected": [{**row.origin.as_record(), "reason": row.reason} for row in rejected],
    }


def unread_report(side: ReadSide[Any], unwritten: Mapping[str, int]) -> dict[str, Any]:
    """List what the sources have that is not read: fields with their numbers, and files of folders.

    Args:
        side: The side as it was read.
        unwritten: Keys of tools that the chat template does not write → conversations that have them.
    """
    fields = [*side.unread.items(), *((("tool key", name), count) for name, count in unwritten.items())]
    return {
        "unread_fields": [{"place": place, "name": name, "count": count} for (place, name), count in fields],
        "files_left_out": side.left_out,
    }


def account_for_rows(side: ReadSide[Any], num_examples: int, *, num_rejected: int, num_dropped: int) -> dict[str, int]:
    """Check that every row of a side is an example, or counted under the reason why it is not.

    Args:
        side: The side as it was read, after rows were held out.
        num_examples: The rows that became examples.
        num_rejected: The rows that cannot be trained on.
        num_dropped: The rows left out for their length.

    Returns:
        The rows of the side that the held-out side has, and the further copies of these, which neither side has.
    """
    held_out, copies = side.num_held_out, side.num_held_out_copies
    assert side.num_rows == num_examples + num_rejected + num_dropped + held_out + copies, (
        f"{side.num_rows} rows, but {num_examples} examples, {num_rejected} rejected, {num_dropped} dropped, "
        f"{held_out} held out and {copies} copies of these"
    )
    return {"held_out_rows": held_out, "copies_of_held_out_rows": copies}


def unread_notices(side: ReadSide[Any], name: str) -> Iterator[str]:
    """Yield notices about the fields and files of a side that are not read."""
    if side.unread:
        yield f"Not read ({name}): {unread_in_words(side.unread)}.{_advice(side)}"
    if side.left_out:
        yield f"Not read ({name}): {_few(side.left_out)}."


def _advice(side: ReadSide[Any]) -> str:
    names = [name for place, name in side.unread if place == "column" and name in ("context", "documents")]
    return f" data.columns='{{input: {names[0]}}}' writes {names[0]} below the prompt." if names else ""


def overlap_report(train: Places, evaluation: Places) -> list[dict[str, Any]]:
    """List the held-out items that also occur in the training data."""
    return [
        {"eval": origins[0].as_record(), "train": [origin.as_record() for origin in train[key]]}
        for key, origins in evaluation.items()
        if key in train
    ]


def row_notices(report: dict[str, Any], num_train: int, *, kind: str, measure: str) -> Iterator[str]:
    """Yield notices about overlapping, duplicate and rejected rows.

    Args:
        report: The data report.
        num_train: Items of the training side.
        kind: What an item is: `conversation`, `text`, `pair` or `answer`.
        measure: What overlapping rows make look better than it is, such as `the held-out loss`.
    """
    if report["overlap"]:
        pairs = [
            f"line {pair['eval']['line']} = training line {pair['train'][0]['line']}" for pair in report["overlap"]
        ]
        occur = plural(len(pairs), f"held-out {kind} also occurs", f"held-out {kind}s also occur")
        yield f"{occur} in the training data, which makes {measure} too optimistic: {_few(pairs)}."
    if report["train"]["duplicates"]:
        groups = [
            " = ".join(f"line {place['line']}" for place in group[:_SHOWN])
            for group in report["train"]["duplicate_rows"]
        ]
        number = report["train"]["duplicates"]
        are = "is an exact duplicate" if number == 1 else "are exact duplicates"
        yield f"{number:,} of {plural(num_train, f'training {kind}')} {are}: {_few(groups, separator='; ')}."
    copies = report["train"].get("copies_of_held_out_rows", 0)
    if copies:
        were = plural(copies, f"further copy of a held-out {kind} was", f"further copies of held-out {kind}s were")
        yield f"{were} left out: the training data must not contain them."
    for name in ("train", "eval"):
        side = report[name]
        if side and side["num_rejected"]:
            were = plural(side["num_rejected"], f"{name} row was", f"{name} rows were")
            yield f"{were} left out; data.json lists them with their reasons."


def _few(parts: Sequence[str], separator: str = ", ") -> str:
    more = f" and {len(parts) - _SHOWN:,} more" if len(parts) > _SHOWN else ""
    return separator.join(parts[:_SHOWN]) + more
