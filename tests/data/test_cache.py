"""What was prepared once is found again, if and only if nothing that decides it has changed."""

from __future__ import annotations

import ast
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

import loratune
from loratune.data import cache as cache_module
from loratune.data.cache import Cache, cache_key, code_files
from loratune.data.prepare import prepare_data
from loratune.data.prepared import PreparedData
from loratune.recipe.recipe import DataSection
from loratune.run.progress import NoProgress

Prepare = Callable[..., PreparedData]

SOURCE = Path(loratune.__file__).parent
DECIDE_NO_TOKENS = (
    *("recipe/recipe.py", "recipe/checks.py", "recipe/tasks.py", "recipe/yaml.py", "recipe/validation_errors.py"),
    *("recipe/sections/", "recipe/given_rows.py", "run/"),
)
"""Imported by the code that prepares examples: settings and files of rows, which are in the key, and the ground."""


class Heard(NoProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.warnings: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def write_rows(path: Path, number: int, answer: str = "It is") -> str:
    rows = [
        {"messages": [{"role": "user", "content": f"Thing {n}?"}, {"role": "assistant", "content": f"{answer} {n}."}]}
        for n in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def prepared(tmp_path: Path, smollm2_tokenizer: PreTrainedTokenizerBase, heard: Heard) -> Prepare:
    train = write_rows(tmp_path / "train.jsonl", 12)

    def make(
        *, tokenizer: PreTrainedTokenizerBase = smollm2_tokenizer, max_length: int = 64, seed: int = 1, **data: Any
    ) -> PreparedData:
        section = DataSection.model_validate({"train": train, "eval": 0.25, **data})
        folder = tmp_path / "cache"
        return prepare_data(section, tokenizer, max_length=max_length, seed=seed, cache=folder, progress=heard)

    return make


def test_the_second_time_all_comes_from_the_cache(prepared: Prepare, heard: Heard) -> None:
    first = prepared()
    assert heard.lines == []
    second = prepared()

    assert (first.cached, second.cached) == (False, True)
    assert heard.lines == []
    assert second.report == json.loads(json.dumps(first.report))
    assert second.eval_conversations == first.eval_conversations
    for one, other in ((first.train, second.train), (first.eval, second.eval)):
        assert [e.origin for e in one] == [e.origin for e in other]
        assert [e.input_ids.tolist() for e in one] == [e.input_ids.tolist() for e in other]
        assert [e.supervised.tolist() for e in one] == [e.supervised.tolist() for e in other]
    assert second.train[0].input_ids.dtype == np.int32
    assert second.train[0].supervised.dtype == np.bool_
    assert heard.warnings == []


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 60},
        {"seed": 2},
        {"train_on": "last"},
        {"train_on": ["user", "assistant"]},
        {"thinking": "strip"},
        {"on_long": "drop"},
        {"on_bad_row": "skip"},
        {"format": "messages"},
        {"eval": "none"},
    ],
    ids=str,
)
def test_another_policy_misses(prepared: Prepare, change: dict[str, Any]) -> None:
    prepared()

    assert not prepared(**change).cached
    assert prepared(**change).cached
    assert prepared().cached


def test_another_row_misses(prepared: Prepare, tmp_path: Path) -> None:
    prepared()
    write_rows(tmp_path / "train.jsonl", 12, answer="It was")

    changed = prepared()

    assert not changed.cached
    assert prepared().cached


def test_another_held_out_row_misses(prepared: Prepare, tmp_path: Path) -> None:
    held_out = write_rows(tmp_path / "eval.jsonl", 3)
    prepared(eval=held_out)
    assert prepared(eval=held_out).cached

    write_rows(tmp_path / "eval.jsonl", 4)

    assert not prepared(eval=held_out).cached


def test_another_template_or_tokenizer_misses(prepared: Prepare, smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    prepared()
    template, vocabulary = copy.deepcopy(smollm2_tokenizer), copy.deepcopy(smollm2_tokenizer)
    template.chat_template = template.chat_template.replace("You are a helpful", "You are an able")
    vocabulary.add_tokens(["Thing"])

    for tokenizer in (template, vocabulary):
        assert not prepared(tokenizer=tokenizer).cached
        assert prepared(tokenizer=tokenizer).cached


def imported_by(file: Path) -> set[Path]:
    """The modules of loratune that a module imports anywhere in it, but for their packages' `__init__`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
    files = (SOURCE.joinpath(*name.split(".")[1:]).with_suffix(".py") for name in names if name.startswith("loratune."))
    return {path for path in files if path.is_file()}


def test_every_module_that_decides_tokens_or_masks_is_part_of_the_key() -> None:
    found: set[Path] = set()
    waiting = {SOURCE / "data" / "prepare.py", SOURCE / "data" / "masking" / "worker.py"}
    while waiting:
        file = waiting.pop()
        found.add(file)
        if not str(file.relative_to(SOURCE)).startswith(DECIDE_NO_TOKENS):
            waiting |= imported_by(file) - found
    deciding = {file for file in found if not str(file.relative_to(SOURCE)).startswith(DECIDE_NO_TOKENS)}
    assert SOURCE / "recipe" / "roles.py" in deciding, "it says which roles are trained"
    assert SOURCE / "data" / "masking" / "token_labels.py" in deciding
    assert deciding <= set(code_files())


@pytest.mark.parametrize("name", ["data/masking/policy.py", "recipe/roles.py"])
def test_a_change_of_the_code_changes_the_key(
    name: str, smollm2_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = cache_key(smollm2_tokenizer, {})
    changed = tmp_path / "changed.py"
    changed.write_text((SOURCE / name).read_text(encoding="utf-8") + "\n# another line\n", encoding="utf-8")
    files = [changed if file == SOURCE / name else file for file in code_files()]
    monkeypatch.setattr(cache_module, "code_files", lambda: files)
    assert cache_key(smollm2_tokenizer, {}) != before


def test_other_code_or_another_version_of_a_library_misses(
    prepared: Prepare, monkeypatch: pytest.MonkeyPatch, smollm2_tokenizer: PreTrainedTokenizerBase
) -> None:
    prepared()
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "_code", lambda: "other")
        assert not prepared().cached
    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.version", lambda _: "9")
        assert not prepared().cached
    assert prepared().cached


def test_a_template_that_writes_the_date_misses_tomorrow(
    smollm2_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datetime as dt

    class Tomorrow(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> dt.datetime:
            return super().now(tz) + dt.timedelta(days=1)

    dated = copy.deepcopy(smollm2_tokenizer)
    dated.chat_template = "{{ strftime_now('%d') }}" + dated.chat_template
    today = [cache_key(tokenizer, {}) for tokenizer in (smollm2_tokenizer, dated)]
    monkeypatch.setattr("loratune.data.cache.dt.datetime", Tomorrow)
    tomorrow = [cache_key(tokenizer, {}) for tokenizer in (smollm2_tokenizer, dated)]

    assert (today[0] == tomorrow[0], today[1] == tomorrow[1]) == (True, False)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_entry_is_made_again_aloud(prepared: Prepare, heard: Heard, tmp_path: Path, damage: str) -> None:
    prepared()
    (entry,) = (tmp_path / "cache").iterdir()
    content = bytearray(entry.read_bytes())
    content[-1] ^= 1
    entry.write_bytes({"flip": content, "cut": content[:-9], "empty": b""}[damage])

    assert not prepared().cached
    assert "damaged" in heard.warnings[0]
    assert prepared().cached


def test_a_folder_that_cannot_be_written_is_a_warning(prepared: Prepare, heard: Heard, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file is in the way")

    data = prepared()

    assert len(data.train) == 9
    assert any("could not be cached" in warning for warning in heard.warnings)


def test_the_entries_unused_for_longest_are_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: Heard
) -> None:
    monkeypatch.setattr(cache_module, "LIMIT_BYTES", 3000)
    cache = Cache(tmp_path, heard)
    for number, key in enumerate(("a", "b", "c")):
        cache.store(key, {"x": np.full(1000, number, dtype=np.uint8)})
        assert cache.load("a") is not None  # used again and again
    assert cache.load("b") is None
    assert cache.load("c") is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "c.safetensors"]
