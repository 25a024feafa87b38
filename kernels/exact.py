"""Sums that carry their own rounding error: the same value to the last bit however they are cut."""

from __future__ import annotations

from collections.abc import Sequence

from .values import Value


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
