"""The wheel, the locks, and the scripts that find a Python and make an environment."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from slatewise import VERSION

ROOT = Path(__file__).parent.parent
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
DEMO = max((ROOT / "models" / "bundles" / "movielens").glob("[0-9]*"), key=lambda folder: int(folder.name))
LOCKS = {name: (ROOT / "deploy" / f"{name}.lock").read_text() for name in ("serve", "test")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves files of earlier builds in a source folder, and packs them again.

    The copy has a bundle of the user's own.
    """
    folder = tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", ".staging-*")
    for name in ("app", "models"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    (folder / "source" / "models" / "bundles" / "own" / "1").mkdir(parents=True)
    (folder / "source" / "models" / "bundles" / "own" / "1" / "manifest.json").write_text("{}")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", folder, folder / "source"], check=True, capture_output=True, timeout=120)
    return next(folder.glob("*.whl"))


def test_wheel_has_both_packages_and_the_demo(wheel: Path) -> None:
    assert wheel.name == f"slatewise-{VERSION}-py3-none-any.whl"
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in packed} == {"slatewise", "slatewise_train", f"slatewise-{VERSION}.dist-info"}
    sources = {path.relative_to(root).as_posix() for root in (ROOT / "app", ROOT / "models") for path in modules(root)}
    bundles = {
        f"slatewise/{path.relative_to(ROOT / 'models').as_posix()}" for path in tracked(ROOT / "models" / "bundles")
    }
    assert not any("/own/" in name for name in packed)
    page = {path.relative_to(ROOT / "app").as_posix() for path in tracked(ROOT / "app" / "slatewise" / "page")}
    assert "slatewise/page/index.html" in page
    assert packed >= sources | bundles | page | {
        "slatewise/__init__.pyi",
        "slatewise/py.typed",
        "slatewise_train/py.typed",
    }


def modules(root: Path) -> list[Path]:
    return [path for path in root.rglob("*.py") if "egg-info" not in str(path)]


def tracked(folder: Path) -> list[Path]:
    """The files of a folder, without those that git ignores."""
    if not (ROOT / ".git").exists():
        return [path for path in folder.rglob("*") if path.is_file()]
    listed = subprocess.run(["git", "ls-files", "-z", "."], cwd=folder, capture_output=True, text=True, check=True)
    return [folder / name for name in listed.stdout.split("\0") if name]


def test_every_package_is_listed() -> None:
    found = {
        ".".join(path.parent.relative_to(root).parts)
        for root in (ROOT / "app", ROOT / "models")
        for path in root.rglob("__init__.py")
    }
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == found | {"slatewise.bundles"}


def test_unpacked_wheel_serves_the_demo_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    package = tmp_path / "site-packages"
    zipfile.ZipFile(wheel).extractall(package)
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLATEWISE_")}
    command = [
        sys.executable,
        ROOT / ".ci" / "first_request.py",
        package / "slatewise" / DEMO.relative_to(ROOT / "models") / "manifest.json",
    ]
    command += [sys.executable, "-m", "slatewise", "serve", "--port", "0"]
    environment["PYTHONPATH"] = str(package)
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "first answer" in done.stdout
    shown = subprocess.run(
        [sys.executable, "-m", "slatewise", "check-bundle"], cwd=empty, env=environment, capture_output=True, text=True
    )
    assert shown.stdout.startswith(f"movielens version {DEMO.name} serves")


@pytest.mark.parametrize("name", LOCKS)
def test_lock_has_pins_with_hashes_only(name: str) -> None:
    """No address or option of the machine that wrote it."""
    for line in LOCKS[name].splitlines():
        assert re.fullmatch(r"#.*|[a-z0-9.-]+==\S+( ; [^\\]+)? \\|    --hash=sha256:[0-9a-f]{64}( \\)?", line)
    assert "://" not in LOCKS[name]


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9.-]+)==(\S+)", LOCKS[name], re.MULTILINE))


def test_locks_agree() -> None:
    assert pins("serve").items() <= pins("test").items()


def test_locks_pin_every_declared_dependency() -> None:
    project = PYPROJECT["project"]
    for name, extras in (("serve", ["serve"]), ("test", ["serve", "train", "ray", "test"])):
        wanted = project["dependencies"] + [
            text for extra in extras for text in project["optional-dependencies"][extra]
        ]
        assert {Requirement(text).name for text in wanted} <= pins(name).keys() | {"torch"}


def test_test_lock_has_the_dependencies_of_torch_but_not_torch() -> None:
    """Those of the CPU build: torch is installed without its dependencies."""
    assert "torch" not in pins("test")
    requirements = [Requirement(text) for text in importlib.metadata.requires("torch") or []]
    needed = {each.name for each in requirements if not each.marker or each.marker.evaluate({"extra": ""})}
    assert {name for name in needed if not re.match("nvidia-|cuda-|triton", name)} <= pins("test").keys()


def test_torch_has_one_version() -> None:
    declared = [text for text in PYPROJECT["project"]["optional-dependencies"]["train"] if text.startswith("torch")]
    assert f"torch={declared[0]} " in (ROOT / ".ci" / "environment").read_text()


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def path_of_fakes(tmp_path: Path) -> Path:
    """A PATH with the tools that the scripts call, and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("sh", "cat", "head", "dirname"):
        (folder / tool).symlink_to(shutil.which(tool) or "")
    return folder


def find_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [ROOT / ".ci" / "find-python", *arguments]
    return subprocess.run(command, env={"PATH": str(folder)}, capture_output=True, text=True, timeout=30)


def test_find_python_passes_over_shims_that_fail(path_of_fakes: Path) -> None:
    script(path_of_fakes / "python3.14", "echo 'shim: no such version' >&2; exit 127")
    script(path_of_fakes / "python3.13", "echo 'Python 3.13.1 without the module ensurepip' >&2; exit 1")
    script(path_of_fakes / "python3.12", f'exec {sys.executable} "$@"')
    found = find_python(path_of_fakes)
    assert found.returncode == 0
    assert found.stdout == f"{sys.executable}\n"
    assert found.stderr.startswith(f"Python: {sys.executable} (Python 3.")


def test_find_python_without_any_says_how_to_install(path_of_fakes: Path) -> None:
    found = find_python(path_of_fakes)
    assert found.returncode == 1 and found.stdout == ""
    assert "no Python on the PATH" in found.stderr and "apt-get install python3" in found.stderr
    script(path_of_fakes / "python3", "echo 'Python 3.10.2' >&2; exit 1")
    assert "  python3: Python 3.10.2\n" in find_python(path_of_fakes).stderr


def test_find_python_takes_a_path_with_spaces(path_of_fakes: Path) -> None:
    (path_of_fakes / "my python").mkdir()
    script(path_of_fakes / "my python" / "python", f'exec {sys.executable} "$@"')
    assert find_python(path_of_fakes, str(path_of_fakes / "my python" / "python")).returncode == 0


# A Python that makes an environment of itself alone, in no time, and installs nothing. It reaches no other index.
FAKE = f"""case "$1 $2" in
"-m venv") rm -rf "$4"; mkdir -p "$4/bin" "$4/lib/python3.12/site-packages"; cp "$0" "$4/bin/python" ;;
"-m pip") case "$*" in *--index-url*) exit 1 ;; esac ;;
-c*import*venv*) echo "$0" ;;
*) exec {sys.executable} "$@" ;;
esac"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the scripts, and locks without packages."""
    folder = tmp_path / "check out"
    (folder / "deploy").mkdir(parents=True)
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    for name in LOCKS:
        (folder / "deploy" / f"{name}.lock").write_text("# no package\n")
    return folder


def test_environment_is_kept_if_complete_and_else_made_anew(checkout: Path, tmp_path: Path) -> None:
    lock = checkout / "deploy" / "serve.lock"
    folder = checkout / "environment"
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    for path in (first, second):
        script(Path(path), FAKE)

    def is_made_anew(python: str = "") -> bool:
        mark = folder / "mark"
        if folder.exists():
            mark.touch()
        command = [checkout / ".ci" / "environment", "environment", "serve", python]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        assert ("Installing" in shown) != mark.exists()
        return not mark.exists()

    assert is_made_anew(first)
    assert not is_made_anew(first)
    assert not is_made_anew()
    (folder / "installed").unlink()  # an installation that stopped half way
    assert is_made_anew(first)
    assert is_made_anew(second)  # another Python
    assert not is_made_anew(second)
    lock.write_text("# another lock\n")
    assert is_made_anew(second)
    (folder / "bin" / "python").unlink()  # its Python is gone
    assert is_made_anew(second)


@pytest.mark.parametrize("kind", LOCKS)
def test_environment_of_tests_finds_both_packages(checkout: Path, tmp_path: Path, kind: str) -> None:
    script(tmp_path / "python", FAKE)
    script(tmp_path / "uname", "echo Linux")
    shared = tmp_path / "shared"
    shared.mkdir()
    (checkout / "environment").symlink_to(shared)
    command = [checkout / ".ci" / "environment", "environment", kind, str(tmp_path / "python")]
    variables = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    shown = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=True).stdout
    assert f"Removing the link environment to {shared}; that folder stays" in shown
    assert shared.is_dir() and not list(shared.iterdir())
    found = checkout / "environment" / "lib" / "python3.12" / "site-packages" / "slatewise.pth"
    if kind == "test":
        assert found.read_text() == f"{checkout / 'app'}\n{checkout / 'models'}\n"
        assert "PyTorch's CPU index is not reachable; installing torch from PyPI (on Linux x86-64 about 4 GB" in shown
    else:
        assert not found.exists() and "PyTorch" not in shown
