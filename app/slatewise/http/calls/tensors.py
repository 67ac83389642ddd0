"""Tensors of the Open Inference Protocol, version 2: JSON and the binary extension, both ways.

    element of BYTES, binary:  length (4 bytes, little-endian), then as many bytes of UTF-8

Called by: `oip.py`. Calls: `errors.py`.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pydantic_core
from pydantic import Field

from slatewise.errors import Invalid, RankingError
from slatewise.http.calls.common import ForeignModel
from slatewise.schemas import Text

NUMPY_TYPES = {
    "INT8": "<i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "UINT8": "<u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
DATATYPES = ("BYTES", *NUMPY_TYPES)
LENGTH = struct.Struct("<I")


class TensorParameters(ForeignModel):
    binary_data_size: int | None = Field(None, ge=0, strict=True)


class Tensor(ForeignModel):
    """One input. Its values are `data`, or as many bytes behind the JSON part as `binary_data_size` says."""

    name: Text
    shape: list[Annotated[int, Field(ge=0, strict=True)]] = Field(min_length=1, max_length=4)
    datatype: Text
    parameters: TensorParameters = TensorParameters()
    data: list[Any] | None = None


class RepeatedInput(RankingError):
    """Two inputs have one name. Either could be meant."""

    status = 400
    title = "Repeated input"


def check_names(tensors: Sequence[Tensor]) -> None:
    """Raises RepeatedInput."""
    for name, count in Counter(tensor.name for tensor in tensors).items():
        if count > 1:
            raise RepeatedInput(f"{name}: {count} inputs have this name")


def read_values(tensor: Tensor, raw: bytes | None, most: int) -> list[Any]:
    """Return the values of an input in one list. `raw`: its bytes, if it has binary data. Raises Invalid.

    most: largest number of values. It is checked before any value is read.
    """
    count = math.prod(tensor.shape)
    if count > most:
        shown = count if count < 10**18 else "too many"  # a number of thousands of digits has no text
        raise Invalid.at(tensor.name, f"{shown} values, limit {most}")
    if tensor.datatype not in DATATYPES:
        raise Invalid.at(tensor.name, f"datatype must be one of {', '.join(DATATYPES)}")
    if raw is None:
        values = flat(tensor)
    elif tensor.datatype == "BYTES":
        values = read_texts(tensor.name, raw, count)
    else:
        kind = np.dtype(NUMPY_TYPES[tensor.datatype])
        if len(raw) != count * kind.itemsize:
            raise Invalid.at(tensor.name, f"{len(raw)} bytes for {count} values of {tensor.datatype}")
        values = np.frombuffer(raw, kind).tolist()
    if len(values) != count:
        raise Invalid.at(tensor.name, f"{len(values)} values for a shape of {count}")
    return values


def flat(tensor: Tensor) -> list[Any]:
    """Return the values of `data`, which may be nested as the shape is. Raises Invalid."""
    if tensor.data is None:
        raise Invalid.at(tensor.name, "has neither `data` nor `binary_data_size`")
    values = tensor.data
    for _ in tensor.shape[1:]:
        if values and all(isinstance(row, list) for row in values):
            values = list(chain.from_iterable(values))
    return values


def read_texts(name: str, raw: bytes, count: int) -> list[str]:
    """Read `count` elements of BYTES. Raises Invalid."""
    texts = []
    at = 0
    try:
        for _ in range(count):
            start = at + LENGTH.size
            at = start + LENGTH.unpack_from(raw, at)[0]
            texts.append(str(raw[start:at], "utf-8"))
    except struct.error:
        raise Invalid.at(name, f"its bytes end before element {len(texts)}") from None
    except UnicodeDecodeError:
        raise Invalid.at(f"{name}/{len(texts)}", "is not UTF-8") from None
    if at != len(raw):
        raise Invalid.at(name, f"{len(raw)} bytes, but its elements have {at}")
    return texts


def split_binary(tensors: Sequence[Tensor], binary: bytes) -> list[bytes | None]:
    """Return the bytes of each input, `None` for inputs with `data`. Raises Invalid unless the sizes add up."""
    parts: list[bytes | None] = []
    at = 0
    for tensor in tensors:
        size = tensor.parameters.binary_data_size
        parts.append(None if size is None else binary[at : at + size])
        at += size or 0
    if at != len(binary):
        raise Invalid.at("inputs", f"binary_data_size adds up to {at}, and {len(binary)} bytes follow the JSON part")
    return parts


def write_outputs(
    answer: dict[str, Any], columns: dict[str, npt.NDArray[np.float64]], binary: dict[str, bool]
) -> tuple[bytes, int | None]:
    """Return a body with one output of FP64 for each column, and the length of its JSON part if more follows."""
    outputs: list[dict[str, Any]] = []
    tail = []
    for name, column in columns.items():
        output: dict[str, Any] = {"name": name, "datatype": "FP64", "shape": [len(column)]}
        if binary[name]:
            tail.append(column.astype("<f8").tobytes())
            output["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            output["data"] = column.tolist()
        outputs.append(output)
    head = pydantic_core.to_json(answer | {"outputs": outputs})
    return (head, None) if not tail else (b"".join([head, *tail]), len(head))
