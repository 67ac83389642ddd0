"""Who may import what: the server runs without the tools of training, and each library has its one place."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slatewise import VERSION

ROOT = Path(__file__).parent.parent
SERVER = sorted((ROOT / "app").rglob("*.py"))
OFFLINE = ("torch", "slatewise_train", "polars", "pandas", "onnx", "matplotlib", "tqdm", "sklearn", "ray", "tests")


def imported(path: Path) -> set[str]:
    """Top names of all that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("module", ["slatewise.main", "slatewise.store.push"])
def test_the_server_loads_nothing_of_training(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    loaded = set(result.stdout.split())
    assert "slatewise" in loaded
    assert not loaded & set(OFFLINE)


@pytest.mark.parametrize("path", SERVER, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_of_the_server_imports_training(path: Path) -> None:
    assert not imported(path) & set(OFFLINE)


PLACES = {
    "onnxruntime": {"inference/engine.py"},
    "fastapi": {"main.py", "http/app.py", "http/rank.py", "http/models.py", "http/health.py"},
    "fastapi_offline": {"http/app.py"},
    "uvicorn": {"main.py"},
    "starlette": {"http/app.py", "http/auth.py", "http/body.py", "http/problems.py", "http/rank.py"},
    "redis": {"store/generations.py", "store/lookup.py", "store/client.py", "store/node.py"},
    "pydantic_settings": {"settings.py"},
    "prometheus_client": {"metrics.py", "http/health.py"},
}


@pytest.mark.parametrize("library", PLACES)
def test_a_library_is_imported_in_its_place_only(library: str) -> None:
    places = {path.relative_to(ROOT / "app" / "slatewise").as_posix() for path in SERVER if library in imported(path)}
    assert places, "not used at all"
    assert places <= PLACES[library]


def test_every_library_of_the_server_is_a_declared_dependency() -> None:
    declared = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert declared
    names = {name.replace("-", "_") for name in re.findall(r'"([\w-]+)', declared[1])} | {
        "slatewise",
        "starlette",
        "pydantic_core",
        "google",
        "typing_extensions",
    }  # fastapi's, pydantic's, protobuf's, pydantic's
    used = set().union(*map(imported, SERVER)) - set(sys.stdlib_module_names)
    assert used <= names


def repository_texts() -> dict[str, str]:
    """The tracked text files by path."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    texts = {}
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_file() and b"\0" not in (content := path.read_bytes()):
            texts[name] = content.decode(errors="replace")
    return texts


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_no_file_names_a_folder_of_the_machine_it_was_made_on() -> None:
    folder = re.compile(r"(?<![\w.}-])/(?:home|Users|workspace|work)(?=/|\b(?![\w.-]))|file:[/]{3}")
    texts = repository_texts()
    assert "pyproject.toml" in texts
    assert not {name: found[0] for name, text in texts.items() if (found := folder.search(text))}


def test_the_version_is_the_packages() -> None:
    assert f'version = "{VERSION}"' in (ROOT / "pyproject.toml").read_text()
