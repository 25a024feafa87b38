"""d**2 / 2 where d = |x - y| is at most delta, else delta (d - delta / 2)."""

from .pointwise import Pointwise
from .values import Value
from .vecmath import where


def value(x: Value, y: Value, delta: Value) -> Value:
    d = abs(x - y)
    return where(d <= delta, 0.5 * d * d, delta * (d - 0.5 * delta))


def grad(x: Value, y: Value, delta: Value) -> Value:
    d = x - y
    return where(d > delta, delta, where(d < -delta, -delta, d))


def grad_target(x: Value, y: Value, delta: Value) -> Value:
    return grad(y, x, delta)


HUBER = Pointwise("huber", value, grad, grad_target, wide=True, short_grads=True, parameters=("delta",))
