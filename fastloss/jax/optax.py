"""optax's losses over classes, with optax's arguments and values, evaluated by fastloss: no reduction, any batch
dimensions, the classes along any axis."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from .. import losses
from .rules import ENGINE

Axes = int | tuple[int, ...]


def softmax_cross_entropy_with_integer_labels(
    logits: Any, labels: Any, axis: Axes = -1, where: Any = None
) -> jax.Array:
    """log(sum_c exp(logits[..., c])) - logits[..., labels].

    Args:
        logits: of shape [..., num_classes], floating.
        labels: class indices, of the batch dimensions' shape [...] (extents of 1 are broadcast, both ways). Negative
            ones count from the end.
        axis: where the classes are; of several axes, whose classes are then counted in C order.
        where: samples (of the batch dimensions' shape) or classes (of the logits' shape) to include: others are left
            out of the sum, and the loss is 0 where none is left. A mask of classes is evaluated by jax.numpy.

    Returns:
        The losses, of the batch dimensions' shape and the dtype of logits. A label out of range gives NaN.

    Raises:
        TypeError: dtypes. ValueError: shapes, axis.

    Source: optax.softmax_cross_entropy_with_integer_labels (0.2.8).

    >>> import jax.numpy as jnp, fastloss.jax
    >>> logits, labels = jnp.array([[[1.2, -0.8, -0.5]], [[0.9, -1.2, 1.1]]]), jnp.array([[0], [1]])
    >>> fastloss.jax.softmax_cross_entropy_with_integer_labels(logits, labels).shape
    (2, 1)
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels have dtype {labels.dtype}, expected integers")
    rows, mask = _classes_last(logits, where, axis)
    if labels.ndim != rows.ndim - 1:
        raise ValueError(f"labels have shape {labels.shape}, expected {rows.shape[:-1]}, the logits' without classes")
    batch = jnp.broadcast_shapes(rows.shape[:-1], labels.shape)
    classes = rows.shape[-1]
    labels = jnp.broadcast_to(jnp.where(labels < 0, labels + classes, labels), batch)
    rows = jnp.broadcast_to(rows, (*batch, classes))
    known = (labels >= 0) & (labels < classes)
    if mask is not None and mask.shape[-1] != 1:
        picked = jnp.take_along_axis(rows, jnp.where(known, labels, 0)[..., None], -1)[..., 0]
        loss = jax.nn.logsumexp(rows, -1, where=mask) - picked
    else:
        loss = _each(rows, jnp.where(known, labels, -1), ignore_index=-1)
    loss = jnp.where(known, loss, jnp.nan)
    return loss if mask is None else jnp.where(mask.any(-1), loss, 0)


def softmax_cross_entropy(logits: Any, labels: Any, axis: Axes | None = -1, where: Any = None) -> jax.Array:
    """sum_c labels[..., c] (log(sum exp(logits)) - logits[..., c]).

    Args:
        logits: of shape [..., num_classes], floating.
        labels: class probabilities, of a shape that broadcasts with the logits'.
        axis: where the classes are: one axis, several, or (None) all of them.
        where: samples or elements to include, of the batch dimensions' or the logits' shape; evaluated by jax.numpy.

    Returns:
        The losses, of the batch dimensions' shape.

    Raises:
        TypeError: dtypes. ValueError: shapes, axis.

    Source: optax.softmax_cross_entropy (0.2.8).

    >>> import jax.numpy as jnp, fastloss.jax
    >>> loss = fastloss.jax.softmax_cross_entropy(jnp.array([0.8, 0.1, 0.2]), jnp.array([1.0, 0.0, 0.0]))
    >>> round(float(loss), 4)
    0.7156
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if where is not None:
        where = jnp.asarray(where)
        where = where if where.ndim == logits.ndim or axis is None else jnp.expand_dims(where, axis)
        log_p = jax.nn.log_softmax(logits, axis, where)
        return -(labels * log_p).sum(axis, where=where)
    shape = jnp.broadcast_shapes(logits.shape, labels.shape)
    rows, _ = _classes_last(jnp.broadcast_to(logits, shape), None, axis)
    q, _ = _classes_last(jnp.broadcast_to(labels, shape), None, axis)
    return _each(rows, q)


def sigmoid_binary_cross_entropy(logits: Any, labels: Any) -> jax.Array:
    """labels * softplus(-logits) + (1 - labels) * softplus(logits), element by element.

    Args:
        logits, labels: of shapes that broadcast; labels are probabilities, or 0 and 1 of any dtype.

    Returns:
        The losses, of the broadcast shape.

    Raises:
        TypeError: dtypes. ValueError: shapes.

    Source: optax.sigmoid_binary_cross_entropy (0.2.8).

    >>> import jax.numpy as jnp, fastloss.jax
    >>> round(float(fastloss.jax.sigmoid_binary_cross_entropy(jnp.array(2.0), 1)), 6)
    0.126928
    """
    logits, labels = jnp.broadcast_arrays(jnp.asarray(logits), jnp.asarray(labels))
    arguments = {"input": logits, "target": labels, "reduction": "none"}
    return ENGINE.evaluate(losses.binary_cross_entropy_with_logits, arguments)


def _each(rows: jax.Array, target: jax.Array, **options: Any) -> jax.Array:
    """The losses of samples with any batch dimensions, the classes last."""
    batch, classes = rows.shape[:-1], rows.shape[-1]
    arguments = {
        "input": rows.reshape(math.prod(batch), classes),
        "target": target.reshape(math.prod(batch), *target.shape[len(batch) :]),
        "reduction": "none",
        **options,
    }
    return ENGINE.evaluate(losses.cross_entropy, arguments).reshape(batch)


def _classes_last(array: jax.Array, where: Any, axis: Axes | None) -> tuple[jax.Array, jax.Array | None]:
    """An array and its mask with the classes along one axis, the last; a mask of samples has one class."""
    several = tuple(range(array.ndim)) if axis is None else (axis,) if isinstance(axis, int) else axis
    axes = tuple(a % array.ndim if -array.ndim <= a < array.ndim else -1 for a in several)
    if -1 in axes or len(set(axes)) != len(axes):
        raise ValueError(f"axis is {axis!r}, expected different axes of the logits, of shape {array.shape}")
    batch = [k for k in range(array.ndim) if k not in axes]

    def moved(array: jax.Array) -> jax.Array:
        array = array.transpose(*batch, *axes)
        return array.reshape(*array.shape[: len(batch)], -1)

    if where is None:
        return moved(array), None
    where = jnp.asarray(where)
    return moved(array), moved(where) if where.ndim == array.ndim else where[..., None]
