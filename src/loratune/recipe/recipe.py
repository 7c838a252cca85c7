"""The recipe: every setting of a run, declared once.

A field is declared by its name, its type, its default, and the docstring under it, which states its unit and what it
does. `--help`, the JSON schema, the reference page and the comments of generated recipes are derived from here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from loratune.recipe.checks import check_beside, check_held_out, check_muon, check_quantization_settings
from loratune.recipe.given_rows import with_rows_in_files
from loratune.recipe.sections.base import Cadence, Section, Source
from loratune.recipe.sections.data import SEED_DATASET, Column, DataSection
from loratune.recipe.sections.evaluate import EvaluateSection
from loratune.recipe.sections.lora import TARGET_PRESETS, VARIANTS, LoraSection, TargetPreset, Variant
from loratune.recipe.sections.model import ModelSection
from loratune.recipe.sections.preference import PreferenceSection
from loratune.recipe.sections.train import DECAY_FRACTION, Optimizer, Schedule, TrainSection
from loratune.recipe.tasks import check_task
from loratune.recipe.validation_errors import shown, translate_validation_error
from loratune.recipe.yaml import apply_override, hoist_task, read_yaml, refuse_secrets

__all__ = [
    "DECAY_FRACTION",
    "SEED_DATASET",
    "TARGET_PRESETS",
    "VARIANTS",
    "Cadence",
    "Column",
    "DataSection",
    "EvaluateSection",
    "LoraSection",
    "ModelSection",
    "Optimizer",
    "PreferenceSection",
    "Recipe",
    "Schedule",
    "Section",
    "Source",
    "TargetPreset",
    "TrainSection",
    "Variant",
    "as_recipe",
    "origins",
]


class Recipe(Section):
    """All settings of a run. Load one with `Recipe.load`, or give the sections as keywords.

    `Recipe(model={"name": "folder"}, data={"train": rows}, train={"epochs": 1})`: a section is a dictionary of its
    settings. `data.train`, `data.eval` and `evaluate.forgetting` also take rows: a list of dictionaries, a
    `datasets.Dataset` or a data frame.
    """

    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    preference: PreferenceSection = PreferenceSection()
    evaluate: EvaluateSection = EvaluateSection()

    def __init__(self, **sections: Any) -> None:
        """Validate the sections.

        Args:
            sections: The settings of each section, or `task`.

        Raises:
            RecipeError: A setting is unknown, of the wrong type, or contradicts another.
            DataError: Rows among the settings cannot be written.
        """
        values = with_rows_in_files(sections)
        refuse_secrets(shown(values, max_characters=1_000_000), None)
        try:
            super().__init__(**hoist_task(values, {}))
        except ValidationError as error:
            raise translate_validation_error(error, type(self), Source, None, {}) from None

    # Else pydantic would call it from `model_validate`, which knows the file and the lines for the errors.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_task(self)
        check_quantization_settings(self)
        check_beside(self)
        check_muon(self)
        check_held_out(self)
        return self

    @model_serializer(mode="wrap")
    def _without_other_tasks(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the sections of other tasks: a recipe with one of them is refused."""
        return {
            name: part for name, part in dump(self).items() if getattr(self, name).only_for in ("", self.model.task)
        }

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Self:
        """Read a recipe from a YAML file.

        Args:
            path: The file.
            overrides: Settings that replace those of the file, as `section.field=value` with the value in YAML.

        Raises:
            RecipeError: The file cannot be read, or a setting is unknown, of the wrong type, or contradicts another.
        """
        path = Path(path)
        values, lines = read_yaml(path)
        for override in overrides:
            apply_override(values, override, lines)
        return cls.parse(values, file=path, lines=lines)

    @classmethod
    def parse(
        cls, values: dict[str, Any], *, file: str | Path | None = None, lines: dict[str, int] | None = None
    ) -> Self:
        """Validate nested dictionaries, as they come from YAML or JSON; without a file, rows may be among them.

        Args:
            values: Sections with their fields.
            file: The file to name in error messages.
            lines: The line of each `section.field`, for error messages.

        Raises:
            RecipeError: A setting is unknown, of the wrong type, or contradicts another.
        """
        values = values if file is not None else with_rows_in_files(values)
        refuse_secrets(shown(values, max_characters=1_000_000), None)
        try:
            return cls.model_validate(hoist_task(values, lines or {}))
        except ValidationError as error:
            raise translate_validation_error(error, cls, Source, file, lines or {}) from None

    def replace(self, **sections: dict[str, Any]) -> Self:
        """Return the recipe with other settings: `recipe.replace(train={"epochs": 1}, lora={"r": 8})`.

        Raises:
            RecipeError: A setting is unknown, of the wrong type, or contradicts another.
        """
        values = self.model_dump(mode="json", exclude_unset=True)
        for name, settings in sections.items():
            values[name] = {**values.get(name, {}), **settings}
        return self.parse(values)

    def to_yaml(self) -> str:
        """Return the settings that were given as YAML that `load` reads back.

        Defaults stay out: a default that does not fit a small model is adapted (`data.max_length`), a setting is not.
        """
        given = self.model_dump(mode="json", exclude_unset=True)
        return yaml.safe_dump(given, sort_keys=False, allow_unicode=True)


def as_recipe(recipe: Recipe | str | Path) -> Recipe:
    """Return a recipe, read from its file if it is given as a path.

    Raises:
        RecipeError: See `Recipe.load`.
    """
    return recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)


def origins(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, str]:
    """Return where each given setting was set: `section.field` → `FILE:LINE` or `command line`.

    Settings that are not listed have their default.

    Raises:
        RecipeError: See `Recipe.load`.
    """
    values, lines = read_yaml(Path(path))
    found = {name: f"{path}:{line}" for name, line in lines.items() if name.count(".") == 1}
    for override in overrides:
        apply_override(values, override, lines)
        found[override.partition("=")[0].strip()] = "command line"
    return found
