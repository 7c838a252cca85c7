"""Between a verb and the shell: progress on stderr, errors as message and exit code, output of one process only."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec

from rich.markup import escape

from loratune.cli.output import print_json
from loratune.cli.terminal import SafeConsole, TerminalProgress
from loratune.run import processes
from loratune.run.errors import Interrupted, LoratuneError, MachineError, RecipeError, RunError
from loratune.run.extras import pip_install


def start_processes(number: int) -> None:
    """Replace this process by that many, started by torchrun; do nothing for one, or if a launcher started this one."""
    if number > 1 and not processes.is_launched():
        from loratune.cli.torchrun import run_torchrun

        raise SystemExit(run_torchrun(number, sys.argv[1:]))


def check_engine(engine: str, processes: int, only_ray: Mapping[str, object]) -> None:
    """Refuse options that the engine would ignore, and an engine that is not installed.

    Args:
        engine: What starts the processes: `torch` or `ray`.
        processes: Number of processes for torchrun.
        only_ray: Value of each option that only Ray takes, by name; None if it was not given.

    Raises:
        RecipeError: An option belongs to the other engine.
        MachineError: Ray is not installed.
    """
    given = next((name for name, value in only_ray.items() if value is not None), None)
    if engine != "ray":
        if given is not None:
            raise RecipeError(f"{given} is only for Ray", fix=f"add --engine ray, or remove {given}")
        return
    if find_spec("ray") is None:
        raise MachineError("Ray is not installed", fix=pip_install("ray"))
    if processes > 1:
        raise RecipeError(f"--processes {processes} is only for torchrun", fix=f"--engine ray --workers {processes}")


@contextmanager
def command_context(as_json: bool, *, together: bool = False) -> Iterator[TerminalProgress]:
    """Turn our errors into a message and an exit code.

    Of several processes only the first prints progress, and only the first error is reported.

    Args:
        as_json: Whether an error is also printed as JSON.
        together: Whether the verb can run in several processes.
    """
    progress = TerminalProgress() if processes.is_main() else TerminalProgress(SafeConsole(quiet=True))
    try:
        if processes.is_launched() and not together:
            raise RecipeError("this command runs in one process", fix="run it without a launcher: `loratune …`")
        processes.start()
        yield progress
    except LoratuneError as error:
        raise SystemExit(_print_error(error, as_json)) from None
    except KeyboardInterrupt:
        progress.console.print("[yellow]Interrupted[/yellow] stopped immediately")
        raise SystemExit(Interrupted.exit_code) from None
    except Exception:
        earlier = processes.first_failure(RunError.exit_code)
        if earlier is not None:
            raise SystemExit(earlier) from None
        raise
    finally:
        processes.stop_at_exit()


_LEAD = 15.0
"""Seconds by which the first process may be slower to print an error: a launcher ends all when one has failed."""


def _print_error(error: LoratuneError, as_json: bool) -> int:
    """Print an error unless another process does, and return the exit code."""
    # All processes stop together, and before they are connected all of them read the same recipe.
    everywhere = isinstance(error, Interrupted) or not processes.is_connected()
    if everywhere and not processes.is_main():
        if not isinstance(error, Interrupted):
            time.sleep(_LEAD)
        return error.exit_code
    earlier = processes.first_failure(error.exit_code)
    if earlier is not None:
        return earlier
    if as_json:
        print_json({**error.as_dict(), **({"process": processes.rank()} if processes.is_connected() else {})})
    color = "yellow" if isinstance(error, Interrupted) else "red"
    where = "" if processes.is_main() else f"process {processes.rank()}: "
    console = TerminalProgress().console
    if TerminalProgress.verbose:
        console.print(escape("".join(traceback.format_exception(error))), style="dim")
    console.print(f"[{color}]{type(error).__name__}[/{color}] {where}{escape(str(error))}")
    return error.exit_code
