"""Check that every locked package has a wheel for each supported platform and Python; prints the matrix.

Called by: `make wheels-check`. Calls: pip, which resolves each pin for another platform without installing it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
TORCH = Requirement(re.findall(r'"(torch==[\d.]+)"', (ROOT / "pyproject.toml").read_text())[0])
PYTHONS = ("3.11", "3.12", "3.13", "3.14")


def glibc(architecture: str) -> list[str]:
    """Tags of wheels for glibc 2.28: Debian 10, Ubuntu 18.10, RHEL 8 and newer."""
    return [f"manylinux_2_{minor}_{architecture}" for minor in range(28, 16, -1)] + [f"manylinux2014_{architecture}"]


PLATFORMS = {
    "Linux x86-64": (glibc("x86_64"), {"sys_platform": "linux", "platform_machine": "x86_64"}),
    "Linux aarch64": (glibc("aarch64"), {"sys_platform": "linux", "platform_machine": "aarch64"}),
    "macOS 14 arm64": (["macosx_14_0_arm64"], {"sys_platform": "darwin", "platform_machine": "arm64"}),
}


def locked(name: str) -> list[Requirement]:
    text = (ROOT / "deploy" / f"{name}.lock").read_text()
    return [Requirement(line) for line in re.findall(r"^(\w.*==.*?)(?: \\)?$", text, re.MULTILINE)]


def pins(requirements: list[Requirement], python: str, markers: dict[str, str]) -> list[str]:
    """Those that apply there. pip itself would evaluate markers for the Python that runs it."""
    environment = markers | {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    chosen = [each for each in requirements if not each.marker or each.marker.evaluate(environment)]
    return [f"{each.name}{each.specifier}" for each in chosen]


def without_wheel(wanted: list[str], python: str, tags: list[str]) -> list[str]:
    """The pins that pip finds no wheel for."""
    missing: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed"]
        command += ["--only-binary", ":all:", "--target", folder, "--python-version", python]
        command += [argument for tag in tags for argument in ("--platform", tag)]
        while True:
            rest = [pin for pin in wanted if pin not in missing]
            result = subprocess.run([*command, *rest], capture_output=True, text=True)
            if result.returncode == 0:
                return missing
            found = re.search(r"No matching distribution found for (\S+)", result.stderr)
            if not found or found[1] not in rest:
                sys.exit(result.stderr)
            missing.append(found[1])


def main() -> None:
    failed = False
    print("| platform | Python | " + " | ".join(f"{name}.lock" for name in ("serve", "test")) + " |")
    print("| --- " * 4 + "|")
    for platform, (tags, markers) in PLATFORMS.items():
        for python in PYTHONS:
            cells = []
            for requirements in (locked("serve"), [*locked("test"), TORCH]):
                wanted = pins(requirements, python, markers)
                missing = without_wheel(wanted, python, tags)
                failed |= bool(missing)
                cells.append(f"no wheel: {', '.join(missing)}" if missing else f"all {len(wanted)}")
            print(f"| {platform} | {python} | {' | '.join(cells)} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
