"""Which files of a folder are read: those of one split, interpreted as on the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratune.data.rows.dataset_card import declared_splits
from loratune.run.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

COMPRESSED = (".gz", ".zst")
_SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
"""Word in the name of a file or folder → split; the words are those that `datasets` knows."""
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "croissant.json"}
_ABOUT = {".md", ".rst", ".py", ".yaml", ".yml", ".lock"}
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_NUMBER = re.compile(r"[-._ ]?\d+$")
_SEPARATORS = re.compile(r"[-._ ]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The files of a folder.

    Attributes:
        files: Those that are read, in a fixed order.
        left_out: Those that are not, each with the reason; without what describes the dataset.
    """

    files: list[Path]
    left_out: list[str]


@dataclass(frozen=True, slots=True)
class _Part:
    file: Path
    split: str
    """Empty if its name says nothing about a split."""
    exact: bool
    """Whether the name is that of the split and nothing more."""


def data_suffix(path: Path) -> str:
    """Return the suffix that tells the type of a file, without that of its compression: `.jsonl` of `a.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def select_files(folder: Path, split: str | None, known: Collection[str], config: str | None = None) -> Selection:
    """Choose the files of a split; without one, those for training.

    What the folder's `README.md` declares comes first. Else names decide: a file or folder whose name says `test` or
    `validation` is never chosen unless asked for by its split.

    Args:
        folder: The folder.
        split: The split that the recipe names.
        known: The suffixes of data files.
        config: The configuration that the recipe names; folders have some only if their `README.md` declares them.

    Raises:
        DataError: There is none, or it cannot be said which.
    """
    declared, inner = declared_splits(folder, config)
    found = sorted(f for f in folder.rglob("*") if f.is_file() and not _hidden(f, folder))
    found = [f for f in found if f.name not in _METADATA and f.suffix.lower() not in _ABOUT and f.suffix]
    parts = _named_parts(inner, found, known) if declared is None else _declared_parts(folder, declared, known)
    chosen = _of_split(parts, split) if split is not None else _for_training(parts, folder)
    if not chosen:
        what = f"of split {split} " if split else ""
        names = ", ".join(dict.fromkeys(part.split for part in parts if part.split))
        fix = f"it has the splits {names}" if names else f"supported types are {', '.join(known)}"
        raise DataError(f"no data files {what}in this folder", file=folder, fix=fix)
    files = [part.file for part in chosen]
    by_file = {part.file: part for part in parts}
    others = [(f, by_file.get(f)) for f in found if f not in files]
    return Selection(
        files=files,
        left_out=[
            f"{file.relative_to(folder)} ({_reason(part, declared is not None or inner != folder)})"
            for file, part in others
            if split is None or part is None or not part.exact  # of the other splits, the recipe wants none
        ],
    )


def _named_parts(folder: Path, found: list[Path], known: Collection[str]) -> list[_Part]:
    data = [f for f in found if data_suffix(f) in known and f.is_relative_to(folder)]
    if any(data_suffix(f) != ".txt" for f in data):
        data = [f for f in data if data_suffix(f) != ".txt"]  # licenses and notes beside the data
    return [_part(file, folder) for file in data]


def _declared_parts(folder: Path, declared: dict[str, list[Path]], known: Collection[str]) -> list[_Part]:
    parts = [_Part(f, _SPLITS.get(split, split), exact=True) for split, files in declared.items() for f in files]
    for part in parts:
        if data_suffix(part.file) not in known:
            raise DataError(
                f"its README.md names {part.file.relative_to(folder)}, a file of an unsupported type",
                file=folder,
                fix=f"supported types are {', '.join(known)}",
            )
    return parts


def _reason(part: _Part | None, declared: bool) -> str:
    if part is None:
        return "not named in README.md" if declared else "not a data file"
    if not part.split:
        return "of no split"
    return f"split {part.split}" if part.exact else f"its name is not {part.split} alone"


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _part(file: Path, folder: Path) -> _Part:
    for name in file.relative_to(folder).parts[:-1]:
        if name.lower() in _SPLITS:
            return _Part(file, _SPLITS[name.lower()], exact=True)
    stem = file.name.removesuffix("".join(file.suffixes[-2:])) if file.suffix in COMPRESSED else file.stem
    if _SHARD.search(stem):
        name = _SHARD.sub("", stem)
        return _Part(file, _SPLITS.get(name.lower(), name), exact=True)
    name = _NUMBER.sub("", stem).lower()
    if name in _SPLITS:
        return _Part(file, _SPLITS[name], exact=True)
    words = {_SPLITS[word] for word in _SEPARATORS.split(name) if word in _SPLITS}
    return _Part(file, words.pop() if len(words) == 1 else "", exact=False)


def _of_split(parts: list[_Part], split: str) -> list[_Part]:
    wanted = _SPLITS.get(split.lower(), split)
    exact = [part for part in parts if part.exact and part.split == wanted]
    named = [part for part in parts if split in (part.file.stem, part.file.parent.name)]
    return exact or named or [part for part in parts if part.split == wanted]


def _for_training(parts: list[_Part], folder: Path) -> list[_Part]:
    train = _of_split(parts, "train")
    if train:
        return train
    rest = [part for part in parts if part.split not in ("validation", "test")]
    shards = sorted({part.split for part in rest if part.exact})
    if len(shards) > 1:
        raise DataError(
            f"the folder has the splits {', '.join(shards)}, and none is called train", file=folder,
            fix=f"name one: data.train='{{name: {folder}, split: {shards[0]}}}'",
        )  # fmt: skip
    return rest
