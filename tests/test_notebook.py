"""The notebook has no outputs, and runs from top to bottom, with and without a server."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.support.network import free_port

with warnings.catch_warnings():  # of jupyter's packages, while they are imported
    warnings.simplefilter("ignore", DeprecationWarning)
    import nbformat
    from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A kernel of this Python, whatever kernels the machine has."""
    folder = tmp_path / "kernels" / "this-python"
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (folder / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "this", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    return folder.name


def outputs(notebook: Any) -> list[str]:
    """The text of each output."""
    found = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [
        str(output.get("text") or output["data"].get("text/html") or output["data"]["text/plain"]) for output in found
    ]


def test_no_output_is_committed() -> None:
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:zmq")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:nbclient")
@pytest.mark.parametrize("with_server", [True, False])
def test_notebook_runs(kernel: str, monkeypatch: pytest.MonkeyPatch, demo_url: str, with_server: bool) -> None:
    monkeypatch.setenv("SLATEWISE_URL", demo_url if with_server else f"http://127.0.0.1:{free_port()}")
    notebook = nbformat.read(NOTEBOOK, 4)
    NotebookClient(notebook, kernel_name=kernel, timeout=120).execute()
    *_, last = shown = outputs(notebook)
    assert "<table>" in shown[1] and "Toy Story (1995)" in shown[2]
    assert "Shawshank Redemption" in shown[3] and "someone new" in shown[4]
    assert shown[5].startswith("/exit: ")
    if with_server:
        assert last.startswith("the largest difference") and float(last.split()[-1]) < 1e-5
    else:
        assert last.startswith("no server: cannot connect")
