"""The JSON schema of a recipe, with which an editor completes and checks one."""

from __future__ import annotations

from typing import Any

from loratune.recipe.recipe import Recipe

SCHEMA_FILE = ".loratune.schema.json"
"""The name of the schema beside a recipe that `init` wrote."""
EDITOR_LINE = f"# yaml-language-server: $schema={SCHEMA_FILE}"
"""The comment by which editors find the schema."""


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe as it is written: a source may be a name, and `task` stand at the top."""
    schema = Recipe.model_json_schema(mode="validation")
    task = schema["$defs"]["ModelSection"]["properties"]["task"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:loratune:recipe",
        **schema,
        "properties": {"task": task, **schema["properties"]},
    }
