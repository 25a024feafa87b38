"""(x - y)**2, no 1/2."""

from .pointwise import Pointwise
from .values import Value


def value(x: Value, y: Value) -> Value:
    d = x - y
    return d * d


def grad(x: Value, y: Value) -> Value:
    return 2 * (x - y)


def grad_target(x: Value, y: Value) -> Value:
    return 2 * (y - x)


MSE = Pointwise("mse", value, grad, grad_target, wide=True, short_grads=True)
