"""From the recipe's data section to verified examples and the data report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from loratune.data.cache import Arrays, Cache, cache_key
from loratune.data.examples import Example
from loratune.data.findings import add_checks
from loratune.data.masking.render import Rendered, render
from loratune.data.masking.token_labels import backend_of
from loratune.data.prompts import Prompt
from loratune.data.rows.conversation import ROLES, Conversation, Origin, Rejected
from loratune.data.rows.reading import Reader, ReadSide, apply_policy, held_out_sources, hold_out
from loratune.recipe.recipe import DataSection, Source
from loratune.recipe.roles import as_written
from loratune.run.errors import DataError, plural
from loratune.run.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = 10
"""Line numbers that a warning names before it says how many more there are."""


@runtime_checkable
class Stream(Protocol):
    """Training examples that are made when they are asked for, or why there is none; see `loratune.data.stream`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example | Rejected: ...

    @property
    def contents(self) -> dict[str, Any]:
        """Fingerprints of all rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """The data of a run.

    Attributes:
        train: Verified training examples, in the order of the sources; of streamed data, those of a random sample.
        eval: Verified held-out examples; empty where `data.eval` is `none`.
        eval_conversations: The conversation of each held-out example.
        report: What was read, what it became, and what was left out, as JSON.
        cached: Whether all this was found in the cache.
        stream: All training examples, where `train` is only a sample.
        prompts: The held-out prompts that base and fine-tuned model answer; empty without a metric.
        forgetting: The examples of `evaluate.forgetting`; empty without it.
    """

    train: list[Example]
    eval: list[Example]
    eval_conversations: list[Conversation]
    report: dict[str, Any]
    cached: bool = False
    stream: Stream | None = None
    prompts: tuple[Prompt, ...] = ()
    forgetting: tuple[Example, ...] = ()

    @property
    def num_examples(self) -> int:
        """Training examples; of streamed data, rows."""
        return len(self.train if self.stream is None else self.stream)

    @property
    def scale(self) -> float:
        """Training examples for each one in `train`."""
        return self.num_examples / len(self.train)


def prepare_data(
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    seed: int,
    cache: Path | None = None,
    processes: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> PreparedData:
    """Read, validate, render and verify the data of a run, or find all that in the cache.

    Args:
        data: The recipe's data section.
        tokenizer: Of the base model.
        max_length: The longest example, in tokens.
        seed: Decides which rows a fractional weight picks, and which conversations are held out.
        cache: The folder of the cache; None: nothing is kept.
        processes: How many share the work; None: as many as repay their start. The result is the same.
        progress: Who is told how it goes.

    Returns:
        The examples, and the report.

    Raises:
        DataError: A row cannot be trained on and `on_bad_row` is `error`; nothing is left; or the labels of a
            conversation cannot be verified.
        MachineError: The hub does not answer.
    """
    backend_of(tokenizer)  # first of all: it must be a fast one
    held_out = held_out_sources(data)
    read = Reader(data, seed, progress)
    if cache is None:
        return assemble_data(read, held_out, tokenizer, max_length, processes)
    store = Cache(cache, progress)
    sources = [*data.train, *(held_out if isinstance(held_out, tuple) else ())]

    def key() -> str:
        policy = {
            **data.model_dump(mode="json", exclude={"streaming"}),
            "max_length": max_length,
            "seed": seed,
            "held_out": str(held_out),
        }
        return cache_key(tokenizer, {"policy": policy, "contents": [read.contents(source) for source in sources]})

    before = key()
    arrays = store.load(before)
    if arrays is not None:
        progress.line(f"the prepared examples are in the cache: {store.path(before)}")
        return unpack(arrays)
    prepared = assemble_data(read, held_out, tokenizer, max_length, processes)
    arrays = pack(prepared)
    if arrays is not None and key() == before:  # not changed while it was read
        store.store(before, arrays)
    return prepared


def assemble_data(
    read: Reader,
    held_out: tuple[Source, ...] | float,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    processes: int | None,
) -> PreparedData:
    """Examples and report of what a reader reads; the arguments and errors are those of `prepare_data`."""
    data = read.data
    train = read(data.train)
    absent = _absent_roles(train, data, complete=read.complete)
    evaluation: ReadSide | None = None
    if isinstance(held_out, float):
        train, evaluation = hold_out(train, held_out, read.seed)
    elif held_out:
        evaluation = read(held_out)
    rendered = _render("train", train, data, tokenizer, max_length, processes, read.progress)
    rendered_eval = (
        _render("eval", evaluation, data, tokenizer, max_length, processes, read.progress) if evaluation else None
    )
    report: dict[str, Any] = {
        "train_on": data.train_on,
        "thinking": data.thinking,
        "max_length": max_length,
        "on_long": data.on_long,
        "mask": {"method": rendered.method, "verified": rendered.counts.get("verified", 0)},
        "train": _report(train, rendered),
        "eval": _report(evaluation, rendered_eval) if evaluation and rendered_eval else None,
        "overlap": _overlap(train, evaluation) if evaluation else [],
    }
    report["notices"] = [*rendered.notices, *absent, *_warnings(report, train)]
    add_checks(
        report,
        data,
        tokenizer,
        train=(rendered.examples, train.conversations),
        evaluation=(rendered_eval.examples, evaluation.conversations) if evaluation and rendered_eval else ((), ()),
    )
    kept = {example.origin for example in rendered_eval.examples} if rendered_eval else set()
    return PreparedData(
        train=rendered.examples,
        eval=rendered_eval.examples if rendered_eval else [],
        eval_conversations=[c for c in evaluation.conversations if c.origin in kept] if evaluation else [],
        report=report,
    )


def _render(
    name: Literal["train", "eval"],
    part: ReadSide,
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    processes: int | None,
    progress: Progress,
) -> Rendered:
    with progress.task(f"preparing {name} data", len(part.conversations), "conversations") as task:
        rendered = render(
            part.conversations,
            tokenizer,
            train_on=data.train_on,
            thinking=data.thinking,
            max_length=max_length,
            on_long=data.on_long,
            special_tokens_in_text=data.special_tokens_in_text,
            processes=processes,
            progress=task.advance,
        )
    apply_policy(rendered.rejected, data)
    if not rendered.examples:
        left_out = Counter(rejected.reason for rejected in [*part.rejected, *rendered.rejected])
        reasons = "; ".join(f"{number} × {reason}" for reason, number in left_out.most_common(3))
        dropped = sum(rendered.counts.get(name, 0) for name in ("dropped_long", "dropped_empty"))
        raise DataError(
            f"no {name} conversation is left of {plural(part.num_rows, 'row')}: {dropped} dropped for their length"
            + (f"; {reasons}" if reasons else ""),
            fix="see the reasons; raise data.max_length if the length is one",
        )
    return rendered


def _absent_roles(part: ReadSide, data: DataSection, *, complete: bool) -> list[str]:
    """What is wrong with a list of roles, as a warning where only a sample was read.

    Raises:
        DataError: No message has one of the roles.
    """
    found = dict.fromkeys(message["role"] for conversation in part.conversations for message in conversation.messages)
    named = data.train_on if isinstance(data.train_on, tuple) else ()
    absent = [role for role in named if role not in found]
    if not absent or not part.conversations:
        return []
    problem = f"data.train_on names the role {absent[0]}, which no message of the training data has"
    if not complete:
        return [f"{problem} that was looked at."]
    first = part.conversations[0].origin
    raise DataError(
        problem,
        file=first.file,
        line=first.line,
        fix=f"the roles there are {', '.join(found)}: data.train_on={as_written([r for r in named if r in found] or [*found])}",
    )


# ---- the report


def _report(part: ReadSide, rendered: Rendered) -> dict[str, Any]:
    lengths = np.array([len(example.input_ids) for example in rendered.examples])
    supervised = int(sum(int(example.supervised.sum()) for example in rendered.examples))
    tokens = int(lengths.sum())
    counts = rendered.counts
    rejected = [*part.rejected, *rendered.rejected]
    duplicates = [origins for origins in _origins(part).values() if len(origins) > 1]
    return {
        "sources": part.sources,
        "format": part.format,
        "rows": part.num_rows,
        "conversations": len(rendered.examples),
        "turns": sum(len(conversation.messages) for conversation in part.conversations),
        "tokens": tokens,
        "supervised_tokens": supervised,
        "supervised_share": supervised / tokens,
        "length": {
            "p50": int(np.percentile(lengths, 50)),
            "p95": int(np.percentile(lengths, 95)),
            "max": int(lengths.max()),
        },
        "truncated": counts.get("truncated", 0),
        "dropped": counts.get("dropped_long", 0) + counts.get("dropped_empty", 0),
        "dropped_for_length": counts.get("dropped_long", 0),
        "dropped_with_nothing_to_train_after_truncation": counts.get("dropped_empty", 0),
        "verified": counts.get("verified", 0),
        "straddling_tokens": counts.get("straddling", 0),
        "answers_with_thoughts": counts.get("thoughts", 0),
        "answers_with_thoughts_put_back": counts.get("thoughts_restored", 0),
        "answers_not_trained": counts.get("answers_not_trained", 0),
        "trained_messages": _by_role(counts, "trained"),
        "trained_messages_without_stop_token": _by_role(counts, "without_stop_token"),
        "special_tokens_in_text": counts.get("special_tokens_in_text", 0),
        "conversations_without_last_answer": counts.get("unanswered", 0),
        "duplicates": sum(len(origins) - 1 for origins in duplicates),
        "duplicate_rows": [[_place(origin) for origin in origins] for origins in duplicates],
        "num_rejected": len(rejected),
        "rejected": [{"file": r.origin.file, "line": r.origin.line, "reason": r.reason} for r in rejected],
    }


def _by_role(counts: dict[str, int], what: str) -> dict[str, int]:
    return {role: counts[f"{what} {role}"] for role in ROLES if f"{what} {role}" in counts}


def _origins(part: ReadSide) -> dict[int, list[Origin]]:
    """Where each distinct conversation stands. A row that a weight repeats stands in one place."""
    places: dict[int, dict[Origin, None]] = {}
    for key, conversation in zip(part.keys, part.conversations, strict=True):
        places.setdefault(key, {})[conversation.origin] = None
    return {key: list(origins) for key, origins in places.items()}


def _overlap(train: ReadSide, evaluation: ReadSide) -> list[dict[str, Any]]:
    """The held-out conversations that also stand in the training data."""
    seen = _origins(train)
    return [
        {"eval": _place(origins[0]), "train": [_place(origin) for origin in seen[key]]}
        for key, origins in _origins(evaluation).items()
        if key in seen
    ]


def _place(origin: Origin) -> dict[str, Any]:
    return {"file": origin.file, "line": origin.line}


def _warnings(report: dict[str, Any], train: ReadSide) -> list[str]:
    warnings = []
    if report["overlap"]:
        pairs = [
            f"line {pair['eval']['line']} = training line {pair['train'][0]['line']}" for pair in report["overlap"]
        ]
        more = f" and {len(pairs) - _SHOWN} more" if len(pairs) > _SHOWN else ""
        warnings.append(
            f"{plural(len(pairs), 'held-out conversation also stands', 'held-out conversations also stand')} in the training data, so the held-out loss flatters: "
            f"{', '.join(pairs[:_SHOWN])}{more}."
        )
    if report["train"]["duplicates"]:
        groups = report["train"]["duplicate_rows"]
        lines = "; ".join(" = ".join(f"line {place['line']}" for place in group[:_SHOWN]) for group in groups[:_SHOWN])
        more = f" and {len(groups) - _SHOWN} more groups" if len(groups) > _SHOWN else ""
        warnings.append(
            f"{report['train']['duplicates']} of {plural(len(train.conversations), 'training conversation')} "
            f"{'is an exact duplicate' if report['train']['duplicates'] == 1 else 'are exact duplicates'}: "
            f"{lines}{more}."
        )
    for name in ("train", "eval"):
        part = report[name]
        if part and part["num_rejected"]:
            warnings.append(
                f"{plural(part['num_rejected'], f'{name} row was', f'{name} rows were')} left out; data.json lists them with "
                "their reasons."
            )
    return warnings


# ---- to and from the cache


def pack(prepared: PreparedData) -> Arrays | None:
    """As arrays; None where the held-out conversations hold what JSON cannot (dates of a Parquet file)."""
    record = {
        "report": prepared.report,
        "eval_conversations": [
            [c.messages, c.tools, c.text, c.origin.file, c.origin.line, c.excluded, c.forced_trained]
            for c in prepared.eval_conversations
        ],
        "files": list(dict.fromkeys(e.origin.file for e in [*prepared.train, *prepared.eval])),
    }
    try:
        text = json.dumps(record)
    except (TypeError, ValueError):
        return None
    if _conversations(json.loads(text)) != prepared.eval_conversations:
        return None
    arrays: Arrays = {"record": np.frombuffer(text.encode(), dtype=np.uint8)}
    files = {file: number for number, file in enumerate(record["files"])}
    for name, examples in (("train", prepared.train), ("eval", prepared.eval)):
        arrays[f"{name}.input_ids"] = np.concatenate([np.empty(0, np.int32), *(e.input_ids for e in examples)])
        arrays[f"{name}.supervised"] = np.concatenate([np.empty(0, np.bool_), *(e.supervised for e in examples)])
        places = [(len(e.input_ids), files[e.origin.file], e.origin.line) for e in examples]
        arrays[f"{name}.places"] = np.array(places, dtype=np.int64).reshape(-1, 3)
    return arrays


def unpack(arrays: Arrays) -> PreparedData:
    """The opposite of `pack`."""
    record = json.loads(arrays["record"].tobytes())
    return PreparedData(
        train=_examples(arrays, "train", record["files"]),
        eval=_examples(arrays, "eval", record["files"]),
        eval_conversations=_conversations(record),
        report=record["report"],
        cached=True,
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
        )
        for messages, tools, text, file, line, excluded, forced_trained in record["eval_conversations"]
    ]
