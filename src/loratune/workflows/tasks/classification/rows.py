"""Labelled rows: what each of them says, which classes there are, and which rows are held out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from loratune.data.rows.conversation import BadRow, Origin, Rejected, check_columns, rename_columns
from loratune.data.rows.reading import Reader, apply_policy
from loratune.data.rows.sources import Row, hub_class_names, is_local
from loratune.recipe.recipe import Source
from loratune.run.errors import DataError, plural

_SHOWN = 40
"""Characters of a value in a message."""

TextKey = tuple[str, str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledText:
    """One validated row."""

    text: str
    second: str | None
    """The other text of a pair."""
    label: int | str
    origin: Origin

    @property
    def key(self) -> TextKey:
        """Equal for rows that say the same."""
        return self.text, self.second

    @property
    def name(self) -> str:
        """Of the class."""
        return str(self.label)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadSide:
    """One side of the data, as it was read."""

    sources: list[dict[str, Any]]
    num_rows: int
    texts: list[LabelledText]
    rejected: list[Rejected]


# ---- rows


def read_labelled(read: Reader, sources: Sequence[Source], refuse: Callable[[str], str]) -> ReadSide:
    """The rows of sources.

    Args:
        read: Reads them.
        sources: Where they are.
        refuse: Says which special token a text names; empty: none.

    Raises:
        DataError: A row cannot be trained on, and `data.on_bad_row` is `error`.
    """
    described: list[dict[str, Any]] = []
    texts: list[LabelledText] = []
    rejected: list[Rejected] = []
    num_rows = 0
    for source in sources:
        rows = read.rows(source)
        check_columns(rows, read.data.columns)
        classes = [] if is_local(source) else hub_class_names(source, read.data.columns.get("label", "label"))
        good, bad = labelled_texts(rename_columns(rows, read.data.columns), refuse, classes)
        form = "" if not good else "text and label" if good[0].second is None else "sentence1, sentence2 and label"
        texts += good
        rejected += bad
        described.append({**source.model_dump(), "format": form, "rows": len(rows), "sha256": read.contents(source)})
        num_rows += len(rows)
    apply_policy(rejected, read.data)
    return ReadSide(sources=described, num_rows=num_rows, texts=texts, rejected=rejected)


def labelled_texts(
    rows: Iterable[Row], refuse: Callable[[str], str] = lambda _: "", classes: Sequence[str] = ()
) -> tuple[list[LabelledText], list[Rejected]]:
    """What rows say, and why others say nothing.

    Args:
        rows: With the field names of labelled rows.
        refuse: Says which special token a text names; empty: none.
        classes: The names that a hub data set gives to its integers.
    """
    texts: list[LabelledText] = []
    rejected: list[Rejected] = []
    for row in rows:
        origin = Origin(file=row.file, line=row.line)
        try:
            texts.append(_labelled(row.value, origin, refuse, classes))
        except BadRow as bad:
            rejected.append(Rejected(origin=origin, reason=str(bad)))
    return texts, rejected


def _labelled(value: Any, origin: Origin, refuse: Callable[[str], str], classes: Sequence[str]) -> LabelledText:
    if not isinstance(value, dict):
        raise BadRow(f"a row is an object with text and label, this is {_shown(value)}")
    paired = "text" not in value and ("sentence1" in value or "sentence2" in value)
    fields = ("sentence1", "sentence2") if paired else ("text",)
    if missing := [name for name in (*fields, "label") if name not in value]:
        has = ", ".join(map(str, value)) or "(none)"
        raise BadRow(
            f"no {missing[0]} among its fields {has}; a row has text, or sentence1 and sentence2, and label; "
            "data.columns says where they have other names"
        )
    texts = [_checked(value[name], name, refuse) for name in fields]
    label = value["label"]
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise BadRow(f"label is {_shown(label)}, neither text nor an integer; there is no regression")
    if isinstance(label, str):
        label = label.strip()
        if not label:
            raise BadRow("label is empty")
        _unicode(label, "label")
    if classes and isinstance(label, int):
        if not 0 <= label < len(classes):
            raise BadRow(
                f"label is {label}, but the data set names classes from 0 to {len(classes) - 1}: it has no label"
            )
        label = classes[label]
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


def class_names(train: Sequence[LabelledText], evaluation: Sequence[LabelledText]) -> list[str]:
    """The labels of the training data in order: integers by size, texts by the alphabet.

    Raises:
        DataError: There are fewer than two, they are of two kinds, or the held-out data has one of its own.
    """
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


def hold_out_texts(part: ReadSide, fraction: float, seed: int) -> tuple[ReadSide, ReadSide]:
    """Split off a seeded choice of distinct texts, of each class its share; every class keeps one, and all copies of a text go to
    the same side.

    Raises:
        DataError: No class has two distinct texts.
    """
    groups: dict[TextKey, list[int]] = {}
    for number, text in enumerate(part.texts):
        groups.setdefault(text.key, []).append(number)
    by_class: dict[int | str, list[TextKey]] = {}
    for key, numbers in groups.items():
        by_class.setdefault(part.texts[numbers[0]].label, []).append(key)
    draw = random.Random(seed)  # noqa: S311 - no secret
    chosen: set[TextKey] = set()
    for keys in by_class.values():
        draw.shuffle(keys)
        chosen.update(keys[: min(round(fraction * len(keys)), len(keys) - 1)])
    if not chosen:  # so few that no class has a whole text to give
        largest = max(by_class.values(), key=len, default=[])
        if len(largest) < 2:
            raise DataError(
                f"{plural(len(groups), 'distinct text')}: nothing can be held out",
                fix="give more data, or set data.eval=none or data.eval=FILE",
            )
        chosen = {largest[0]}
    train = [text for text in part.texts if text.key not in chosen]
    evaluation = [part.texts[numbers[0]] for key, numbers in groups.items() if key in chosen]
    note = [{"held_out": fraction, "seed": seed, "from": "train"}]
    return (
        ReadSide(sources=part.sources, num_rows=part.num_rows, texts=train, rejected=part.rejected),
        ReadSide(sources=note, num_rows=len(evaluation), texts=evaluation, rejected=[]),
    )
