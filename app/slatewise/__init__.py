"""Slatewise, a ranking service: the serving package, and the client.

`Client`, `AsyncClient`, `Ranking`, the errors and `load` are imported on first use, so that the server never imports
httpx and the client never imports the server. `__init__.pyi` has their types.
"""

import importlib
import os

VERSION = "0.1.0"  # read by pyproject.toml

# ONNX Runtime reads this on import. Without it, it looks up a collector's host and writes a device id below HOME.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_PLACES = {
    "AsyncClient": "slatewise.client.async_client",
    "Client": "slatewise.client.client",
    "LocalRanker": "slatewise.local.ranker",
    "Ranking": "slatewise.client.results",
    "SlatewiseError": "slatewise.client.errors",
    "load": "slatewise.local.ranker",
}


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module 'slatewise' has no attribute {name!r}")
    try:
        module = importlib.import_module(_PLACES[name])
    except ModuleNotFoundError as error:
        if _PLACES[name].startswith("slatewise.client") or str(error.name).startswith("slatewise"):
            raise
        remedy = "pip install 'slatewise[serve]' (in a clone: pip install '.[serve]')"
        reason = f"slatewise.{name} needs {error.name}; run: {remedy}"
        raise ImportError(reason) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
