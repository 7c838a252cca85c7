from __future__ import annotations

from pathlib import Path

import pytest

from loratune.evaluation.user_metric import load_metric
from loratune.run.errors import RecipeError, RunError

CODE = """from pathlib import Path
Path({ran!r}).touch()
def shares_a_word(answer, reference):
    return bool(set(answer.split()) & set(reference.split()))
def too_large(answer, reference):
    return 5
def broken(answer, reference):
    return 1 / 0
nll = shares_a_word
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(CODE.format(ran=str(tmp_path / "ran")))
    return path


def test_without_leave_the_file_is_not_even_run(file: Path) -> None:
    with pytest.raises(RecipeError, match="would run the code") as error:
        load_metric(f"{file}:shares_a_word", allow_code=False)
    assert "--allow-code" in error.value.fix
    assert not (file.parent / "ran").exists()


def test_with_leave_it_scores(file: Path) -> None:
    metric = load_metric(f"{file}:shares_a_word", allow_code=True)
    assert metric.name == "shares_a_word"
    assert (metric("a red house", "red"), metric("blue", "red")) == (1.0, 0.0)


@pytest.mark.parametrize(("name", "words"), [("too_large", "returned 5"), ("broken", "ZeroDivisionError")])
def test_what_goes_wrong_in_it_is_told_with_its_file(file: Path, name: str, words: str) -> None:
    with pytest.raises(RunError, match=words) as error:
        load_metric(f"{file}:{name}", allow_code=True)("a", "b")
    assert error.value.file == str(file)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("own.py", "neither a metric of loratune nor a function"),
        ("no_such_file.py:f", "does not exist"),
        ("FILE:missing", "no function missing"),
        ("FILE:nll", "name of another measure"),
    ],
)
def test_what_cannot_be_loaded_is_refused(file: Path, text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_metric(text.replace("FILE", str(file)), allow_code=True)
