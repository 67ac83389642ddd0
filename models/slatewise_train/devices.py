"""The device that a training runs on, and the precision of its matrix products.

Called by: `train_command.py`, `train.py`, `evaluation/held_out.py`. Calls: torch.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch

T = TypeVar("T")

DEVICES = ("auto", "cpu", "cuda")
CPU_FEATURES = ("amx_bf16", "avx512_bf16")  # processors with either multiply bfloat16
WIDE = 128  # least width whose products are faster in bfloat16 on a CPU, for short and long histories: docs/training.md


def find_device(name: str) -> torch.device:
    """Return a device by its name in DEVICES; "auto" is a CUDA GPU if there is one. Raises ValueError without a GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: PyTorch finds no CUDA GPU here; leave out --device, or install a PyTorch build with CUDA"
        )
    return torch.device(name)


def moved(part: T, device: torch.device) -> T:
    """Return a dataclass of tensors, or of such dataclasses, with its tensors on a device."""
    values: dict[str, Any] = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}  # type: ignore[arg-type]
    return type(part)(
        **{
            name: moved(value, device) if dataclasses.is_dataclass(value) else value.to(device)
            for name, value in values.items()
        }
    )


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions for products in bfloat16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(torch.cpu.get_capabilities().get(name, False) for name in CPU_FEATURES)


def choose_bfloat16(wanted: bool | str, device: torch.device, width: int) -> tuple[bool, str]:
    """Return whether matrix products are in bfloat16, and the reason.

    wanted: `bfloat16` of `[train]`; width: of the ranker. "auto" takes bfloat16 on a device that has the instructions.
    On a CPU the ranker must be wide too: smaller products take longer, because their operands have to be converted.
    """
    able = multiplies_bfloat16(device)
    if wanted != "auto":
        warning = "; WARNING: slow, this processor has no instructions for it" if wanted and not able else ""
        return bool(wanted), f"[train] bfloat16{warning}"
    if not able and device.type == "cuda":
        return False, "this GPU has no bfloat16"
    if not able:
        return False, "this processor has no AMX or AVX512_BF16 instructions"
    if device.type == "cpu" and width < WIDE:
        return False, f"on a CPU, bfloat16 is faster from width {WIDE} on"
    return True, "faster on this processor"


def wait(device: torch.device) -> None:
    """Return when the device has done all that it was asked for; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(device: torch.device) -> str:
    """Return the name of a device for a printed line."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return "CPU, 1 thread" if threads == 1 else f"CPU, {threads} threads (--threads 1 is faster beside other work)"
