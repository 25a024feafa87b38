"""d**2 / (2 beta) where d = |x - y| is under beta, else d - beta / 2; beta = 0 is |x - y|."""

from .pointwise import Pointwise, sign
from .values import Value
from .vecmath import where


def value(x: Value, y: Value, beta: Value) -> Value:
    d = abs(x - y)
    return where(d < beta, d * d * (0.5 / beta), d - 0.5 * beta)


def grad(x: Value, y: Value, beta: Value) -> Value:
    d = x - y
    return where(abs(d) < beta, d * (1 / beta), sign(d))


def grad_target(x: Value, y: Value, beta: Value) -> Value:
    return grad(y, x, beta)


SMOOTH_L1 = Pointwise("smooth_l1", value, grad, grad_target, wide=True, short_grads=True, parameters=("beta",))
