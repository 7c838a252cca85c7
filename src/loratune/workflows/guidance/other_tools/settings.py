"""The settings of another tool's file by their names there, and what becomes of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratune.recipe.validation_errors import shown
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

OFF = (None, False, "", "no", "none", "None", 0)
"""Values by which other tools switch a setting off."""

_MARKS = {
    "Axolotl": ("base_model", "micro_batch_size", "sequence_len"),
    "LLaMA-Factory": ("finetuning_type", "stage", "cutoff_len"),
    "mlx-lm": ("iters", "steps_per_eval", "fine_tune_type", "lora_parameters.rank"),
}
"""Tool → settings that no other tool has. A file with none of them is one of TRL's."""

Answer = dict[str, Any] | str
"""What a setting becomes, as `section.field` → value; or why it becomes nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Translated:
    """One setting of the file, and what becomes of it.

    Attributes:
        name: Its name, with those of the mappings and lists that it is in.
        value: Its value.
        answer: The settings of ours, or the reason why there are none.
    """

    name: str
    value: Any
    answer: Answer

    def __str__(self) -> str:
        return f"{self.name}: {'null' if self.value is None else shown(self.value, 60)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherSettings:
    """All settings of the file that have a value.

    Attributes:
        path: The file.
        named: Full name → value; names of mappings and numbers of list entries are separated by dots.
        lines: Full name → line, as far as it is known.
    """

    path: Path
    named: Mapping[str, Any]
    lines: Mapping[str, int]

    def find(self, *names: str) -> tuple[str, Any] | None:
        """Return the full name and the value of the first of these settings that the file has, in any mapping."""
        for name in names:
            if name in self.named:
                return name, self.named[name]
            for full, value in self.named.items():
                if full.endswith(f".{name}") and not full.startswith("datasets."):
                    return full, value
        return None

    def first(self, *names: str, default: Any = None) -> Any:
        """Return the value of the first of these settings that the file has."""
        found = self.find(*names)
        return default if found is None else found[1]

    @property
    def tool(self) -> str:
        """The tool that the file belongs to."""
        return next((tool for tool, names in _MARKS.items() if any(name in self.named for name in names)), "TRL")

    def error(self, name: str, problem: str, fix: str) -> RecipeError:
        """Return an error at the line of a setting."""
        parts = name.split(".")
        above = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        line = next((self.lines[part] for part in above if part in self.lines), None)
        return RecipeError(problem, file=self.path, line=line, fix=fix)
