"""float16 as CPUs without instructions for it convert it, against NumPy's conversions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from llvmlite import ir

from fastloss.kernels import storage
from fastloss.kernels.compiler import callable_of
from fastloss.kernels.values import F32, I16, I64, LANES, Value, loop

ALL = np.arange(1 << 16, dtype=np.uint16)


def converted(numbers: np.ndarray, dtype: type, elem: ir.Type, convert: Callable[[Value], Value]) -> np.ndarray:
    """Numbers that kernels read as `elem`, converted."""
    out = np.empty(numbers.size, dtype)

    def emit(source: Value, target: Value, n: Value) -> None:
        def body(i: Value) -> None:
            (target + i * out.itemsize).store(convert((source + i * numbers.itemsize).load(elem, LANES)))

        loop(Value(n.b, I64(0)), n, LANES, [], body)

    callable_of(emit, 3, None)(numbers.ctypes.data, out.ctypes.data, numbers.size)
    return out


def widened(halves: np.ndarray) -> np.ndarray:
    return converted(halves, np.float32, I16, storage._from_half)


def narrowed(numbers: np.ndarray) -> np.ndarray:
    return converted(numbers, np.uint16, F32, storage._to_half)


def test_every_float16_is_read() -> None:
    expected = ALL.view(np.float16).astype(np.float32)
    found = widened(ALL)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))


def test_every_float16_is_written() -> None:
    """NaN as some quiet NaN of its sign."""
    numbers = ALL.view(np.float16).astype(np.float32)
    nan = np.isnan(numbers)
    found = narrowed(numbers)
    np.testing.assert_array_equal(found[~nan], ALL[~nan])
    assert (found[nan] & 0x7E00 == 0x7E00).all()
    np.testing.assert_array_equal(found[nan] >> 15, ALL[nan] >> 15)


@pytest.mark.parametrize("distance", [-1, 0, 1])
def test_ties_go_to_even(distance: int) -> None:
    """Halfway between neighbours, and the float32 before and after it."""
    finite = ALL[:0x7C00].view(np.float16).astype(np.float32)
    last = np.float32(65536)  # where the next number would be
    halfway = (finite + np.append(finite[1:], last)) / 2
    numbers = (halfway.view(np.int32) + distance).view(np.float32)
    numbers = np.concatenate([numbers, -numbers])
    with np.errstate(over="ignore"):
        expected = numbers.astype(np.float16)
    np.testing.assert_array_equal(narrowed(numbers), expected.view(np.uint16))


def test_any_float32_is_written(rng: np.random.Generator) -> None:
    numbers = rng.integers(0, 1 << 32, 1 << 20, dtype=np.uint32).view(np.float32)
    numbers = np.concatenate([numbers, rng.standard_normal(1 << 20, dtype=np.float32) * 1e-5])
    numbers = numbers[~np.isnan(numbers)]
    numbers = numbers[: numbers.size // LANES * LANES]
    with np.errstate(over="ignore"):
        expected = numbers.astype(np.float16)
    np.testing.assert_array_equal(narrowed(numbers), expected.view(np.uint16))
