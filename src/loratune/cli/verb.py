"""What every verb of the command line has: `--quiet`, `--verbose`, and errors about its arguments as JSON."""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from loratune.cli.output import print_json
from loratune.cli.terminal import TerminalProgress
from loratune.run.errors import RecipeError

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results, warnings and errors only.")]

Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", help="Also show what the libraries report, and where in the code an error occurred."
    ),
]

_UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # typer's own copy of click's, or click's


def _usage(name: str, argument: Any) -> str:
    if "..." in name:
        return name
    return (name if argument.required else f"[{name}]") + ("..." if argument.nargs == -1 else "")


def as_verb(function: Callable[..., None]) -> Callable[..., None]:
    """Return the function with two further options, `--quiet` and `--verbose`."""

    @functools.wraps(function)
    def run(*, quiet: bool = False, verbose: bool = False, **options: Any) -> None:
        TerminalProgress.quiet, TerminalProgress.verbose = quiet, verbose
        if verbose:
            show_library_reports()
        function(**options)

    types = get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    ours = {"quiet": Quiet, "verbose": Verbose}
    options = [
        inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=t) for n, t in ours.items()
    ]
    typed: Any = run  # typer reads both
    typed.__signature__ = inspect.Signature([*(p.replace(annotation=types[p.name]) for p in parameters), *options])
    typed.__annotations__ = {**types, **ours}
    return run


def show_library_reports() -> None:
    """Let the libraries log and warn. Call this before they are imported, since that is when they read it."""
    os.environ["TRANSFORMERS_VERBOSITY"] = os.environ["DATASETS_VERBOSITY"] = os.environ["HF_HUB_VERBOSITY"] = "info"
    warnings.resetwarnings()
    warnings.simplefilter("default")


class Verb(TyperCommand):
    """A command whose usage line follows the usual conventions, whatever typer's own looks like in this version, and
    that prints errors about its arguments as JSON if `--json` is among them."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:  # noqa: ARG002 - typer's signature
        """Return the usage line's words: RUN is required, [OUT] is not, [NAME]... may be repeated."""
        given: list[Any] = [one for one in self.params if one.param_type_name == "argument"]
        return ["[OPTIONS]", *(_usage(one.metavar or one.name.upper(), one) for one in given)]

    def make_context(self, info_name: str | None, args: Sequence[str], parent: Any = None, **extra: Any) -> Any:
        """Read the arguments."""
        words = list(args)
        try:
            return super().make_context(info_name, list(args), parent, **extra)
        except _UsageError as error:
            if "--json" in words:
                problem: Any = error
                print_json(RecipeError(problem.format_message(), fix=f"loratune {info_name} --help").as_dict())
            raise
