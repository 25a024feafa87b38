"""Losses of Dask arrays as graphs: each block gives its sums, which are added up in a tree; no array is rechunked.

Blocks are evaluated by the library's own calls, so what a block is (a NumPy or a CuPy array) decides where it runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import dask.array as da
import numpy as np
from dask.array.utils import meta_from_array
from dask.layers import ArraySliceDep

from .. import checks, dispatch
from ..arrays import View
from ..arrays.numpy import wrap
from ..call import Call, memory_dtype
from ..classification import SoftmaxCall
from ..losses import Loss
from ..pointwise import PointwiseCall
from . import dask_blocks as blocks
from .dask_blocks import Finish, GradientsOf, LossesOf, Scale, SumsOf, TotalsOf

Axes = tuple[int, ...]
Chunks = tuple[tuple[int, ...], ...]

_REPLACED = frozenset({"size_average", "reduce", "reduction", "dtype", "out"})

CLASS = -1  # the axis of a row loss's input that its losses have not; theirs are numbered from 0


class Lazily:
    """The engine of Dask arrays: results are graphs, which nobody has computed yet."""

    def evaluate(self, loss: Loss[Any], arguments: Mapping[str, Any]) -> Any:
        """The loss: a 0-d array, or for 'none' one with the input's chunks."""
        _refuse("out", arguments.get("out"))
        # Here and not deeper down: warnings point at the caller of the loss.
        whole = loss.call(**{name: _stand_in(name, value) for name, value in arguments.items()})
        whole.prepare(differentiable=False)
        return _graph(loss, whole, arguments).value()

    def value_and_grad(
        self,
        loss: Loss[Any],
        arguments: Mapping[str, Any],
        names: Sequence[str],
        grad_output: Any,
        grad_outs: Sequence[Any],
    ) -> tuple[Any, list[Any]]:
        """The loss and its gradients, which have the chunks of their arguments."""
        _refuse("out", arguments.get("out"))
        for grad_out in grad_outs:
            _refuse("grad_out", grad_out)
        whole = loss.call(**{name: _stand_in(name, value) for name, value in arguments.items()})
        whole.prepare(differentiable=True)
        return _graph(loss, whole, arguments).value_and_grad(names, grad_output)


def _refuse(name: str, array: Any) -> None:
    if array is not None:
        raise ValueError(f"{name} is given, but what Dask arrays give is a graph, of which nothing is written anywhere")


def _stand_in(name: str, value: Any) -> Any:
    """An array of the same shape and dtype without memory of that size, for all checks that read no numbers."""
    if not isinstance(value, da.Array):
        return value
    if np.isnan(value.shape).any():
        raise ValueError(f"{name} has chunks of unknown size, shape {value.shape}: call .compute_chunk_sizes() first")
    return np.broadcast_to(np.zeros((), value.dtype), value.shape)


def _graph(loss: Loss[Any], whole: Call, arguments: Mapping[str, Any]) -> Graph:
    options = {name: value for name, value in arguments.items() if name not in whole.named_sources}
    for name, value in options.items():
        if isinstance(value, da.Array):
            raise TypeError(f"{name} is a Dask array, expected a number")
    graph = Graph(loss, whole, arguments, options)
    if len(graph.chunks.get(CLASS, ())) <= 1:
        return graph
    from .dask_classes import NLLGraph, SoftmaxGraph

    return (SoftmaxGraph if isinstance(whole, SoftmaxCall) else NLLGraph)(loss, whole, arguments, options)


class Graph:
    """The graph of one loss. `whole` is its call on the whole arrays, checked, without their numbers."""

    sums_of: type[SumsOf] = SumsOf
    losses_of: type[LossesOf] = LossesOf
    gradients_of: type[GradientsOf] = GradientsOf

    def __init__(self, loss: Loss[Any], whole: Any, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        self.loss, self.whole = loss, whole
        self.name = loss.call.__name__
        self.pointwise = isinstance(whole, PointwiseCall)
        self.axes: Axes = tuple(range(len(whole.losses_shape)))  # of the losses
        self.full: Axes = self.axes if self.pointwise else (*self.axes[:1], CLASS, *self.axes[1:])  # of the input
        extents = whole.losses_shape if self.pointwise else whole.x.shape
        self.extents = dict(zip(self.full, extents, strict=True))
        self.along = {name: self._axes_of(name) for name in whole.named_sources}
        self.chunks = self._common_chunks(arguments)
        self.arrays = {name: self._cut(name, arguments[name]) for name in whole.named_sources}
        self.given_chunks = {name: array.chunks for name, array in arguments.items() if isinstance(array, da.Array)}
        self.dtype = whole.dtype or whole.result_dtype
        plain = {name: value for name, value in options.items() if name not in _REPLACED}
        self.options = {**plain, "reduction": whole.reduction, "dtype": self.dtype}
        self.like = self.arrays["target" if whole.like is whole.target else "input"]._meta

    def _axes_of(self, name: str) -> Axes:
        """The axes of the losses, and CLASS, that an array lies along."""
        ndim = len(self.whole.named_sources[name].shape)
        if self.pointwise:
            return self.axes[len(self.axes) - ndim :]
        if name == "weight":
            return (CLASS,)
        return self.full if name == "input" or self.whole.by_probability else self.axes

    def _common_chunks(self, arguments: Mapping[str, Any]) -> dict[int, tuple[int, ...]]:
        """The chunks that every array is cut into: the input's; where arrays as large are cut elsewhere, there too."""
        large: tuple[str, ...] = tuple(self.along) if self.pointwise else ("input",)
        if not self.pointwise and (self.whole.by_probability or not isinstance(arguments["input"], da.Array)):
            large = "input", "target"
        found: dict[int, list[tuple[int, ...]]] = {axis: [] for axis in self.full}
        for name in large:
            if isinstance(array := arguments[name], da.Array):
                for axis, extent, cuts in zip(self.along[name], array.shape, array.chunks, strict=True):
                    if extent == self.extents[axis]:
                        found[axis].append(cuts)
        return {axis: _common(cuts) if cuts else (self.extents[axis],) for axis, cuts in found.items()}

    def _cut(self, name: str, array: Any) -> da.Array:
        """An argument as a Dask array of the common chunks; only one of class indices may have chunks merged."""
        view = self.whole.named_sources[name]
        chunks = tuple(
            self.chunks[axis] if extent == self.extents[axis] else (extent,)
            for axis, extent in zip(self.along[name], view.shape, strict=True)
        )
        if view.weak and view.data.dtype.kind == "f":  # the dtype of a block is not weak any more
            dtype = "float64" if self.pointwise and self.whole.loss.wide else _compute(self.whole.result_dtype)
            view = View(view.data.astype(dtype), dtype)
        return _as_dask(array, view, chunks)

    # ---- layers

    @property
    def block(self) -> dict[str, Any]:
        """The fields of a Block."""
        return {"loss": self.loss, "names": tuple(self.arrays), "options": self.options, "spread": self.pointwise}

    def with_options(self, **options: Any) -> dict[str, Any]:
        """The fields of a Block with other options."""
        return self.block | {"options": self.options | options}

    @property
    def operands(self) -> list[Any]:
        """Every array and its axes, as da.blockwise takes them."""
        return [part for name, array in self.arrays.items() for part in (array, self.along[name])]

    def layer(self, function: Any, axes: Axes, *operands: Any, dtype: Any = object, like: Any = None) -> da.Array:
        """What `function` gives for every block."""
        meta = np.empty((0,) * len(axes), object) if like is None else meta_from_array(like, len(axes), dtype)
        token = f"{self.name}-{_name(function)}"
        return da.blockwise(function, axes, *operands, dtype=dtype, meta=meta, align_arrays=False, token=token)

    def by_block(self, function: Any, axes: Axes, *operands: Any, **kwargs: Any) -> da.Array:
        """The same, where `function` wants to know first which part of the losses the block is."""
        place = ArraySliceDep(tuple(self.chunks[axis] for axis in self.axes))
        return self.layer(function, axes, place, self.axes, *operands, **kwargs)

    def reduced(self, states: da.Array, aggregate: Any, combine: Any, dtype: Any, like: Any) -> da.Array:
        """The states of all blocks combined in a tree, in an order that the chunks alone decide."""
        if not states.ndim:
            return self.layer(blocks.Alone(aggregate), (), states, (), dtype=dtype, like=like)
        return da.reduction(
            states, chunk=blocks.same, combine=combine, aggregate=aggregate, concatenate=False, dtype=dtype,
            meta=meta_from_array(like, 0, dtype), name=self.name,
        )  # fmt: skip

    def finished(self, states: da.Array) -> da.Array:
        """The sums of all blocks as the reduced loss."""
        whole = self.whole
        like = meta_from_array(self.like, 0)
        finish = Finish(whole.reduction, whole.weighted_mean, whole.rows, self.dtype, like)
        return self.reduced(states, finish, blocks.merged, numpy_dtype(self.dtype), like)

    # ---- results

    def value(self) -> da.Array:
        """The loss."""
        return self.losses() if self.whole.reduction == "none" else self.finished(self.sums())

    def losses(self, states: da.Array | None = None) -> da.Array:
        """The losses of all samples, computed, or out of what `gradients` gives."""
        made = {"dtype": numpy_dtype(self.dtype), "like": self.like}
        if states is None:
            losses = self.by_block(self.losses_of(**self.block), self.axes, *self.operands, **made)
        else:
            losses = self.layer(blocks.pick, self.axes, states, self.full, 0, None, **made)
        return self.as_cut(losses)

    def sums(self, states: da.Array | None = None) -> da.Array:
        """The sums of each block, likewise."""
        if states is not None:
            return self.layer(blocks.pick, self.full, states, self.full, 0, None)
        return self.by_block(self.sums_of(**self.with_options(reduction="sum")), self.full, *self.operands)

    def value_and_grad(self, names: Sequence[str], grad_output: Any) -> tuple[da.Array, list[da.Array]]:
        """The loss and its gradients."""
        none = self.whole.reduction == "none"
        wanted = {name: self.whole.gradient_of(name)[2] for name in names}
        states = self.gradients(wanted, self.upstream(grad_output) if none else self.factor(grad_output))
        value = self.losses(states) if none else self.finished(self.sums(states))
        found = {}
        for number, (name, dtype) in enumerate(wanted.items(), 1):
            kept, like = self._kept(name), self.arrays[name]._meta
            of = numpy_dtype(dtype) if all(kept) else np.float64
            part = self.layer(blocks.pick, self.full, states, self.full, number, None, dtype=of, like=like)
            found[name] = self.as_cut(part if all(kept) else self._folded(part, kept, name, dtype), name)
        return value, [found[name] for name in names]

    def gradients(self, wanted: Iterable[str], upstream: tuple[Any, Axes | None]) -> da.Array:
        """What GradientsOf gives for each block."""
        function, lazily = self.gradient_block(self.gradients_of, wanted, upstream)
        return self.by_block(function, self.full, *lazily, *self.operands)

    def gradient_block(
        self, kind: type[Any], wanted: Iterable[str], upstream: tuple[Any, Axes | None], **more: Any
    ) -> tuple[Any, tuple[Any, Axes | None]]:
        """The function that finds gradients, and the array that it is given first where the graph has to find that."""
        factor, axes = upstream
        kept = {name: self._kept(name) for name in wanted}
        function = kind(
            **self.with_options(reduction="none" if self.whole.reduction == "none" else "sum") | more,
            wrt=tuple(kept),
            kept={name: axes for name, axes in kept.items() if not all(axes)},
            factor=None if axes is not None else factor,
        )
        return function, (None, None) if axes is None else (factor, axes)

    def _kept(self, name: str) -> tuple[bool, ...]:
        """For each axis of a block whether an argument has it in full."""
        own = dict(zip(self.along[name], self.arrays[name].shape, strict=True))
        return tuple(own.get(axis) == self.extents[axis] for axis in self.full)

    def _folded(self, part: da.Array, kept: tuple[bool, ...], name: str, dtype: str) -> da.Array:
        """The gradient of an argument that every block gives a part of."""
        axis = tuple(k for k, keep in enumerate(kept) if not keep)
        meta = part._meta.astype(numpy_dtype(dtype))
        total = da.reduction(
            part, chunk=blocks.same, combine=blocks.added, aggregate=blocks.Folded(dtype), concatenate=False,
            axis=axis, keepdims=True, dtype=meta.dtype, meta=meta, name=self.name,
        )  # fmt: skip
        own = self.along[name]
        return total[tuple(slice(None) if axis in own else 0 for axis in self.full)]

    def upstream(self, grad_output: Any) -> tuple[Any, Axes | None]:
        """The gradient of what comes after for every sample, and its axes."""
        if grad_output is None:
            return None, None
        view = _check_grad_output(grad_output, self.whole.losses_shape, "the losses")
        chunks = tuple(self.chunks[axis] for axis in self.axes)
        return _as_dask(grad_output, view, chunks), self.axes

    def factor(self, grad_output: Any) -> tuple[Any, Axes | None]:
        """What the gradients of a reduced loss are multiplied by; the divisor of a mean comes first."""
        whole = self.whole
        grad_output = 1.0 if grad_output is None else grad_output
        _check_grad_output(grad_output, (), "the reduced loss")
        totals = self.totals() if whole.reduction == "mean" else None
        scale = Scale(by_weight=totals is not None)
        if totals is None:
            divisor = {"mean": whole.samples, "batchmean": whole.rows}.get(whole.reduction, 1)
            if not isinstance(grad_output, da.Array):
                return scale((divisor, divisor), grad_output), None
            totals = da.from_array(np.array([divisor, divisor]), chunks=-1)
            return self.layer(scale, (), totals, (0,), grad_output, ()), ()
        if not isinstance(grad_output, da.Array):
            return self.layer(scale, (), totals, (), float(blocks.on_host(grad_output)), None), ()
        return self.layer(scale, (), totals, (), grad_output, ()), ()

    def totals(self) -> da.Array | None:
        """(sum of weights, count) over all samples that count, without a look at the input; None where it is known."""
        if self.pointwise:
            if not self.whole.weighted_mean:
                return None
            part = self.layer(blocks.weight_total, self.axes, self.arrays["weight"], self.axes)
        else:
            if self.whole.by_probability:
                return None
            part = self.class_totals()
        return self.reduced(part, blocks.added, blocks.added, np.float64, np.empty(0))

    def class_totals(self) -> da.Array:
        """The same for each block of class indices."""
        names = [name for name in ("target", "weight") if name in self.arrays]
        function = TotalsOf(**self.block | {"classes": self.whole.classes})
        return self.by_block(function, self.axes, *(part for n in names for part in (self.arrays[n], self.along[n])))

    def as_cut(self, array: da.Array, name: str | None = None) -> da.Array:
        """A gradient, or losses, with the chunks that the argument, or the input, came with; they may have been cut."""
        if name is None:
            own = dict(zip(self.along["input"], self.given_chunks.get("input", ()), strict=False))
            chunks = tuple(own.get(axis, self.chunks[axis]) for axis in self.axes)
            if tuple(map(sum, chunks)) != array.shape:  # the input was broadcast
                return array
        else:
            chunks = self.given_chunks.get(name, array.chunks)
        return array if array.chunks == chunks else array.rechunk(chunks)


def _common(cuts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The chunks of an axis that is cut wherever one of several arrays is.

    >>> _common([(4, 4), (2, 6)])
    (2, 2, 4)
    """
    if len(set(cuts)) == 1:
        return cuts[0]
    ends = sorted({end for chunks in cuts for end in accumulate(chunks)})
    return tuple(end - start for start, end in pairwise([0, *ends]) if end > start) or (0,)


def _as_dask(array: Any, view: View, chunks: Chunks) -> da.Array:
    """An argument as a Dask array of these chunks. What is not one is cut here, so that no task holds all of it."""
    if isinstance(array, da.Array):
        return array if array.chunks == chunks else array.rechunk(chunks)
    if view.device is not None:
        return da.from_array(array, chunks=chunks, asarray=False)
    return da.from_array(np.asarray(wrap(view.data, view.dtype, None)), chunks=chunks)


def _check_grad_output(array: Any, shape: tuple[int, ...], of: str) -> View:
    view = dispatch.view(_stand_in("grad_output", array), "grad_output", differentiable=True)
    checks.numeric(view, "grad_output")
    checks.same_shape(view, "grad_output", shape, of)
    return view


def _compute(dtype: str) -> str:
    """What the arithmetic of a loss of that dtype runs in."""
    return "float64" if dtype == "float64" else "float32"


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype of that name; bfloat16 is ml_dtypes'."""
    return np.asarray(wrap(np.empty((), memory_dtype(name)), name, None)).dtype


def _name(function: Any) -> str:
    """How tasks of a function are called on a dashboard."""
    return str(getattr(function, "__name__", type(function).__name__)).strip("_").lower()
