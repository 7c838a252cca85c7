"""Is what `loratune tune` finds within noise of the best of a grid, and at what cost?

    python benchmarks/tune_grid.py recipes/quickstart.yaml --budget 15m --out grid.json
    python benchmarks/tune_grid.py RECIPE --rates 1e-4,1e-3 --ranks 8,32 --targets attention train.epochs=0.5

Trains every point of the grid to its end, tunes within the budget, trains the tuned recipe to its end, and compares the
held-out losses on the same rows. By default the grid has 24 points: 6 rates × 2 ranks × 2 targets; each rank with each
target is a sweep of its own. What was done before a kill is not done again, and sweeps that `loratune sweep` ended are
taken as they are, so that several processes may share the grid. The cost of either is the sum of what its trials took.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.cli.options import as_seconds
from loratune.cli.terminal import TerminalProgress
from loratune.evaluation.record import paired_differences
from loratune.planning.auto import output_dir
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir, write_json
from loratune.run.records.files import read_record
from loratune.run.records.sweep import TrialLosses
from loratune.run.run_log import RunLog
from loratune.workflows.search.folder import SweepDir
from loratune.workflows.search.halving import mean_loss
from loratune.workflows.search.settings import as_words, with_settings
from loratune.workflows.search.sweep import sweep
from loratune.workflows.search.tune import UNSCORED, alpha_for, tune
from loratune.workflows.start import start_run
from loratune.workflows.steps import Leg

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.run.records.sweep import SweepRecord


def main() -> None:
    """Run the grid and the tuning, and print the comparison."""
    asked = _arguments()
    recipe = with_settings(Recipe.load(asked.recipe, asked.overrides), UNSCORED)
    progress = TerminalProgress()

    places = [{"r": r, "targets": t} for r in asked.ranks.split(",") for t in asked.targets.split(",")]
    parts = [
        sweep(
            _elsewhere(recipe, f"grid-r{place['r']}-{place['targets']}"),
            [
                f"train.learning_rate={asked.rates}",
                f"lora.targets={place['targets']}",
                f"lora.r={place['r']}",
                f"lora.alpha={alpha_for(recipe.lora, int(place['r'])):.8g}",
            ],
            halving=False,
            progress=progress,
        ).record
        for place in places
    ]
    tuned = tune(recipe, budget=as_seconds(asked.budget), progress=progress).record
    grid_seconds = _seconds(parts)
    tune_seconds = _seconds([tuned.rates, *([tuned.shapes] if tuned.shapes is not None else [])])

    own = _elsewhere(with_settings(recipe, as_words(tuned.settings)), "tuned")
    losses: list[tuple[float, int]] = []
    run = RunDir.create(output_dir(own), overwrite=True)
    leg = Leg(on_losses=lambda _, measured: losses.extend(measured))
    with RunLog(progress, run.log) as log:
        start_run(prepare(own, log), run, own.to_yaml(), log, leg)
    best = min(parts, key=lambda part: part.trials[0].rungs[-1].nll)
    (difference,) = paired_differences([_losses(best, best.trials[0].number), losses])
    report: dict[str, Any] = {
        "grid_points": sum(len(part.trials) for part in parts),
        "grid_best": {**places[parts.index(best)], **best.trials[0].settings, "nll": best.trials[0].rungs[-1].nll},
        "tuned": {
            **tuned.settings,
            "nll": mean_loss(losses),
        },
        "tuned_minus_best": difference.as_dict(),
        "within_noise": difference.low <= 0,
        "tune_seconds": tune_seconds,
        "grid_seconds": grid_seconds,
        "cost_ratio": tune_seconds / grid_seconds,
        "reasons": list(tuned.reasons),
        "grid": [
            {**where, **trial.settings, "nll": trial.rungs[-1].nll if trial.rungs else None, "problem": trial.problem}
            for where, part in zip(places, parts, strict=True)
            for trial in part.trials
        ],
    }
    print(json.dumps(report, indent=2))
    if asked.out is not None:
        write_json(asked.out, report)


def _elsewhere(recipe: Recipe, name: str) -> Recipe:
    return with_settings(recipe, [f"train.output_dir={recipe.train.output_dir}-{name}"])


def _seconds(sweeps: Sequence[SweepRecord]) -> float:
    return math.fsum(rung.seconds for each in sweeps for trial in each.trials for rung in trial.rungs)


def _losses(record: SweepRecord, number: int) -> list[tuple[float, int]]:
    """Return the final losses of a trial, row by row."""
    path = SweepDir(Path(record.folder)).losses(number, len(record.rungs) - 1)
    return list(read_record(path, TrialLosses).losses)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", help="settings that override the recipe")
    parser.add_argument("--budget", default="15m", help="time for tuning")
    parser.add_argument("--rates", default="3e-5,1e-4,3e-4,1e-3,3e-3,1e-2", help="learning rates of the grid")
    parser.add_argument("--ranks", default="8,32", help="ranks of the grid")
    parser.add_argument("--targets", default="attention,complete", help="targets of the grid")
    parser.add_argument("--out", type=Path, help="where to write the result as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
