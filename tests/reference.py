"""The oracle: every loss and its gradients in plain NumPy, one format wider than the input.

Written from the definitions; nothing here imports fastloss. float64 input is computed in `numpy.longdouble`
(64 bits of mantissa on x86), everything else in float64, so that an error of the oracle stays far below the
bounds that it checks.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Wide = NDArray[Any]


@dataclass(frozen=True)
class Truth:
    """A loss's value and, for a given grad_output, the gradient of sum(grad_output * value) to each operand.

    `terms` holds, for the value of each sample ("value") and for gradients by name, the size of the terms
    that cancel in it: no arithmetic of precision eps comes nearer than about eps times that.
    """

    value: Wide
    input: Wide | None = None
    target: Wide | None = None
    weight: Wide | None = None
    terms: dict[str, Wide] = field(default_factory=dict)


def wide(array: Any, like: Any = None) -> Wide:
    """The array as longdouble where it, or the arrays that it meets, is float64, else as float64."""
    array = np.asarray(array)
    dtypes = [np.asarray(a).dtype.newbyteorder("=") for a in ([array] if like is None else like)]
    return array.astype(np.longdouble if np.dtype(np.float64) in dtypes else np.float64)


def sum_to(array: Wide, shape: tuple[int, ...]) -> Wide:
    """The gradient of broadcasting: sums over the axes along which `shape` was stretched."""
    array = array.sum(tuple(range(array.ndim - len(shape))))
    stretched = tuple(i for i, n in enumerate(shape) if n == 1 and array.shape[i] != 1)
    return array.sum(stretched, keepdims=True)


def reduce(losses: Wide, reduction: str, divisor: Any) -> Wide:
    """'none', 'sum', or the sum over the divisor for both means; 0 / 0 is nan."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return np.asarray(total / losses.dtype.type(divisor) if reduction in ("mean", "batchmean") else total)


def upstream(losses: Wide, reduction: str, divisor: Any, grad_output: Any) -> Wide:
    """The gradient of sum(grad_output * value) to the losses, in the shape of the losses."""
    grad = np.asarray(grad_output).astype(losses.dtype)
    if reduction in ("mean", "batchmean"):
        grad = grad / losses.dtype.type(divisor)
    return np.broadcast_to(grad, losses.shape)


# ---------------------------------------------------------------------------- row losses


def class_last(array: Wide) -> Wide:
    """(C) or (N, C, d1, ...) as (..., C)."""
    return np.moveaxis(array, 0 if array.ndim == 1 else 1, -1)


def class_back(array: Wide) -> Wide:
    """The way back from `class_last`."""
    return np.moveaxis(array, -1, 0 if array.ndim == 1 else 1)


def log_softmax(z: Wide) -> tuple[Wide, Wide]:
    """The logarithm of softmax over the last axis, and the logarithm of the sum of exponentials."""
    top = z.max(-1, keepdims=True)
    shifted = z - top
    log_sum = np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted - log_sum, (top + log_sum)[..., 0]


def one_hot(target: NDArray[Any], kept: NDArray[np.bool_], n_classes: int) -> NDArray[np.bool_]:
    """(...) of indices as (..., C); rows that are not kept are empty."""
    index = np.where(kept, target, 0).astype(np.int64)
    return np.asarray((np.arange(n_classes) == index[..., None]) & kept[..., None])


@np.errstate(all="ignore")
def cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    grad_output: Any = None,
) -> Truth:
    """-sum_c b[c] log softmax(z)[c] + lse_square_scale * lse**2; b: target, weight and smoothing."""
    target = np.asarray(target)
    probabilities = target.shape == np.shape(input)
    x = class_last(wide(input, (input, target) if probabilities else None))
    real = x.dtype.type
    n_classes = x.shape[-1]
    w = np.ones(n_classes, x.dtype) if weight is None else np.asarray(weight).astype(x.dtype)
    smoothing = real(label_smoothing)
    if probabilities:
        kept = np.ones(x.shape[:-1], bool)
        soft = class_last(target.astype(x.dtype)) * (1 - smoothing) + smoothing / n_classes
        b = w * soft
    else:
        kept = target != ignore_index
        x = np.where(kept[..., None], x, 0)
        hot = one_hot(target, kept, n_classes)
        weight_of = (w * hot).sum(-1)
        b = np.where(hot, (1 - smoothing) * w, 0) + np.where(kept[..., None], smoothing / n_classes * w, 0)
    t = np.tanh(x / real(softcap)) if softcap is not None else None
    z = x if t is None else real(softcap) * t
    log_p, lse = log_softmax(z)
    # An impossible class (-inf) that the target does not name costs nothing: 0 * inf is 0 here.
    losses = np.where((b == 0) & np.isneginf(log_p), 0, -b * log_p).sum(-1)
    k = real(lse_square_scale)
    z_losses = np.where(kept, k * lse**2, 0) if k else np.zeros_like(losses)
    divisor = losses.size if probabilities else weight_of[kept].sum()
    # The z part is divided by the number of samples, never by their weights.
    value = reduce(losses, reduction, divisor) + reduce(z_losses, reduction, kept.sum())

    # softcap rounds z by an ulp or two, the one place where a large z costs digits: z - max(z) is exact.
    blur = 1 if t is None else 1 + real(abs(softcap)) / 2
    total = abs(b).sum(-1)
    size = blur * (total + 2 * k * abs(lse))
    terms = {"value": np.where(kept, size, 0)}
    if grad_output is None:
        return Truth(value, terms=terms)

    up = upstream(losses, reduction, divisor, grad_output)[..., None]
    up_z = upstream(losses, reduction, kept.sum(), grad_output)[..., None]
    p = np.exp(log_p)
    to_z = (p * b.sum(-1, keepdims=True) - b) * up
    if k:
        to_z = to_z + 2 * k * lse[..., None] * p * up_z
    to_x = to_z if t is None else to_z * (1 - t * t)
    to_x = np.where(kept[..., None], to_x, 0)

    finite_log_p = np.where(np.isfinite(log_p), abs(log_p), 0)
    share = p * (2 + finite_log_p / 4) * blur
    to_x_size = abs(up) * (share * total[..., None] + abs(b)) + 2 * k * abs(up_z) * share * (1 + abs(lse[..., None]))
    terms["input"] = class_back(np.where(kept[..., None], to_x_size, 0))
    if not probabilities:
        return Truth(value, class_back(to_x), terms=terms)
    to_target = -(1 - smoothing) * w * log_p * up
    to_weight = (-soft * log_p * up).reshape(-1, n_classes).sum(0)
    terms["target"] = class_back(abs(w * up) * blur + 0 * to_target)
    terms["weight"] = ((1 + abs(log_p)) * blur * abs(soft * up)).reshape(-1, n_classes).sum(0)
    return Truth(value, class_back(to_x), class_back(to_target), to_weight, terms)


@np.errstate(all="ignore")
def nll_loss(
    input: Any,
    target: Any,
    weight: Any = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    grad_output: Any = None,
) -> Truth:
    """-weight[target] * input[target]; only that element of a row counts."""
    target = np.asarray(target)
    x = class_last(wide(input))
    w = np.ones(x.shape[-1], x.dtype) if weight is None else np.asarray(weight).astype(x.dtype)
    kept = target != ignore_index
    hot = one_hot(target, kept, x.shape[-1])
    losses = np.where(hot, -w * x, 0).sum(-1)
    divisor = (w * hot).sum()
    up = upstream(losses, reduction, divisor, 1.0 if grad_output is None else grad_output)[..., None]
    return Truth(reduce(losses, reduction, divisor), class_back(np.where(hot, -w * up, 0)))


# ---------------------------------------------------------------------------- pointwise losses


def pointwise(
    losses: Wide,
    to_input: Wide,
    to_target: Wide,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    weight: Any,
    reduction: str,
    grad_output: Any,
    divisor: Any = None,
    terms: dict[str, Wide] | None = None,
) -> Truth:
    """Weights, reduces and chains: what every pointwise loss shares. The divisor is the size unless given."""
    w = np.asarray(1 if weight is None else weight).astype(losses.dtype)
    divisor = losses.size if divisor is None else divisor
    up = w * upstream(losses, reduction, divisor, 1.0 if grad_output is None else grad_output)
    scaled = {"value": abs(w), "input": abs(up), "target": abs(up)}
    shape_of = {"value": losses.shape, "input": shapes[0], "target": shapes[1]}
    return Truth(
        reduce(w * losses, reduction, divisor),
        sum_to(to_input * up, shapes[0]),
        sum_to(to_target * up, shapes[1]),
        terms={key: sum_to(abs(size) * scaled[key], shape_of[key]) for key, size in (terms or {}).items()},
    )


def pair(input: Any, target: Any) -> tuple[Wide, Wide, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Both operands in the wider format, and their shapes."""
    both = (input, target)
    return wide(input, both), wide(target, both), (np.shape(input), np.shape(target))


def weight_sum(weight: Any, dtype: Any) -> Any:
    """What l1_loss and mse_loss divide a weighted mean by."""
    return None if weight is None else np.asarray(weight).astype(dtype).sum()


@np.errstate(all="ignore")
def l1_loss(input: Any, target: Any, weight: Any = None, reduction: str = "mean", grad_output: Any = None) -> Truth:
    """|input - target|; the gradient is 0 at equality."""
    x, y, shapes = pair(input, target)
    d = x - y
    divisor = weight_sum(weight, d.dtype)
    return pointwise(abs(d), np.sign(d), -np.sign(d), shapes, weight, reduction, grad_output, divisor)


@np.errstate(all="ignore")
def mse_loss(input: Any, target: Any, weight: Any = None, reduction: str = "mean", grad_output: Any = None) -> Truth:
    """(input - target)**2, no 1/2."""
    x, y, shapes = pair(input, target)
    d = x - y
    divisor = weight_sum(weight, d.dtype)
    return pointwise(d * d, 2 * d, -2 * d, shapes, weight, reduction, grad_output, divisor)


@np.errstate(all="ignore")
def smooth_l1_loss(
    input: Any,
    target: Any,
    beta: float = 1.0,
    weight: Any = None,
    reduction: str = "mean",
    grad_output: Any = None,
) -> Truth:
    """0.5 d**2 / beta where |d| < beta, else |d| - 0.5 beta."""
    x, y, shapes = pair(input, target)
    d = x - y
    b = d.dtype.type(beta)
    inside = abs(d) < b
    losses = np.where(inside, 0.5 * d * d / b, abs(d) - 0.5 * b)
    grad = np.where(inside, d / b, np.sign(d))
    return pointwise(losses, grad, -grad, shapes, weight, reduction, grad_output)


@np.errstate(all="ignore")
def huber_loss(
    input: Any,
    target: Any,
    delta: float = 1.0,
    weight: Any = None,
    reduction: str = "mean",
    grad_output: Any = None,
) -> Truth:
    """0.5 d**2 where |d| <= delta, else delta (|d| - 0.5 delta); a weighted mean divides by the size."""
    x, y, shapes = pair(input, target)
    d = x - y
    c = d.dtype.type(delta)
    losses = np.where(abs(d) <= c, 0.5 * d * d, c * (abs(d) - 0.5 * c))
    grad = np.where(abs(d) <= c, d, c * np.sign(d))
    return pointwise(losses, grad, -grad, shapes, weight, reduction, grad_output)


@np.errstate(all="ignore")
def kl_div(
    input: Any, target: Any, log_target: bool = False, reduction: str = "mean", grad_output: Any = None
) -> Truth:
    """With t the target: t (log t - input), 0 where t is 0; log_target: the target is log t already."""
    x, y, shapes = pair(input, target)
    t, log_t = (np.exp(y), y) if log_target else (y, np.log(y))
    losses = t * (log_t - x)
    to_target = t * (log_t - x + 1) if log_target else log_t - x + 1
    if not log_target:
        # 0 log 0 is 0 whatever the input; its gradient, -inf, is taken as 0 too.
        losses, to_target = np.where(t == 0, 0, losses), np.where(t == 0, 0, to_target)
    divisor = losses.shape[0] if reduction == "batchmean" else None
    size = abs(log_t) + abs(x)
    terms = {"value": np.where(t == 0, 0, t * size), "target": (t if log_target else 1) * (size + 1)}
    return pointwise(losses, -t, to_target, shapes, None, reduction, grad_output, divisor, terms)


@np.errstate(all="ignore")
def binary_cross_entropy(
    input: Any, target: Any, weight: Any = None, reduction: str = "mean", grad_output: Any = None
) -> Truth:
    """-(y log x + (1 - y) log(1 - x)), each logarithm at least -100; the gradient over at least 1e-12."""
    x, y, shapes = pair(input, target)
    log_x, log_rest = np.maximum(np.log(x), -100), np.maximum(np.log1p(-x), -100)
    losses = -(y * log_x + (1 - y) * log_rest)
    to_input = (x - y) / np.maximum((1 - x) * x, x.dtype.type(1e-12))
    terms = {"target": abs(log_rest) + abs(log_x)}
    return pointwise(losses, to_input, log_rest - log_x, shapes, weight, reduction, grad_output, terms=terms)


def softplus(x: Wide) -> Wide:
    """log(1 + exp(x)) without overflow and without losing the small tail."""
    return np.maximum(x, 0) + np.log1p(np.exp(-abs(x)))


@np.errstate(all="ignore")
def binary_cross_entropy_with_logits(
    input: Any,
    target: Any,
    weight: Any = None,
    pos_weight: Any = None,
    reduction: str = "mean",
    grad_output: Any = None,
) -> Truth:
    """With p = pos_weight: p y softplus(-x) + (1 - y) softplus(x); a factor 0 leaves nothing."""
    x, y, shapes = pair(input, target)
    p = np.asarray(1 if pos_weight is None else pos_weight).astype(x.dtype)
    positive, negative = p * y, 1 - y
    losses = np.where(positive == 0, 0, positive * softplus(-x))
    losses = losses + np.where(negative == 0, 0, negative * softplus(x))
    losses = np.where(np.isnan(x), x, losses)
    to_input = negative / (1 + np.exp(-x)) - positive / (1 + np.exp(x))
    to_target = p * softplus(-x) - softplus(x)
    sigmoid = 1 / (1 + np.exp(-x))
    terms = {
        "input": abs(negative) * sigmoid + abs(positive) * (1 - sigmoid),
        "target": abs(p) * softplus(-x) + softplus(x),
    }
    return pointwise(losses, to_input, to_target, shapes, weight, reduction, grad_output, terms=terms)
