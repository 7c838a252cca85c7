"""Pages as self-contained HTML files: no scripts, no requests, all text of data and models escaped."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files as resources
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from loratune.reporting.comparison_page import comparison_page
from loratune.reporting.run_files import read_run
from loratune.reporting.run_page import run_page
from loratune.run.directory import RunDir, write_text
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.reporting.blocks import Page
    from loratune.run.progress import Progress


def report(root: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run, even of one that is still running or has crashed, from the run's other files.

    Args:
        root: Run directory.
        out: File to write; `RUN/report.html` by default.

    Returns:
        The file.

    Raises:
        RecipeError: The folder is not a run directory, or `out` is not an HTML file.
        MachineError: The file cannot be written.
    """
    run = RunDir.open(root)
    return save_page(run_page(read_run(run)), run.report if out is None else Path(out))


def compare(roots: Sequence[str | Path], out: str | Path = "compare.html") -> Path:
    """Write one page about several runs.

    Args:
        roots: Two or more different run directories.
        out: File to write.

    Returns:
        The file.

    Raises:
        RecipeError: A folder is not a run directory, there are fewer than two, or `out` is not an HTML file.
        MachineError: The file cannot be written.
    """
    runs = [RunDir.open(root) for root in roots]
    if len({run.root for run in runs}) < max(2, len(runs)):
        raise RecipeError(
            f"nothing to compare: {', '.join(map(str, roots))}", fix="give two or more different run directories"
        )
    return save_page(comparison_page([read_run(run) for run in runs]), Path(out))


def report_or_warn(run: RunDir, progress: Progress) -> None:
    """Write the page at the end of a run; warn if that fails, since the run itself is finished."""
    try:
        progress.line(f"report: {report(run.root)}")
    except Exception as error:  # noqa: BLE001 - hours of training must not end in an error about a page
        progress.warn(f"no report was written: {type(error).__name__}: {error}")


def render_page(page: Page) -> str:
    """Return the page as HTML."""
    style = _style()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return _environment().get_template("page.html").render(page=page, style=Markup(style), style_hash=digest)  # noqa: S704 - our own file


def save_page(page: Page, out: Path) -> Path:
    """Write a page, and return its file.

    Raises:
        RecipeError: `out` is not an HTML file.
        MachineError: The file cannot be written.
    """
    if out.suffix not in (".html", ".htm"):
        raise RecipeError(f"{out} is not an HTML file", fix=f"--out {out.with_suffix('.html')}")
    # File names may hold bytes that are no text; Python keeps them as half characters, which no encoding can hold.
    text = render_page(page).encode("utf-8", "backslashreplace").decode()
    write_text(out.expanduser(), text)
    return out


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("loratune.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _style() -> str:
    return (resources("loratune.reporting") / "templates" / "page.css").read_text(encoding="utf-8")
