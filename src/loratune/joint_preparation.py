"""`prepare` by several processes that are to come to the same."""

from __future__ import annotations

import json

from loratune import world
from loratune.errors import RecipeError, RunError
from loratune.lock import examples_fingerprint
from loratune.preparation import Preparation, prepare
from loratune.progress import Progress
from loratune.recipe import Recipe
from loratune.recipe_tasks import refuse_classifier


def prepare_together(recipe: Recipe, progress: Progress) -> Preparation:
    """`prepare` by all processes of a run: what `auto` becomes is what the first one finds, and its prepared examples are in the
    cache when the others ask for them.

    Raises:
        RunError: The processes do not see the same data.
        LoratuneError: As `prepare`.
    """
    if world.size() == 1:
        return prepare(recipe, progress)
    if recipe.train.engine == "trl":
        raise RecipeError("train.engine is trl, which trains in one process here", fix="train.engine=fast")
    refuse_classifier(recipe, "training in several processes", "train in one process")
    if world.is_main():
        prepared = prepare(recipe, progress)
        world.publish("recipe", prepared.recipe.model_dump_json())
    else:
        prepared = prepare(Recipe.parse(json.loads(world.read("recipe"))), progress)
    seen = world.gather([examples_fingerprint(examples) for examples in (prepared.data.train, prepared.data.eval)])
    if seen[world.rank()] != seen[0]:
        raise RunError(
            f"process {world.rank()} does not see the same examples as process 0",
            fix="the same files, at the same paths, on all machines",
        )
    return prepared
