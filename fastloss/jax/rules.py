"""How JAX transforms a loss: what runs where, derivatives, and batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ..losses import Loss
from . import composite, ffi
from .sites import Site, site_of

Results = tuple[jax.Array, ...]


class JaxEngine:
    """Evaluates losses of arrays that JAX traces. `fastloss.arrays.Engine` says what each method is for."""

    def evaluate(self, loss: Loss[Any], arguments: Mapping[str, Any]) -> jax.Array:
        site, arrays = site_of(loss, arguments)
        return evaluate(site, *arrays)

    def value_and_grad(
        self,
        loss: Loss[Any],
        arguments: Mapping[str, Any],
        names: Sequence[str],
        grad_output: Any,
        grad_outs: Sequence[Any],
    ) -> tuple[jax.Array, list[jax.Array]]:
        if any(out is not None for out in grad_outs):
            raise TypeError("grad_out is given, but arrays of JAX never change: use what the call returns")

        def value(*learning: Any) -> jax.Array:
            return self.evaluate(loss, {**arguments, **dict(zip(names, learning, strict=True))})

        found, pull = jax.vjp(value, *(jnp.asarray(arguments[name]) for name in names))
        upstream = jnp.ones_like(found) if grad_output is None else jnp.asarray(grad_output, found.dtype)
        if upstream.shape != found.shape:
            raise ValueError(f"grad_output has shape {upstream.shape}, expected {found.shape} to match the loss")
        return found, list(pull(upstream))


ENGINE = JaxEngine()


@lru_cache(1024)
def _kernel(site: Site) -> Any:
    """A site as a function of its operands that gives the value and its gradients, and has no derivative."""

    @jax.custom_batching.custom_vmap
    def kernel(*arrays: jax.Array) -> Results:
        made: Results = jax.lax.platform_dependent(
            *arrays, cpu=partial(ffi.call, site), default=partial(composite.evaluate, site)
        )
        return made

    @kernel.def_vmap
    def batched(axis_size: int, in_batched: Sequence[bool], *arrays: jax.Array) -> tuple[Results, tuple[bool, ...]]:
        together = _samples_together if _independent(site, in_batched) else _one_by_one
        results = together(site, axis_size, in_batched, arrays)
        return results, (True,) * len(results)

    return jax.jit(kernel)


def _independent(site: Site, mapped: Sequence[bool]) -> bool:
    """Whether a batch of these calls is one call on more samples."""
    weighted = "weight" in site.names
    if site.batch or (site.classes and weighted and mapped[site.names.index("weight")]):
        return False
    added_up = site.reduction != "none" and site.samples != ()
    return not added_up and not (site.reduction == "mean" and weighted)


def _samples_together(site: Site, size: int, mapped: Sequence[bool], arrays: Sequence[jax.Array]) -> Results:
    """A batch as one call on all of its samples."""
    samples = (size, *site.samples)
    # a batch of rows of classes takes the place of the samples' first dimension, or is one with it
    folded = (math.prod(samples[:2]), *samples[2:]) if site.classes else samples
    whole = []
    for name, m, array in zip(site.names, mapped, arrays, strict=True):
        own = array.shape[1:] if m else array.shape
        if not site.classes:
            array = array.reshape(size if m else 1, *(1,) * (len(site.samples) - len(own)), *own)
            array = jnp.broadcast_to(array, samples)
        elif name != "weight":
            array = jnp.broadcast_to(array if m else array[None], (size, *own))
            array = array.reshape(folded[0], *(own[1:] if site.samples else own))
        whole.append(array)
    options = tuple(sorted({**dict(site.options), "reduction": "none"}.items()))
    value, *grads = _kernel(replace(site, options=options, shape=folded, samples=folded))(*whole)
    value = value.reshape(samples)
    if site.classes and site.reduction == "mean" and jnp.issubdtype(arrays[1].dtype, jnp.integer):
        ignored = whole[1].reshape(samples) == dict(site.options).get("ignore_index", -100)
        value = jnp.where(ignored, jnp.nan, value)  # the mean over nothing
    places = [site.names.index(name) for name in site.grads]
    shapes = [arrays[k].shape[1:] if mapped[k] else arrays[k].shape for k in places]
    return value, *(grad.reshape(size, *shape) for grad, shape in zip(grads, shapes, strict=True))


def _one_by_one(site: Site, size: int, mapped: Sequence[bool], arrays: Sequence[jax.Array]) -> Results:
    """A batch as calls one after the other, within one operation. A batch of batches is one longer batch."""
    inner = site.mapped or (False,) * len(arrays)
    whole = []
    for array, m, was in zip(arrays, mapped, inner, strict=True):
        if site.batch and m != was:
            own = array.shape[1:]
            array = jnp.broadcast_to(array[:, None] if m else array[None], (size, site.batch, *own))
        if site.batch and (m or was):
            array = array.reshape(size * site.batch, *array.shape[2:])
        whole.append(array)
    total = size * max(site.batch, 1)
    every = tuple(m or was for m, was in zip(mapped, inner, strict=True))
    results: Results = _kernel(replace(site, batch=total, mapped=every))(*whole)
    if site.batch:
        results = tuple(result.reshape(size, site.batch, *result.shape[1:]) for result in results)
    return results


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def evaluate(site: Site, *arrays: jax.Array) -> jax.Array:
    """The value of a site."""
    value: jax.Array = _kernel(site)(*arrays)[0]
    return value


@partial(evaluate.defjvp, symbolic_zeros=True)
def _evaluate_jvp(site: Site, primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    """The fused kernel gives value and gradients at once; what is left for the derivative is a product."""
    learning = {name: t for name, t in zip(site.names, tangents, strict=True) if not isinstance(t, SymbolicZero)}
    fused = tuple(name for name in learning if name in site.fused)
    value, *grads = _value_and_grads(replace(site, grads=fused), *primals)
    parts = [_along(grad, learning[name], value) for name, grad in zip(fused, grads, strict=True)]
    rest = [k for k, name in enumerate(site.names) if name in learning and name not in fused]
    if rest:

        def of_rest(*chosen: jax.Array) -> jax.Array:
            arrays = dict(enumerate(primals)) | dict(zip(rest, chosen, strict=True))
            return composite.evaluate(site, *arrays.values())[0]

        parts.append(jax.jvp(of_rest, tuple(primals[k] for k in rest), tuple(tangents[k] for k in rest))[1])
    return value, sum(parts[1:], parts[0])


def _along(grad: jax.Array, tangent: jax.Array, value: jax.Array) -> jax.Array:
    """What a gradient makes of a tangent: its product with it, added up to the value's shape."""
    wide = jnp.promote_types(jnp.promote_types(grad.dtype, value.dtype), "float32")
    product = grad.astype(wide) * tangent.astype(wide)
    if value.ndim == 0:
        product = product.sum()
    elif product.ndim > value.ndim:
        product = product.sum(1)
    return product.astype(value.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _value_and_grads(site: Site, *arrays: jax.Array) -> Results:
    results: Results = _kernel(site)(*arrays)
    return results


@_value_and_grads.defjvp
def _value_and_grads_jvp(site: Site, primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    results = _value_and_grads(site, *primals)
    return results, jax.jvp(partial(composite.evaluate, site), tuple(primals), tuple(tangents))[1]
