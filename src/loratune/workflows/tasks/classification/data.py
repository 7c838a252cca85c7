"""Rows with a text and its label → examples for a classifier, and the data report.

A row has `text`, or `sentence1` and `sentence2`, and `label`: text, or an integer. The labels of the training data, sorted, are
the classes; a label that stands in the held-out data alone could not be learned, and is an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loratune.data.examples import LabelledExample
from loratune.data.findings import histogram, places, scripts
from loratune.data.masking.special_tokens import any_of, special_names
from loratune.data.masking.token_labels import LengthViolations
from loratune.data.prepare import PreparedData
from loratune.data.rows.conversation import Conversation, Origin, Rejected
from loratune.data.rows.reading import Reader, apply_policy, held_out_sources
from loratune.recipe.recipe import DataSection
from loratune.run.errors import DataError, plural
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.workflows.tasks.classification.rows import (
    LabelledText,
    ReadSide,
    TextKey,
    class_names,
    hold_out_texts,
    read_labelled,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_CHUNK = 1024
"""Texts that are tokenised at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Encoded:
    """What became of a side's texts."""

    examples: list[LabelledExample]
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
    train = read_labelled(read, data.train, refuse)
    evaluation: ReadSide | None = None
    if isinstance(held_out, float):
        train, evaluation = hold_out_texts(train, held_out, seed)
    elif held_out:
        evaluation = read_labelled(read, held_out, refuse)
    names = class_names(train.texts, evaluation.texts if evaluation else [])
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


@dataclass(frozen=True, slots=True)
class _Encoder:
    """Texts → examples, with the tokens that the tokenizer adds by itself."""

    tokenizer: PreTrainedTokenizerBase
    names: Sequence[str]
    max_length: int
    data: DataSection
    progress: Progress

    def __call__(self, side: str, part: ReadSide) -> _Encoded:
        number_of = {name: number for number, name in enumerate(self.names)}
        examples: list[LabelledExample] = []
        long: list[Origin] = []
        rejected: list[Rejected] = []
        too_long = LengthViolations()
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
                            too_long.add(LengthViolations(count=1, first=text.origin, longest=len(ids)))
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
                f"no {side} text is left of {plural(part.num_rows, 'row')}: {len(long)} dropped for their length",
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


def _report(part: ReadSide, encoded: _Encoded, names: Sequence[str]) -> dict[str, Any]:
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


def _origins(part: ReadSide) -> dict[tuple[TextKey, int | str], list[Origin]]:
    """Where each distinct text with its label stands. A row that a weight repeats stands in one place."""
    found: dict[tuple[TextKey, int | str], dict[Origin, None]] = {}
    for text in part.texts:
        found.setdefault((text.key, text.label), {})[text.origin] = None
    return {key: list(origins) for key, origins in found.items()}


def _overlap(train: ReadSide, evaluation: ReadSide) -> list[dict[str, Any]]:
    """The held-out texts that also stand in the training data, with whichever label."""
    seen: dict[TextKey, dict[Origin, None]] = {}
    for text in train.texts:
        seen.setdefault(text.key, {})[text.origin] = None
    return [
        {"eval": _place(text.origin), "train": [_place(origin) for origin in seen[text.key]]}
        for text in {text.key: text for text in evaluation.texts}.values()
        if text.key in seen
    ]


def _place(origin: Origin) -> dict[str, Any]:
    return {"file": origin.file, "line": origin.line}


def _notices(report: dict[str, Any], train: ReadSide, encoded: _Encoded) -> Iterator[str]:
    if report["overlap"]:
        first = report["overlap"][0]
        yield (
            f"{plural(len(report['overlap']), 'held-out text also stands', 'held-out texts also stand')} in the training data, so the accuracy flatters: first line "
            f"{first['eval']['line']} = training line {first['train'][0]['line']}."
        )
    labels: dict[TextKey, dict[str, Origin]] = {}
    for text in train.texts:
        labels.setdefault(text.key, {}).setdefault(text.name, text.origin)
    torn = [found for found in labels.values() if len(found) > 1]
    if torn:
        both = " and ".join(f"{name} ({origin})" for name, origin in list(torn[0].items())[:2])
        stand = plural(len(torn), "training text stands", "training texts stand")
        yield f"{stand} there with several labels, which cannot all be learned: first {both}."
    if report["train"]["duplicates"]:
        number = report["train"]["duplicates"]
        are = "is an exact duplicate" if number == 1 else "are exact duplicates"
        yield f"{number} of {plural(len(train.texts), 'training text')} {are}; data.json lists them."
    yield from _odd_names(report["labels"])
    counts = report["train"]["labels"]
    rare = min(counts, key=lambda name: counts[name])
    most = max(counts.values())
    if counts[rare] * 10 < most:
        yield f"the classes are uneven: {rare} has {plural(counts[rare], 'training text')}, the largest {most:,}; mind F1 beside accuracy."
    if report["eval"] and (unseen := [name for name, count in report["eval"]["labels"].items() if not count]):
        few = ", ".join(unseen[:5]) + (", …" if len(unseen) > 5 else "")
        yield f"the held-out data has no text of the class {few}, so nothing is measured of it."
    for side in ("train", "eval"):
        part = report[side]
        if part and part["truncated"]:
            where = f": {places(encoded.truncated)}" if side == "train" else ""
            yield f"{side}: {plural(part['truncated'], 'text is', 'texts are')} cut at {report['max_length']:,} tokens{where}."
        if part and part["num_rejected"]:
            yield (
                f"{plural(part['num_rejected'], f'{side} row was', f'{side} rows were')} left out; data.json lists them with "
                "their reasons."
            )


def _odd_names(names: Sequence[str]) -> Iterator[str]:
    """Classes that are probably none of their own."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(" ".join(name.casefold().split()), []).append(name)
    if torn := next((same for same in alike.values() if len(same) > 1), None):
        yield f"the classes {' and '.join(torn)} differ in upper and lower case or spaces alone; write them alike if they are one."
    if all(re.fullmatch(r"[-+]?\d*\.\d+", name) for name in names):
        yield f"the labels are numbers with a fraction: each of the {len(names)} is a class of its own, since there is no regression."
