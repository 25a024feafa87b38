"""How fast this machine's memory is: kernels that read, copy or combine arrays on all threads and compute nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from cases import aligned
from numba import njit, prange

from fastloss.kernels.compiler import callable_of
from fastloss.kernels.values import F32, I64, LANES, Value, full, loop

LARGEST = 1 << 29  # bytes: several times any cache; more of them go no slower
SHARE = 1 << 16  # float32 of an array that one thread takes at a time
UNROLL = 8
STEP = UNROLL * LANES
OUT_STEP = 64  # bytes: a line of its own for each share's sum


def _vectors(start: Value, i: Value) -> list[Value]:
    return [(start + (i + k * LANES) * 4).load(F32, LANES, align=LANES * 4) for k in range(UNROLL)]


def _emit_read(a: Value, b: Value, out: Value, n: Value) -> None:
    """Sum of a, kept so that the loads are."""

    def body(i: Value, *sums: Value) -> list[Value]:
        return [s + v for s, v in zip(sums, _vectors(a, i), strict=True)]

    _, sums = loop(Value(n.b, I64(0)), n, STEP, [full(n.b, F32, LANES)] * UNROLL, body)
    out.store(sum(sums[1:], sums[0]).sum())


def _emit_copy(a: Value, b: Value, out: Value, n: Value) -> None:
    """out = a, past the caches."""

    def body(i: Value) -> None:
        for k, v in enumerate(_vectors(a, i)):
            (out + (i + k * LANES) * 4).store(v, stream=True)

    loop(Value(n.b, I64(0)), n, STEP, [], body)


def _emit_triad(a: Value, b: Value, out: Value, n: Value) -> None:
    """out = a + b, past the caches."""

    def body(i: Value) -> None:
        for k, (v, w) in enumerate(zip(_vectors(a, i), _vectors(b, i), strict=True)):
            (out + (i + k * LANES) * 4).store(v + w, stream=True)

    loop(Value(n.b, I64(0)), n, STEP, [], body)


# name -> the kernel, the arrays that it goes over
KINDS = {"read": (_emit_read, 1), "copy": (_emit_copy, 2), "triad": (_emit_triad, 3)}


@cache
def _runner(kind: str) -> Callable[[int, int, int, int, int], None]:
    """(a, b, out, bytes from one share's output to the next, shares): on Numba's threads, as fastloss's own kernels."""
    share = callable_of(KINDS[kind][0], 4, None)

    @njit(parallel=True)
    def run(a, b, out, out_step, shares):
        for k in prange(shares):
            share(a + k * SHARE * 4, b + k * SHARE * 4, out + k * out_step, SHARE)

    return run


@cache
def _memory() -> np.ndarray:
    memory = aligned((LARGEST // 4,), np.dtype(np.float32))
    memory[...] = 1
    return memory


def limit(kind: str, nbytes: int) -> tuple[Callable[[], None], int]:
    """A call that moves about as many bytes in this way, at most `LARGEST`; and how many it does."""
    arrays = KINDS[kind][1]
    shares = max(1, round(min(nbytes, LARGEST) / arrays / (SHARE * 4)))
    size = shares * SHARE * 4
    run, start = _runner(kind), _memory().ctypes.data
    sums = aligned((shares * OUT_STEP,), np.dtype(np.uint8))
    a, b = start, start + size
    out, step = (sums.ctypes.data, OUT_STEP) if kind == "read" else (start + (arrays - 1) * size, SHARE * 4)

    def call() -> None:
        run(a, b, out, step, shares)
        sums[0]  # they live as long as the call

    return call, arrays * size
