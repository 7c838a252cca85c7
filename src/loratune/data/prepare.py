"""From the recipe's data section to verified examples and the data report."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from loratune.data.conversation import Conversation, Origin, Rejected, detect_format, to_conversations
from loratune.data.render import Example, Rendered, render
from loratune.data.sources import Row, hash_source, hub_has_split, is_local, read_rows
from loratune.errors import DataError
from loratune.recipe import DataSection, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]

AUTO_EVAL_FRACTION = 0.05
_MOST_BINS = 30
"""Of the histogram of lengths."""
_SHOWN = 10
"""Line numbers that a warning names before it says how many more there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """The data of a run.

    Attributes:
        train: Verified training examples, in the order of the sources.
        eval: Verified held-out examples; empty where `data.eval` is `none`.
        eval_conversations: The conversation of each held-out example.
        report: What was read, what it became, and what was left out, as JSON.
    """

    train: list[Example]
    eval: list[Example]
    eval_conversations: list[Conversation]
    report: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One side of the data, train or eval, as it was read."""

    sources: list[dict[str, Any]]
    format: str
    num_rows: int
    conversations: list[Conversation]
    rejected: list[Rejected]


def prepare_data(
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    seed: int,
    progress: Progress | None = None,
) -> PreparedData:
    """Read, validate, render and verify the data of a run.

    Args:
        data: The recipe's data section.
        tokenizer: Of the base model.
        max_length: The longest example, in tokens.
        seed: Decides which rows a fractional weight picks, and which conversations are held out.
        progress: Called with what is being done, how much of it is done, and its total.

    Returns:
        The examples, and the report.

    Raises:
        DataError: A row cannot be trained on and `on_bad_row` is `error`; nothing is left; or the labels of a
            conversation cannot be verified.
        MachineError: The hub does not answer.
    """
    train = _read(data.train, data, seed)
    held_out = _held_out_sources(data)
    evaluation: _Part | None = None
    if isinstance(held_out, float):
        train, evaluation = _hold_out(train, held_out, seed)
    elif held_out:
        evaluation = _read(held_out, data, seed)
    rendered = _render("train", train, data, tokenizer, max_length, progress)
    rendered_eval = _render("eval", evaluation, data, tokenizer, max_length, progress) if evaluation else None
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
    report["notices"] = [*rendered.notices, *_warnings(report, train)]
    kept = {example.origin for example in rendered_eval.examples} if rendered_eval else set()
    return PreparedData(
        train=rendered.examples,
        eval=rendered_eval.examples if rendered_eval else [],
        eval_conversations=[c for c in evaluation.conversations if c.origin in kept] if evaluation else [],
        report=report,
    )


def _held_out_sources(data: DataSection) -> tuple[Source, ...] | float:
    """Sources of held-out data, or the fraction of the training data to hold out; no sources: nothing is held out."""
    if data.eval == "none":
        return ()
    if data.eval != "auto":
        return data.eval if isinstance(data.eval, tuple) else float(data.eval)
    first = data.train[0]
    from_hub = len(data.train) == 1 and not is_local(first) and (first.config or first.split)
    if from_hub and first.split != "test" and hub_has_split(first, "test"):
        return (first.model_copy(update={"split": "test", "weight": 1.0}),)
    return AUTO_EVAL_FRACTION


def _read(sources: Sequence[Source], data: DataSection, seed: int) -> _Part:
    """Rows of all sources, as conversations. Each source has its own format."""
    described: list[dict[str, Any]] = []
    conversations: list[Conversation] = []
    rejected: list[Rejected] = []
    num_rows = 0
    for source in sources:
        rows = read_rows(source, seed=seed)
        form = _format(rows, data, source)
        good, bad = to_conversations(rows, form)
        described.append(
            {**source.model_dump(), "format": form, "rows": len(rows), "sha256": hash_source(source, rows)}
        )
        conversations += good
        rejected += bad
        num_rows += len(rows)
    _apply_policy(rejected, data)
    formats = dict.fromkeys(source["format"] for source in described)
    return _Part(
        sources=described,
        format=", ".join(formats),
        num_rows=num_rows,
        conversations=conversations,
        rejected=rejected,
    )


def _format(rows: Sequence[Row], data: DataSection, source: Source) -> str:
    form = detect_format(rows, strict=data.on_bad_row == "error") if data.format == "auto" else data.format
    if form == "text" and data.train_on != "all":
        raise DataError(
            f"the rows are plain text, which has no answers, but train_on is {data.train_on}",
            file=source.name,
            fix="set data.train_on=all",
        )
    return form


def _apply_policy(rejected: Sequence[Rejected], data: DataSection) -> None:
    if rejected and data.on_bad_row == "error":
        first = rejected[0]
        more = f" ({len(rejected)} such rows)" if len(rejected) > 1 else ""
        raise DataError(
            f"{first.reason}{more}",
            file=first.origin.file,
            line=first.origin.line,
            fix="correct the row, or leave such rows out with data.on_bad_row=skip; they are listed in data.json",
        )


def _key(conversation: Conversation) -> str:
    """Equal for conversations that say the same."""
    return json.dumps([conversation.messages, conversation.tools, conversation.text], sort_keys=True)


def _hold_out(part: _Part, fraction: float, seed: int) -> tuple[_Part, _Part]:
    """Split off a seeded choice of distinct conversations: all copies of one go to the same side."""
    groups: dict[str, list[Conversation]] = {}
    for conversation in part.conversations:
        groups.setdefault(_key(conversation), []).append(conversation)
    if len(groups) < 2:
        raise DataError(
            f"{len(groups)} distinct conversations: nothing can be held out",
            fix="give more data, or set data.eval=none or data.eval=FILE",
        )
    keys = list(groups)
    random.Random(seed).shuffle(keys)  # noqa: S311 - no secret
    number = min(max(1, round(fraction * len(keys))), len(keys) - 1)
    chosen = set(keys[:number])
    train = [c for key, group in groups.items() if key not in chosen for c in group]
    evaluation = [group[0] for key, group in groups.items() if key in chosen]
    order = {id(conversation): n for n, conversation in enumerate(part.conversations)}
    train.sort(key=lambda conversation: order[id(conversation)])
    note = [{"held_out": fraction, "seed": seed, "from": "train"}]
    return (
        _Part(
            sources=part.sources,
            format=part.format,
            num_rows=part.num_rows,
            conversations=train,
            rejected=part.rejected,
        ),
        _Part(sources=note, format=part.format, num_rows=len(evaluation), conversations=evaluation, rejected=[]),
    )


def _render(
    name: Literal["train", "eval"],
    part: _Part,
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    progress: Progress | None,
) -> Rendered:
    rendered = render(
        part.conversations,
        tokenizer,
        train_on=data.train_on,
        thinking=data.thinking,
        max_length=max_length,
        on_long=data.on_long,
        progress=None if progress is None else lambda done, total: progress(f"preparing {name} data", done, total),
    )
    _apply_policy(rendered.rejected, data)
    if not rendered.examples:
        left_out = Counter(rejected.reason for rejected in [*part.rejected, *rendered.rejected])
        reasons = "; ".join(f"{number} × {reason}" for reason, number in left_out.most_common(3))
        dropped = sum(rendered.counts.get(name, 0) for name in ("dropped_long", "dropped_empty"))
        raise DataError(
            f"no {name} conversation is left of {part.num_rows} rows: {dropped} dropped for their length"
            + (f"; {reasons}" if reasons else ""),
            fix="see the reasons; raise data.max_length if the length is one",
        )
    return rendered


# ---- the report


def _report(part: _Part, rendered: Rendered) -> dict[str, Any]:
    lengths = np.array([len(example.input_ids) for example in rendered.examples])
    supervised = int(sum(int(example.supervised.sum()) for example in rendered.examples))
    tokens = int(lengths.sum())
    counts = rendered.counts
    rejected = [*part.rejected, *rendered.rejected]
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
            "histogram": _histogram(lengths),
        },
        "truncated": counts.get("truncated", 0),
        "dropped": counts.get("dropped_long", 0) + counts.get("dropped_empty", 0),
        "dropped_for_length": counts.get("dropped_long", 0),
        "dropped_with_nothing_to_train_after_truncation": counts.get("dropped_empty", 0),
        "verified": counts.get("verified", 0),
        "straddling_tokens": counts.get("straddling", 0),
        "answers_with_thoughts": counts.get("thoughts", 0),
        "answers_with_thoughts_put_back": counts.get("thoughts_restored", 0),
        "conversations_without_last_answer": counts.get("unanswered", 0),
        "duplicates": _num_duplicates(part.conversations),
        "num_rejected": len(rejected),
        "rejected": [{"file": r.origin.file, "line": r.origin.line, "reason": r.reason} for r in rejected],
    }


def _histogram(lengths: np.ndarray[tuple[int], np.dtype[np.int64]]) -> dict[str, list[int]]:
    """How many lengths lie from each edge up to, not including, the next."""
    first, end = int(lengths.min()), int(lengths.max()) + 1
    width = -(-(end - first) // _MOST_BINS)
    edges = np.arange(first, end + width, width)
    return {"edges": edges.tolist(), "counts": np.histogram(lengths, edges)[0].tolist()}


def _origins(conversations: Iterable[Conversation]) -> dict[str, list[Origin]]:
    """Where each distinct conversation stands. A row that a weight repeats stands in one place."""
    places: dict[str, dict[Origin, None]] = {}
    for conversation in conversations:
        places.setdefault(_key(conversation), {})[conversation.origin] = None
    return {key: list(origins) for key, origins in places.items()}


def _num_duplicates(conversations: Sequence[Conversation]) -> int:
    return sum(len(origins) - 1 for origins in _origins(conversations).values())


def _overlap(train: _Part, evaluation: _Part) -> list[dict[str, Any]]:
    """The held-out conversations that also stand in the training data."""
    seen = _origins(train.conversations)
    return [
        {"eval": _place(origins[0]), "train": [_place(origin) for origin in seen[key]]}
        for key, origins in _origins(evaluation.conversations).items()
        if key in seen
    ]


def _place(origin: Origin) -> dict[str, Any]:
    return {"file": origin.file, "line": origin.line}


def _warnings(report: dict[str, Any], train: _Part) -> list[str]:
    warnings = []
    if report["overlap"]:
        pairs = [
            f"line {pair['eval']['line']} = training line {pair['train'][0]['line']}" for pair in report["overlap"]
        ]
        more = f" and {len(pairs) - _SHOWN} more" if len(pairs) > _SHOWN else ""
        warnings.append(
            f"{len(pairs)} held-out conversations also stand in the training data, so the held-out loss flatters: "
            f"{', '.join(pairs[:_SHOWN])}{more}."
        )
    if report["train"]["duplicates"]:
        warnings.append(
            f"{report['train']['duplicates']} of {len(train.conversations)} training conversations are exact duplicates."
        )
    for name in ("train", "eval"):
        part = report[name]
        if part and part["num_rejected"]:
            warnings.append(
                f"{part['num_rejected']} {name} rows were left out; data.json lists them with their reasons."
            )
        if part and (part["truncated"] or part["dropped"]):
            warnings.append(
                f"{part['truncated']} {name} conversations were cut at {report['max_length']} tokens, "
                f"{part['dropped']} were left out for their length."
            )
    return warnings
