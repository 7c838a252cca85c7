"""Rows with a text and its label → examples for a classifier, and the data report.

A row has `text`, or `sentence1` and `sentence2`, and `label`: text, or an integer. The labels of the training data,
sorted, are the classes; a label that occurs only in the held-out data could not be learned, and is an error.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loratune.data.examples import LabeledExample
from loratune.data.findings import places
from loratune.data.masking.spans import any_of
from loratune.data.masking.special_tokens import special_names
from loratune.data.masking.token_labels import LengthViolations
from loratune.data.prepared import PreparedData
from loratune.data.report import (
    Places,
    overlap_report,
    places_by_key,
    row_notices,
    row_report,
    size_report,
    unread_notices,
    unread_report,
)
from loratune.data.rows.reading import Reader, ReadSide, apply_policy, held_out_sources
from loratune.data.rows.row import Origin, Rejected
from loratune.data.statistics import histogram, scripts
from loratune.run.errors import DataError, plural
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.workflows.tasks.classification.rows import (
    LabeledText,
    TextKey,
    class_names,
    hold_out_texts,
    read_labeled,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from loratune.recipe.recipe import DataSection


_CHUNK = 1024
"""Texts that are tokenized together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Encoded:
    """The results of the texts of a side."""

    examples: list[LabeledExample]
    truncated: list[Origin]
    dropped: list[Origin]
    rejected: list[Rejected]


def prepare_classified(
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    seed: int,
    progress: Progress = NO_PROGRESS,
) -> PreparedData:
    """Read, validate and tokenize the labeled texts of a run.

    Args:
        data: The recipe's data section.
        tokenizer: The tokenizer of the base model; it adds the tokens that start and end a text.
        max_length: The maximum length of an example, in tokens.
        seed: Seed for the rows that a fractional weight picks, and for the texts that are held out.
        progress: Receives progress, lines and warnings.

    Returns:
        The examples, which are `LabeledExample`; the report, whose `labels` are the names of the classes in their
        order.

    Raises:
        DataError: A row cannot be trained on and `on_bad_row` is `error`; nothing is left; there are fewer than two
            classes; or a label occurs in the held-out data only.
        MachineError: The Hub does not answer.
    """
    train, evaluation = _read(data, tokenizer, seed, progress)
    names = class_names(train.items, evaluation.items if evaluation else [])
    encode = _Encoder(tokenizer, names, max_length, data, progress)
    encoded = encode("train", train)
    encoded_eval = encode("eval", evaluation) if evaluation else None
    left = {example.name for example in encoded.examples}
    if lost := [name for name in names if name not in left]:
        raise DataError(
            f"no text of the class {lost[0]} is left to train on: all were too long, or had no tokens",
            fix="raise data.max_length, or data.on_long=truncate",
        )
    report: dict[str, Any] = {
        "labels": names,
        "train_on": data.train_on,
        "thinking": data.thinking,
        "max_length": max_length,
        "on_long": data.on_long,
        "mask": {"method": "the class of each text, and no token", "verified": 0},
        "train": _side_report(train, encoded, names),
        "eval": _side_report(evaluation, encoded_eval, names) if evaluation and encoded_eval else None,
        "overlap": overlap_report(_places(train), _places(evaluation)) if evaluation else [],
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


def _read(
    data: DataSection, tokenizer: PreTrainedTokenizerBase, seed: int, progress: Progress
) -> tuple[ReadSide[LabeledText], ReadSide[LabeledText] | None]:
    """Read the training side, and the held-out side if there is one."""
    held_out = held_out_sources(data)
    read = Reader(data, seed, progress)
    special = any_of(special_names(tokenizer))

    def special_token(text: str) -> str:
        return found[0] if (found := special.search(text)) else ""

    train = read_labeled(read, data.train, special_token)
    if isinstance(held_out, float):
        return hold_out_texts(train, held_out, seed)
    return train, read_labeled(read, held_out, special_token) if held_out else None


@dataclass(frozen=True, slots=True)
class _Encoder:
    """Turns texts into examples, with the tokens that the tokenizer adds by itself."""

    tokenizer: PreTrainedTokenizerBase
    names: Sequence[str]
    max_length: int
    data: DataSection
    progress: Progress

    def __call__(self, name: str, side: ReadSide[LabeledText]) -> _Encoded:
        number_of = {name: number for number, name in enumerate(self.names)}
        examples: list[LabeledExample] = []
        long: list[Origin] = []
        rejected: list[Rejected] = []
        too_long = LengthViolations()
        with self.progress.task(f"preparing {name} data", len(side.items), "texts") as task:
            for start in range(0, len(side.items), _CHUNK):
                chunk = side.items[start : start + _CHUNK]
                for text, full in zip(chunk, self._tokens(chunk), strict=True):
                    ids, types = full
                    if not ids:
                        rejected.append(Rejected(origin=text.origin, reason="the tokenizer makes no token of the text"))
                        continue
                    if len(ids) > self.max_length:
                        long.append(text.origin)
                        if self.data.on_long in ("error", "split"):
                            too_long.add(LengthViolations(count=1, first=text.origin, longest=len(ids)))
                        if self.data.on_long != "truncate":
                            continue
                        ids, types = next(self._tokens([text], max_length=self.max_length))
                    examples.append(
                        LabeledExample(
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
        too_long.raise_if_any(self.max_length)
        apply_policy(rejected, self.data)
        if not examples:
            raise DataError(
                f"no {name} text is left of {plural(side.num_rows, 'row')}: {len(long)} dropped for their length",
                fix="raise data.max_length if the length is the reason; data.json lists the others",
            )
        truncates = self.data.on_long == "truncate"
        return _Encoded(
            examples=examples,
            truncated=long if truncates else [],
            dropped=[] if truncates else long,
            rejected=rejected,
        )

    def _tokens(
        self, texts: Sequence[LabeledText], max_length: int | None = None
    ) -> Iterator[tuple[list[int], list[int] | None]]:
        """Yield token ids and types, truncated if a limit is given: of a pair the longer text first."""
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


def _side_report(side: ReadSide[LabeledText], encoded: _Encoded, names: Sequence[str]) -> dict[str, Any]:
    counts = Counter(example.name for example in encoded.examples)
    report = size_report(side, encoded.examples, num_turns=len(encoded.examples), num_supervised=len(encoded.examples))
    report["length"]["histogram"] = histogram([len(example.input_ids) for example in encoded.examples])
    # copies of a text with another label are no duplicates
    copies = places_by_key([(text.key, text.label) for text in side.items], (text.origin for text in side.items))
    return {
        **report,
        "labels": {name: counts[name] for name in names},
        "truncated": len(encoded.truncated),
        "dropped": len(encoded.dropped),
        "dropped_for_length": len(encoded.dropped),
        "dropped_with_nothing_to_train_after_truncation": 0,
        "answers_with_thoughts": 0,
        "special_tokens_in_text": 0,
        **row_report(copies, [*side.rejected, *encoded.rejected]),
        "scripts": scripts([f"{text.text} {text.second or ''}" for text in side.items]),
        "findings": [],
        **unread_report(side, {}),
    }


def _places(side: ReadSide[LabeledText]) -> Places:
    """Return where each distinct text was read, with whichever label."""
    return places_by_key(side.keys, (text.origin for text in side.items))


def _notices(report: dict[str, Any], train: ReadSide[LabeledText], encoded: _Encoded) -> Iterator[str]:
    yield from unread_notices(train, "train")
    yield from row_notices(report, len(train.items), kind="text", measure="the accuracy")
    yield from _label_notices(report, train)
    for name in ("train", "eval"):
        side = report[name]
        if side and side["truncated"]:
            where = f": {places(encoded.truncated)}" if name == "train" else ""
            cut = plural(side["truncated"], "text is", "texts are")
            yield f"{name}: {cut} cut at {report['max_length']:,} tokens{where}."


def _label_notices(report: dict[str, Any], train: ReadSide[LabeledText]) -> Iterator[str]:
    labels: dict[TextKey, dict[str, Origin]] = {}
    for text in train.items:
        labels.setdefault(text.key, {}).setdefault(text.name, text.origin)
    ambiguous = [found for found in labels.values() if len(found) > 1]
    if ambiguous:
        both = " and ".join(f"{name} ({origin})" for name, origin in list(ambiguous[0].items())[:2])
        have = plural(len(ambiguous), "training text has", "training texts have")
        yield f"{have} several labels, which cannot all be learned: first {both}."
    yield from _odd_names(report["labels"])
    counts = report["train"]["labels"]
    rare = min(counts, key=lambda name: counts[name])
    most = max(counts.values())
    if counts[rare] * 10 < most:
        yield (
            f"the classes are imbalanced: {rare} has {plural(counts[rare], 'training text')}, the largest {most:,}; "
            "look at F1, not only at accuracy."
        )
    if report["eval"] and (unseen := [name for name, count in report["eval"]["labels"].items() if not count]):
        few = ", ".join(unseen[:5]) + (", …" if len(unseen) > 5 else "")
        yield f"the held-out data has no text of the class {few}, so nothing is measured for it."


def _odd_names(names: Sequence[str]) -> Iterator[str]:
    """Yield notices about classes that are probably not classes of their own."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(" ".join(name.casefold().split()), []).append(name)
    if same := next((group for group in alike.values() if len(group) > 1), None):
        yield f"the classes {' and '.join(same)} differ only in case or spaces; write them alike if they are one class."
    if all(re.fullmatch(r"[-+]?\d*\.\d+", name) for name in names):
        yield (
            f"the labels are decimal numbers: each of the {len(names)} is a class of its own, since there is no "
            "regression."
        )
