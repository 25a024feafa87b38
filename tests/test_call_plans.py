"""Repeated calls on the CPU: a plan gives the bits of the long way, and steps aside where only that will do."""

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fastloss
from fastloss.kernels import compiler, entry
from fastloss.kernels.values import Value
from fastloss.plans import Plans
from fastloss.reductions import Sums
from table import ROWS, Rng, Row, name_of

CROSS_ENTROPY = fastloss.cross_entropy
LIBRARIES: dict[str, Callable[[Any], Any]] = {"numpy": np.asarray, "torch": torch.from_numpy}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The losses whose calls are made the long way; none has a plan when the test begins."""
    names: list[str] = []
    for name in {row.name for row in ROWS}:
        function = getattr(fastloss, name)

        @functools.wraps(function.call)
        def call(*args: Any, of: Any = function.call, name: str = name, **options: Any) -> Any:
            names.append(name)
            return of(*args, **options)

        monkeypatch.setattr(function, "plans", Plans())
        monkeypatch.setattr(function, "call", call)
    return names


def bits(result: Any) -> Any:
    """Type, dtype and bytes of a result, or of each of several."""
    if isinstance(result, tuple):
        return [bits(part) for part in result]
    return type(result), result.dtype, np.asarray(result).tobytes()


def evaluated(loss: Any, *args: Any, **options: Any) -> Any:
    return loss.call(*args, **options).evaluate()


def differentiated(loss: Any, *args: Any, **options: Any) -> Any:
    """Without a plan: each function of value_and_grad has its own."""
    return fastloss.value_and_grad(loss)(*args, **options)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("row", ROWS, ids=name_of)
@pytest.mark.parametrize("shape", [(1, 10), (37, 10), (5, 70), (9, 3, 4), (700, 300)], ids=str)
def test_the_bits_of_the_long_way(row: Row, shape: tuple[int, ...], library: str, rng: Rng, made: list[str]) -> None:
    """Other numbers of one kind, each twice: by plans after the first call."""
    for dtype in ("float32", "float64"):
        samples = [row.draw(rng, shape, dtype) for _ in range(3)]
        pairs = [tuple(LIBRARIES[library](array) for array in (s.input, s.target)) for s in samples]
        for reduction in row.reductions:
            for ask in (row.function, fastloss.value_and_grad(row.function)):
                long_way = evaluated if ask is row.function else differentiated
                expected = [bits(long_way(row.function, *pair, reduction=reduction)) for pair in pairs]
                made.clear()
                for _ in range(2):
                    assert [bits(ask(*pair, reduction=reduction)) for pair in pairs] == expected
                if row.name != "nll_loss" or ask is row.function:  # whose gradient takes two kernels
                    assert len(made) == 1


@pytest.mark.parametrize("dtype", ["float16", ">f4"])
def test_other_memory(dtype: str, rng: Rng, made: list[str]) -> None:
    x, t = rng.standard_normal((37, 10)).astype(dtype), rng.integers(0, 10, 37).astype("uint8")
    assert len({bits(CROSS_ENTROPY(x, t)) for _ in range(3)}) == 1
    assert made == ["cross_entropy"]


def test_the_latest_kind_is_no_other(rng: Rng) -> None:
    """Whatever ran last, arrays that differ in one respect, or in number, are not taken for its."""

    def check(x: Any, t: Any) -> None:
        CROSS_ENTROPY(base, target)
        CROSS_ENTROPY(base, target)
        assert CROSS_ENTROPY(x, t) == CROSS_ENTROPY.call(x, t).evaluate()

    base, target = rng.standard_normal((8, 8)).astype(np.float32), rng.integers(0, 8, 8)
    for x in (base[:4], base[:, :5], base.T, base[::-1], base.astype(np.float64), base.astype(">f4"), base.view(Sub)):
        check(x, target[: len(x)] % x.shape[1])
    for t in (target.astype(np.int32), target[::-1], np.repeat(target, 2)[::2], target.tolist(), np.eye(8)[target]):
        check(base, t)
    check(torch.from_numpy(base), target)
    room = np.zeros(base.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(base.shape)
    room[...] = base
    check(room, target)
    for wrong in ((), (base,), (base, target, *[None] * 9)):
        CROSS_ENTROPY(base, target)
        with pytest.raises((TypeError, ValueError)):
            CROSS_ENTROPY(*wrong)


class Sub(np.ndarray[Any, Any]):
    """An array type that plans know nothing of."""


def test_equal_options_of_other_types_are_other_options(rng: Rng) -> None:
    x, t = rng.standard_normal((8, 8)), rng.integers(0, 8, 8)
    for _ in range(2):
        CROSS_ENTROPY(x, t, ignore_index=1)
    with pytest.raises(TypeError):
        CROSS_ENTROPY(x, t, ignore_index=1.0)


@pytest.mark.parametrize("ask", [CROSS_ENTROPY, fastloss.value_and_grad(CROSS_ENTROPY)], ids=["value", "gradient"])
@pytest.mark.parametrize("shape", [(3, 10), (300, 1000)], ids=str)
def test_what_only_numbers_tell(ask: Any, shape: tuple[int, int], rng: Rng) -> None:
    """A bad class index, NaN and infinity in a call that has a plan."""
    x, t = rng.standard_normal(shape).astype(np.float32), rng.integers(0, shape[1], shape[0])
    bad = t.copy()
    bad[1] = shape[1]
    for _ in range(2):
        ask(x, t)
        with pytest.raises(IndexError, match=rf"target {shape[1]} at position \(1,\) is out of range"):
            ask(x, bad)
    for special in (np.nan, np.inf):
        x[2, 3] = special
        assert np.isnan(np.asarray(ask(x, t)[0] if ask is not CROSS_ENTROPY else ask(x, t)))
    ignored = np.full_like(t, -100)
    value = ask(x, ignored)
    if ask is CROSS_ENTROPY:
        assert np.isnan(value)
    else:
        assert np.isnan(value[0])
        assert not value[1].any()


def test_a_probability_out_of_range(rng: Rng) -> None:
    p, y = rng.uniform(size=(2, 100))
    for ask in (fastloss.binary_cross_entropy, fastloss.value_and_grad(fastloss.binary_cross_entropy)):
        for number in (0.5, 0.5, 1.5):
            p[7] = number
            if number > 1:
                with pytest.raises(ValueError, match=r"input 1.5 at position \(7,\)"):
                    ask(p, y)
            else:
                ask(p, y)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_memory_for_the_gradient(reduction: str, rng: Rng, made: list[str]) -> None:
    """grad_out that is given, is the input, overlaps it, or may not be written."""
    x, t = rng.standard_normal((37, 10)).astype(np.float32), rng.integers(0, 10, 37)
    fused = fastloss.value_and_grad(CROSS_ENTROPY)
    value, grad = fused(x, t, reduction=reduction)
    made.clear()
    for _ in range(3):
        out = np.empty_like(x)
        got = fused(x, t, reduction=reduction, grad_out=out)
        assert got[1] is out
        assert (bits(got[0]), bits(out)) == (bits(value), bits(grad))
    for _ in range(3):
        own = x.copy()
        got = fused(own, t, reduction=reduction, grad_out=own)
        assert got[1] is own
        assert (bits(got[0]), bits(own)) == (bits(value), bits(grad))
    assert len(made) == 2
    room = np.empty(371 + 10, np.float32)
    moved, out = room[1:371].reshape(x.shape), room[:370].reshape(x.shape)
    moved[...] = x
    fused(moved, t, reduction=reduction, grad_out=out)
    np.testing.assert_array_equal(out, grad)
    out = np.zeros_like(x)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="grad_out"):
        fused(x, t, reduction=reduction, grad_out=out)
    assert not out.any()
    bad = np.where(np.arange(37) == 36, 10, t)
    out = np.full_like(x, 7)
    with pytest.raises(IndexError, match=r"target 10 at position \(36,\)"):
        fused(x, bad, reduction=reduction, grad_out=out)
    assert (out == 7).all()


def test_results_are_not_shared(rng: Rng) -> None:
    x, t = rng.standard_normal((37, 10)), rng.integers(0, 10, 37)
    for ask in (CROSS_ENTROPY, fastloss.value_and_grad(CROSS_ENTROPY)):
        results = [ask(x, t, reduction="none") for _ in range(3)]
        arrays = [array for result in results for array in (result if isinstance(result, tuple) else (result,))]
        assert not any(np.shares_memory(a, b) for k, a in enumerate(arrays) for b in arrays[:k])


def test_a_plan_in_many_threads(rng: Rng) -> None:
    """Each thread's numbers stay its own, of small arrays and of ones that threads share out."""
    for shape in ((3, 10), (2000, 300)):
        pairs = [(rng.standard_normal(shape).astype(np.float32), rng.integers(0, shape[1], shape[0])) for _ in range(6)]
        expected = [CROSS_ENTROPY.call(*pair).evaluate() for pair in pairs]
        wrong: list[Any] = []

        def work(k: int, pairs: Any = pairs, expected: Any = expected, wrong: Any = wrong) -> None:
            wrong.extend(got for _ in range(100) if (got := CROSS_ENTROPY(*pairs[k])) != expected[k])

        threads = [threading.Thread(target=work, args=(k,)) for k in range(len(pairs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


def test_reduced_by_compiled_code_as_by_python(rng: Rng) -> None:
    """Every bit of the value, for sums of any size and sign, special ones included."""

    def emit(sums: Value, reduction: Value, rows: Value, out: Value) -> None:
        out.store(entry._reduced(sums, reduction, rows))

    reduce = compiler.callable_of(emit, 4, None)
    special = np.array([0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, 1e-320, 1e308])
    ways = [(entry.SUM, "sum", False), (entry.OVER_COUNT, "mean", False), (entry.OVER_WEIGHT, "mean", True)]
    for turn in range(4000):
        raw = rng.standard_normal(8) * 10.0 ** rng.integers(-200, 200, 8)
        raw[1::2] = raw[::2] * rng.uniform(-1, 1, 4) * 2.0**-53
        if turn % 2:
            raw[:6:2] = np.where(rng.uniform(size=3) < 0.5, rng.choice(special, 3), raw[:6:2])
        raw[2:4] = (count := rng.integers(0, 1000)), 0.0
        raw[4:6] = raw[4:6] if turn % 3 else 0.0
        raw[6], rows, out = count, int(rng.integers(0, 100)), np.empty(1)
        for code, reduction, weighted in (*ways, (entry.OVER_ROWS, "batchmean", False)):
            reduce(raw.ctypes.data, code, rows, out.ctypes.data)
            expected = Sums(raw, count, rows).value(reduction, weighted)
            same = np.isnan(out[0]) if np.isnan(expected) else out.tobytes() == np.float64(expected).tobytes()
            assert same, (raw, code, rows, out[0], expected)


def test_where_numpy_keeps_an_arrays_fields() -> None:
    """What entries read of an array: NumPy's binary interface."""
    array = np.zeros((3, 4), np.float32)[:, ::2]
    assert array.__array_interface__["data"][0] == _word(id(array) + entry.DATA)
    assert id(array.dtype) == _word(id(array) + entry.DTYPE)
    assert array.ndim == _word(id(array) + entry.NDIM) & 0xFFFFFFFF
    for field, expected in ((entry.SHAPE, array.shape), (entry.STRIDES, array.strides)):
        start = _word(id(array) + field)
        assert tuple(_word(start + 8 * k) for k in range(2)) == expected


def _word(address: int) -> int:


    return ctypes.c_int64.from_address(address).value


@pytest.mark.parametrize("shift", [1, 3, 8])
def test_a_streamed_gradient_may_lie_anywhere(shift: int) -> None:
    """The plan of an aligned gradient serves memory that is not: large results are written by aligned vectors."""
    rng = np.random.default_rng()
    x = rng.standard_normal((3, 5, 1 << 18), np.float32)
    t = rng.integers(0, 5, (3, 1 << 18))
    memory = np.zeros(x.size + 32, np.float32)
    aligned = -memory.ctypes.data % 64 // 4
    grads = [memory[start : start + x.size].reshape(x.shape) for start in (aligned, aligned + shift)]
    function = fastloss.value_and_grad(fastloss.cross_entropy)
    function(x, t, grad_out=grads[0])
    expected = grads[0].copy()
    for _ in range(2):
        function(x, t, grad_out=grads[1])
        np.testing.assert_array_equal(grads[1], expected)
