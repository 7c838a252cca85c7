"""`examples/notebook.ipynb` runs as it stands, in a kernel of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning")  # of the kernel's own processes and sockets
def test_the_notebook_runs_and_shows_plan_progress_and_verdict(tmp_path: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    shutil.copytree(EXAMPLES / "quickstart", tmp_path / "quickstart")
    client = nbclient.NotebookClient(notebook, timeout=550, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    planned, trained, metrics, samples, answer = (_shown(cell) for cell in code[1:])
    assert "<td>4</td>" in planned, "the steps"
    assert '<progress value="4" max="4">' in trained
    assert "training: 4/4 steps" in trained
    assert "JSON correct" in trained
    assert (tmp_path / "__models" / "notebook" / "report.html").is_file()
    assert "tokens_per_second" in metrics
    assert samples.count("\n\n") == 2
    assert answer.strip()


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code")


def _shown(cell: Any) -> str:
    """Return everything a cell shows, as text."""
    parts = []
    for output in cell.outputs:
        data = output.get("data", {})
        parts.append(output.get("text", "") or data.get("text/html", "") or data.get("text/plain", ""))
    return "\n".join(parts)
