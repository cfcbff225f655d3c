"""The notebooks run from top to bottom, offline."""

import json
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_is_a_notebook_for_each_family():
    assert [path.stem for path in NOTEBOOKS] == ["heptapod", "hierarchical_lm", "leap", "multigrid"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path):
    """Outputs would hold paths and warnings of the machine that ran it."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        assert cell["cell_type"] == "markdown" or (not cell["outputs"] and cell["execution_count"] is None)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


@pytest.mark.slow  # trains each family for a few steps
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("HEPTAPOD_NOTEBOOK_STEPS", "3")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("configs", "training"):
        (tmp_path / name).symlink_to(ROOT / name)
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "outputs" / f"notebook-{path.stem}" / "model.safetensors").is_file()
    assert any(cell.get("outputs") for cell in notebook["cells"])
    shown = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    noise = "".join(output["text"] for output in shown if output.get("name") == "stderr")
    assert not re.search("Failed to load|Warning|pytree|pin_memory", noise), noise
