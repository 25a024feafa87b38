"""The losses as compositions of JAX's own operations.

Where no kernel runs (GPUs and TPUs inside a traced program), and where one would be overkill (second derivatives,
forward mode over gradients, a weight that learns), XLA evaluates and JAX differentiates these.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from ..call import Call
from ..classification import NLLCall, SoftmaxCall
from ..pointwise import PointwiseCall
from .sites import Site

Arrays = dict[str, jax.Array]


class _Lifted(NDArrayOperatorsMixin):
    """An array of JAX's that formulas take for one of NumPy's: its operations are jax.numpy's of the same name."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any) -> _Lifted:
        return _Lifted(getattr(jnp, ufunc.__name__)(*map(_plain, inputs)))

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> _Lifted:
        return _Lifted(getattr(jnp, function.__name__)(*map(_plain, args), **kwargs))


def _plain(value: Any) -> Any:
    return value.array if isinstance(value, _Lifted) else value


def evaluate(site: Site, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The value of a site and its gradients."""
    if site.batch:
        axes = [0 if mapped else None for mapped in site.mapped]
        made: tuple[jax.Array, ...] = jax.vmap(partial(evaluate, site.single), axes, axis_size=site.batch)(*arrays)
        return made
    call = site.call(site.shapes(arrays))
    call.prepare(differentiable=True)
    floats = [array.dtype for array in arrays if jnp.issubdtype(array.dtype, jnp.floating)]
    compute = jnp.result_type(*floats, jnp.float32)
    named = {
        name: array if site.classes and jnp.issubdtype(array.dtype, jnp.integer) else array.astype(compute)
        for name, array in zip(site.names, arrays, strict=True)
    }
    value, grads = _pointwise(site, call, named) if isinstance(call, PointwiseCall) else _by_class(site, call, named)
    dtypes = [result.dtype for result in site.results(arrays)]
    return tuple(result.astype(dtype) for result, dtype in zip((value, *grads), dtypes, strict=True))


def _pointwise(site: Site, call: PointwiseCall, named: Arrays) -> tuple[jax.Array, Sequence[jax.Array]]:
    formulas, weight = call.loss, named.get("weight")
    numbers = [jnp.asarray(number, named["input"].dtype) for number in call.parameters]
    arrays = [named[name] for name in ("input", "target", *formulas.operands)]
    operands = [_Lifted(operand) for operand in (*arrays, *numbers)]

    def weighted(formula: Any) -> jax.Array:
        found = jnp.broadcast_to(_plain(formula(*operands)), site.samples)
        return found if weight is None else found * weight

    each = weighted(formulas.value)
    if formulas.valid:
        each = jnp.where(_plain(formulas.valid(*operands[:2])), each, jnp.nan)
    scale: Any = 1.0
    if call.reduction == "mean":
        divisor = weight.sum() if call.weighted_mean and weight is not None else jnp.asarray(call.samples, each.dtype)
        scale = 1 / divisor
        value = each.sum() / divisor
    elif call.reduction == "batchmean":
        rows = jnp.asarray(call.rows, each.dtype)
        scale, value = 1 / rows, each.sum() / rows
    else:
        value = each if call.reduction == "none" else each.sum()
    slopes = {"input": formulas.grad, "target": formulas.grad_target}
    return value, [weighted(slopes[name]) * scale for name in site.grads]


def _by_class(site: Site, call: Any, named: Arrays) -> tuple[jax.Array, Sequence[jax.Array]]:
    each = _softmax if isinstance(call, SoftmaxCall) else _nll

    def value(*learning: jax.Array) -> jax.Array:
        return _reduced(call, *each(call, named | dict(zip(site.grads, learning, strict=True))))

    if not site.grads:
        return value(), ()
    found, pull = jax.vjp(value, *(named[name] for name in site.grads))
    return found, pull(jnp.ones_like(found))  # samples are independent: their gradients come at once


def _reduced(call: Call, each: jax.Array, z: jax.Array | None, weight: jax.Array, counted: jax.Array) -> jax.Array:
    """Losses, z-losses, weights, and which samples count, of the samples' shape, as `reduction` says."""
    if call.reduction == "none":
        return each if z is None else each + z
    total, count = each.sum(), counted.sum(dtype=each.dtype)
    if call.reduction == "mean":
        total = total / ((weight * counted).sum() if call.weighted_mean else count)
    if z is None:
        return total
    return total + (z.sum() / count if call.reduction == "mean" else z.sum())


def _indices(call: NLLCall | SoftmaxCall, named: Arrays) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The target's classes (0 where there is none), each sample's weight, which samples count, which are in range."""
    target = named["target"]
    counted = target != call.ignore_index if _fits(call.ignore_index, target.dtype) else jnp.ones(target.shape, bool)
    valid = (target >= 0) & (target < call.classes)
    index = jnp.where(counted & valid, target, 0)
    weight = named["weight"][index] if "weight" in named else jnp.ones(target.shape, named["input"].dtype)
    return index, weight, counted, valid | ~counted


def _fits(number: int, dtype: Any) -> bool:
    info = jnp.iinfo(dtype)
    return bool(info.min <= number <= info.max)


def _class_last(array: jax.Array) -> jax.Array:
    return jnp.moveaxis(array, 0 if array.ndim == 1 else 1, -1)


def _nll(call: NLLCall, named: Arrays) -> tuple[jax.Array, None, jax.Array, jax.Array]:
    index, weight, counted, valid = _indices(call, named)
    picked = jnp.take_along_axis(_class_last(named["input"]), index[..., None], -1)[..., 0]
    each = jnp.where(counted, -weight * picked, 0)
    return jnp.where(valid, each, jnp.nan), None, weight, counted


def _softmax(call: SoftmaxCall, named: Arrays) -> tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]:
    x = _class_last(named["input"])
    weights = named.get("weight", jnp.ones((), x.dtype))
    keep, share = 1 - call.label_smoothing, call.label_smoothing / max(call.classes, 1)
    if call.by_probability:
        counted = valid = jnp.ones(x.shape[:-1], bool)
        weight = counted.astype(x.dtype)
        masses = (keep * _class_last(named["target"]) + share) * weights
    else:
        index, weight, counted, valid = _indices(call, named)
        x = jnp.where(counted[..., None], x, 0)  # nothing of an ignored row may come through, NaN least of all
        hot = jnp.arange(call.classes) == index[..., None]
        masses = (keep * hot + share) * weights
    if call.softcap is not None:
        x = call.softcap * jnp.tanh(x / call.softcap)
    lse = jax.nn.logsumexp(x, -1, keepdims=True)
    lse = jnp.where(jnp.isinf(lse), jnp.nan, lse)  # no finite logit, or an infinite one
    terms = lse - x
    each = (masses * jnp.where((masses == 0) & jnp.isinf(terms), 0, terms)).sum(-1)
    each = jnp.where(valid, jnp.where(counted, each, 0), jnp.nan)
    z = jnp.where(counted, call.lse_square_scale * lse[..., 0] ** 2, 0) if call.lse_square_scale else None
    return each, z, weight, counted
