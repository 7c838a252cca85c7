"""A metric of the user's own: a Python function, which runs only where the user says so."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loratune.run.errors import RecipeError, RunError

TAKEN = ("nll", "perplexity", "none", "bleu")


@dataclass(frozen=True, slots=True, kw_only=True)
class UserMetric:
    """A function of answer and reference.

    Attributes:
        name: The function's, and the measure's.
        file: Where it stands.
        function: Returns a number from 0, wrong, to 1, right; or a bool.
    """

    name: str
    file: Path
    function: Callable[[str, str], float]

    def __call__(self, answer: str, reference: str) -> float:
        """Score an answer.

        Raises:
            RunError: The function fails, or returns something else.
        """
        try:
            value = self.function(answer, reference)
        except Exception as error:  # a stranger's code may raise anything, and its author wants to know what
            raise RunError(
                f"the metric {self.name} failed on the answer {answer[:60]!r}: {type(error).__name__}: {error}",
                file=self.file,
                fix="correct the function",
            ) from error
        if not isinstance(value, bool | int | float) or not (math.isfinite(value) and 0 <= value <= 1):
            raise RunError(
                f"the metric {self.name} returned {value!r}",
                file=self.file,
                fix="return a number from 0 to 1, or a bool",
            )
        return float(value)


def load_metric(text: str, *, allow_code: bool) -> UserMetric:
    """Load `path/to/file.py:function`.

    Raises:
        RecipeError: Code is not allowed, or there is no such function.
    """
    path, colon, name = text.rpartition(":")
    file = Path(path).expanduser()
    if not colon or not name.isidentifier():
        raise RecipeError(f"--metric {text} names no function", fix="--metric path/to/file.py:function")
    if not allow_code:
        raise RecipeError(
            f"--metric {text} would run the code in {file} on this machine, with all that you may do",
            fix="read the file; if you trust it, add --allow-code",
        )
    if name in TAKEN:
        raise RecipeError(f"--metric {text}: {name} is another measure's name", fix="give the function another name")
    if not file.is_file():
        raise RecipeError("there is no such file for --metric", file=file, fix="check the path")
    spec = importlib.util.spec_from_file_location(f"loratune_metric_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise RecipeError("--metric is no Python file", file=file, fix="a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # as above
        raise RecipeError(f"the file cannot be run: {type(error).__name__}: {error}", file=file) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise RecipeError(f"there is no function {name}", file=file, fix=f"def {name}(answer, reference): …")
    return UserMetric(name=name, file=file, function=function)
