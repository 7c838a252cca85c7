"""The recipe in a run's `lock.json`, with its paths, which were relative to the working folder of the time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.recipe.sections.preference import PreferenceSection
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loratune.run.directory import Record


def located(lock: Record) -> dict[str, Any]:
    """Return the recipe of a run's lock for use in another working folder than the one the run began in.

    A relative path that leads nowhere from here is resolved in the folder in which the run began. So a project can be
    moved as a whole, and a run can be used from elsewhere.

    Args:
        lock: The contents of `lock.json`.

    Raises:
        RecipeError: The base was a local folder or file, and is in neither place.
    """
    recipe = without_other_tasks(copy.deepcopy(lock["recipe"]))
    if "train" in recipe:
        recipe["train"].setdefault("share_prefixes", False)  # else `auto` would draw other masks from a resume on
    began = lock.get("folder")
    for part, key in _paths(recipe):
        there = Path(began, part[key]) if began else None
        if there is not None and not Path(part[key]).expanduser().exists() and there.exists():
            part[key] = str(there)
    model = recipe["model"]
    name, base = str(model["name"]), lock["inputs"].get("model_path")
    if Path(name).expanduser().exists() or name.startswith("package:") or not base:
        return recipe
    # The Hub's cache keeps a model at …/snapshots/COMMIT, an imported GGUF file lies in loratune's: other names.
    if Path(base).name == Path(name).name:
        if not Path(base).exists():
            raise RecipeError(
                f"model.name is {name}: the run began with {base}, which no longer exists",
                fix=f"put the model back there, or at {name} in the folder where you run this",
            )
        model["name"] = base  # a run of a version that did not record its folder
    return recipe


def without_other_tasks(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe of a lock without the section of another task, which earlier versions wrote too."""
    other = recipe["model"].get("task", "causal_lm") != PreferenceSection.only_for
    return {name: part for name, part in recipe.items() if not (other and name == "preference")}


def _paths(recipe: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the settings that may be a path, as the part of the recipe and the key in it."""
    data, evaluation = recipe.get("data", {}), recipe.get("evaluate", {})
    places = [(recipe.get("model", {}), "name"), (recipe.get("lora", {}), "start_from")]
    read = (data.get("train"), data.get("eval"), evaluation.get("forgetting"))
    for sources in (value for value in read if isinstance(value, list)):  # not a fraction, `auto` or `none`
        places += [(source, "name") for source in sources if isinstance(source, dict)]
    for part, key in places:
        if isinstance(part.get(key), str) and not Path(part[key]).is_absolute():
            yield part, key
