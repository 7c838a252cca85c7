"""Rows with a text and its label → examples for a classifier, and the data report.

A row has `text`, or `sentence1` and `sentence2`, and `label`: text, or an integer. The labels of the training data, sorted, are
the classes; a label that stands in the held-out data alone could not be learned, and is an error.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from loratune.data.checks import histogram, places, scripts
from loratune.data.conversation import BadRow, Conversation, Origin, Rejected, check_columns, rename_columns
from loratune.data.labels import Example, TooLong
from loratune.data.prepare import PreparedData
from loratune.data.reading import Reader, apply_policy, held_out_sources
from loratune.data.specials import any_of, special_names
from loratune.errors import DataError
from loratune.progress import Progress, Silent
from loratune.recipe import DataSection, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NOBODY = Silent()
_CHUNK = 1024
"""Texts that are tokenised at a time."""
_SHOWN = 40
"""Characters of a value in a message."""

Key = tuple[str, str | None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelledExample(Example):
    """One tokenised text and its class. None of its tokens carries loss: the class does."""

    label: int
    """The number of the class."""
    name: str
    """Its name."""
    token_types: npt.NDArray[np.int8] | None
    """[T] 0 and 1 for the two texts of a pair, where the tokenizer tells them apart."""
    texts: tuple[str, ...]
    """What was tokenised: one text, or the two of a pair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledText:
    """One validated row."""

    text: str
    second: str | None
    """The other text of a pair."""
    label: int | str
    origin: Origin

    @property
    def key(self) -> Key:
        """Equal for rows that say the same."""
        return self.text, self.second

    @property
    def name(self) -> str:
        """Of the class."""
        return str(self.label)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One side of the data, as it was read."""

    sources: list[dict[str, Any]]
    num_rows: int
    texts: list[LabelledText]
    rejected: list[Rejected]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Encoded:
    """What became of a side's texts."""

    examples: list[LabelledExample]
    truncated: list[Origin]
    dropped: list[Origin]
    rejected: list[Rejected]


def prepare_labelled(
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    seed: int,
    progress: Progress = _NOBODY,
) -> PreparedData:
    """Read, validate and tokenise the labelled texts of a run.

    Args:
        data: The recipe's data section.
        tokenizer: Of the base model; it adds what the model begins and ends texts with.
        max_length: The longest example, in tokens.
        seed: Decides which rows a fractional weight picks, and which texts are held out.
        progress: Who is told how it goes.

    Returns:
        The examples, which are `LabelledExample`; the report, whose `labels` are the names of the classes in their order.

    Raises:
        DataError: A row cannot be trained on and `on_bad_row` is `error`; nothing is left; there are fewer than two classes; or a
            label occurs in the held-out data only.
        MachineError: The hub does not answer.
    """
    held_out = held_out_sources(data)
    read = Reader(data, seed, progress)
    special = any_of(special_names(tokenizer))
    refuse: Callable[[str], str] = lambda text: found[0] if (found := special.search(text)) else ""  # noqa: E731
    train = _read(read, data.train, refuse)
    evaluation: _Part | None = None
    if isinstance(held_out, float):
        train, evaluation = _hold_out(train, held_out, seed)
    elif held_out:
        evaluation = _read(read, held_out, refuse)
    names = _class_names(train.texts, evaluation.texts if evaluation else [])
    encode = _Encoder(tokenizer, names, max_length, data, progress)
    encoded = encode("train", train)
    encoded_eval = encode("eval", evaluation) if evaluation else None
    left = {example.name for example in encoded.examples}
    if lost := [name for name in names if name not in left]:
        raise DataError(
            f"no text of the class {lost[0]} is left to train on: all were too long, or made no token",
            fix="raise data.max_length, or data.on_long=truncate",
        )
    report: dict[str, Any] = {
        "labels": names,
        "train_on": data.train_on,
        "thinking": data.thinking,
        "max_length": max_length,
        "on_long": data.on_long,
        "mask": {"method": "the class of each text, and no token", "verified": 0},
        "train": _report(train, encoded, names),
        "eval": _report(evaluation, encoded_eval, names) if evaluation and encoded_eval else None,
        "overlap": _overlap(train, evaluation) if evaluation else [],
        "shared_prompts": [],
        "prompts": {},
    }
    report["notices"] = list(_notices(report, train, encoded))
    return PreparedData(
        train=[*encoded.examples],
        eval=[*encoded_eval.examples] if encoded_eval else [],
        eval_conversations=[],
        report=report,
    )


# ---- rows


def _read(read: Reader, sources: Sequence[Source], refuse: Callable[[str], str]) -> _Part:
    described: list[dict[str, Any]] = []
    texts: list[LabelledText] = []
    rejected: list[Rejected] = []
    num_rows = 0
    for source in sources:
        rows = read.rows(source)
        check_columns(rows, read.data.columns)
        form = ""
        for row in rename_columns(rows, read.data.columns):
            origin = Origin(file=row.file, line=row.line)
            try:
                text = _labelled(row.value, origin, refuse)
            except BadRow as bad:
                rejected.append(Rejected(origin=origin, reason=str(bad)))
                continue
            texts.append(text)
            form = form or ("text and label" if text.second is None else "sentence1, sentence2 and label")
        described.append({**source.model_dump(), "format": form, "rows": len(rows), "sha256": read.contents(source)})
        num_rows += len(rows)
    apply_policy(rejected, read.data)
    return _Part(sources=described, num_rows=num_rows, texts=texts, rejected=rejected)


def _labelled(value: Any, origin: Origin, refuse: Callable[[str], str]) -> LabelledText:
    if not isinstance(value, dict):
        raise BadRow(f"a row is an object with text and label, this is {_shown(value)}")
    fields = ("text",) if "text" in value else ("sentence1", "sentence2")
    if missing := [name for name in (*fields, "label") if name not in value]:
        has = ", ".join(map(str, value)) or "(none)"
        raise BadRow(
            f"no {missing[0]} among its fields {has}; a row has text, or sentence1 and sentence2, and label; "
            "data.columns says where they have other names"
        )
    texts = [_checked(value[name], name, refuse) for name in fields]
    label = value["label"]
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise BadRow(f"label is {_shown(label)}, neither text nor an integer")
    if isinstance(label, str):
        label = label.strip()
        if not label:
            raise BadRow("label is empty")
        _unicode(label, "label")
    return LabelledText(text=texts[0], second=texts[1] if len(texts) > 1 else None, label=label, origin=origin)


def _checked(text: Any, name: str, refuse: Callable[[str], str]) -> str:
    if not isinstance(text, str):
        raise BadRow(f"{name} is {_shown(text)}, not text")
    if not text.strip():
        raise BadRow(f"{name} is empty")
    _unicode(text, name)
    if found := refuse(text):
        raise BadRow(f"{name} contains the special token {found}, which the tokenizer would read as one")
    return text


def _unicode(text: str, name: str) -> None:
    """JSON can spell half a surrogate pair, which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{name} is not valid Unicode: {text[error.start]!r} at character {error.start}") from None


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= _SHOWN else text[: _SHOWN - 1] + '…'}"


# ---- classes


def _class_names(train: Sequence[LabelledText], evaluation: Sequence[LabelledText]) -> list[str]:
    """The labels of the training data in order: integers by size, texts by the alphabet."""
    if not train:
        raise DataError("no labelled text is left to train on", fix="see data.on_bad_row")
    kind = type(train[0].label)
    for text in (*train, *evaluation):
        if type(text.label) is not kind:
            raise DataError(
                f"label is {text.label!r}, but that of {train[0].origin} is {train[0].label!r}: one is text, the other a number",
                file=text.origin.file,
                line=text.origin.line,
                fix="write all labels as text, or all as integers",
            )
    names = [str(label) for label in sorted({text.label for text in train})]  # of one kind, as checked
    if len(names) < 2:
        raise DataError(
            f"all training texts have the label {names[0]}", file=train[0].origin.file, fix="there must be at least two"
        )
    known = set(names)
    for text in evaluation:
        if text.name not in known:
            few = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
            raise DataError(
                f"the label {text.name} occurs in the held-out data only, so nothing could be learned of it",
                file=text.origin.file,
                line=text.origin.line,
                fix=f"correct the row, or add training texts with it; the training data has {few}",
            )
    return names


def _hold_out(part: _Part, fraction: float, seed: int) -> tuple[_Part, _Part]:
    """Split off a seeded choice of distinct texts, of each class its share; every class keeps one, and all copies of a text go to
    the same side.

    Raises:
        DataError: No class has two distinct texts.
    """
    groups: dict[Key, list[int]] = {}
    for number, text in enumerate(part.texts):
        groups.setdefault(text.key, []).append(number)
    by_class: dict[int | str, list[Key]] = {}
    for key, numbers in groups.items():
        by_class.setdefault(part.texts[numbers[0]].label, []).append(key)
    draw = random.Random(seed)  # noqa: S311 - no secret
    chosen: set[Key] = set()
    for keys in by_class.values():
        draw.shuffle(keys)
        chosen.update(keys[: min(round(fraction * len(keys)), len(keys) - 1)])
    if not chosen:  # so few that no class has a whole text to give
        largest = max(by_class.values(), key=len, default=[])
        if len(largest) < 2:
            raise DataError(
                f"{len(groups)} distinct texts: nothing can be held out",
                fix="give more data, or set data.eval=none or data.eval=FILE",
            )
        chosen = {largest[0]}
    train = [text for text in part.texts if text.key not in chosen]
    evaluation = [part.texts[numbers[0]] for key, numbers in groups.items() if key in chosen]
    note = [{"held_out": fraction, "seed": seed, "from": "train"}]
    return (
        _Part(sources=part.sources, num_rows=part.num_rows, texts=train, rejected=part.rejected),
        _Part(sources=note, num_rows=len(evaluation), texts=evaluation, rejected=[]),
    )


# ---- tokens


@dataclass(frozen=True, slots=True)
class _Encoder:
    """Texts → examples, with the tokens that the tokenizer adds by itself."""

    tokenizer: PreTrainedTokenizerBase
    names: Sequence[str]
    max_length: int
    data: DataSection
    progress: Progress

    def __call__(self, side: str, part: _Part) -> _Encoded:
        number_of = {name: number for number, name in enumerate(self.names)}
        examples: list[LabelledExample] = []
        long: list[Origin] = []
        rejected: list[Rejected] = []
        too_long = TooLong()
        with self.progress.task(f"preparing {side} data", len(part.texts), "texts") as task:
            for start in range(0, len(part.texts), _CHUNK):
                chunk = part.texts[start : start + _CHUNK]
                for text, whole in zip(chunk, self._tokens(chunk), strict=True):
                    ids, types = whole
                    if not ids:
                        rejected.append(Rejected(origin=text.origin, reason="the tokenizer makes no token of the text"))
                        continue
                    if len(ids) > self.max_length:
                        long.append(text.origin)
                        if self.data.on_long == "error":
                            too_long.add(TooLong(count=1, first=text.origin, longest=len(ids)))
                        if self.data.on_long != "truncate":
                            continue
                        ids, types = next(self._tokens([text], max_length=self.max_length))
                    examples.append(
                        LabelledExample(
                            input_ids=np.array(ids, dtype=np.int32),
                            supervised=np.zeros(len(ids), dtype=np.bool_),
                            origin=text.origin,
                            label=number_of[text.name],
                            name=text.name,
                            token_types=None if types is None else np.array(types, dtype=np.int8),
                            texts=(text.text,) if text.second is None else (text.text, text.second),
                        )
                    )
                task.advance(len(chunk))
        too_long.complain(self.max_length)
        apply_policy(rejected, self.data)
        if not examples:
            raise DataError(
                f"no {side} text is left of {part.num_rows} rows: {len(long)} dropped for their length",
                fix="raise data.max_length if the length is the reason; data.json has the others",
            )
        truncates = self.data.on_long == "truncate"
        return _Encoded(
            examples=examples,
            truncated=long if truncates else [],
            dropped=[] if truncates else long,
            rejected=rejected,
        )

    def _tokens(
        self, texts: Sequence[LabelledText], max_length: int | None = None
    ) -> Iterator[tuple[list[int], list[int] | None]]:
        """Token ids and types, cut where a limit is given: of a pair the longer text first."""
        paired = [text for text in texts if text.second is not None]
        if paired and len(paired) != len(texts):  # a tokenizer takes texts or pairs, not both at once
            for text in texts:
                yield from self._tokens([text], max_length)
            return
        seconds = [text.second or "" for text in texts] if paired else None
        encoded = self.tokenizer(
            [text.text for text in texts],
            seconds,
            truncation="longest_first" if max_length is not None else False,
            max_length=max_length,
            verbose=False,
        )
        types = encoded.get("token_type_ids") or [None] * len(texts)
        yield from zip(encoded["input_ids"], types, strict=True)


# ---- the report


def _report(part: _Part, encoded: _Encoded, names: Sequence[str]) -> dict[str, Any]:
    lengths = np.array([len(example.input_ids) for example in encoded.examples])
    tokens = int(lengths.sum())
    counts = Counter(example.name for example in encoded.examples)
    rejected = [*part.rejected, *encoded.rejected]
    copies = [origins for origins in _origins(part).values() if len(origins) > 1]
    return {
        "sources": part.sources,
        "format": ", ".join(dict.fromkeys(source["format"] for source in part.sources if source.get("format"))),
        "rows": part.num_rows,
        "conversations": len(encoded.examples),
        "labels": {name: counts[name] for name in names},
        "turns": len(encoded.examples),
        "tokens": tokens,
        "supervised_tokens": len(encoded.examples),
        "supervised_share": len(encoded.examples) / tokens,
        "length": {
            "p50": int(np.percentile(lengths, 50)),
            "p95": int(np.percentile(lengths, 95)),
            "max": int(lengths.max()),
            "histogram": histogram(lengths.tolist()),
        },
        "truncated": len(encoded.truncated),
        "dropped": len(encoded.dropped),
        "dropped_for_length": len(encoded.dropped),
        "dropped_with_nothing_to_train_after_truncation": 0,
        "answers_with_thoughts": 0,
        "special_tokens_in_text": 0,
        "duplicates": sum(len(origins) - 1 for origins in copies),
        "duplicate_rows": [[_place(origin) for origin in origins] for origins in copies],
        "num_rejected": len(rejected),
        "rejected": [{"file": r.origin.file, "line": r.origin.line, "reason": r.reason} for r in rejected],
        "scripts": scripts([_as_conversation(text) for text in part.texts]),
        "findings": [],
    }


def _as_conversation(text: LabelledText) -> Conversation:
    return Conversation(messages=(), tools=None, text=f"{text.text} {text.second or ''}", origin=text.origin)


def _origins(part: _Part) -> dict[tuple[Key, int | str], list[Origin]]:
    """Where each distinct text with its label stands. A row that a weight repeats stands in one place."""
    found: dict[tuple[Key, int | str], dict[Origin, None]] = {}
    for text in part.texts:
        found.setdefault((text.key, text.label), {})[text.origin] = None
    return {key: list(origins) for key, origins in found.items()}


def _overlap(train: _Part, evaluation: _Part) -> list[dict[str, Any]]:
    """The held-out texts that also stand in the training data, with whichever label."""
    seen: dict[Key, dict[Origin, None]] = {}
    for text in train.texts:
        seen.setdefault(text.key, {})[text.origin] = None
    return [
        {"eval": _place(text.origin), "train": [_place(origin) for origin in seen[text.key]]}
        for text in {text.key: text for text in evaluation.texts}.values()
        if text.key in seen
    ]


def _place(origin: Origin) -> dict[str, Any]:
    return {"file": origin.file, "line": origin.line}


def _notices(report: dict[str, Any], train: _Part, encoded: _Encoded) -> Iterator[str]:
    if report["overlap"]:
        first = report["overlap"][0]
        yield (
            f"{len(report['overlap'])} held-out texts also stand in the training data, so the accuracy flatters: first line "
            f"{first['eval']['line']} = training line {first['train'][0]['line']}."
        )
    labels: dict[Key, dict[str, Origin]] = {}
    for text in train.texts:
        labels.setdefault(text.key, {}).setdefault(text.name, text.origin)
    torn = [found for found in labels.values() if len(found) > 1]
    if torn:
        both = " and ".join(f"{name} ({origin})" for name, origin in list(torn[0].items())[:2])
        yield f"{len(torn)} training texts stand there with several labels, which cannot all be learned: first {both}."
    if report["train"]["duplicates"]:
        yield f"{report['train']['duplicates']} of {len(train.texts)} training texts are exact duplicates; data.json lists them."
    counts = report["train"]["labels"]
    rare = min(counts, key=lambda name: counts[name])
    most = max(counts.values())
    if counts[rare] * 10 < most:
        yield f"the classes are uneven: {rare} has {counts[rare]:,} training texts, the largest {most:,}; mind F1 beside accuracy."
    for side in ("train", "eval"):
        part = report[side]
        if part and part["truncated"]:
            where = f": {places(encoded.truncated)}" if side == "train" else ""
            yield f"{side}: {part['truncated']} texts are cut at {report['max_length']:,} tokens{where}."
        if part and part["num_rejected"]:
            yield f"{part['num_rejected']} {side} rows were left out; data.json lists them with their reasons."


def labels_fingerprint(examples: Sequence[Example]) -> str:
    """The SHA-256 of all classes and token types; empty where there are none."""
    labelled = [example for example in examples if isinstance(example, LabelledExample)]
    digest = hashlib.sha256()
    for example in labelled:
        types = b"" if example.token_types is None else example.token_types.tobytes()
        digest.update(example.label.to_bytes(4, "little") + len(types).to_bytes(8, "little") + types)
    return digest.hexdigest() if labelled else ""
