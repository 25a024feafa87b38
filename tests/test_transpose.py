"""Rows to classes and back, on memory that shows what was touched beside them."""

from collections.abc import Callable

import numpy as np
import pytest

from fastloss.kernels import storage, transpose
from fastloss.kernels.compiler import callable_of
from fastloss.kernels.values import F32, I64, LANES, SIZE, Value

GUARD = 16  # elements on either side of the memory that may be written
CLASSES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 18, 21, 31, 32)
STORAGES = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32, "float64": np.float64}


def run(emit: Callable[[Value, Value], None], source: np.ndarray, target: np.ndarray) -> None:
    callable_of(emit, 2, None)(source.ctypes.data, target.ctypes.data)


def numbers(kind: str, count: int) -> np.ndarray:
    """Different numbers that every storage holds exactly; bfloat16 as its bits."""
    values = np.arange(1, count + 1, dtype=np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16) if kind == "bfloat16" else values.astype(STORAGES[kind])


def reader(kind: str) -> transpose.Convert:
    compute = storage.COMPUTE["float64" if kind == "float64" else "float32"]
    return lambda raw: storage.widened(raw, kind, compute)


def writer(kind: str) -> transpose.Convert:
    return lambda value: storage.narrowed(value, kind)


@pytest.mark.parametrize("kind", STORAGES)
@pytest.mark.parametrize("classes", CLASSES)
def test_load_classes(kind: str, classes: int) -> None:
    rows = numbers(kind, LANES * classes).reshape(LANES, classes)
    out = np.zeros((classes, LANES), np.float64 if kind == "float64" else np.float32)

    def emit(source: Value, target: Value) -> None:
        vectors = transpose.load_classes(source, classes, storage.MEMORY[kind], reader(kind))
        assert len(vectors) == classes
        for c, vector in enumerate(vectors):
            (target + c * out.itemsize * LANES).store(vector)

    run(emit, rows, out)
    wanted = (rows.astype(np.uint32) << 16).view(np.float32) if kind == "bfloat16" else rows
    np.testing.assert_array_equal(out, wanted.T)


@pytest.mark.parametrize("kind", STORAGES)
@pytest.mark.parametrize("classes", CLASSES)
def test_store_classes_writes_the_rows_and_nothing_beside_them(kind: str, classes: int) -> None:
    rows = numbers(kind, LANES * classes)
    out = np.full(len(rows) + 2 * GUARD, 0x77, rows.dtype)

    def emit(source: Value, target: Value) -> None:
        elem = storage.MEMORY[kind]
        vectors = transpose.load_classes(source, classes, elem, reader(kind))
        transpose.store_classes(target + GUARD * SIZE[elem], vectors, elem, writer(kind))

    run(emit, rows, out)
    np.testing.assert_array_equal(out[GUARD:-GUARD], rows)
    np.testing.assert_array_equal(out[:GUARD], np.full(GUARD, 0x77, rows.dtype))
    np.testing.assert_array_equal(out[-GUARD:], np.full(GUARD, 0x77, rows.dtype))


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_quads_of_rows_with_gaps(kind: str) -> None:
    """Four elements of rows that are longer: to a quad, scaled by a number of each row, and to other rows."""
    elem, dtype, width, first = storage.MEMORY[kind], np.dtype(STORAGES[kind]), 11, 5
    rows = numbers(kind, LANES * width).reshape(LANES, width)
    scale = np.arange(2, LANES + 2, dtype=dtype)
    out = np.zeros((LANES, width), dtype)

    def emit(source: Value, target: Value) -> None:
        step = Value(source.b, I64(width * dtype.itemsize))  # known when it runs only
        by_row = transpose.spread(Value(source.b, I64(scale.ctypes.data)).load(elem, LANES))
        quad = transpose.load_quad(source + first * dtype.itemsize, step, elem, reader(kind))
        scaled = [x * s for x, s in zip(quad, by_row, strict=True)]
        transpose.store_quad(target + first * dtype.itemsize, step, scaled, writer(kind))

    run(emit, rows, out)
    wanted = np.zeros_like(rows)
    wanted[:, first : first + 4] = rows[:, first : first + 4] * scale[:, None]
    np.testing.assert_array_equal(out, wanted)


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_folded_combines_each_rows_four(kind: str) -> None:
    elem, dtype = storage.MEMORY[kind], np.dtype(STORAGES[kind])
    rows = np.random.default_rng(0).permutation(numbers(kind, LANES * 4)).reshape(LANES, 4)
    out = np.zeros((2, LANES), dtype)

    def emit(source: Value, target: Value) -> None:
        quad = transpose.load_quad(source, 4 * dtype.itemsize, elem, reader(kind))
        target.store(transpose.folded(quad, lambda a, b: a + b))
        (target + LANES * dtype.itemsize).store(transpose.folded(quad, lambda a, b: (a > b).select(a, b)))

    run(emit, rows, out)
    np.testing.assert_array_equal(out, [rows.sum(1), rows.max(1)])


def test_folded_rows_adds_each_vector_into_its_lane() -> None:
    vectors = np.random.default_rng(0).integers(-1000, 1000, (LANES, LANES)).astype(np.float32)
    out = np.zeros(LANES, np.float32)

    def emit(source: Value, target: Value) -> None:
        rows = [(source + r * vectors.itemsize * LANES).load(F32, LANES) for r in range(LANES)]
        target.store(transpose.folded_rows(rows))

    run(emit, vectors, out)
    np.testing.assert_array_equal(out, vectors.sum(1))


@pytest.mark.parametrize("classes", CLASSES)
def test_sums_of_packed_rows_are_those_of_transposed_ones(classes: int) -> None:
    """To the last bit."""
    rows = np.random.default_rng(classes).standard_normal((LANES, classes)).astype(np.float32)
    out = np.zeros((2, LANES), np.float32)

    def emit(source: Value, target: Value) -> None:
        size = LANES * SIZE[F32]
        target.store(transpose.packed_sums([(source + c * size).load(F32, LANES) for c in range(classes)]))
        vectors = transpose.load_classes(source, classes, F32, lambda raw: raw)
        (target + size).store(transpose.row_sums(vectors))

    run(emit, rows, out)
    np.testing.assert_array_equal(*out)
    np.testing.assert_allclose(out[0], rows.sum(1, dtype=np.float64), atol=classes * 2e-7)


@pytest.mark.parametrize("classes", [4, 5, 8, 21, 31])
def test_starts_cover_every_class_within_the_row(classes: int) -> None:
    covered = {c for first in transpose.starts(classes) for c in range(first, first + 4)}
    assert covered == set(range(classes))
