"""A loss as one operation of a JAX program: which function, its options, the shape and dtype of its result."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np

from .. import losses
from ..call import Call
from ..losses import Loss
from ..pointwise import PointwiseCall

Shape = tuple[int, ...]

ARRAYS = ("input", "target", "weight", "pos_weight")  # arguments that are arrays; all others are options
_own: dict[str, Loss[Any]] = {}  # losses made by `pointwise_loss`, by names that no other process knows


@dataclass(frozen=True)
class Site:
    """What is fixed while a program is traced; equal sites are one operation."""

    loss: str  # name of the function
    options: tuple[tuple[str, Any], ...]
    names: tuple[str, ...]  # the arguments that are arrays, in the order of the operands
    shape: Shape  # of the value
    dtype: str
    samples: Shape  # of the samples' losses
    classes: bool  # whether a sample is a row of classes
    fused: tuple[str, ...]  # arguments by which the kernel has a gradient
    grads: tuple[str, ...] = ()  # of which gradients are computed too
    batch: int = 0  # so many calls, along a first dimension of the operands that are `mapped`; 0: one, without it
    mapped: tuple[bool, ...] = ()

    @property
    def function(self) -> Loss[Any]:
        found = _own.get(self.loss) or getattr(losses, self.loss, None)
        if not isinstance(found, Loss):
            raise LookupError(f"the loss {self.loss!r} was made by pointwise_loss in another process than this one")
        return found

    @property
    def reduction(self) -> str:
        return str(dict(self.options)["reduction"])

    @cached_property
    def single(self) -> Site:
        """One call of a batch."""
        return replace(self, batch=0, mapped=())

    def parts(self, arrays: Sequence[Any], k: int) -> list[Any]:
        """The operands of call k of a batch."""
        if not self.batch:
            return list(arrays)
        return [array[k, ...] if mapped else array for array, mapped in zip(arrays, self.mapped, strict=True)]

    def results(self, arrays: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the value and the gradients for these operands."""
        call = self.call(self.shapes(arrays))
        call.prepare(differentiable=True)
        made = [jax.ShapeDtypeStruct(self.shape, self.dtype)]
        for name in self.grads:
            view, _, dtype = call.gradient_of(name)
            made.append(jax.ShapeDtypeStruct(view.shape, dtype))
        lead = (self.batch,) if self.batch else ()
        return [jax.ShapeDtypeStruct((*lead, *r.shape), r.dtype) for r in made]

    def shapes(self, arrays: Sequence[Any]) -> list[np.ndarray]:
        """One call's operands without memory."""
        mapped = self.mapped or (False,) * len(arrays)
        return [without_memory(a.shape[1:] if m else a.shape, a.dtype) for a, m in zip(arrays, mapped, strict=True)]

    def call(self, arrays: Sequence[Any], out: Any = None) -> Call:
        """The loss and its arguments, of one call."""
        given = dict(zip(self.names, arrays, strict=True)) | dict(self.options)
        made: Call = self.function.call(**given, **({} if out is None else {"out": out}))
        return made

    @cached_property
    def description(self) -> str:
        """All that another process needs to evaluate this site."""
        return json.dumps([self.loss, self.options, self.names, self.grads, self.batch, self.mapped])


def described(description: str, shape: Shape, dtype: str) -> Site:
    """The site that a description was made of, as far as evaluation goes; `shape` and `dtype`: of its value."""
    loss, options, names, grads, batch, mapped = json.loads(description)
    shape = shape[1:] if batch else shape
    pairs = tuple((name, value) for name, value in options)
    return Site(loss, pairs, tuple(names), shape, dtype, (), False, (), tuple(grads), batch, tuple(mapped))


def without_memory(shape: Shape, dtype: Any) -> np.ndarray:
    """An array to be looked at, not into."""
    return np.lib.stride_tricks.as_strided(np.empty(1, dtype), shape, (0,) * len(shape))


def site_of(loss: Loss[Any], arguments: Mapping[str, Any]) -> tuple[Site, list[jax.Array]]:
    """The site of a call, and its operands. Everything is checked that can be without the numbers."""
    given = {name: value for name, value in arguments.items() if value is not None}
    if given.pop("out", None) is not None:
        raise TypeError("out is given, but arrays of JAX never change: use what the call returns")
    if given.pop("check", False):
        raise TypeError(
            "check=True waits for numbers that a traced call has not: on the CPU it raises when it runs anyway, on a "
            "GPU call fastloss outside jax.jit"
        )
    names = tuple(name for name in ARRAYS if name in given)
    operands = {name: given.pop(name) for name in names}
    arrays = {name: as_jax(name, value) for name, value in operands.items()}
    shown = {
        name: operands[name] if _weak(operands[name]) else without_memory(array.shape, array.dtype)
        for name, array in arrays.items()
    }
    call = loss.call(**shown, **given)
    call.prepare(differentiable=True)
    for name, other in (("input", "target"), ("target", "input")):
        array = arrays[name]
        if _weak(operands[name]) and jax.numpy.issubdtype(array.dtype, jax.numpy.floating):
            arrays[name] = array.astype(arrays[other].dtype)
    if isinstance(call, PointwiseCall):
        arrays |= {name: jax.numpy.broadcast_to(arrays[name], call.shape) for name in ("input", "target")}
    dtype = jax.dtypes.canonicalize_dtype(call.dtype or call.result_dtype).name
    options = {name: _plain(value) for name, value in given.items() if name not in ("size_average", "reduce")}
    options |= {"reduction": call.reduction, "dtype": dtype}
    samples = call.losses_shape
    site = Site(
        _name(loss),
        tuple(sorted(options.items())),
        names,
        samples if call.reduction == "none" else (),
        dtype,
        samples,
        not isinstance(call, PointwiseCall),
        tuple(name for name in call.differentiable if name != "weight"),
    )
    return site, list(arrays.values())


def _name(loss: Loss[Any]) -> str:
    name: str = loss.call.__name__
    if getattr(losses, name, None) is loss:
        return name
    known = next((token for token, other in _own.items() if other is loss), None)
    if known is None:
        known = f"{name} {uuid.uuid4()}"
        _own[known] = loss
    return known


def _weak(value: Any) -> bool:
    """Whether a value is Python's own, whose dtype gives way to the others'."""
    return isinstance(value, bool | int | float | list | tuple)


def as_jax(name: str, value: Any) -> jax.Array:
    """An operand as JAX holds it: of 32 bits unless 64 are enabled."""
    if isinstance(value, jax.Array):
        return value
    array = np.asarray(value)
    kept = jax.dtypes.canonicalize_dtype(array.dtype)
    if array.dtype.kind in "iu" and array.size and kept != array.dtype:
        info = np.iinfo(kept)
        if array.min() < info.min or array.max() > info.max:
            raise ValueError(f"{name} holds integers that {kept} cannot: enable JAX's 64-bit numbers (jax_enable_x64)")
    return jax.numpy.asarray(array)


def _plain(value: Any) -> Any:
    """An option as a number or string of Python's."""
    if isinstance(value, str | int | float):
        return value
    return value.item() if hasattr(value, "item") else value
