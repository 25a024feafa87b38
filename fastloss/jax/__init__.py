"""The losses for JAX: under jit, grad, vmap, jvp and any composition of them, on the CPU by fastloss's kernels.

The functions take fastloss's arguments and give arrays of JAX's. `fastloss.cross_entropy` of a traced array is the
same thing; these also make JAX's arrays of NumPy's, and are here to be imported. A gradient by input (or target) is
computed with the value, by one kernel, and is only scaled afterwards; second derivatives, derivatives by weights, and
other devices than the CPU take compositions of jax.numpy instead.

While a program is traced everything is checked but the numbers. These are when it runs: a class index out of range, or
a probability outside 0 to 1, makes the program raise (as a `ValueError` or `RuntimeError` of JAX's, whose message names
the position) where its results are waited for; on other devices than the CPU that sample's loss is NaN.

>>> import jax, jax.numpy as jnp, fastloss.jax
>>> loss, grad = jax.jit(jax.value_and_grad(fastloss.jax.cross_entropy))(jnp.array([[0.8, 0.1, 0.2]]), jnp.array([0]))
>>> round(float(loss), 4), grad.shape
(0.7156, (1, 3))
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from .. import losses
from ..extras import needed
from ..losses import Loss

with needed("jax", by="fastloss.jax", extra="jax"):
    import jax

    from . import ffi
    from .optax import (
        sigmoid_binary_cross_entropy,
        softmax_cross_entropy,
        softmax_cross_entropy_with_integer_labels,
    )
    from .rules import ENGINE
    from .sites import ARRAYS, as_jax

P = ParamSpec("P")

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "mse_loss",
    "nll_loss",
    "sigmoid_binary_cross_entropy",
    "smooth_l1_loss",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
]


def _of_jax(loss: Loss[P]) -> Callable[P, jax.Array]:
    """A loss function whose arrays are JAX's."""

    @wraps(loss.call)
    def function(*args: P.args, **kwargs: P.kwargs) -> jax.Array:
        arguments = loss.arguments(*args, **kwargs)
        if any(isinstance(value, jax.core.Tracer) for value in arguments.values()):
            return ENGINE.evaluate(loss, arguments)
        arrays = {name: as_jax(name, arguments[name]) for name in ARRAYS if arguments.get(name) is not None}
        return loss(**{**arguments, **arrays})  # type: ignore[call-arg]  # the arguments, by name

    return function


l1_loss = _of_jax(losses.l1_loss)
mse_loss = _of_jax(losses.mse_loss)
smooth_l1_loss = _of_jax(losses.smooth_l1_loss)
huber_loss = _of_jax(losses.huber_loss)
kl_div = _of_jax(losses.kl_div)
cross_entropy = _of_jax(losses.cross_entropy)
nll_loss = _of_jax(losses.nll_loss)
binary_cross_entropy = _of_jax(losses.binary_cross_entropy)
binary_cross_entropy_with_logits = _of_jax(losses.binary_cross_entropy_with_logits)

ffi.available()  # registers with XLA: programs that were traced and saved by another process need no more than that
