"""Labeled rows: their texts and labels, the classes, and which rows are held out."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loratune.data.rows.fields import Unread, says_nothing
from loratune.data.rows.hub import hub_class_names
from loratune.data.rows.reading import Converted, Reader, ReadSide, held_out_side
from loratune.data.rows.row import Origin, Rejected, Row
from loratune.data.rows.sources import is_local
from loratune.data.rows.tools import check_unicode
from loratune.run.errors import BadRow, DataError, plural

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from loratune.recipe.recipe import Source

_SHOWN = 40
"""Maximum characters of a value in a message."""

TextKey = tuple[str, str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabeledText:
    """One validated row."""

    text: str
    second: str | None
    """The second text of a pair."""
    label: int | str
    origin: Origin

    @property
    def key(self) -> TextKey:
        """A key that is equal for rows with the same text."""
        return self.text, self.second

    @property
    def name(self) -> str:
        """Name of the class."""
        return str(self.label)


# ---- rows


def read_labeled(read: Reader, sources: Sequence[Source], refuse: Callable[[str], str]) -> ReadSide[LabeledText]:
    """Read the rows of sources as labeled texts.

    Args:
        read: The reader.
        sources: Where the rows are.
        refuse: Returns the special token that a text names; empty if it names none.

    Raises:
        DataError: A row cannot be trained on, and `data.on_bad_row` is `error`.
    """

    def convert(source: Source, rows: list[Row]) -> Converted[LabeledText]:
        classes = [] if is_local(source) else hub_class_names(source, read.data.columns.get("label", "label"))
        good, bad = labeled_texts(rows, refuse, classes)
        form = "" if not good else "text and label" if good[0].second is None else "sentence1, sentence2 and label"
        return Converted(format=form, items=good, rejected=bad, unread=_unread(rows, bad))

    return read.read(sources, convert, lambda text: text.key)


def _unread(rows: Sequence[Row], rejected: Sequence[Rejected]) -> Unread:
    """Count the columns of the valid rows that are not read."""
    bad = {row.origin for row in rejected}
    unread: Unread = Counter()
    for row in rows:
        if Origin(file=row.file, line=row.line) not in bad:
            read = ("text", "label") if "text" in row.value else ("sentence1", "sentence2", "label")
            unread.update(
                ("column", name) for name, value in row.value.items() if name not in read and not says_nothing(value)
            )
    return unread


def labeled_texts(
    rows: Iterable[Row], refuse: Callable[[str], str] = lambda _: "", classes: Sequence[str] = ()
) -> tuple[list[LabeledText], list[Rejected]]:
    """Read rows as labeled texts.

    Args:
        rows: Rows with the field names of labeled rows.
        refuse: Returns the special token that a text names; empty if it names none.
        classes: The class names of a Hub dataset with integer labels.

    Returns:
        The valid texts, and the reason for each row that is not one.
    """
    texts: list[LabeledText] = []
    rejected: list[Rejected] = []
    for row in rows:
        origin = Origin(file=row.file, line=row.line)
        try:
            texts.append(_labeled(row.value, origin, refuse, classes))
        except BadRow as bad:
            rejected.append(Rejected(origin=origin, reason=str(bad)))
    return texts, rejected


def _labeled(value: Any, origin: Origin, refuse: Callable[[str], str], classes: Sequence[str]) -> LabeledText:
    if not isinstance(value, dict):
        raise BadRow(f"a row must be an object with text and label, but this is {_shown(value)}")
    paired = "text" not in value and ("sentence1" in value or "sentence2" in value)
    fields = ("sentence1", "sentence2") if paired else ("text",)
    if missing := [name for name in (*fields, "label") if name not in value]:
        has = ", ".join(map(str, value)) or "(none)"
        raise BadRow(
            f"no {missing[0]} among its fields {has}; a row has text, or sentence1 and sentence2, and label; "
            "data.columns maps other names"
        )
    texts = [_checked(value[name], name, refuse) for name in fields]
    label = value["label"]
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise BadRow(f"label is {_shown(label)}, neither text nor an integer; there is no regression")
    if isinstance(label, str):
        label = label.strip()
        if not label:
            raise BadRow("label is empty")
        check_unicode(label, "label")
    if classes and isinstance(label, int):
        if not 0 <= label < len(classes):
            raise BadRow(
                f"label is {label}, but the dataset names classes 0 to {len(classes) - 1}: the row has no label"
            )
        label = classes[label]
    return LabeledText(text=texts[0], second=texts[1] if len(texts) > 1 else None, label=label, origin=origin)


def _checked(text: Any, name: str, refuse: Callable[[str], str]) -> str:
    if not isinstance(text, str):
        raise BadRow(f"{name} is {_shown(text)}, not text")
    if not text.strip():
        raise BadRow(f"{name} is empty")
    check_unicode(text, name)
    if found := refuse(text):
        raise BadRow(f"{name} contains the special token {found}, which the tokenizer would read as one")
    return text


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= _SHOWN else text[: _SHOWN - 1] + '…'}"


# ---- classes


def class_names(train: Sequence[LabeledText], evaluation: Sequence[LabeledText]) -> list[str]:
    """Return the labels of the training data in order: integers by value, texts alphabetically.

    Raises:
        DataError: There are fewer than two, they have different types, or the held-out data has another one.
    """
    if not train:
        raise DataError("no labeled text is left to train on", fix="see data.on_bad_row")
    kind = type(train[0].label)
    for text in (*train, *evaluation):
        if type(text.label) is not kind:
            raise DataError(
                f"label is {text.label!r}, but that of {train[0].origin} is {train[0].label!r}: one is text, the "
                "other a number",
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
                f"the label {text.name} occurs in the held-out data only, so it cannot be learned",
                file=text.origin.file,
                line=text.origin.line,
                fix=f"correct the row, or add training texts with it; the training data has {few}",
            )
    return names


def hold_out_texts(
    side: ReadSide[LabeledText], fraction: float, seed: int
) -> tuple[ReadSide[LabeledText], ReadSide[LabeledText]]:
    """Split off a seeded choice of distinct texts, the same fraction of each class.

    Every class keeps at least one text for training, and all copies of a text go to the same side.

    Returns:
        The training side and the held-out side.

    Raises:
        DataError: No class has two distinct texts.
    """
    groups: dict[TextKey, list[int]] = {}
    for number, key in enumerate(side.keys):
        groups.setdefault(key, []).append(number)
    by_class: dict[int | str, list[TextKey]] = {}
    for key, numbers in groups.items():
        by_class.setdefault(side.items[numbers[0]].label, []).append(key)
    draw = random.Random(seed)  # noqa: S311 - no secret
    chosen: set[TextKey] = set()
    for keys in by_class.values():
        draw.shuffle(keys)
        chosen.update(keys[: min(round(fraction * len(keys)), len(keys) - 1)])
    if not chosen:  # every class is too small for the fraction to round to one text
        largest = max(by_class.values(), key=len, default=[])
        if len(largest) < 2:
            raise DataError(
                f"{plural(len(groups), 'distinct text')}: nothing can be held out",
                fix="provide more data, or set data.eval=none or data.eval=FILE",
            )
        chosen = {largest[0]}
    train = [number for number, key in enumerate(side.keys) if key not in chosen]
    evaluation = [numbers[0] for key, numbers in groups.items() if key in chosen]
    return side.choose(train), replace(held_out_side(side, evaluation, fraction, seed), format="")
