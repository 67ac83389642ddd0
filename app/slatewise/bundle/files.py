"""The files of a bundle, read once into memory. The digests are checked over the bytes that are used.

A file that is mapped, or that is read again after its check, may change while it is served: a truncated one kills the
process with SIGBUS, and one that is overwritten in place changes scores. So nothing of a bundle is mapped, and nothing
on disk matters after a load.

Called by: `loader.py`, `commands/doctor.py`, and the package slatewise_train. Calls: `manifest.py`.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slatewise.bundle.manifest import ManifestError
from slatewise.inference.engine import Step, at_once
from slatewise.process import memory_limit

DECODE_AT_ONCE = 2**18  # characters of JSON that are decoded in one call, which lets no other thread run


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checked_path(folder: Path, name: str) -> Path:
    """Raise ManifestError if a file is missing, is a symbolic link, lies outside the bundle, or exceeds the memory."""
    path = folder / name
    if path.is_symlink() or not path.resolve().is_relative_to(folder.resolve()):
        raise ManifestError(f"{name} leads out of the bundle")
    if not path.is_file():
        raise ManifestError(f"{name} is missing")
    if path.stat().st_size > memory_limit():  # to read it would end the process, and to compute its digest take hours
        raise ManifestError(f"{name} is larger than the memory")
    return path


def check_file(folder: Path, name: str, digest: str) -> None:
    """Check a file that the server does not use. Raises the errors of `checked_path`, or WrongDigest."""
    if sha256(checked_path(folder, name)) != digest:
        raise WrongDigest(name)


WRONG_DIGEST = "does not have the manifest's sha256"


class WrongDigest(ManifestError):
    """A file is not the one that was published, or has not arrived completely."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} {WRONG_DIGEST}")


class Files:
    """Reads the files in a bundle's folder. `digests` is `None` for a bundle that is being written: nothing is checked.

    Without a digest in the manifest, a file does not exist. step: as in `Engine`.
    """

    def __init__(self, folder: Path, digests: Mapping[str, str] | None, step: Step = at_once) -> None:
        self.folder = folder
        self.digests = digests
        self.step = step

    def exists(self, name: str) -> bool:
        return (self.folder / name).is_file() if self.digests is None else name in self.digests

    def read(self, name: str) -> bytes:
        """Return the content of a file. Raises ManifestError, also for another digest."""
        path = checked_path(self.folder, name)
        content: bytes
        try:
            content, digest = self.step(partial(read, path))
        except OSError as error:
            raise ManifestError(f"{name}: {error}") from error
        if self.digests is not None and digest != self.digests.get(name):
            raise WrongDigest(name)
        return content

    def read_optional(self, name: str) -> bytes | None:
        return self.read(name) if self.exists(name) else None

    def read_json(self, name: str) -> Any:
        """Return the content of a JSON file; `None` without the file. Raises ManifestError or ValueError."""
        content = self.read_optional(name)
        return None if content is None else json.loads(content)

    def read_array(self, name: str) -> NDArray[Any]:
        """Return the read-only array of an .npy file. Raises ManifestError or ValueError; pickles are refused."""
        return array_of(self.read(name))


def read(path: Path) -> tuple[bytes, str]:
    """Return the content of a file, and its SHA-256."""
    content = path.read_bytes()
    return content, hashlib.sha256(content).hexdigest()


def array_of(content: bytes) -> NDArray[Any]:
    """Return the array in the bytes of an .npy file, without a copy. Raises ValueError.

    `numpy.load` would copy: a table would be in memory twice while it loads.
    """
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise ValueError(f"version {version} of the .npy format is not known")
    shape, fortran_order, dtype = read_header[version](stream)
    if dtype.hasobject:
        raise ValueError("Python objects are not read")
    count = math.prod(shape)
    if count * dtype.itemsize != len(content) - stream.tell():
        raise ValueError(f"the file does not hold {count} values of {dtype}")
    array = np.frombuffer(content, dtype, count, stream.tell())
    return array.reshape(shape, order="F" if fortran_order else "C")


def strings(content: bytes) -> list[str]:
    """Return the texts in a JSON list. Raises ValueError for other content, and for a text that is not Unicode.

    A long list is decoded text by text: one call for a million ids would stop the event loop for a tenth of a second.
    """
    text = content.decode()
    names = json.loads(text) if len(text) <= DECODE_AT_ONCE else list(elements(text))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("not a list of texts")
    if "\\u" in text:
        for name in names:
            name.encode()  # raises ValueError for half of a surrogate pair, which no answer can hold
    return names


def elements(text: str) -> Iterator[Any]:
    """Yield the elements of a JSON list one by one. Raises ValueError if the text is not one JSON list."""
    decode = json.JSONDecoder().raw_decode
    blank = " \t\n\r"
    at = len(text) - len(text.lstrip(blank))
    expected = "["
    while text[at : at + 1] == expected:
        at = after_blanks(text, at + 1)
        if expected == "[" and text[at : at + 1] == "]":
            break
        element, at = decode(text, at)
        yield element
        at = after_blanks(text, at)
        expected = ","
    if text[at : at + 1] != "]" or text[at + 1 :].strip(blank):
        raise ValueError("not a JSON list")


def after_blanks(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\n", "\r"):
        at += 1
    return at
