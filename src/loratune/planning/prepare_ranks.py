"""`prepare` by several processes that are to come to the same."""

from __future__ import annotations

import json

from loratune.planning.lock import examples_fingerprint
from loratune.planning.preparation import Preparation
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.recipe.tasks import require_processes
from loratune.run import processes
from loratune.run.errors import RecipeError, RunError
from loratune.run.progress import Progress


def prepare_on_all_ranks(recipe: Recipe, progress: Progress) -> Preparation:
    """`prepare` by all processes of a run: what `auto` becomes is what the first one finds, and its prepared examples are in the
    cache when the others ask for them.

    Raises:
        RunError: The processes do not see the same data.
        LoratuneError: As `prepare`.
    """
    if processes.size() == 1:
        return prepare(recipe, progress)
    if recipe.train.engine == "trl":
        raise RecipeError("train.engine is trl, which trains in one process here", fix="train.engine=fast")
    require_processes(recipe, "training in several processes")
    if processes.is_main():
        prepared = prepare(recipe, progress)
        processes.store_set("recipe", prepared.recipe.model_dump_json())
    else:
        prepared = prepare(Recipe.parse(json.loads(processes.store_wait("recipe"))), progress)
    seen = processes.gather([examples_fingerprint(examples) for examples in (prepared.data.train, prepared.data.eval)])
    if seen[processes.rank()] != seen[0]:
        raise RunError(
            f"process {processes.rank()} does not see the same examples as process 0",
            fix="the same files, at the same paths, on all machines",
        )
    return prepared
