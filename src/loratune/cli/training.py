"""Verbs that train, and watch it: train, sweep, tune, resume, extend, watch, runs, evaluate, reproduce, bench.

Typer reads a command's options from its parameters, so the limit on the number of parameters does not apply to verbs.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loratune.cli.options import (
    USUAL_BUDGET,
    Address,
    AsJson,
    Budget,
    BudgetIfAny,
    Engine,
    MaxFailures,
    NoOverrides,
    Overrides,
    Overwrite,
    OverwriteSweep,
    Processes,
    RecipeFile,
    RunFolder,
    RunsFolder,
    SameAsOut,
    SearchEngine,
    Storage,
    SweptSettings,
    Workers,
    as_seconds,
    one_out,
)
from loratune.cli.output import print_json, show_plan, show_result, show_sweep, show_tuned
from loratune.cli.shell import check_engine, command_context, start_processes
from loratune.cli.terminal import SafeConsole
from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir
from loratune.run.errors import RecipeError, RunError
from loratune.run.processes import is_main

if TYPE_CHECKING:
    from loratune.cli.ray import RayOptions
    from loratune.cli.ray_workers import RayWorkers
    from loratune.cli.terminal import TerminalProgress
    from loratune.planning.preparation import Preparation


def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
    overwrite: Overwrite = False,
    processes: Processes = 1,
    engine: Engine = "torch",
    workers: Workers = None,
    address: Address = None,
    storage: Storage = None,
    max_failures: MaxFailures = None,
) -> None:
    """Plan, train, and compare the base and the fine-tuned model on held-out data."""
    on_ray = engine == "ray"
    if not on_ray:
        start_processes(processes)
    with command_context(as_json, together=not on_ray) as progress:
        options = {"--workers": workers, "--address": address, "--storage": storage, "--max-failures": max_failures}
        check_engine(engine, processes, options)
        loaded = Recipe.load(recipe, overrides or ())
        written = recipe.read_text(encoding="utf-8") if not overrides else loaded.to_yaml()
        if on_ray:
            from loratune.cli.ray import RayOptions, train_on_ray

            ray = RayOptions(workers=workers or 1, address=address, storage=storage, max_failures=max_failures or 0)
            result = train_on_ray(loaded, ray, written=written, overwrite=overwrite, progress=progress)
            show_result(result, as_json)
            return
        from loratune.workflows import train as workflow

        def show(prepared: Preparation) -> None:
            show_plan(prepared, prepared.as_plan(), progress.console, samples=1, full=False)

        result = workflow.train(loaded, written=written, overwrite=overwrite, progress=progress, on_plan=show)
        if is_main():
            show_result(result, as_json)


def sweep(
    recipe: RecipeFile,
    settings: SweptSettings,
    trials: Annotated[
        int | None,
        typer.Option(
            "--trials", min=2, help="Number of trials; default: every combination of lists, or 16 with a range."
        ),
    ] = None,
    budget: BudgetIfAny = None,
    halving: Annotated[
        bool, typer.Option(help="Drop worse trials early; --no-halving trains all of them to the end.")
    ] = True,
    as_json: AsJson = False,
    overwrite: OverwriteSweep = False,
    engine: SearchEngine = None,
    workers: Workers = None,
    address: Address = None,
    max_failures: MaxFailures = None,
) -> None:
    """Train with different settings, drop worse ones early, and rank them with confidence intervals.

    The same command continues an interrupted sweep. Its folder is named like the run directory, plus `-sweep`.
    """
    with command_context(as_json) as progress:
        ray = _ray_options(engine, workers, address, max_failures)
        loaded = Recipe.load(recipe)
        from loratune.workflows.search.settings import parse_settings, with_settings
        from loratune.workflows.search.sweep import sweep as run_sweep

        seconds = None if budget is None else as_seconds(budget)
        fixed, _ = parse_settings(settings)
        with _workers(with_settings(loaded, fixed), ray, progress) as taking:
            result = run_sweep(
                loaded,
                settings,
                trials=trials,
                budget=seconds,
                halving=halving,
                overwrite=overwrite,
                workers=taking,
                progress=progress,
            )
        show_sweep(result.record, as_json)


def tune(
    recipe: RecipeFile,
    overrides: Overrides = None,
    budget: Budget = USUAL_BUDGET,
    as_json: AsJson = False,
    overwrite: OverwriteSweep = False,
    engine: SearchEngine = None,
    workers: Workers = None,
    address: Address = None,
    max_failures: MaxFailures = None,
) -> None:
    """Choose learning rate, rank and target modules within a time budget, with a reason for each.

    The same command continues where it was interrupted. Its folder is named like the run directory, plus `-tune`.
    """
    with command_context(as_json) as progress:
        seconds = as_seconds(budget)
        ray = _ray_options(engine, workers, address, max_failures)
        loaded = Recipe.load(recipe, overrides or ())
        from loratune.workflows.search.tune import tune as run_tune

        with _workers(loaded, ray, progress) as taking:
            result = run_tune(loaded, budget=seconds, overwrite=overwrite, workers=taking, progress=progress)
        show_tuned(result.record, as_json)


def _ray_options(
    engine: str | None, workers: int | None, address: str | None, max_failures: int | None
) -> RayOptions | None:
    """Return the settings of Ray for a search; None if this process takes all trials."""
    check_engine(engine or "", 1, {"--workers": workers, "--address": address, "--max-failures": max_failures})
    if engine is None:
        return None
    from loratune.cli.ray import RayOptions

    return RayOptions(workers=workers or 1, address=address, max_failures=max_failures or 0)


@contextmanager
def _workers(recipe: Recipe, options: RayOptions | None, progress: TerminalProgress) -> Iterator[RayWorkers | None]:
    if options is None:
        yield None
        return
    from loratune.cli.ray_workers import ray_workers

    with ray_workers(recipe, options, progress) as workers:
        yield workers


def resume(run: RunFolder, overrides: NoOverrides = None, as_json: AsJson = False, processes: Processes = 1) -> None:
    """Resume an interrupted run, as it was planned."""
    start_processes(processes)
    with command_context(as_json, together=True) as progress:
        if overrides:
            raise RecipeError(
                f"resume finishes a run as it was planned, without {' '.join(overrides)}",
                fix=f"`{shlex.join(['loratune', 'extend', str(run), *overrides])}`, which trains it further",
            )
        from loratune.workflows import resume as workflow

        result = workflow.resume(run, progress=progress)
        if is_main():
            show_result(result, as_json)


def extend(
    run: RunFolder,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="The new run directory; default: RUN-extended.")] = None,
    rewarm: Annotated[
        bool,
        typer.Option("--rewarm", help="Start a new learning-rate schedule, with a warm-up."),
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    processes: Processes = 1,
) -> None:
    """Train a run further, as a new run: for more epochs (train.epochs=6), or on other data (data.train=FILE)."""
    start_processes(processes)
    with command_context(as_json, together=True) as progress:
        from loratune.workflows import extend as workflow

        def show(prepared: Preparation) -> None:
            show_plan(prepared, prepared.as_plan(), progress.console, samples=1, full=False)

        result = workflow.extend(
            run, overrides or (), out=out, rewarm=rewarm, overwrite=overwrite, progress=progress, on_plan=show
        )
        if is_main():
            show_result(result, as_json)


def watch(
    run: RunFolder,
    once: Annotated[bool, typer.Option("--once", help="Print the current state and exit.")] = False,
) -> None:
    """Show a run that another process is working on: loss, speed, time left, memory, held-out loss.

    Ends when the run ends. Without a terminal, prints a line whenever something changes.
    """
    with command_context(as_json=False):
        from loratune.reporting.watch import show_run

        show_run(RunDir.open(run), SafeConsole(highlight=False), once=once)


def runs(folder: RunsFolder = Path("__models"), as_json: AsJson = False) -> None:
    """List the runs in a folder, newest first: their state, and whether they are better than their base."""
    with command_context(as_json):
        from loratune.reporting.run_list import list_runs, runs_table

        found = list_runs(folder)
        if as_json:
            print_json([item.as_dict() for item in found])
        elif found:
            SafeConsole(highlight=False).print(runs_table(found))
        else:
            sys.stdout.write(f"no runs in {folder}\n")


def evaluate(
    run: RunFolder,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME>=NUMBER", help="Exit with 1 unless this holds: json>=0.8, difference.nll.high<0. Repeatable."
        ),
    ] = None,
    metric: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE.py:FUNCTION",
            help="exact_match, json, contains or bleu; or a function of answer and reference that returns 0 to 1.",
        ),
    ] = "",
    harness: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="A task of lm-evaluation-harness: its name, or a YAML file. Repeatable."),
    ] = None,
    allow_code: Annotated[bool, typer.Option(help="Allow running the code that --metric or --harness names.")] = False,
    as_json: AsJson = False,
) -> None:
    """Re-run the held-out evaluation of the base and the fine-tuned model."""
    with command_context(as_json) as progress:
        from loratune.evaluation.gates import check_gates
        from loratune.workflows import evaluate as workflow

        tasks = tuple(task for word in harness or () for task in word.split(","))
        result = workflow.evaluate(
            run, metric=metric, harness=tasks, gates=gate or (), allow_code=allow_code, progress=progress
        )
        show_result(result, as_json)
        try:
            check_gates(result.evaluation or {})
        except RunError as failed:
            if not as_json:
                raise
            progress.warn(str(failed))  # stdout already has the record, gates included
            raise SystemExit(failed.exit_code) from None


def reproduce(
    run: RunFolder,
    folder: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="The new run directory; default: RUN-again.")
    ] = None,
    out: SameAsOut = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Train a finished run again from the same inputs, and compare the adapters.

    Exits with 0 if they are bit-for-bit the same, otherwise with 1.
    """
    with command_context(as_json) as progress:
        from loratune.workflows import reproduce as workflow

        result = workflow.reproduce(run, one_out(folder, out), overwrite=overwrite, progress=progress)
        if as_json:
            print_json(result.as_dict())
        if not result.equal:
            raise result.as_error()
        progress.line(f"the same adapter, bit for bit: {result.run.adapter}")


def bench(
    recipe: RecipeFile,
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Number of runs of each engine.")] = 2,
    steps: Annotated[
        int, typer.Option("--steps", min=3, help="Optimizer steps per run; the first two are warm-up.")
    ] = 8,
    as_json: AsJson = False,
) -> None:
    """Benchmark the fast engine against stock TRL in alternating runs: speed, memory, losses."""
    with command_context(as_json) as progress:
        loaded = Recipe.load(recipe, overrides or ())
        from loratune.workflows.bench import bench as run_bench
        from loratune.workflows.bench import bench_table

        record = run_bench(loaded, rounds=rounds, steps=steps, progress=progress)
        if as_json:
            print_json(record)
            return
        SafeConsole(highlight=False).print(bench_table(record))
