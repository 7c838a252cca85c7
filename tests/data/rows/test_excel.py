"""Excel files: read as the CSV file of their first sheet, and what that leaves out is told."""

from __future__ import annotations

import datetime as dt
import re
import zipfile
from pathlib import Path

import pytest

from loratune.data.rows import excel
from loratune.data.rows.excel import read_excel, sheets_left_out
from loratune.data.rows.files import READERS
from loratune.data.rows.sources import files_left_out
from loratune.recipe.recipe import Source
from loratune.run.errors import DataError, MachineError


def test_the_first_sheet_of_an_excel_file_is_read_as_its_csv_would_be(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append(["prompt", "completion", "day", None])
    book.active.append(["How many?", 42, dt.date(2026, 1, 2)])
    book.active.append([])
    book.active.append(["Half?", 0.5])
    book.create_sheet("notes").append(["not read"])
    path = tmp_path / "rows.xlsx"
    book.save(path)
    assert [(row.line, row.value) for row in READERS[".xlsx"](path)] == [
        (2, {"prompt": "How many?", "completion": "42", "day": "2026-01-02T00:00:00"}),
        (4, {"prompt": "Half?", "completion": "0.5", "day": ""}),
    ]
    book.active["E4"] = "no column"
    book.save(path)
    with pytest.raises(DataError, match="a cell to the right of the named columns") as error:
        READERS[".xlsx"](path)
    assert error.value.line == 4
    book.active["D1"] = "prompt"
    book.save(path)
    with pytest.raises(DataError, match="two columns are called prompt"):
        READERS[".xlsx"](path)
    path.write_text("prompt,completion")
    with pytest.raises(DataError, match="not an Excel file"):
        READERS[".xlsx"](path)


def test_without_openpyxl_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(excel, "find_spec", lambda name: None)
    monkeypatch.setattr(excel, "pip_install", lambda extra: f"pip install '{extra}'")
    with pytest.raises(MachineError, match="openpyxl") as error:
        READERS[".xlsx"](tmp_path / "a.xlsx")
    assert error.value.fix == "pip install 'excel'; or save the sheet as CSV (UTF-8)"


def test_a_formula_without_a_stored_value_is_refused_and_with_one_it_is_its_value(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book, path = openpyxl.Workbook(), tmp_path / "rows.xlsx"
    book.active.append(["prompt", "completion", "note"])
    book.active.append(["How many?", "=20+22", None])
    book.active.append(["Empty?", "42", '=""'])
    book.save(path)  # as a program writes them, which computes nothing
    with pytest.raises(DataError, match=r"cell B2 is the formula =20\+22, and the file has no value for it") as error:
        read_excel(path)
    assert (error.value.file, error.value.line) == (str(path), 2)
    assert "save it" in error.value.fix

    stored = {
        rb"<f>20\+22</f><v ?(/>|></v>)": b"<f>20+22</f><v>42</v>",
        rb'r="C3"(><f>"")': rb'r="C3" t="str"\1',  # an empty text
    }
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "saved.xlsx", "w") as new:
        for name in old.namelist():
            text = old.read(name)
            for before, after in stored.items() if name == "xl/worksheets/sheet1.xml" else ():
                text, number = re.subn(before, after, text)
                assert number == 1
            new.writestr(name, text)
    assert [row.value for row in read_excel(tmp_path / "saved.xlsx")] == [
        {"prompt": "How many?", "completion": "42", "note": ""},
        {"prompt": "Empty?", "completion": "42", "note": ""},
    ]


def test_sheets_that_are_not_read_are_named(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book, path = openpyxl.Workbook(), tmp_path / "rows.xlsx"
    book.active.append(["prompt", "completion"])
    book.create_sheet("empty")
    book.save(path)
    assert sheets_left_out(path) == files_left_out(Source(name=str(path))) == []
    book.create_sheet("more").append(["prompt", "completion"])
    book.save(path)
    assert sheets_left_out(path) == ["more"]
    told = [f"{path} (its sheet more: only the first sheet is read)"]
    assert files_left_out(Source(name=str(path))) == files_left_out(Source(name=str(tmp_path))) == told
