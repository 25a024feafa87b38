"""Row losses of Dask arrays whose classes are in several chunks: what is known of their parts is joined."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import dask.array as da
import numpy as np
from dask.array.utils import meta_from_array
from dask.layers import ArraySliceDep

from ..call import Call
from ..partials import Partials, cross_entropy_partials, cross_entropy_partials_grad
from . import dask_blocks as blocks
from .dask import CLASS, Axes, Graph, numpy_dtype
from .dask_blocks import (
    Block,
    Factor,
    GradientsOf,
    LossesOf,
    Place,
    SumsOf,
    checked_totals,
    one_thread,
    placed,
    rounded_as,
)

_ELSEWHERE = -100  # the index of a sample whose class another shard has; no class has it


@dataclass(frozen=True)
class Shard(Block):
    """nll_loss on a block of some of its `classes`: samples whose class is in another cost nothing here."""

    classes: int = 0

    def call(self, where: Place, arrays: Sequence[Any], **options: Any) -> Call:
        own, *arrays = arrays
        (own,) = own  # the slice of classes
        target = blocks.only(arrays[self.names.index("target")])
        ignore_index = self.options.get("ignore_index", -100)
        if own.start == 0:  # of the shards that a sample has, one looks whether there is such a class
            checked_totals(self, where, target, self.classes)
        inside = (target >= own.start) & (target < own.stop) & (target != ignore_index)
        local = np.where(inside, target.astype(np.int64) - own.start, _ELSEWHERE)
        arrays[self.names.index("target")] = local
        return super().call(where, arrays, **options | {"ignore_index": _ELSEWHERE})


@dataclass(frozen=True)
class SumsOfShard(Shard, SumsOf):
    """The sums of a block's losses."""


@dataclass(frozen=True)
class LossesOfShard(Shard, LossesOf):
    """The losses of a block's samples, 0 where the class is in another."""


@dataclass(frozen=True)
class GradientsOfShard(Shard, GradientsOf):
    """The same, and the gradient."""


class ShardedGraph(Graph):
    """A row loss whose classes are in several chunks."""

    @property
    def operands(self) -> list[Any]:
        shards = ArraySliceDep((self.chunks[CLASS],))
        return [shards, (CLASS,), *super().operands]

    def joined(self, states: da.Array, function: Any, dtype: Any = object, like: Any = None) -> da.Array:
        """The states of the shards of each sample combined by `function`, in their order."""
        meta = np.empty((0,) * len(self.axes), object) if like is None else like
        return da.reduction(
            states, chunk=blocks.same, combine=function, aggregate=function, concatenate=False,
            axis=self.full.index(CLASS), dtype=dtype, meta=meta, name=self.name,
        )  # fmt: skip


class NLLGraph(ShardedGraph):
    """nll_loss: the losses of all shards are added up; a sample has one that is not 0."""

    sums_of = SumsOfShard
    losses_of = LossesOfShard
    gradients_of = GradientsOfShard

    @property
    def block(self) -> dict[str, Any]:
        return super().block | {"classes": self.whole.classes}

    def losses(self, states: da.Array | None = None) -> da.Array:
        dtype = numpy_dtype(self.dtype)
        if states is None:
            states = self.by_block(LossesOfShard(**self.block), self.full, *self.operands, dtype=dtype, like=self.like)
        else:
            states = self.layer(blocks.pick, self.full, states, self.full, 0, None, dtype=dtype, like=self.like)
        like = meta_from_array(self.like, len(self.axes), dtype)
        return self.as_cut(self.joined(states, blocks.added, dtype, like))


@dataclass(frozen=True)
class PartialsOf(Block):
    """The state of a shard of cross_entropy: of a block of some of its `classes`."""

    classes: int = 0

    def __call__(self, where: Place, own: tuple[slice], *arrays: Any) -> Partials:
        with one_thread(), placed(where):
            return cross_entropy_partials(**self.arguments(own, arrays))

    def arguments(self, own: tuple[slice], arrays: Sequence[Any]) -> dict[str, Any]:
        """What the functions of `partials` take of a shard."""
        given = dict(zip(("shard", *self.names[1:]), map(blocks.only, arrays), strict=True))
        taken = ("ignore_index", "label_smoothing", "softcap")
        given |= {name: self.options[name] for name in taken if name in self.options}
        return given | {"offset": own[0].start, "num_classes": self.classes}


@dataclass(frozen=True)
class GradientsOfPartials(PartialsOf):
    """The gradients of a shard by `wrt`, once the states of all are merged; a place is left for the value."""

    wrt: tuple[str, ...] = ()
    kept: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    factor: Factor | None = None

    def __call__(self, where: Place, upstream: Any, merged: Partials, own: Any, *arrays: Any) -> tuple[Any, ...]:  # type: ignore[override]
        upstream, z = self.factor or upstream, self.options.get("lse_square_scale", 0.0)
        arguments = self.arguments(own, arrays)
        reduction = "none"
        if isinstance(upstream, Factor):
            reduction, z, upstream = "sum", z * upstream.z, upstream.scale
        found = []
        with one_thread(), placed(where):
            for name in self.wrt:
                if name == "input":
                    found.append(_input_gradient(arguments, merged, reduction, z, upstream))
                else:
                    found.append(self._of_probabilities(name, arguments, merged, upstream))
        return (None, *found)

    def _of_probabilities(self, name: str, given: Mapping[str, Any], merged: Partials, upstream: Any) -> Any:
        """d loss / d q[c] = (1 - e) w[c] (lse - x[c]); d loss / d w[c] is the sum of q[c] (lse - x[c]) over samples."""
        axis = min(1, given["shard"].ndim - 1)
        distance = _wide(given["shard"])
        if cap := given.get("softcap"):
            distance = cap * np.tanh(distance / cap)
        distance = np.expand_dims(merged.lse, axis) - distance
        smoothing = given.get("label_smoothing", 0.0)
        scale = 1.0 if upstream is None else upstream
        scale = np.expand_dims(_wide(scale), axis) if np.ndim(scale) else scale
        weight = given.get("weight")
        if name == "target":
            if weight is not None:
                distance *= _wide(weight).reshape(-1, *[1] * (distance.ndim - 1 - axis))
            grad = distance * (1.0 - smoothing) * scale
            return rounded_as(grad, given["target"].dtype)
        q = _wide(given["target"]) * (1.0 - smoothing) + smoothing / self.classes
        with np.errstate(invalid="ignore"):
            terms = np.where(q == 0, 0.0, q * distance) * scale
        others = tuple(k for k, keep in enumerate(self.kept["weight"]) if not keep) if "weight" in self.kept else ()
        return terms.sum(axis=others, keepdims=True)


def _input_gradient(given: Mapping[str, Any], merged: Partials, reduction: str, z: float, upstream: Any) -> Any:
    """The gradient of a shard's logits; `z` is negative where the sum of weights is."""
    weight, scale = given.get("weight"), upstream
    if z < 0:
        weight, scale, merged = -_wide(weight), -scale, replace(merged, mass=-merged.mass)
    more = {"weight": weight, "lse_square_scale": abs(z), "reduction": reduction, "grad_output": scale}
    return cross_entropy_partials_grad(**{**given, "merged": merged, **more})


def _wide(array: Any) -> Any:
    return np.asarray(array).astype(np.float64)


@dataclass(frozen=True)
class Joined:
    """The losses of samples out of the merged states of their shards, or the sums of these losses."""

    reduction: str
    lse_square_scale: float
    dtype: str

    def __call__(self, where: Place, merged: Partials) -> Any:
        with placed(where):
            if self.reduction == "none":
                return merged.finish("none", self.lse_square_scale, self.dtype)
            return merged.sums(self.lse_square_scale)


def _merged(states: Any, axis: Any = None, keepdims: bool = True) -> Partials:
    """The states of shards in nested lists merged, in their order."""
    found, *others = blocks.flat(states)
    for other in others:
        found = found.merge(other)
    return found


class SoftmaxGraph(ShardedGraph):
    """cross_entropy: the states of the shards of each sample are merged."""

    @cached_property
    def merged(self) -> da.Array:
        """The states of the whole classes."""
        states = self.by_block(PartialsOf(**self.block, classes=self.whole.classes), self.full, *self.operands)
        return self.joined(states, _merged)

    def _joined(self, **made: Any) -> da.Array:
        whole = self.whole
        return self.by_block(
            Joined(whole.reduction, whole.lse_square_scale, self.dtype), self.axes, self.merged, self.axes, **made
        )

    def losses(self, states: da.Array | None = None) -> da.Array:
        return self.as_cut(self._joined(dtype=numpy_dtype(self.dtype), like=self.like))

    def sums(self, states: da.Array | None = None) -> da.Array:
        return self._joined()

    def gradients(self, wanted: Iterable[str], upstream: tuple[Any, Axes | None]) -> da.Array:
        function, lazily = self.gradient_block(GradientsOfPartials, wanted, upstream, classes=self.whole.classes)
        return self.by_block(function, self.full, *lazily, self.merged, self.axes, *self.operands)
