"""|x - y|."""

from .pointwise import Pointwise, sign
from .values import Value


def value(x: Value, y: Value) -> Value:
    return abs(x - y)


def grad(x: Value, y: Value) -> Value:
    return sign(x - y)


def grad_target(x: Value, y: Value) -> Value:
    return sign(y - x)


L1 = Pointwise("l1", value, grad, grad_target, wide=True, short_grads=True)
