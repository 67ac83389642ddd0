"""The stored value: vectors of each dtype are restored, and every damaged value is refused."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn

from slatewise.store.codec import (
    DTYPES,
    FLOAT32,
    HEADER,
    MAGIC,
    Corrupt,
    Mismatched,
    pack,
    pack_many,
    read_pointer,
    renumbered,
    unpack,
    user_key,
)

vectors = st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), max_size=40).map(
    lambda numbers: np.array(numbers, np.float32)
)
generations = st.integers(0, 2**64 - 1)
moments = st.floats(0, 1e11)


@given(vectors, generations, moments)
def test_unpack_restores_a_packed_vector(vector: np.ndarray, generation: int, created_at: float) -> None:
    found, found_generation, found_created = unpack(pack(vector, generation, created_at), len(vector))
    assert found.dtype == np.float32
    assert found.tobytes() == vector.tobytes()
    assert (found_generation, found_created) == (generation, created_at)


def test_a_stored_value_has_the_documented_layout() -> None:
    value = pack(np.array([1.0, -2.0], np.float32), 7, 1_000.5)
    rest = b"SLWM" + bytes([0, 0]) + struct.pack("<HdQ", 2, 1_000.5, 7), struct.pack("<2f", 1.0, -2.0)
    assert value == rest[0] + struct.pack("<I", zlib.crc32(rest[0] + bytes(4) + rest[1])) + rest[1]


@settings(max_examples=20)
@given(vectors, generations, moments, st.integers(1, 255))
def test_unpack_refuses_a_change_of_any_byte(
    vector: np.ndarray, generation: int, created_at: float, change: int
) -> None:
    value = pack(vector, generation, created_at)
    for position in range(len(value)):
        corrupt = bytearray(value)
        corrupt[position] ^= change
        with pytest.raises(Corrupt):
            unpack(bytes(corrupt), len(vector))
            pytest.fail(f"byte {position} was changed by {change} and not noticed", pytrace=False)


@settings(max_examples=30)
@given(vectors, st.data())
def test_unpack_refuses_a_cut_or_extended_value(vector: np.ndarray, data: st.DataObject) -> None:
    value = pack(vector, 1, 0.0)
    for wrong in (
        value[: data.draw(st.integers(0, len(value) - 1))],
        value + data.draw(st.binary(min_size=1, max_size=8)),
    ):
        with pytest.raises(Corrupt):
            unpack(wrong, len(vector))


@given(st.binary(max_size=80), st.integers(0, 12))
def test_unpack_refuses_random_bytes(value: bytes, dim: int) -> None:
    with pytest.raises(Corrupt):
        unpack(value, dim)


@pytest.mark.parametrize("dim", [0, 7, 9, 65_535])
def test_unpack_refuses_a_vector_of_another_size(dim: int) -> None:
    for dtype in DTYPES:
        with pytest.raises(Mismatched):
            unpack(pack(np.zeros(8, np.float32), 1, 0.0, dtype), dim)


def sealed(body: bytes, dim: int, dtype: int = FLOAT32, magic: bytes = MAGIC, created_at: float = 0.0) -> bytes:
    """A value with a correct checksum and any content."""
    crc = zlib.crc32(HEADER.pack(magic, dtype, dim, created_at, 1, 0) + body)
    return HEADER.pack(magic, dtype, dim, created_at, 1, crc) + body


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_pack_and_unpack_refuse_numbers_that_are_not_finite(number: float) -> None:
    vector = np.array([0.0, number], np.float32)
    for dtype in DTYPES:
        with pytest.raises(ValueError, match="finite"):
            pack(vector, 1, 0.0, dtype)
    for value in (
        sealed(vector.tobytes(), 2),
        sealed(vector.astype("<f2").tobytes(), 2, DTYPES["float16"]),
        sealed(struct.pack("<f2b", number, 1, 1), 2, DTYPES["int8"]),
        sealed(bytes(8), 2, created_at=number),
    ):
        with pytest.raises(Corrupt, match="finite"):
            unpack(value, 2)


@pytest.mark.parametrize(("magic", "dtype"), [(b"SLWN", FLOAT32), (MAGIC, 3), (MAGIC, 1)])
def test_unpack_refuses_another_format_with_a_correct_checksum(magic: bytes, dtype: int) -> None:
    with pytest.raises(Corrupt):
        unpack(sealed(bytes(8), 2, dtype, magic), 2)


def test_changing_an_unpacked_vector_leaves_the_value_unchanged() -> None:
    value = pack(np.ones(4, np.float32), 1, 0.0)
    unpack(value, 4)[0][:] = 9
    assert unpack(value, 4)[0].tolist() == [1.0] * 4


matrices = hn.arrays(
    np.float32, st.tuples(st.integers(0, 6), st.integers(0, 9)), elements=st.floats(-60_000, 60_000, width=32)
)


@given(matrices, generations, moments, st.sampled_from(list(DTYPES)))
def test_pack_many_matches_the_slow_layout(vectors: np.ndarray, generation: int, created_at: float, dtype: str) -> None:
    """Compared with the layout, one number at a time."""
    expected = []
    for vector in vectors:
        if dtype == "int8":
            scale = np.float32(max(map(abs, vector), default=np.float32(0)) / np.float32(127))
            body = struct.pack("<f", scale) + bytes(
                max(-127, min(127, round(float(v / scale)))) & 255 if scale else 0 for v in vector
            )
        else:
            body = struct.pack(f"<{len(vector)}{'f' if dtype == 'float32' else 'e'}", *vector.tolist())
        header = (b"SLWM", DTYPES[dtype], len(vector), created_at, generation)
        expected.append(HEADER.pack(*header, zlib.crc32(HEADER.pack(*header, 0) + body)) + body)
    assert pack_many(vectors, generation, created_at, dtype) == expected


@given(matrices, st.sampled_from(list(DTYPES)))
def test_the_rounding_error_of_each_dtype_is_bounded(vectors: np.ndarray, dtype: str) -> None:
    for vector, value in zip(vectors, pack_many(vectors, 1, 0.0, dtype), strict=True):
        found = unpack(value, len(vector))[0]
        largest = float(np.abs(vector).max(initial=0.0))
        bound = {
            "float32": 0.0,
            "float16": max(largest * 2.0**-11, 2.0**-25),
            "int8": max(largest / 127 * 0.50001, 1e-42),
        }[dtype]
        assert np.abs(found - vector).max(initial=0.0) <= bound


def test_pack_refuses_a_number_too_large_for_the_dtype() -> None:
    with pytest.raises(ValueError, match="float16"):
        pack(np.array([70_000], np.float32), 1, 0.0, "float16")


@given(matrices, generations, generations, moments, st.sampled_from(list(DTYPES)))
def test_renumbered_equals_packing_under_the_new_number(
    vectors: np.ndarray, before: int, after: int, created_at: float, dtype: str
) -> None:
    for old, new in zip(
        pack_many(vectors, before, created_at, dtype), pack_many(vectors, after, created_at, dtype), strict=True
    ):
        assert renumbered(old, after) == new


def test_renumbered_refuses_a_corrupt_value() -> None:
    with pytest.raises(Corrupt):
        renumbered(pack(np.ones(2, np.float32), 1, 0.0)[:-1] + b"x", 2)


@pytest.mark.parametrize(
    ("pointer", "read"),
    [
        (None, ([], 0)),
        (b"", ([], 0)),
        (b"7", ([7], 0)),
        (b"7,6,5", ([7, 6, 5], 0)),
        (b"7,6,5#3", ([7, 6, 5], 3)),
        (b"#2", ([], 2)),
        (b"7,x,5#y", ([7, 5], 0)),
        (b"\xff", ([], 0)),
        (b"01,-1, 1,1.5,18446744073709551616", ([], 0)),
        (b"18446744073709551615", ([2**64 - 1], 0)),
        ("\u0662".encode(), ([], 0)),
    ],
)
def test_read_pointer_skips_entries_that_are_not_numbers(pointer: bytes | None, read: tuple[list[int], int]) -> None:
    assert read_pointer(pointer) == read


def test_a_user_key_has_the_user_as_its_cluster_tag() -> None:
    assert user_key("r", "s", "u 1") == "slatewise:r:s:emb:{u 1}"
