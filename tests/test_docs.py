"""Notebooks, the example and what the pages tell one to type: run as they are."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

QUICK = {"SEEDS = 15, 3": "SEEDS = 2, 1", "seeds=3, max_epochs=15": "seeds=1, max_epochs=2"}


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    text = "".join(cell.source for cell in notebook.cells)
    assert sum(text.count(long) for long in QUICK) == 1
    for cell in notebook.cells:
        assert not cell.get("outputs"), "notebooks are kept without outputs"
        for long, short in QUICK.items():
            cell.source = cell.source.replace(long, short)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert not [output.text for output in shown if output.get("name") == "stderr"]
