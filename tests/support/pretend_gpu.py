"""A pretended GPU: code for "cuda" runs on the CPU, and fails where it would fail on a machine with a GPU.

The mode remembers which tensors are on the GPU. An operation on a tensor of the GPU and one of the CPU raises, as does
`numpy` of a tensor on the GPU. A CPU tensor without dimensions may meet tensors on the GPU, and `copy_` may cross. The
backward pass is not checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

GPU = torch.device("cuda")
CROSSING = ("copy_", "_has_compatible_shallow_copy_type")  # functions that may read from both


class PretendGpu(TorchFunctionMode):
    def __init__(self) -> None:
        self.marked: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.seen = 0  # operations on the GPU

    def on_gpu(self, value: object) -> bool:
        return isinstance(value, Tensor) and value in self.marked

    def mark(self, found: Any) -> Any:
        for value in tree_leaves(found):
            if isinstance(value, Tensor):
                self.marked[value] = True
        return found

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return GPU if self.on_gpu(args[0]) else torch.device("cpu")
        if func in (Tensor.grad.__get__, Tensor.data.__get__):  # type: ignore[attr-defined]
            found = func(*args)
            return self.mark(found) if self.on_gpu(args[0]) else found
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            self.marked.pop(args[0], None)
            if self.on_gpu(args[1]):
                self.mark(args[0])
            return func(*args)
        if name == "backward":
            with torch._C.DisableTorchFunction():
                return func(*args, **kwargs)
        if name in ("to", "cpu") or "device" in kwargs:
            return self.placed(func, name, args, kwargs)
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        self.check(name, tensors)
        found = func(*args, **kwargs)
        gpu = any(self.on_gpu(value) for value in tensors)
        self.seen += gpu
        return self.mark(found) if gpu else found

    def placed(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function that names a device, or moves a tensor."""
        given = tree_leaves((args, kwargs))
        named = [torch.device(value) for value in given if isinstance(value, (torch.device, str))]
        gpu = name != "cpu" and (named[0] == GPU if named else self.on_gpu(args[0]))
        swapped = tree_map(lambda value: torch.device("cpu") if isinstance(value, torch.device) else value, args)
        found = func(*swapped, **kwargs | ({"device": torch.device("cpu")} if kwargs.get("device") else {}))
        if gpu is self.on_gpu(found):
            return found
        found = found.detach().clone().requires_grad_(found.requires_grad) if found.is_leaf else found.clone()
        return self.mark(found) if gpu else found

    def check(self, name: str, tensors: list[Tensor]) -> None:
        gpu = [value for value in tensors if self.on_gpu(value)]
        stray = [tuple(value.shape) for value in tensors if value.ndim and not self.on_gpu(value)]
        assert not gpu or not stray or name in CROSSING, f"{name}: CPU tensors {stray} with tensors on the GPU"
        assert not gpu or name != "numpy", "numpy of a tensor on the GPU"
