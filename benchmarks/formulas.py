"""Losses and their gradients as plain array expressions, for any library that NumPy's names fit; all are means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_cases import Work

Formula = Callable[[Any, Any, Any], Any]  # (library, input, target)


def _wide(xp: Any, x: Any) -> Any:
    return x if x.dtype.itemsize > 2 else x.astype(xp.float32)


def _lse(xp: Any, x: Any) -> Any:
    top = x.max(1, keepdims=True)
    return top + xp.log(xp.exp(x - top).sum(1, keepdims=True))


def cross_entropy(xp: Any, x: Any, t: Any) -> Any:
    x = _wide(xp, x)
    return (_lse(xp, x) - xp.take_along_axis(x, xp.expand_dims(t, 1), 1)).mean()


def cross_entropy_probabilities(xp: Any, x: Any, p: Any) -> Any:
    return (p * (_lse(xp, x) - x)).sum(1).mean()


def l1_loss(xp: Any, x: Any, y: Any) -> Any:
    return abs(x - y).mean()


def mse_loss(xp: Any, x: Any, y: Any) -> Any:
    return xp.square(x - y).mean()


def smooth_l1_loss(xp: Any, x: Any, y: Any) -> Any:
    d = abs(x - y)
    return xp.where(d < 1, 0.5 * d * d, d - 0.5).mean()


huber_loss = smooth_l1_loss  # the same where beta and delta are 1


def binary_cross_entropy(xp: Any, x: Any, y: Any) -> Any:
    return -(y * xp.maximum(xp.log(x), -100) + (1 - y) * xp.maximum(xp.log1p(-x), -100)).mean()


def binary_cross_entropy_with_logits(xp: Any, x: Any, y: Any) -> Any:
    return (xp.maximum(x, 0) - x * y + xp.log1p(xp.exp(-abs(x)))).mean()


# Gradients of each element's loss, for libraries without automatic ones.
_SLOPES: dict[str, Formula] = {
    "l1_loss": lambda xp, x, y: xp.sign(x - y),
    "mse_loss": lambda xp, x, y: 2 * (x - y),
    "smooth_l1_loss": lambda xp, x, y: xp.clip(x - y, -1, 1),
    "huber_loss": lambda xp, x, y: xp.clip(x - y, -1, 1),
    "binary_cross_entropy": lambda xp, x, y: (x - y) / xp.maximum(x * (1 - x), 1e-12),
    "binary_cross_entropy_with_logits": lambda xp, x, y: 1 / (1 + xp.exp(-x)) - y,
}


def _cross_entropy_and_gradient(xp: Any, x: Any, t: Any) -> Any:
    wide = _wide(xp, x)
    lse = _lse(xp, wide)
    grad = xp.exp(wide - lse)
    first, *others = xp.ogrid[tuple(slice(extent) for extent in t.shape)]
    grad[(first, t, *others)] -= 1
    return (lse - xp.take_along_axis(wide, xp.expand_dims(t, 1), 1)).mean(), (grad / t.size).astype(x.dtype)


def value(work: Work) -> Formula:
    """The mean loss."""
    found: Formula = globals()[work.loss + "_probabilities" * work.probabilities]
    return found


def value_and_gradient(work: Work) -> Formula:
    """The mean loss and its gradient for the input, evaluated together."""
    if work.loss == "cross_entropy" and not work.probabilities:
        return _cross_entropy_and_gradient
    mean, slope = value(work), _SLOPES[work.loss]
    return lambda xp, x, y: (mean(xp, x, y), slope(xp, x, y) / x.size)
