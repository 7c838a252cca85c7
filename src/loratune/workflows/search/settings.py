"""Which settings a sweep tries: `train.learning_rate=5e-5,2e-4 lora.r=4..64` → the settings of each trial."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loratune.recipe.recipe import Recipe
from loratune.recipe.yaml import apply_override
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

MAX_TRIALS = 500
RANDOM_TRIALS = 16
"""Trials of a sweep with a range, if `--trials` does not say how many."""

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")
_PAIRS = {"]": "[", "}": "{", ")": "("}
_SECTIONS = ("lora", "train")
_FIXED = {
    "train.output_dir": "each trial has its own",
    "train.device": "losses on different devices differ by rounding too",
    "lora.new_tokens": "it changes the tokens of the data",
}
"""Settings that trials must share → why."""

Settings = dict[str, str]
"""Setting → its value in YAML, as it was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweptSetting:
    """A setting of which a sweep tries several values.

    Attributes:
        name: `section.field`.
        values: The values in YAML; empty for a range.
        low: Lower end of a range.
        high: Upper end of a range.
        is_whole: Whether the values of a range are whole numbers.
    """

    name: str
    values: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    is_whole: bool = False

    def at(self, share: float) -> str:
        """Return the value at a share of the range, 0 to 1: uniform in the logarithm, to three digits."""
        value = self.low * (self.high / self.low) ** share
        return str(round(value)) if self.is_whole else f"{value:.3g}"


def parse_settings(words: Iterable[str]) -> tuple[list[str], list[SweptSetting]]:
    """Return the settings with one value, which all trials share, and those with several.

    Args:
        words: `section.field=value`, with several values separated by commas, or a range `low..high`.

    Raises:
        RecipeError: A word has another form, no setting has several values, or trials must share a setting.
    """
    fixed: list[str] = []
    swept: list[SweptSetting] = []
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise RecipeError(f"{word!r} is not a setting", fix="section.field=value,value or section.field=low..high")
        setting = _setting(name.strip(), text)
        if setting is None:
            fixed.append(word)
            continue
        _check_may_vary(setting.name)
        if setting.name in (other.name for other in swept):
            raise RecipeError(f"{setting.name} is given twice", fix="give all of its values at once, with commas")
        swept.append(setting)
    if not swept:
        raise RecipeError(
            "no setting has several values, so there is nothing to compare",
            fix="such as train.learning_rate=5e-5,2e-4,1e-3 or lora.r=4..64; for a single run, `loratune train`",
        )
    return fixed, swept


def draw_trials(swept: Sequence[SweptSetting], trials: int | None, seed: int) -> list[Settings]:
    """Return the settings of each trial.

    Lists alone give every combination, or `trials` of them at random. With a range, `trials` are drawn so that each
    range is covered evenly, and each value of a list occurs about equally often (a Latin hypercube).

    Args:
        swept: What varies.
        trials: How many trials; None for all combinations, or `RANDOM_TRIALS` with a range.
        seed: Seed of what is drawn.

    Raises:
        RecipeError: There would be too many trials.
    """
    generator = np.random.default_rng(seed)
    if all(setting.values for setting in swept):
        grid = list(itertools.product(*(setting.values for setting in swept)))
        if trials is not None and trials < len(grid):
            grid = [grid[i] for i in sorted(generator.choice(len(grid), size=trials, replace=False))]
        drawn = [dict(zip((setting.name for setting in swept), values, strict=True)) for values in grid]
    else:
        number = RANDOM_TRIALS if trials is None else trials
        columns = [_column(setting, number, generator) for setting in swept]
        rows = (dict(zip((setting.name for setting in swept), row, strict=True)) for row in zip(*columns, strict=True))
        drawn = [dict(pairs) for pairs in dict.fromkeys(tuple(row.items()) for row in rows)]  # whole numbers repeat
    if len(drawn) > MAX_TRIALS:
        raise RecipeError(f"{len(drawn):,} trials are more than {MAX_TRIALS}", fix="--trials 24 tries some of them")
    return drawn


def with_settings(recipe: Recipe, words: Iterable[str]) -> Recipe:
    """Return a recipe with other settings, each as `section.field=value` with the value in YAML.

    Raises:
        RecipeError: A setting is unknown, of the wrong type, or contradicts another.
    """
    values: dict[str, Any] = recipe.model_dump(mode="json", exclude_unset=True)
    lines: dict[str, int] = {}
    for word in words:
        apply_override(values, word, lines)
    return Recipe.parse(values, lines=lines)


def as_words(settings: Mapping[str, str]) -> list[str]:
    """Return settings as they are written on a command line."""
    return [f"{name}={text}" for name, text in settings.items()]


def short_name(settings: Mapping[str, str]) -> str:
    """Return settings for people: without the section where the field's name is clear without it."""
    fields = [name.partition(".")[2] for name in settings]
    return ", ".join(
        f"{field if fields.count(field) == 1 else name}={text}"
        for field, (name, text) in zip(fields, settings.items(), strict=True)
    )


def _setting(name: str, text: str) -> SweptSetting | None:
    """Return a setting with several values; None if it has one."""
    found = _RANGE.fullmatch(text.strip())
    if found is not None:
        low, high = (float(end) for end in found.groups())
        if not 0 < low < high:
            raise RecipeError(
                f"{name}={text}: a range is tried on a logarithmic scale, so 0 < low < high",
                fix=f"a list, such as {name}={found[1]},{found[2]}",
            )
        is_whole = all(re.fullmatch(r"\d+", end) for end in found.groups())
        return SweptSetting(name=name, low=low, high=high, is_whole=is_whole)
    values = split_values(text)
    if len(values) == 1:
        return None
    if len(set(values)) < len(values) or "" in values:
        raise RecipeError(f"{name}={text}: a value is empty or given twice", fix="give different values")
    return SweptSetting(name=name, values=tuple(values))


def split_values(text: str) -> list[str]:
    """Split a text at the commas outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in _PAIRS.values():
            depth += 1
        elif letter in _PAIRS:
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += letter
    return [part.strip() for part in parts]


def _check_may_vary(name: str) -> None:
    section = name.partition(".")[0]
    why = _FIXED.get(name)
    if section not in _SECTIONS:
        why = "trials share model, data and evaluation, or their held-out losses could not be compared"
    if why is not None:
        raise RecipeError(
            f"{name} cannot vary within a sweep: {why}", fix="separate runs, and `loratune compare RUN RUN`"
        )


def _column(setting: SweptSetting, number: int, generator: np.random.Generator) -> list[str]:
    """Return a value of the setting for each trial."""
    order = generator.permutation(number)
    if setting.values:
        return [setting.values[place % len(setting.values)] for place in order]
    return [setting.at((place + float(generator.random())) / number) for place in order]
