"""-(y log x + (1 - y) log(1 - x)), each logarithm at least -100.

Computed on s, the lesser of x and 1 - x, and its share of the target: share log s + (1 - share) log(1 - s).
"""

from .pointwise import Pointwise, wide
from .values import Value
from .vecmath import (
    bce_logs,
    bce_logs_short,
    fma,
    in_unit_interval,
    minimum,
    outside_unit_interval,
    quotient,
    variance,
    where,
)


def value(x: Value, y: Value) -> Value:
    high, low, rest = (wide(part) for part in bce_logs(minimum(x, 1 - x)))
    share = where(x > 0.5, 1 - wide(y), wide(y))
    return -(share * (high + low) + (1 - share) * rest)


def summand(x: Value, y: Value) -> Value:
    high, low, rest = bce_logs_short(minimum(x, 1 - x))
    share = where(x > 0.5, 1 - y, y)
    return -fma(share, high, fma(share, low - rest, rest))


def grad(x: Value, y: Value) -> Value:
    slope = variance(x)
    return quotient(x - y, where(slope < 1e-12, 1e-12, slope))  # torch's guard: finite at x = 0 and x = 1


def grad_target(x: Value, y: Value) -> Value:
    high, low, rest = bce_logs(minimum(x, 1 - x))
    difference = high + (low - rest)
    return where(x > 0.5, difference, -difference)


BCE = Pointwise("bce", value, grad, grad_target, summand=summand, valid=in_unit_interval, suspect=outside_unit_interval)
