"""Load the user's own metric: a Python function, run only with the user's permission."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loratune.recipe.sections.evaluate import METRICS
from loratune.run.errors import RecipeError, RunError

if TYPE_CHECKING:
    from collections.abc import Callable

RESERVED_NAMES = ("nll", "perplexity", "none", "bleu")


@dataclass(frozen=True, slots=True, kw_only=True)
class UserMetric:
    """A metric written by the user.

    Attributes:
        name: The name of the function, and of the measure.
        file: The file of the function.
        function: Maps answer and reference to a score, from 0 (wrong) to 1 (correct), or a bool.
    """

    name: str
    file: Path
    function: Callable[[str, str], float]

    def __call__(self, answer: str, reference: str) -> float:
        """Score an answer.

        Raises:
            RunError: The function fails, or returns anything but a score.
        """
        try:
            value = self.function(answer, reference)
        except Exception as error:  # the user's code may raise anything
            raise RunError(
                f"the metric {self.name} failed on the answer {answer[:60]!r}: {type(error).__name__}: {error}",
                file=self.file,
                fix="fix the function",
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
        raise RecipeError(
            f"--metric {text} is neither a metric of loratune nor a function",
            fix=f"one of {', '.join(METRICS)}, or path/to/file.py:function",
        )
    if not allow_code:
        raise RecipeError(
            f"--metric {text} would run the code in {file} on this machine, with your permissions",
            fix="read the file; if you trust it, add --allow-code",
        )
    if name in RESERVED_NAMES:
        raise RecipeError(f"--metric {text}: {name} is the name of another measure", fix="rename the function")
    if not file.is_file():
        raise RecipeError("the file of --metric does not exist", file=file, fix="check the path")
    spec = importlib.util.spec_from_file_location(f"loratune_metric_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise RecipeError("the file of --metric is not a Python file", file=file, fix="use a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # as above
        raise RecipeError(f"the file cannot be run: {type(error).__name__}: {error}", file=file) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise RecipeError(f"the file has no function {name}", file=file, fix=f"def {name}(answer, reference): …")
    return UserMetric(name=name, file=file, function=function)
