"""The shape of both packages: allowed imports, no cycles, and limits on the size of files and functions."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

from slatewise.cli import COMMANDS

ROOT = Path(__file__).parent.parent
SOURCES = {
    ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
    for root in (ROOT / "app", ROOT / "models")
    for path in sorted(root.rglob("*.py"))
}
SERVER = {name: path for name, path in SOURCES.items() if name.split(".")[0] == "slatewise"}
OFFLINE = ("torch", "slatewise_train", "polars", "pandas", "onnx", "matplotlib", "tqdm", "sklearn", "ray", "tests")
MOST_LINES = 350
MOST_PARAMETERS = 7


def imports(path: Path) -> set[str]:
    """All that a file imports, also inside functions: modules, and `module.name` for each imported name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


def libraries(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def modules(path: Path) -> set[str]:
    """The modules of both packages that a file imports."""
    return imports(path) & SOURCES.keys()


@pytest.mark.parametrize(
    "module", ["slatewise.cli", "slatewise.main", "slatewise.store.push", "slatewise.bundle.check"]
)
def test_server_loads_nothing_of_training(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    loaded = set(result.stdout.split())
    assert "slatewise" in loaded
    assert not loaded & {*OFFLINE, "httpx"}


@pytest.mark.parametrize("module", SERVER)
def test_server_imports_nothing_of_training(module: str) -> None:
    assert not libraries(SERVER[module]) & set(OFFLINE)


def test_command_imports_only_the_standard_library() -> None:
    """`slatewise serve` without its packages can then say which extra to install."""
    used = libraries(SERVER["slatewise.cli"]) | libraries(SERVER["slatewise"])
    assert used - {"slatewise"} <= set(sys.stdlib_module_names)


PLACES = {
    "onnxruntime": {"inference/engine.py"},
    "fastapi": {
        "main.py",
        *(
            f"http/{name}.py"
            for name in ("admin", "app", "hot_routes", "rank", "models", "health", "server", "items", "page")
        ),
        "http/drain.py",
        "http/events.py",
        "http/telemetry.py",
        "http/calls/oip.py",
        "http/calls/model_list.py",
    },
    "fastapi_offline": {"http/app.py"},
    "uvicorn": {"http/server.py", "http/drain.py", "http/connection.py"},
    "starlette": {
        *(
            f"http/{name}.py"
            for name in ("app", "auth", "body", "dialect", "events", "head", "hot_routes", "problems", "rank")
        ),
        *(
            f"http/{name}.py"
            for name in ("telemetry", "trace_context", "tracing", "whole_bodies", "drain", "request_headers")
        ),
        *(f"http/calls/{name}.py" for name in ("aws", "cohere", "common", "metarank", "oip", "tei")),
    },
    "redis": {f"store/{name}.py" for name in ("client", "deletion", "node", "nodes", "poll", "replies", "writer")}
    | {"events/redis_histories.py"},
    "cryptography": {"bundle/signature.py", "bundle/sign.py"},
    "httpx": {f"client/{name}.py" for name in ("client", "async_client", "exchange")},
    "pydantic_settings": {"settings.py"},
    "opentelemetry": {"http/tracing.py"},
    "prometheus_client": {"metrics.py", "http/health.py"},
}


@pytest.mark.parametrize("library", PLACES)
def test_library_is_imported_in_its_place_only(library: str) -> None:
    found = {path for path in SERVER.values() if library in libraries(path)}
    places = {path.relative_to(ROOT / "app" / "slatewise").as_posix() for path in found}
    assert places, "not used at all"
    assert places <= PLACES[library]


PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORTED_AS = {"opentelemetry_sdk": "opentelemetry", "protobuf": "google", "pyyaml": "yaml"}
BROUGHT_ALONG = {
    "starlette": "fastapi",
    "pydantic_core": "pydantic",
    "typing_extensions": "pydantic",
    "pyarrow": "ray",
}  # by another package


def declared(*extras: str) -> set[str]:
    """Import names of the base dependencies and of extras."""
    listed = PYPROJECT["dependencies"] + [
        name for extra in extras for name in PYPROJECT["optional-dependencies"][extra]
    ]
    names = {match[0].replace("-", "_") for text in listed if (match := re.match(r"[\w-]+", text))}
    names = {IMPORTED_AS.get(name, name) for name in names}
    return names | {name for name, carrier in BROUGHT_ALONG.items() if carrier in names}


@pytest.mark.parametrize(
    ("package", "extras"), [("slatewise", ("serve", "otel", "signing")), ("slatewise_train", ("train", "ray"))]
)
def test_every_library_is_a_declared_dependency(package: str, extras: tuple[str, ...]) -> None:
    paths = [path for name, path in SOURCES.items() if name.split(".")[0] == package]
    used = set().union(*map(libraries, paths)) - set(sys.stdlib_module_names)
    assert used <= declared(*extras) | {"slatewise", "slatewise_train"}


@pytest.mark.parametrize("extra", ["serve", "train"])
def test_extra_declares_every_library_that_its_commands_load(extra: str) -> None:
    """Follows the imports of each command through both packages."""
    reached: set[str] = set()
    waiting = {command.module for command in COMMANDS.values() if command.extra == extra} & SOURCES.keys()
    while waiting:
        reached.add(module := waiting.pop())
        waiting |= modules(SOURCES[module]) - reached
    used = set().union(*(libraries(SOURCES[module]) for module in reached)) - set(sys.stdlib_module_names)
    optional = declared("ray", "otel", "signing") - declared()
    assert used - optional <= declared(extra) | {"slatewise", "slatewise_train"}


def test_no_import_cycle() -> None:
    graph = {name: modules(path) - {name} for name, path in SOURCES.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


# Each imports earlier ones only. `local` builds on the client's requests and results; the server does not.
LEVELS = ("", "inference", "bundle", "store", "events", "ranking", "http", "client", "local", "commands")


def level(module: str) -> int:
    parts = module.split(".")
    return LEVELS.index(parts[1]) if len(parts) > 1 and parts[1] in LEVELS else 0


@pytest.mark.parametrize("module", sorted(SERVER.keys() - {"slatewise.main"}))
def test_imports_point_downwards(module: str) -> None:
    assert not {name for name in modules(SERVER[module]) if level(name) > level(module)}


@pytest.mark.parametrize("module", [name for name in SERVER if level(name) == LEVELS.index("client")])
def test_client_imports_nothing_of_the_server(module: str) -> None:
    assert {name for name in modules(SERVER[module]) if not name.startswith("slatewise.client")} == set()
    used = libraries(SERVER[module]) - {"slatewise", "httpx", "numpy"} - set(sys.stdlib_module_names)
    assert not used


TRAINING = {name: path for name, path in SOURCES.items() if name.startswith("slatewise_train.")}
# Folders and modules of slatewise_train; each imports itself and earlier ones only.
TRAINING_LEVELS = (
    "config_values",
    "rankers",
    "config",
    "split",
    "defaults",
    "tables",
    "exposures",
    "data",
    "devices",
    "losses",
    "listwise",
    "checkpoint",
    "column_kinds",
    "new_toml",
    "check_data",
    "batches",
    "slates",
    "shown",
    "epochs",
    "progress",
    "time_left",
    "evaluation",
    "new_model",
    "training_log",
    "train",
    "incremental",
    "search_space",
    "search_state",
    "search",
    "loading",
    "train_command",
    "graph_check",
    "bundle_writer",
    "compression",
    "meta",
    "demo",
    "export",
    "update_command",
    "compress",
)


def training_level(module: str) -> int:
    return TRAINING_LEVELS.index(module.split(".")[1])


@pytest.mark.parametrize("module", sorted(TRAINING))
def test_training_imports_point_downwards(module: str) -> None:
    imported = modules(TRAINING[module]) & TRAINING.keys()
    assert not {name for name in imported if training_level(name) > training_level(module)}


def long_functions(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            given = node.args
            names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            count = len(names) - (names[:1] in (["self"], ["cls"])) + bool(given.vararg) + bool(given.kwarg)
            if count > MOST_PARAMETERS:
                yield f"{node.name}: {count} parameters"


@pytest.mark.parametrize("module", SOURCES)
def test_file_is_not_too_long(module: str) -> None:
    assert len(SOURCES[module].read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("module", SOURCES)
def test_functions_take_few_parameters(module: str) -> None:
    assert not list(long_functions(SOURCES[module]))


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
def test_no_file_names_a_folder_of_its_machine() -> None:
    folder = re.compile(r"(?<![\w.}-])/(?:home|Users|workspace|work)(?=/|\b(?![\w.-]))|file:[/]{3}")
    texts = repository_texts()
    assert "pyproject.toml" in texts
    assert not {name: found[0] for name, text in texts.items() if (found := folder.search(text))}
