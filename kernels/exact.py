"""Sums that carry their own rounding error: the same value to the last bit however they are cut."""

from __future__ import annotations

from collections.abc import Sequence

from .values import F64, I64, Value, full, loop


def two_sum(pair: Sequence[Value], term: Value) -> tuple[Value, Value]:
    """(high, low) + term with the rounding error of high kept in low (Knuth's TwoSum: any order of magnitudes).

    Where a term is infinite or NaN, high is right and low is nonsense: whoever reads the pair must look at high first.
    """
    high, low = pair
    total = high + term
    back = total - high
    return total, low + ((high - (total - back)) + (term - back))


def add_lanes(pair: Sequence[Value], lanes: Sequence[Value]) -> tuple[Value, Value]:
    """A scalar pair plus all lanes of another pair, in a fixed order."""
    high, low = lanes
    while high.lanes > 1:
        (a, b), (c, d) = high.halves(), low.halves()
        high, low = two_sum((a, c), b)
        low = low + d
    total, rest = two_sum(pair, high)
    return total, rest + low


def add_rows(rows: Value, n: Value, out: Value, width: int) -> None:
    """`void add_rows(rows, n, out)`: n rows of `width` float64 slots added in order into one row of pairs."""
    b = n.b
    zero = full(b, F64, 1)

    def add(i: Value, *total: Value) -> list[Value]:
        row = rows + i * (8 * width)
        out = []
        for k in range(0, width, 2):
            high, low = two_sum(total[k : k + 2], (row + 8 * k).load(F64))
            out += [high, low + (row + 8 * (k + 1)).load(F64)]
        return out

    _, total = loop(Value(b, I64(0)), n, 1, [zero] * width, add)
    for k, value in enumerate(total):
        (out + 8 * k).store(value)
