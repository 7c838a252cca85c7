"""The verbs of `loratune`; also `python -m loratune`, as torchrun calls it."""

from __future__ import annotations

import sys
import warnings
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated

import typer

from loratune import __version__
from loratune.cli import adapter, training
from loratune.cli import after_training as after
from loratune.cli import before_training as before
from loratune.cli.verb import Verb, as_verb

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

VERBS: Mapping[str, tuple[Callable[..., None], ...]] = {
    "Before training": (
        *(before.studio, before.init, before.plan, before.explain, before.eject),
        *(before.doctor, before.selftest, before.schema),
    ),
    "Training": (
        *(training.train, training.sweep, training.tune, training.resume, training.extend, training.watch),
        *(training.runs, training.evaluate, training.reproduce, training.bench),
    ),
    "After training": (
        *(after.report, after.compare, after.diff, after.chat, after.sample),
        *(after.merge, after.export, after.certify, after.serve, after.push),
    ),
}  # fmt: skip
"""Title in `loratune --help` → its verbs, in the order in which they are shown."""

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="LoRA fine-tuning you can trust.\n\n"
    "Start with a table of questions and answers: `loratune init FILE.csv`; or see a complete run: `loratune init "
    "quickstart`. Each command ends with the ones to run next.",
    epilog="Exit codes: 0 done, 1 failed while running, 2 wrong recipe or arguments, 3 wrong data, "
    "4 machine lacks memory, disk, device or network, 130 interrupted, 143 ended by SIGTERM.",
)
for _title, _verbs in VERBS.items():
    for _verb in _verbs:
        app.command(cls=Verb, rich_help_panel=_title)(as_verb(_verb))
app.add_typer(adapter.app, name="adapter", rich_help_panel="After training")


def _print_version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"loratune {__version__}\n")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune language models with LoRA."""


def main() -> None:
    """Run the `loratune` command."""
    # Libraries warn each other's developers; our users cannot act on it.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Could not find a config file")
    # A terminal or a file in another encoding, as on Windows: tables without their lines instead of an error.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    app()  # SIGPIPE stays ignored: a server or browser that closes a connection must not end a run or the studio


if __name__ == "__main__":
    main()
