"""-(y log x + (1 - y) log(1 - x)), each logarithm at least -100."""

from .pointwise import Pointwise, wide
from .values import Value
from .vecmath import bce_logs, reciprocal, where


def value(x: Value, y: Value) -> Value:
    log_x, log_1mx = (wide(logarithm) for logarithm in bce_logs(x))
    return -(wide(y) * log_x + (1 - wide(y)) * log_1mx)


def grad(x: Value, y: Value) -> Value:
    x, y = wide(x), wide(y)
    slope = (1 - x) * x
    return (x - y) * reciprocal(where(slope < 1e-12, 1e-12, slope))  # torch's guard: finite at x = 0 and x = 1


def grad_target(x: Value, y: Value) -> Value:
    log_x, log_1mx = bce_logs(x)
    return log_1mx - log_x


def valid(x: Value, y: Value) -> Value:
    return (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)


BCE = Pointwise("bce", value, grad, grad_target, valid=valid)
