"""Save and load checkpoints, so that a stopped training resumes after its last whole epoch.

Called by: `train.py`, `progress.py`, `search.py`, `meta/limaml.py`, `compression/distill.py`. Calls: torch.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

if sys.platform != "win32":
    import fcntl


class Stateful(Protocol):
    """A torch module or optimizer."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class CheckpointMismatch(ValueError):
    """The checkpoint was made from other data, another model or another config."""


def identity(values: object, tensors: Iterable[Tensor] = ()) -> str:
    """Return a digest of everything that a resumed training must share with the stopped one.

    values: anything whose `repr` describes it completely; tensors: weights and vectors, which count by their bytes.
    """
    digest = hashlib.sha256(repr(values).encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def save(path: Path, identity: str, parts: Mapping[str, Stateful], **progress: Any) -> None:
    """Write a checkpoint to a temporary file and rename it, so that `path` is never half-written.

    The folder is created if it does not exist. progress: plain values, for example the number of finished epochs.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"identity": identity, **{name: part.state_dict() for name, part in parts.items()}, **progress}
    unfinished = path.with_name(f"{path.name}.part")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def load(path: Path, identity: str, parts: Mapping[str, Stateful], mismatch: str) -> dict[str, Any]:
    """Restore the parts in place and return the progress.

    Raises OSError if the file cannot be read, and CheckpointMismatch if its identity is another; then no part changes.
    mismatch: the owner to name in that error, for example "other data or another [model]".
    """
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if state["identity"] != identity:
        raise CheckpointMismatch(
            f"{path} belongs to {mismatch}: use another name in the TOML or another folder, or remove it"
        )
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return {name: value for name, value in state.items() if name not in parts and name != "identity"}


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep a folder for this process. Raises ValueError if another process has it.

    Windows and some network file systems have no such locks, and then nothing is checked.
    """
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(f"{folder}: another process trains in this folder; use another --folder, or wait") from None
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(handle)


def resume(path: Path, identity: str, parts: Mapping[str, Stateful], mismatch: str) -> dict[str, Any]:
    """Restore the parts as `load` does. Without a checkpoint, change no part and return an empty progress."""
    return load(path, identity, parts, mismatch) if path.exists() else {}
