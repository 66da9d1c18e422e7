"""The notebook, from a clean kernel to its last cell."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[2] / "tune_spaces" / "sweep.ipynb"


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) >= 8
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure comes out, and the sweep's trials all finish. No cell may take more than 20 minutes."""
    monkeypatch.setenv("SWEEP_FOLDER", str(tmp_path / "sweep"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    try:
        NotebookClient(
            notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
        ).execute()
    finally:
        if keep := os.environ.get("KEEP_NOTEBOOK"):
            nbformat.write(notebook, keep)  # to look at it
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 7  # data, histogram, curves, three of the report, samples
    tables = [
        output.data["text/plain"] for output in outputs if "finished" in output.get("data", {}).get("text/plain", "")
    ]
    assert tables and all(table.count("finished") == 3 for table in tables)
    assert (tmp_path / "sweep" / "report.html").is_file()
