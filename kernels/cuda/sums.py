"""Sums over a grid in a fixed order: a thread's, a block's, all blocks', and the reduced loss that they make.

Each sum is a pair, high and low, of the compute type. In float32 a pair carries 48 bits, so the result is the sum of
the losses rounded once, without a float64 instruction. There are no atomics: every run gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..exact import two_sum
from ..pointwise import SUMS
from ..vecmath import where
from .build import Kernel
from .device import (
    WARP,
    Int,
    Lanes,
    barrier,
    block_count,
    block_index,
    cuda,
    emitted,
    exchange_all,
    fma,
    full,
    integer,
    isfinite,
    loop,
    shared,
    thread_index,
    to_float,
    to_int,
    when,
)
from .memory import load, load_int, store, store_int

PAIRS = 3  # losses, weights, z-losses
ROW_BYTES = 8 * len(SUMS)  # one block's sums, a slot of 8 bytes each; floats of the compute type stand first in theirs
WEIGHT, COUNT, INVALID = (SUMS.index(name) for name in ("weight", "count", "invalid"))

# The first arguments of every kernel that adds up: where the result goes, where each block's sums go (a row each), and
# the constant that a mean is divided by.
RESULT, PARTIALS, DIVISOR = range(3)
FIRST_FIELDS = ("result", "partials", "divisor")


@dataclass(frozen=True)
class Reduction:
    """What is made of the sums."""

    compute: str  # "float32" or "float64"
    dtype: str  # storage of the result; "sums": the sums themselves, a row of them
    divisor: str = "one"  # what the losses are divided by: "one", "weight", "count", "constant"
    z: bool = False  # there are z-losses, which a mean divides by the count


def no_sums(like: Any, compute: str) -> tuple[Any, tuple[Int, Int]]:
    """Sums over nothing: pairs, and the counts of samples and of invalid ones."""
    return full(like, compute, 0.0, 2 * PAIRS), (integer(like, 0), integer(like, 0))


def add_pair(pair: Any, high: Any, low: Any) -> tuple[Any, Any]:
    """A pair plus another one."""
    total, rest = two_sum(pair, high)
    return total, rest + low


def total_of(pair: Any) -> Any:
    """A pair as one number: infinities and NaN are right in the high part and leave nonsense in the low one."""
    return where(isfinite(pair[1]), pair[0] + pair[1], pair[0])


def quotient(pair: Any, divisor: Any) -> Any:
    """One pair over another."""
    (high, low), (by, by_low) = pair, divisor
    first = high / by
    rest = (fma(-first, by, high) + low - first * by_low) / by
    return where(isfinite(rest), first + rest, total_of(pair) / by)


def as_pair(n: Int, compute: str) -> tuple[Any, Any]:
    """An integer as a pair."""
    high = to_float(n, compute)
    return high, to_float(n - to_int(high), compute)


def _added(sums: Any, other: Any) -> Any:
    parts: list[Any] = []
    for k in range(0, 2 * PAIRS, 2):
        parts += add_pair(sums[k : k + 2], other[k], other[k + 1])
    return Lanes(parts)


def write_row(row: Int, sums: Any, counts: Any, compute: str) -> None:
    """Sums into a row of memory."""
    for k in range(2 * PAIRS):
        store(row + 8 * k, sums[k], compute)
    store_int(row + 8 * COUNT, counts[0])
    store_int(row + 8 * INVALID, counts[1])


def read_row(row: Int, compute: str) -> tuple[Any, tuple[Int, Int]]:
    """Sums from a row of memory."""
    sums = Lanes(load(row + 8 * k, compute, compute) for k in range(2 * PAIRS))
    return sums, (load_int(row + 8 * COUNT), load_int(row + 8 * INVALID))


def block_total(sums: Any, counts: Any, compute: str, threads: int) -> tuple[Any, tuple[Int, Int]]:
    """All threads' sums, right in thread 0."""
    count, invalid = counts
    mask = WARP // 2
    while mask:
        *more, n, bad = exchange_all([*sums, count, invalid], mask)
        sums, count, invalid = _added(sums, more), count + n, invalid + bad
        mask //= 2
    if threads == WARP:
        return sums, (count, invalid)
    like = sums[0]
    rows, thread = shared(like, "fastloss_sums", threads // WARP * ROW_BYTES), thread_index(like)
    when(thread % WARP == 0, lambda: write_row(rows + (thread // WARP) * ROW_BYTES, sums, (count, invalid), compute))
    barrier(like)

    def add(warp: Int, *state: Any) -> list[Any]:
        more, (n, bad) = read_row(rows + warp * ROW_BYTES, compute)
        return [*_added(state[:-2], more), state[-2] + n, state[-1] + bad]

    def in_order() -> list[Any]:
        first, (n, bad) = read_row(rows, compute)
        return loop(integer(like, 1), integer(like, threads // WARP), 1, [*first, n, bad], add)[1]

    *total, count, invalid = when(thread == 0, in_order, lambda: [*sums, count, invalid])
    return Lanes(total), (count, invalid)


def _write_result(a: Any, sums: Any, counts: Any, reduction: Reduction) -> None:
    compute = reduction.compute
    if reduction.dtype == "sums":
        write_row(a[RESULT], sums, counts, compute)
        return
    loss, weight, z = (tuple(sums[k : k + 2]) for k in range(0, 2 * PAIRS, 2))
    count = as_pair(counts[0], compute)
    if reduction.divisor == "one":
        value = total_of(add_pair(loss, *z) if reduction.z else loss)
    else:
        divisor = {"weight": weight, "count": count, "constant": as_pair(a[DIVISOR], compute)}[reduction.divisor]
        value = quotient(loss, divisor)
        value = value + quotient(z, count) if reduction.z else value
    store(a[RESULT], value, reduction.dtype)


def closing(reduction: Reduction, threads: int) -> Any:
    """The last lines of a kernel, `close(a, sums, counts)`: the result where there is one block, else this block's row
    for `Combination`."""

    @emitted
    def close(a: Any, sums: Any, counts: Any) -> None:
        total, counted = block_total(sums, counts, reduction.compute, threads)
        like = total[0]

        def write() -> None:
            alone = block_count(like) == 1
            row = a[PARTIALS] + block_index(like) * ROW_BYTES
            when(
                alone,
                lambda: _write_result(a, total, counted, reduction),
                lambda: write_row(row, total, counted, reduction.compute),
            )

        when(thread_index(like) == 0, write)

    return close


@dataclass(frozen=True, kw_only=True)
class Combination(Kernel):
    """The kernel of one block that makes a result of all blocks' rows of sums."""

    reduction: Reduction

    @property
    def key(self) -> tuple[object, ...]:
        """What tells this kernel from every other, for the disk cache."""
        return ("cuda combination", self.reduction)

    @property
    def fields(self) -> tuple[str, ...]:
        """The kernel's arguments."""
        return (*FIRST_FIELDS, "rows")

    def build(self) -> Any:
        """The kernel."""
        reduction, compute, threads = self.reduction, self.reduction.compute, self.threads

        @emitted
        def start(a: Any) -> Any:
            return no_sums(a[0], compute)

        @emitted
        def add(a: Any, row: Int, sums: Any, counts: Any) -> Any:
            more, (n, bad) = read_row(a[PARTIALS] + row * ROW_BYTES, compute)
            return _added(sums, more), (counts[0] + n, counts[1] + bad)

        @emitted
        def finish(a: Any, sums: Any, counts: Any) -> None:
            total, counted = block_total(sums, counts, compute, threads)
            when(thread_index(total[0]) == 0, lambda: _write_result(a, total, counted, reduction))

        rows = self.fields.index("rows")

        def combine(a):  # type: ignore[no-untyped-def]
            sums, counts = start(a)
            row = cuda.threadIdx.x
            while row < a[rows]:
                sums, counts = add(a, row, sums, counts)
                row += threads
            finish(a, sums, counts)

        return combine
