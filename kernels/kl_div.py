"""y (log y - x), 0 at y = 0; or exp(y) (y - x) for a target given as its logarithm.

Computed in float64 for every storage: log y and x cancel where the distributions agree, which is where it matters.
"""

from .pointwise import Pointwise
from .values import Value
from .vecmath import exp, log, where


def value(x: Value, y: Value) -> Value:
    return where(y == 0, 0.0, y * (log(y) - x))


def grad(x: Value, y: Value) -> Value:
    return -y


def grad_target(x: Value, y: Value) -> Value:
    return where(y == 0, 0.0, log(y) + 1 - x)


def log_value(x: Value, y: Value) -> Value:
    probability = exp(y)
    return where(probability == 0, 0.0, probability * (y - x))


def log_grad(x: Value, y: Value) -> Value:
    return -exp(y)


def log_grad_target(x: Value, y: Value) -> Value:
    probability = exp(y)
    return where(probability == 0, 0.0, probability * (y - x + 1))


KL_DIV = Pointwise("kl_div", value, grad, grad_target, wide=True, signed=True)
KL_DIV_LOG_TARGET = Pointwise("kl_div_log_target", log_value, log_grad, log_grad_target, wide=True, signed=True)
