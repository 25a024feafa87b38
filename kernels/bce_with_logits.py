"""Binary cross-entropy of sigmoid(x): (1 - y) x + (1 + (p - 1) y) softplus(-x), p = pos_weight.

Written on |x|, where every term is positive: |x| c + softplus(-|x|) with c = y for x < 0, else 1 - y. Nothing cancels,
so the relative error stays within a few ulp down to the smallest loss, and at infinity c = 0 gives the limit.
"""

from .pointwise import Pointwise, wide
from .values import Value
from .vecmath import exp_neg, log1p_exp_neg, log1p_exp_neg_plus, logistic_tail, reciprocal, signbit, where


def value(x: Value, y: Value) -> Value:
    return _linear(x, wide(y), 1 - wide(y)) + wide(log1p_exp_neg(abs(x)))


def summand(x: Value, y: Value) -> Value:
    """NaN for infinite x, where the loss is 0 or infinite."""
    factor = where(signbit(x), y, 1 - y)
    return log1p_exp_neg_plus(abs(x), abs(x), factor)


def grad(x: Value, y: Value) -> Value:
    negative = signbit(x)
    g = where(negative, y, 1 - y) - logistic_tail(abs(x))  # of which the loss has most already
    return where(negative, -g, g)


def grad_target(x: Value, y: Value) -> Value:
    return -x


def weighted_value(x: Value, y: Value, pos_weight: Value) -> Value:
    positive, negative = wide(pos_weight) * wide(y), 1 - wide(y)
    return _linear(x, positive, negative) + (negative + positive) * wide(log1p_exp_neg(abs(x)))


def weighted_grad(x: Value, y: Value, pos_weight: Value) -> Value:
    q, r = _tails(x)
    return (1 - y) * where(x < 0, q, r) - pos_weight * y * where(x < 0, r, q)


def weighted_grad_target(x: Value, y: Value, pos_weight: Value) -> Value:
    return (pos_weight - 1) * (log1p_exp_neg(abs(x)) + where(x < 0, -x, 0.0 * x)) - x


def _linear(x: Value, positive: Value, negative: Value) -> Value:
    """|x| times the weight of the side that x is wrong on; 0 where that is 0: the limit for infinite x."""
    factor = where(x < 0, positive, negative)
    return _unless_zero(factor, wide(abs(x))) * factor


def _unless_zero(factor: Value, magnitude: Value) -> Value:
    """The magnitude to multiply by the factor: 0 times infinity is 0 here."""
    return where(factor == 0, 0.0, magnitude)


def _tails(x: Value) -> tuple[Value, Value]:
    """sigmoid(-|x|) and sigmoid(|x|)."""
    e = exp_neg(abs(x))
    r = reciprocal(1 + e)
    return e * r, r


BCE_WITH_LOGITS = Pointwise("bce_with_logits", value, grad, grad_target, summand=summand)
BCE_WITH_LOGITS_POS_WEIGHT = Pointwise(
    "bce_with_logits_pos_weight", weighted_value, weighted_grad, weighted_grad_target, operands=("pos_weight",)
)
