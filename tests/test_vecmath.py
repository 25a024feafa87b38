"""vecmath's accuracy, special values, widths and machine code; every float32 with -m slow."""

from __future__ import annotations

import ctypes
import platform
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir

from fastloss.kernels import compiler, vecmath
from fastloss.kernels.softmax_exp import ShiftedExp
from fastloss.kernels.values import F32, F64, I8, I32, I64, INT_OF, LANES, SIZE, Value, full, iota, loop

ELEMENT = {np.float32: F32, np.float64: F64}
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
EVERY_FLOAT32 = (0, 1 << 32)
NAN, INF = float("nan"), float("inf")
# long double has 11 bits more than double on x86 only; elsewhere the reference itself may be an ulp off
REFERENCE_ULP = 0.0 if np.finfo(np.longdouble).nmant > 60 else 1.0


@dataclass(frozen=True)
class Case:
    """A function, its reference in a wider type, and its largest error.

    No result depends on the machine (nothing but IEEE 754 operations), so the float32 bounds are the worst of
    every float32, rounded up; the float64 ones leave 0.05 ulp above the worst of 10**8 samples.
    """

    reference: Callable[[Any], Any]
    ulp32: float
    ulp64: float
    bits: tuple[int, int] = EVERY_FLOAT32  # its domain as patterns, in whole vectors
    domain: tuple[float, float] = (-INF, INF)
    emit: Callable[[Value], Value] | None = None  # vecmath's function of that name, where none is given
    looked_up: bool = False  # float32 by tables where there is AVX-512: other bits than without


def _sigmoid(x: Any) -> Any:
    u = np.exp(-abs(x))
    return np.where(x < 0, u, 1) / (1 + u)


HALF = {"bits": (0, 0x3F000000), "domain": (0.0, 0.5)}


def _sum_of(logs: Callable[[Value], tuple[Value, Value, Value]]) -> Callable[[Value], Value]:
    def high_and_low(s: Value) -> Value:
        high, low, _ = logs(s)
        return high + low

    return high_and_low


def _log1p_exp_neg_plus(a: Value) -> Value:
    return vecmath.log1p_exp_neg_plus(a, a.lift(0.0), a.lift(0.0))


CASES = {
    "exp": Case(np.exp, 0.9, 1.05),
    "expm1": Case(np.expm1, 1.55, 2.0),
    "log": Case(np.log, 0.95, 1.0, domain=(0.0, INF)),
    "log1p": Case(np.log1p, 0.95, 1.05, domain=(-1.0, INF)),
    "log1p_exp_neg": Case(lambda a: np.log1p(np.exp(-a)), 1.15, 1.3, (0, 0x7F800000), (0.0, INF)),
    "log1p_exp_neg_plus": Case(
        lambda a: np.log1p(np.exp(-a)), 1.95, 1.3, (0, 0x7F800000), (0.0, INF), _log1p_exp_neg_plus, True
    ),
    "logistic_tail": Case(lambda a: 1 / (1 + np.exp(a)), 2.45, 2.6, (0, 0x7F800000), (0.0, INF), looked_up=True),
    "softplus": Case(lambda x: np.maximum(x, 0) + np.log1p(np.exp(-abs(x))), 0.51, 1.45),
    "sigmoid": Case(_sigmoid, 1.0, 1.15),
    "tanh": Case(np.tanh, 1.6, 1.65),
    "bce_logs_s": Case(lambda s: np.maximum(np.log(s), -100), 1.0, 1.0, **HALF, emit=_sum_of(vecmath.bce_logs)),
    "bce_logs_1ms": Case(lambda s: np.log1p(-s), 1.05, 1.0, **HALF, emit=lambda s: vecmath.bce_logs(s)[2]),
    "bce_logs_short_s": Case(
        lambda s: np.maximum(np.log(s), -100), 1.6, 1.0, **HALF, emit=_sum_of(vecmath.bce_logs_short), looked_up=True
    ),
    "bce_logs_short_1ms": Case(
        lambda s: np.log1p(-s), 1.45, 1.0, **HALF, emit=lambda s: vecmath.bce_logs_short(s)[2], looked_up=True
    ),
}  # fmt: skip
FUNCTIONS = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The disk cache knows the package's sources, not this file's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLOSS_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def function(name: str) -> Callable[[Value], Value]:
    return CASES[name].emit or getattr(vecmath, name)


def compiled(name: str, dtype: type, lanes: int = LANES) -> Callable[[np.ndarray], np.ndarray]:
    """The emitted function over an array; what is left of its length is done by the scalar one."""
    elem, apply = ELEMENT[dtype], function(name)
    size = SIZE[elem]

    def emit(source: Value, target: Value, n: Value) -> None:
        def body(width: int) -> Callable[[Value], None]:
            return lambda i: (target + i * size).store(apply((source + i * size).load(elem, width)))

        i, _ = loop(Value(n.b, I64(0)), n, lanes, [], body(lanes))
        loop(i, n, 1, [], body(1))

    call = compiler.callable_of(emit, 3, ("test_vecmath", name, dtype.__name__, lanes))

    def run(x: np.ndarray) -> np.ndarray:
        x = np.ascontiguousarray(x, dtype)
        y = np.empty_like(x)
        call(x.ctypes.data, y.ctypes.data, x.size)
        return y

    return run


def worst_ulp(x: np.ndarray, y: np.ndarray, reference: Callable[[Any], Any]) -> float:
    """The largest error in units of the last place of the true result; NaN and infinities must agree."""
    with np.errstate(all="ignore"):
        exact = reference(x.astype(np.float64 if x.dtype == np.float32 else np.longdouble))
        rounded = exact.astype(x.dtype)
        np.testing.assert_array_equal(np.isnan(y), np.isnan(rounded))
        infinite = np.isinf(rounded)
        np.testing.assert_array_equal(y[infinite], rounded[infinite])
        finite = np.isfinite(rounded)
        unit = np.spacing(abs(rounded[finite])).astype(exact.dtype)
        return float(np.max(abs(y[finite].astype(exact.dtype) - exact[finite]) / unit, initial=0.0))


def samples(name: str, dtype: type, rng: np.random.Generator) -> np.ndarray:
    """A million inputs: of every magnitude, and where the function bends."""
    case, n = CASES[name], 1 << 18
    if dtype == np.float32:
        return np.arange(rng.integers(4096), case.bits[1], 4096, dtype=np.uint32).view(np.float32)
    anything = rng.integers(0, 1 << 64, n, dtype=np.uint64).view(np.float64)
    small = np.exp(rng.uniform(-40, 7, n)) * rng.choice([-1, 1], n)
    x = np.concatenate([anything, small, rng.uniform(-2, 2, n), rng.uniform(-746, 711, n)])
    if case.domain == (0.0, 0.5):
        x = np.concatenate([rng.uniform(0, 0.5, 2 * n), np.exp(-rng.uniform(np.log(2), 745, 2 * n))])
    return x[~((x < case.domain[0]) | (x > case.domain[1]))]


@DTYPES
@FUNCTIONS
def test_accuracy(name: str, dtype: type, rng: np.random.Generator) -> None:
    case, x = CASES[name], samples(name, dtype, rng)
    bound = case.ulp32 if dtype == np.float32 else case.ulp64 + REFERENCE_ULP
    assert worst_ulp(x, compiled(name, dtype)(x), case.reference) <= bound


@pytest.mark.slow
@FUNCTIONS
def test_every_float32(name: str) -> None:
    """Against the float64 function, which test_accuracy knows to be right: half a minute on two cores."""
    apply, case, step = function(name), CASES[name], 1 << 22

    def emit(start: Value, stop: Value, result: Value) -> None:
        b = start.b

        def body(i: Value, worst: Value, wrong: Value) -> list[Value]:
            x = (i.trunc(I32).splat(LANES) + iota(b, LANES)).bits(F32)
            y, exact = apply(x), apply(x.to(F64))
            rounded = exact.to(F32)
            exponent = ((rounded.bits(I32) >> 23) & 0xFF).zext(I64)
            exponent = (exponent < 1).select(1, exponent)  # all subnormal numbers have one unit
            error = abs(y.to(F64) - exact) / ((exponent + (1023 - 127 - 23)) << 52).bits(F64)
            finite = abs(rounded) < INF
            same = (y == rounded) | (y.isnan() & rounded.isnan())
            wrong_zero = (rounded == 0.0) & ((y.bits(I32) ^ rounded.bits(I32)) < 0)
            missed = (~finite & ~same) | (finite & ~(abs(y) < INF)) | wrong_zero
            return [(finite & (error > worst)).select(error, worst), wrong + missed.zext(I64)]

        lanes = [full(b, F64, LANES), full(b, I64, LANES)]
        _, (worst, wrong) = loop(start, stop, LANES, lanes, body)
        result.store(worst.max())
        (result + 8).store(wrong.sum().to(F64))

    call = compiler.callable_of(emit, 3, ("every float32", name))

    def part(start: int) -> np.ndarray:
        result = np.empty(2)
        call(start, min(start + step, case.bits[1]), result.ctypes.data)
        return result

    with ThreadPoolExecutor() as pool:
        parts = np.array(list(pool.map(part, range(*case.bits, step))))
    assert parts[:, 1].sum() == 0
    assert parts[:, 0].max() <= case.ulp32


# x, and f(x) with the sign of its zero
SPECIAL = {
    "exp": [(0.0, 1), (-0.0, 1), (INF, INF), (-INF, 0.0), (1e9, INF), (-1e9, 0.0)],
    "expm1": [(0.0, 0.0), (-0.0, -0.0), (INF, INF), (-INF, -1), (1e9, INF), (-1e9, -1), (1e-30, 1e-30)],
    "log": [(0.0, -INF), (-0.0, -INF), (1.0, 0.0), (INF, INF), (-1.0, NAN), (-INF, NAN)],
    "log1p": [(0.0, 0.0), (-0.0, -0.0), (-1.0, -INF), (INF, INF), (-2.0, NAN), (-INF, NAN), (-1e-30, -1e-30)],
    "log1p_exp_neg": [(0.0, np.log(2)), (-0.0, np.log(2)), (INF, 0.0), (1e9, 0.0)],
    "softplus": [(-INF, 0.0), (INF, INF), (1e9, 1e9), (-1e9, 0.0)],
    "sigmoid": [(0.0, 0.5), (-0.0, 0.5), (INF, 1), (-INF, 0.0), (1e9, 1), (-1e9, 0.0)],
    "tanh": [(0.0, 0.0), (-0.0, -0.0), (INF, 1), (-INF, -1), (1e9, 1), (-1e9, -1), (1e-30, 1e-30)],
    "logistic_tail": [(0.0, 0.5), (-0.0, 0.5), (INF, 0.0), (1e9, 0.0)],
    "log1p_exp_neg_plus": [(0.0, np.log(2)), (-0.0, np.log(2)), (INF, 0.0), (1e9, 0.0)],
    "bce_logs_s": [(0.0, -100), (-0.0, -100), (0.5, -np.log(2)), (1e-44, -100)],
    "bce_logs_1ms": [(0.0, -0.0), (0.5, -np.log(2)), (1e-30, -1e-30)],
}
SPECIAL["bce_logs_short_s"] = [(0.0, -100), (-0.0, -100), (1e-44, -100)]
SPECIAL["bce_logs_short_1ms"] = SPECIAL["bce_logs_1ms"]


@DTYPES
@pytest.mark.parametrize("name", SPECIAL)
def test_special_values(name: str, dtype: type) -> None:
    x, expected = (np.array(side, dtype) for side in zip(*SPECIAL[name], strict=True))
    y = compiled(name, dtype)(x)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(np.signbit(y[y == 0]), np.signbit(expected[y == 0]))


@DTYPES
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("bce")])
def test_nan_of_any_payload(name: str, dtype: type) -> None:
    integer = np.uint32 if dtype == np.float32 else np.uint64
    quiet = np.array([np.nan], dtype).view(integer)[0]
    x = (quiet | np.array([0, 1, 255, 0x1FF, 0x3FFFF], integer)).astype(integer).view(dtype)
    assert np.isnan(compiled(name, dtype)(np.concatenate([x, -x]))).all()


@DTYPES
@pytest.mark.parametrize("name", ["exp", "expm1", "log", "log1p", "log1p_exp_neg", "sigmoid", "tanh", "bce_logs_s"])
def test_subnormal_arguments_and_results(name: str, dtype: type, rng: np.random.Generator) -> None:
    tiny = float(np.finfo(dtype).tiny)
    edge = np.log(tiny)  # where exp leaves the normal numbers
    x = np.concatenate([tiny * rng.uniform(0, 2, 4096), edge + rng.uniform(-25, 1, 4096)]).astype(dtype)
    x = np.concatenate([x, [np.finfo(dtype).smallest_subnormal], -x]).astype(dtype)
    case = CASES[name]
    x = x[(x >= case.domain[0]) & (x <= case.domain[1])]
    bound = case.ulp32 if dtype == np.float32 else case.ulp64 + REFERENCE_ULP
    assert worst_ulp(x, compiled(name, dtype)(x), case.reference) <= bound


@DTYPES
@FUNCTIONS
def test_same_bits_at_any_width(name: str, dtype: type, rng: np.random.Generator) -> None:
    x = samples(name, dtype, rng)[:: 16381 // 8]
    wide = compiled(name, dtype)(x)
    for lanes in (1, 4, 32):
        np.testing.assert_array_equal(compiled(name, dtype, lanes)(x), wide)


def shifted(dtype: type, short: bool) -> Callable[[np.ndarray, float], tuple[np.ndarray, np.ndarray]]:
    """x, count -> ShiftedExp(count)(x), and its hi and lo."""
    elem = ELEMENT[dtype]

    def emit(source: Value, target: Value, n: Value, count: Value, parts: Value) -> None:
        exp = ShiftedExp(count.load(elem), short)
        parts.store(exp.hi)
        (parts + 8).store(exp.lo)
        loop(
            Value(n.b, I64(0)), n, LANES, [],
            lambda i: (target + i * SIZE[elem]).store(exp((source + i * SIZE[elem]).load(elem, LANES))),
        )  # fmt: skip

    call = compiler.callable_of(emit, 5, ("shifted", dtype.__name__, short))

    def run(x: np.ndarray, count: float) -> tuple[np.ndarray, np.ndarray]:
        padded = np.zeros(-(-x.size // LANES) * LANES, dtype)
        padded[: x.size] = x
        y, k, parts = np.empty_like(padded), np.array([count], dtype), np.empty(2)
        call(padded.ctypes.data, y.ctypes.data, padded.size, k.ctypes.data, parts.ctypes.data)
        return y[: x.size], parts

    return run


LN2 = {
    np.float32: Fraction(float(np.float32(np.log(2)))),
    np.float64: Fraction("0.693147180559945309417232121458176568075500134360255254120680009"),
}
COUNTS = {np.float32: (0, 1, -7, 14427, -(2**15), 2**15), np.float64: (0, 1, -1000, 14427, -(2**40), 2**40)}


@pytest.mark.parametrize(
    # bound_below: float32 takes ln 2 in one piece, 1.9e-9 for each power of 2 away from the reference
    ("dtype", "short", "bound", "bound_below"),
    [
        (np.float32, False, 1.2e-7, 3.1e-7),
        (np.float32, True, 3.2e-7, 5.1e-7),
        (np.float64, False, 1.7e-16, 1.7e-16),
    ],
)
def test_shifted_exp_is_accurate_at_every_count(
    dtype: type, short: bool, bound: float, bound_below: float, rng: np.random.Generator
) -> None:
    run, span = shifted(dtype, short), 86.0 if dtype == np.float32 else 707.0
    for count in COUNTS[dtype]:
        subtracted = Fraction(count) * LN2[dtype]
        for low, limit in ((-20, bound), (-span, bound_below)):
            x = (float(subtracted) + rng.uniform(low, -low, 1 << 16)).astype(dtype)
            y, (hi, lo) = run(x, count)
            assert abs(Fraction(hi) + Fraction(lo) - subtracted) <= abs(subtracted) / 10**30
            exact = np.exp((x.astype(np.longdouble) - np.longdouble(hi)) - np.longdouble(lo))
            assert np.max(abs(y - exact) / exact) <= limit + REFERENCE_ULP * 1e-13


@DTYPES
@pytest.mark.parametrize("short", [True, False])
def test_shifted_exp_times_a_number(dtype: type, short: bool, rng: np.random.Generator) -> None:
    """Of either sign, or 0; it may be moved into the exponential."""
    elem, size = ELEMENT[dtype], SIZE[ELEMENT[dtype]]

    def emit(source: Value, target: Value, n: Value, count: Value, share: Value) -> None:
        scaled = ShiftedExp(count.load(elem), short, capped=False).times(share.load(elem))
        loop(
            Value(n.b, I64(0)), n, LANES, [],
            lambda i: (target + i * size).store(scaled((source + i * size).load(elem, LANES))),
        )  # fmt: skip

    call = compiler.callable_of(emit, 5, ("times", dtype.__name__, short))
    x = np.append(rng.uniform(-20, 20, 4095), -INF).astype(dtype)
    y, count = np.empty_like(x), np.array([3], dtype)
    for number in (1.0, -1.0, 0.37, -2.5e-20, 1e-42, -7e18, 0.0):
        share = np.array([number], dtype)
        call(x.ctypes.data, y.ctypes.data, x.size, count.ctypes.data, share.ctypes.data)
        expected = np.exp(x.astype(np.longdouble) - 3 * np.longdouble(float(LN2[dtype]))) * share
        np.testing.assert_allclose(y, expected, rtol=5e-7 if dtype == np.float32 else 1e-15, atol=1e-36)
        assert y[-1] == 0


@DTYPES
def test_shifted_exp_saturates(dtype: type) -> None:
    run, largest = shifted(dtype, False), float(np.finfo(dtype).max)
    bias = 127 if dtype == np.float32 else 1023
    for count in COUNTS[dtype]:
        reference = count * float(LN2[dtype])
        above = np.array([INF, largest, reference + bias + 100], dtype)
        y, _ = run(above, count)
        np.testing.assert_allclose(y, 2.0**bias, rtol=2e-3)
        below = np.array([-INF, -largest, reference - bias - 100], dtype)
        np.testing.assert_array_equal(run(below, count)[0], 0)
        payload = np.array([0x7FC001FF], np.uint32).view(np.float32) if dtype == np.float32 else [NAN]
        assert np.isnan(run(np.array([NAN, *payload], dtype), count)[0]).all()


@DTYPES
@pytest.mark.parametrize("short", [True, False])
def test_shifted_exp_tells_what_is_too_large(dtype: type, short: bool) -> None:
    """Without a ceiling; among fifteen numbers that are not."""
    elem, size = ELEMENT[dtype], SIZE[ELEMENT[dtype]]

    def emit(source: Value, target: Value, n: Value, count: Value) -> None:
        exp = ShiftedExp(count.load(elem), short, capped=False)

        def each(i: Value) -> None:
            nothing = full(n.b, INT_OF[elem], LANES)
            p, scale, seen = exp.watched((source + i * size).load(elem, LANES), nothing)
            infinite = ((p * scale) * 0.0 != 0.0).any()  # or NaN
            (target + i).store((exp.overflowed(seen) | infinite).zext(I8))

        loop(Value(n.b, I64(0)), n, LANES, [], each)

    call = compiler.callable_of(emit, 4, ("overflowed", dtype.__name__, short))
    largest, bias = float(np.finfo(dtype).max), 127 if dtype == np.float32 else 1023
    ln2 = float(np.log(2))
    for count in COUNTS[dtype]:
        reference = count * ln2
        fine = [reference + d for d in (0, 20, -20, -2000, 0.98 * bias * ln2)] + [-largest, -INF]
        wrong = [reference + d for d in (1.02 * bias * ln2, 200 + bias, 2.0**20 + bias)]
        wrong += [1e30, largest, INF, NAN, -NAN]
        x = np.full((len(fine) + len(wrong), LANES), reference, dtype)
        x[np.arange(len(x)), np.arange(len(x)) % LANES] = [*fine, *wrong]
        found = np.zeros((len(x), LANES), np.uint8)
        k = np.array([count], dtype)
        call(x.ctypes.data, found.ctypes.data, x.size, k.ctypes.data)
        np.testing.assert_array_equal(found[:, 0], [0] * len(fine) + [1] * len(wrong), err_msg=f"count {count}")


@DTYPES
def test_shifted_exp_count(dtype: type) -> None:
    elem = ELEMENT[dtype]
    top = vecmath.FORMATS[elem].max_count

    def emit(source: Value, target: Value) -> None:
        target.store(ShiftedExp.count_for(source.load(elem)))

    call = compiler.callable_of(emit, 2, ("count", dtype.__name__))

    def count(maximum: float) -> float:
        x, y = np.array([maximum], dtype), np.empty(1, dtype)
        call(x.ctypes.data, y.ctypes.data)
        return float(y[0])

    assert [count(m) for m in (0, 1, -5, 100, -1e4)] == [0, 1, -7, 144, -14427]
    assert [count(m) for m in (1e30, -1e30, INF, -INF)] == [top, -top, top, -top]
    assert abs(count(NAN)) <= top


@DTYPES
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].emit is None])
def test_numpy_arrays_and_floats(name: str, dtype: type) -> None:
    x = np.array([0.25, 1.0, 3.0], dtype)
    y = getattr(vecmath, name)(x)
    assert y.dtype == dtype
    np.testing.assert_allclose(y, CASES[name].reference(x.astype(np.float64)), rtol=4 * np.finfo(dtype).eps)
    np.testing.assert_allclose(getattr(vecmath, name)(3.0), CASES[name].reference(np.float64(3)), rtol=1e-15)


def test_numpy_parts_and_where() -> None:
    high, low, rest = vecmath.bce_logs(np.array([0.0, 0.25, 0.5]))
    np.testing.assert_allclose(high + low, [-100, np.log(0.25), np.log(0.5)])
    np.testing.assert_allclose(rest, [0, np.log(0.75), np.log(0.5)])
    np.testing.assert_allclose(
        vecmath.log1p_exp_neg_plus(np.array([0.0, 2.0]), 3.0, 0.5), 1.5 + np.log1p(np.exp([0.0, -2.0]))
    )
    np.testing.assert_array_equal(vecmath.signbit(np.array([1.0, -0.0, -2.0])), [False, True, True])
    np.testing.assert_array_equal(vecmath.minimum(np.array([1.0, NAN, 3.0]), np.array([2.0, 1.0, 0.0])), [1, 1, 0])
    assert (vecmath.fma(2.0, 3.0, 4.0), vecmath.variance(0.25), vecmath.quotient(1.0, 4.0)) == (10, 0.1875, 0.25)
    np.testing.assert_array_equal(
        vecmath.in_unit_interval(np.array([0.0, -0.0, 1.1, 0.5, NAN]), np.array([1.0, 0.0, 0.5, -1e-9, 0.5])),
        [True, True, False, False, False],
    )
    np.testing.assert_array_equal(vecmath.where(np.array([True, False]), 1.0, 2.0), [1.0, 2.0])
    assert vecmath.where(False, "a", "b") == "b"


AVX2 = ("x86_64-unknown-linux-gnu", "haswell", "")
AVX512 = ("x86_64-unknown-linux-gnu", "icelake-server", "")
NEON = ("aarch64-unknown-linux-gnu", "generic", "+neon")
TARGETS = {
    # a packed multiply-add, any call, any scalar arithmetic on floats
    AVX2: (r"vfn?m\w+p[sd]\s.*%ymm", r"callq?\b", r"v(add|sub|mul|div|fn?m\w+|max|min)s[sd]\b"),
    AVX512: (r"vfn?m\w+p[sd]\s.*%zmm", r"callq?\b", r"v(add|sub|mul|div|fn?m\w+|max|min)s[sd]\b"),
    NEON: (r"fml[as]\s+v\d+\.(4s|2d)", r"blr?\b", r"f(n?m\w+|add|sub|div|max|min)\s+[sd]\d"),
}


def summing(apply: Callable[[Value], Value], elem: ir.Type) -> compiler.Emit:
    """sum(apply(x)) over an array."""

    def emit(source: Value, n: Value, target: Value) -> None:
        _, (total,) = loop(
            Value(n.b, I64(0)), n, LANES, [full(n.b, elem, LANES)],
            lambda i, total: [total + apply((source + i * SIZE[elem]).load(elem, LANES))],
        )  # fmt: skip
        target.store(total.sum())

    return emit


def inner_loop(assembly: str) -> list[str]:
    """The instructions between a label and the longest jump back to it."""
    lines = [re.sub(r"(#|//).*", "", line).strip() for line in assembly.splitlines()]
    labels = {line[:-1]: k for k, line in enumerate(lines) if line.endswith(":")}
    spans = [
        (labels[jump[1]], k + 1)
        for k, line in enumerate(lines)
        if (jump := re.match(r"(?:j\w+|b\.\w+|cbn?z\s+\w+,|tbn?z\s+\w+,\s*#\w+,)\s+(\.\w+)$", line))
        and labels.get(jump[1], k) < k
    ]
    start, stop = max(spans, key=lambda span: span[1] - span[0])
    return [line for line in lines[start:stop] if line and not line.endswith(":") and not line.startswith(".")]


def exp_shifted(x: Value) -> Value:
    return ShiftedExp(full(x.b, x.elem, 1, 7.0))(x)


@DTYPES
@pytest.mark.parametrize("name", [*CASES, "ShiftedExp"])
def test_machine_code(name: str, dtype: type) -> None:
    apply = exp_shifted if name == "ShiftedExp" else function(name)
    for target, (packed, call, scalar) in TARGETS.items():
        code = inner_loop(compiler.assembly(summing(apply, ELEMENT[dtype]), 3, *target))
        assert any(re.match(packed, line) for line in code), target
        for line in code:
            assert not re.match(call, line), (target, line)
            assert not re.match(scalar, line), (target, line)
            assert "gather" not in line, (target, line)


@DTYPES
def test_unit_interval(dtype: type) -> None:
    """Every pair of the numbers around its bounds, in a vector and alone."""
    elem, size = ELEMENT[dtype], SIZE[ELEMENT[dtype]]

    def emit(x: Value, y: Value, inside: Value, n: Value) -> None:
        def body(lanes: int) -> Callable[[Value], None]:
            def store(i: Value) -> None:
                both = vecmath.in_unit_interval((x + i * size).load(elem, lanes), (y + i * size).load(elem, lanes))
                (inside + i).store(both.zext(I8))

            return store

        i, _ = loop(Value(n.b, I64(0)), n, LANES, [], body(LANES))
        loop(i, n, 1, [], body(1))

    least, eps = np.finfo(dtype).smallest_subnormal, np.finfo(dtype).eps
    points = [0.0, -0.0, least, -least, 0.5, 1 - eps / 2, 1, 1 + eps, 2, -1, 1e30, -1e30, INF, -INF, NAN, -NAN]
    pairs = np.stack(np.meshgrid(points, points)).reshape(2, -1).astype(dtype)
    x, y = (np.ascontiguousarray(np.tile(side, 2)[:-7]) for side in pairs)
    inside = np.full(x.size, 7, np.uint8)
    compiler.callable_of(emit, 4, ("unit interval", dtype.__name__))(
        x.ctypes.data, y.ctypes.data, inside.ctypes.data, x.size
    )
    np.testing.assert_array_equal(inside, (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="runs what is compiled for x86-64")
@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_without_fma(name: str, dtype: type, rng: np.random.Generator) -> None:
    """Compiled for the first x86-64 CPUs: no call, the same float32 bits but those of tables, float64 within half
    an ulp more."""
    elem, apply, size = ELEMENT[dtype], function(name), SIZE[ELEMENT[dtype]]

    def emit(source: Value, target: Value, n: Value) -> None:
        body = lambda i: (target + i * size).store(apply((source + i * size).load(elem, LANES)))  # noqa: E731
        loop(Value(n.b, I64(0)), n, LANES, [], body)

    plain = compiler.machine(llvm.get_process_triple(), "x86-64")
    assert "fma" not in compiler.assembly(emit, 3, llvm.get_process_triple(), "x86-64")
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), compiler.machine())
    code = plain.emit_object(compiler.optimised(compiler.module_of(emit, 3), plain))
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    call = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(engine.get_function_address("kernel"))
    x = np.ascontiguousarray(samples(name, dtype, rng)[::7])
    x = x[: x.size // LANES * LANES]
    y = np.empty_like(x)
    call(x.ctypes.data, y.ctypes.data, x.size)
    case = CASES[name]
    if dtype == np.float32 and not case.looked_up:
        np.testing.assert_array_equal(y, compiled(name, dtype)(x))
    else:
        bound = case.ulp32 if dtype == np.float32 else case.ulp64 + 0.5 + REFERENCE_ULP
        assert worst_ulp(x, y, case.reference) <= bound
