"""The Colab notebook runs from the first cell to the last, and leaves nothing in the repository."""

import glob
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from leon_jax.model_folder import shipped_folder
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "leon_colab.ipynb"
SHIPPED = (shipped_folder() / "decoder.safetensors").is_file()

# The shipped model retrieves from thousands of documents, which are rendered and indexed first.
MODELS = ["tiny", *([pytest.param("shipped", marks=pytest.mark.slow)] if SHIPPED else [])]


@pytest.mark.parametrize("model", MODELS)
def test_the_notebook_runs(model, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS", "cpu"))
    if model == "tiny":
        checkpoint, prepared = tiny.folders()
        monkeypatch.setenv("LEON_MODEL", str(checkpoint))
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


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of its own: no GPU, no TPU, leon_jax not installed. Adds them, runs the cell."""
    (tmp_path / "bin").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in list(os.environ):
        if "TPU" in name:
            monkeypatch.delenv(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    everywhere = glob.glob
    # No devices of this machine.
    monkeypatch.setattr(glob, "glob", lambda p: [] if p.startswith("/dev") else everywhere(p))
    return Machine(monkeypatch, tmp_path)


class Machine:
    """Where the install cell runs."""

    def __init__(self, monkeypatch, folder: Path):
        self.monkeypatch, self.folder = monkeypatch, folder

    def add_nvidia_smi(self, code: int):
        script = self.folder / "bin" / "nvidia-smi"
        script.write_text(f"#!/bin/sh\nexit {code}\n")
        script.chmod(0o755)

    def install(self, *answers: str) -> tuple[str, list[str]]:
        """What pip is told to install, and the questions, each answered in turn."""
        commands, questions, waiting = [], [], list(answers)
        run = subprocess.run

        def record(command, **settings):
            if command[0] != sys.executable:
                return run(command, **settings)
            commands.append(command)

        def ask(question):
            questions.append(question)
            return waiting.pop(0)

        self.monkeypatch.setattr(subprocess, "run", record)
        self.monkeypatch.setattr("builtins.input", ask)
        (cell,) = (
            cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells
            if cell.cell_type == "code" and "SOURCE" in cell.source
        )  # fmt: skip
        exec(compile(cell.source, "cell", "exec"), {})
        ((*_, wanted),) = commands
        assert not waiting
        return wanted, questions


ADDRESS = "https://example.org/leon_jax"


def test_a_cpu_needs_no_extra_and_the_address_is_asked_for_in_one_sentence(machine):
    wanted, questions = machine.install("", f" {ADDRESS} ")
    assert wanted == f"leon_jax[demo] @ git+{ADDRESS}"
    assert len(questions) == 2 and questions[0].count("?") == 1
    assert "address" in questions[0] and "wheel" in questions[0]


@pytest.mark.parametrize(("code", "extras"), [(0, "demo,cuda"), (9, "demo")])
def test_a_gpu_that_answers_needs_cuda(machine, code, extras):
    machine.add_nvidia_smi(code)
    assert machine.install(ADDRESS)[0] == f"leon_jax[{extras}] @ git+{ADDRESS}"


@pytest.mark.parametrize("name", ["COLAB_TPU_1VM", "TPU_ACCELERATOR_TYPE"])
def test_a_tpu_needs_tpu(machine, monkeypatch, name):
    monkeypatch.setenv(name, "v5e-1")
    assert machine.install(ADDRESS)[0] == f"leon_jax[demo,tpu] @ git+{ADDRESS}"


def test_an_uploaded_wheel_is_found(machine):
    wheel = "leon_jax-0.1.0-py3-none-any.whl"
    (machine.folder / wheel).write_text("")
    assert machine.install() == (f"{wheel}[demo]", [])


def test_the_extras_are_those_of_the_package():
    extras = importlib.metadata.metadata("leon_jax").get_all("Provides-Extra")
    assert {"demo", "cuda", "tpu"} <= set(extras)


def test_the_readme_links_to_the_notebook_where_it_says_how_to_set_up():
    section = (ROOT / "README.md").read_text().split("## Set up\n")[1].split("\n## ")[0]
    assert re.search(r"Colab.*\(notebooks/leon_colab\.ipynb\)", section)
