"""Verbs for the time before training: write a recipe, see what it would do, check the machine.

Typer reads a command's options from its parameters, so the limit on the number of parameters does not apply to verbs.
"""

from __future__ import annotations

import sys
import webbrowser
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, get_args

import typer

from loratune.cli.next_steps import command, missing_packages
from loratune.cli.options import (
    AsJson,
    DeviceName,
    DevicesSpec,
    EveryTable,
    FieldsAndOverrides,
    Html,
    Interconnect,
    OutFile,
    Overrides,
    OverwriteFile,
    Price,
    RealSteps,
    RecipeFile,
    Samples,
)
from loratune.cli.output import add_cost, print_json, print_record, show_plan, write_page
from loratune.cli.shell import command_context
from loratune.cli.terminal import SafeConsole
from loratune.recipe.recipe import Column, Recipe
from loratune.recipe.recipe import origins as load_origins
from loratune.run.errors import MachineError
from loratune.run.extras import pip_install
from loratune.workflows.guidance.shipped import shipped_recipes


def studio(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="The folder with your data, recipes and runs.")
    ] = Path(),
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port to listen on; default: 8321, or a free one.")
    ] = None,
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
) -> None:
    """Do everything in a browser: from a file of examples to a run, its report, and a chat with the fine-tuned model.

    Only this machine can reach it, with the token in the printed URL. Runs continue when it is closed.
    """
    with command_context(as_json=False) as progress:
        if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
            raise MachineError(f"the studio needs {' and '.join(missing)}", fix=pip_install("studio"))
        from loratune.cli.studio.server import serve_studio

        def ready(url: str) -> None:
            sys.stdout.write(f"{url}\n")
            sys.stdout.flush()
            progress.line("the token in this URL is your key: do not share it; stop with Ctrl-C")
            if show and not webbrowser.open(url):
                progress.warn("no browser was found on this machine; open the URL yourself")

        serve_studio(folder, port=port, on_ready=ready)


def init(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA|NAME",
            help=f"A data file, or the name of a shipped recipe (default: quickstart): {', '.join(shipped_recipes())}.",
        ),
    ] = None,
    out: OutFile = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Translate another tool's file: YAML of Axolotl, LLaMA-Factory or mlx-lm, or TRL arguments as JSON.",
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD=COLUMN,...", help="What the columns are, such as prompt=Question,completion=Answer."
        ),
    ] = None,
    overwrite: OverwriteFile = False,
    as_json: AsJson = False,
) -> None:
    """Write a commented recipe to start from, fitted to the data and this machine."""
    with command_context(as_json) as progress:
        from loratune.workflows.guidance.guesses import read_columns
        from loratune.workflows.guidance.init import init as write

        path, starter = write(
            what,
            out,
            source=source,
            columns=read_columns(columns, get_args(Column)) if columns else None,
            ask=_ask_columns if sys.stdin.isatty() and not as_json else None,
            overwrite=overwrite,
        )
        if as_json:
            left_out = [asdict(item) for item in starter.left_out]
            settings = starter.as_dict()
            print_json({"recipe": str(path), "title": starter.title, "settings": settings, "left_out": left_out})
            return
        progress.line(starter.title)
        for item in starter.left_out_by_reason():
            progress.line(f"not taken over: {item}")
        sys.stdout.write(f"{path}\n")
        model = str(starter.settings["model.name"][0])
        for line in (*missing_packages(model), command("plan", path), command("train", path)):
            progress.line(f"$ {line}")


def _ask_columns(names: list[str]) -> dict[Column, str]:
    """Ask on the terminal which column holds prompts and which answers."""

    def known(name: str) -> str:
        if name.strip() not in names:
            raise typer.BadParameter(f"{name} is not a column; there are {', '.join(names)}")
        return name.strip()

    typer.echo(f"columns: {', '.join(names)}", err=True)
    prompt = typer.prompt("column of the prompts", value_proc=known, err=True)
    return {"prompt": prompt, "completion": typer.prompt("column of the answers", value_proc=known, err=True)}


def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
    samples: Samples = 3,
    every: EveryTable = False,
    html: Html = None,
    device: DeviceName = None,
    devices: DevicesSpec = None,
    interconnect: Interconnect = None,
    price_per_hour: Price = None,
    probe: RealSteps = False,
) -> None:
    """Show what would be trained: parameters, memory, time, data, trained tokens.

    Loads no weights without --probe.
    """
    with command_context(as_json) as progress:
        loaded = Recipe.load(recipe, overrides or ())
        if probe:
            from loratune.workflows import plan as workflow

            prepared = workflow.plan(
                loaded, device=device, devices=devices, interconnect=interconnect or (), probe=True, progress=progress
            )
        else:
            from loratune.planning.hardware.cluster import find_machine
            from loratune.planning.prepare import prepare  # not workflows.plan, which imports the trainer

            named, cluster = find_machine(device, devices, interconnect or ())
            prepared = prepare(loaded, progress, named, cluster=cluster, weights=False)
        record = prepared.as_plan()
        if price_per_hour is not None:
            add_cost(record, price_per_hour)
        if html is not None:
            write_page(html, prepared, samples)
        if as_json:
            print_record("plan", {**record, "data_report": prepared.data.report})
        else:
            show_plan(prepared, record, SafeConsole(highlight=False), samples, full=every)
            if not every:
                progress.line("--all adds the tables of memory, matrices, presets and data")
            if device is None and devices is None:  # planned for this machine
                progress.line(f"$ {command('train', recipe, *(overrides or ()))}")


def explain(recipe: RecipeFile, words: FieldsAndOverrides = None, as_json: AsJson = False) -> None:
    """Show every setting: its value, where the value came from, and what it does to this model and data."""
    with command_context(as_json) as progress:
        fields = [word for word in words or () if "=" not in word]
        overrides = [word for word in words or () if "=" in word]
        loaded, origins = Recipe.load(recipe, overrides), load_origins(recipe, overrides)
        from loratune.planning.prepare import prepare
        from loratune.workflows.guidance import explain as guide

        fields = [guide.full_name(field) for field in fields]  # a typo is an error before the data is read
        found = guide.explain(loaded, prepare(loaded, progress, weights=False), origins, fields)
        if as_json:
            print_json([item.as_dict() for item in found])
            return
        console = SafeConsole(highlight=False)
        for part in [guide.explanation_page(item) for item in found] if fields else [guide.explanation_table(found)]:
            console.print(part)


def doctor(as_json: AsJson = False) -> None:
    """Show what this machine can do, and the commands that fix what is missing.

    Exits with 0 if the quickstart can run.
    """
    with command_context(as_json):
        from loratune.workflows.guidance import doctor as workflow

        checks = workflow.doctor()
        missing = [check.name for check in checks if check.state == "missing"]
        if as_json:
            print_json({"quickstart_can_run": not missing, "checks": [check.as_dict() for check in checks]})
        else:
            SafeConsole(highlight=False).print(workflow.diagnosis_table(checks))
        if missing:
            raise MachineError(
                f"the quickstart cannot run: {', '.join(missing)}", fix="run the commands shown next to ✗"
            )


def selftest(as_json: AsJson = False) -> None:
    """Check on this machine, with a tiny model, that the optimizations change nothing.

    Exits with 0 if every check passes, otherwise with 1.
    """
    with command_context(as_json) as progress:
        from loratune.workflows import selftest as tests

        checks = tests.selftest(progress)
        failed = [check.name for check in checks if not check.ok]
        if as_json:
            print_json({"ok": not failed, "checks": [check.as_dict() for check in checks]})
            raise SystemExit(bool(failed))
        SafeConsole(highlight=False).print(tests.selftest_table(checks))
        if failed:
            raise tests.failure(failed)


def eject(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: OutFile = None,
    overwrite: OverwriteFile = False,
    as_json: AsJson = False,
) -> None:
    """Write the same run as one plain script that needs only datasets, transformers, peft and trl."""
    with command_context(as_json) as progress:
        loaded = Recipe.load(recipe, overrides or ())
        from loratune.planning.prepare import prepare
        from loratune.workflows.guidance.eject import eject as write

        target = out or Path(f"{recipe.stem}.py")
        ejected = write(prepare(loaded, progress), target, overwrite=overwrite, progress=progress)
        if as_json:
            print_json(ejected.as_dict())
            return
        if ejected.rows is not None:
            progress.warn(f"tokens and labels are in {ejected.rows}: {ejected.why_rows}")
        else:
            progress.line(
                "the script reads your own rows: TRL turns them into the same tokens and labels (all compared)"
            )
        sys.stdout.write(f"{ejected.script}\n")


def schema(
    verb: Annotated[
        str | None, typer.Argument(metavar="VERB", help="A verb, such as plan; without it, the schema of a recipe.")
    ] = None,
) -> None:
    """Print the JSON schema of a recipe (for editors), or of a verb's --json output."""
    with command_context(as_json=True):
        from loratune.recipe.schema import recipe_schema
        from loratune.run.records.schemas import schema_of

        print_json(recipe_schema() if verb is None else schema_of(verb))
