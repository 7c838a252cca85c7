"""Prepared examples as the arrays of a cache entry, and back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loratune.data.examples import Example
from loratune.data.rows.conversation import Conversation
from loratune.data.rows.row import Origin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.data.cache import Arrays


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedData:
    """The contents of a cache entry; see `PreparedData`."""

    train: list[Example]
    eval: list[Example]
    eval_conversations: list[Conversation]
    report: dict[str, Any]


def to_arrays(data: CachedData) -> Arrays | None:
    """Return prepared data as arrays; None if its conversations contain values that JSON does not have (dates of a
    Parquet file)."""
    record = {
        "report": data.report,
        "eval_conversations": [
            [
                c.messages,
                c.tools,
                c.text,
                c.origin.file,
                c.origin.line,
                c.excluded,
                c.forced_trained,
                c.given,
                c.started,
            ]
            for c in data.eval_conversations
        ],
        "files": list(dict.fromkeys(e.origin.file for e in [*data.train, *data.eval])),
    }
    try:
        text = json.dumps(record)
    except (TypeError, ValueError):
        return None
    if _conversations(json.loads(text)) != data.eval_conversations:
        return None
    arrays: Arrays = {"record": np.frombuffer(text.encode(), dtype=np.uint8)}
    files = {file: number for number, file in enumerate(record["files"])}
    for name, examples in (("train", data.train), ("eval", data.eval)):
        arrays[f"{name}.input_ids"] = np.concatenate([np.empty(0, np.int32), *(e.input_ids for e in examples)])
        arrays[f"{name}.supervised"] = np.concatenate([np.empty(0, np.bool_), *(e.supervised for e in examples)])
        places = [(len(e.input_ids), files[e.origin.file], e.origin.line) for e in examples]
        arrays[f"{name}.places"] = np.array(places, dtype=np.int64).reshape(-1, 3)
    return arrays


def from_arrays(arrays: Arrays) -> CachedData:
    """Return the data from which `to_arrays` made these arrays."""
    record = json.loads(arrays["record"].tobytes())
    return CachedData(
        train=_examples(arrays, "train", record["files"]),
        eval=_examples(arrays, "eval", record["files"]),
        eval_conversations=_conversations(record),
        report=record["report"],
    )


def _examples(arrays: Arrays, name: str, files: Sequence[str]) -> list[Example]:
    ids, supervised, places = (arrays[f"{name}.{field}"] for field in ("input_ids", "supervised", "places"))
    stops = places[:, 0].cumsum().tolist()
    return [
        Example(
            input_ids=ids[stop - length : stop],
            supervised=supervised[stop - length : stop],
            origin=Origin(file=files[file], line=line),
        )
        for stop, (length, file, line) in zip(stops, places.tolist(), strict=True)
    ]


def _conversations(record: dict[str, Any]) -> list[Conversation]:
    return [
        Conversation(
            messages=tuple(messages),
            tools=None if tools is None else tuple(tools),
            text=text,
            origin=Origin(file=file, line=line),
            excluded=tuple(excluded),
            forced_trained=tuple(forced_trained),
            given=tuple(given),
            started=None if started is None else (started[0], started[1]),
        )
        for messages, tools, text, file, line, excluded, forced_trained, given, started in record["eval_conversations"]
    ]
