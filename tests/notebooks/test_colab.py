"""The Colab notebook runs from the first cell to the last, and leaves nothing in the repository."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from leon_jax.model_folder import shipped_folder
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "leon_colab.ipynb"
SHIPPED = (shipped_folder() / "decoder.safetensors").is_file()

# The shipped model retrieves from thousands of documents, which are drawn and indexed first.
MODELS = ["tiny", *([pytest.param("shipped", marks=pytest.mark.slow)] if SHIPPED else [])]


@pytest.mark.parametrize("model", MODELS)
def test_the_notebook_runs(model, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS", "cpu"))
    if model == "tiny":
        checkpoint, prepared = tiny.folders()
        monkeypatch.setenv("LEON_CHECKPOINT", str(checkpoint))
        monkeypatch.setenv("LEON_INDEX", str(prepared))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert "CC-BY" in printed and "the model: " in printed and "Image(" in printed
    assert (tmp_path / "cat.png").is_file()


def test_the_notebook_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
