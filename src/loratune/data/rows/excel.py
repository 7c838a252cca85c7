"""Excel files → rows: the first sheet, read like a CSV file of it."""

from __future__ import annotations

import zipfile
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from loratune.data.rows.row import Row
from loratune.run.errors import DataError, MachineError
from loratune.run.extras import pip_install

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def read_excel(path: Path) -> list[Row]:
    """Read the first sheet; its first row names the columns. Cells are text, as in a CSV file of the sheet.

    Raises:
        DataError: It is not an Excel file, a cell has no column, or a formula has no stored value.
        MachineError: openpyxl is not installed.
    """
    with _sheets(path, values=True) as sheets:
        written = [list(row) for row in sheets[0].iter_rows()]
    _check_formulas(path, written)
    cells = [[_text(cell.value) for cell in row] for row in written]
    names = cells[0] if cells else []
    while names and not names[-1]:
        names.pop()
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"two columns are called {twice}", file=path, line=1, fix="rename one of them")
    rows: list[Row] = []
    for line, values in enumerate(cells[1:], start=2):
        if any(values[len(names) :]):
            raise DataError(
                "a cell to the right of the named columns", file=path, line=line, fix="name its column, or clear it"
            )
        if any(values):
            padded = [*values, *[""] * len(names)]
            rows.append(Row(file=str(path), line=line, value=dict(zip(names, padded, strict=False))))
    return rows


def sheets_left_out(path: Path) -> list[str]:
    """Return the names of the sheets after the first that have a cell with something in it; none of them is read.

    Raises:
        DataError: It is not an Excel file.
        MachineError: openpyxl is not installed.
    """
    with _sheets(path, values=False) as sheets:
        return [
            str(sheet.title)
            for sheet in sheets[1:]
            if any(value is not None for row in sheet.iter_rows(values_only=True) for value in row)
        ]


@contextmanager
def _sheets(path: Path, *, values: bool) -> Iterator[list[Any]]:
    """Open a workbook; with `values`, a cell with a formula has the value that was stored with it."""
    if find_spec("openpyxl") is None:
        fix = f"{pip_install('excel')}; or save the sheet as CSV (UTF-8)"
        raise MachineError("openpyxl, which reads .xlsx files, is not installed", file=path, fix=fix)
    from openpyxl import load_workbook

    try:
        with path.open("rb") as stream:
            sheets = load_workbook(stream, read_only=True, data_only=values).worksheets
            if not sheets:
                raise ValueError("it has no sheet with cells")
            yield sheets
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile, SyntaxError) as error:
        raise DataError(f"not an Excel file: {error}", file=path, fix="save it again, or as CSV (UTF-8)") from None


def _check_formulas(path: Path, written: list[list[Any]]) -> None:
    """Refuse a formula that nobody has computed: other programs than spreadsheets store no value with it."""
    if all(cell.value is not None for row in written for cell in row):
        return
    with _sheets(path, values=False) as sheets:
        for line, (row, formulas) in enumerate(zip(written, sheets[0].iter_rows(), strict=True), start=1):
            for cell, formula in zip(row, formulas, strict=True):
                # A formula whose value is an empty text is of type "str", one without a value is not.
                if formula.data_type == "f" and cell.value is None and cell.data_type != "str":
                    raise DataError(
                        f"cell {formula.coordinate} is the formula {formula.value}, and the file has no value for it",
                        file=path,
                        line=line,
                        fix="open the file in a spreadsheet program and save it, which stores the values; or save it "
                        "as CSV (UTF-8)",
                    )


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
