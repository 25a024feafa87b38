"""What a task of a Dask graph does: one loss on one block of each of its arrays."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .. import checks, dispatch, losses, runtime
from ..arrays import View
from ..arrays.numpy import wrap
from ..call import Call, Result
from ..reductions import Sums, rounded, to_memory
from .layout import as_floats

Place = tuple[slice, ...]  # which part of the losses a block is


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Kernels within keep to the thread of their task, which a scheduler runs beside others.

    Of the synchronous scheduler too, which has nothing beside it: on 2 cores and blocks of 4 MB Numba's threads made
    it no faster (0.055 and 0.058 s for 256 MB), and the threaded scheduler is there.
    """
    before = runtime.get_num_threads()
    runtime.set_num_threads(1)
    try:
        yield
    finally:
        runtime.set_num_threads(before)


@contextlib.contextmanager
def placed(where: Place) -> Iterator[None]:
    """Errors about an element name its position in the whole array."""
    try:
        yield
    except (checks.ClassIndexError, checks.DomainError) as error:
        position = [k + part.start for k, part in zip(error.position, where, strict=True)]
        raise checks.positioned(type(error), error.template, position) from None


class Factor(NamedTuple):
    """What the gradients of every block are multiplied by."""

    scale: float
    z: float = 1.0  # and that of the z-loss on top: it is divided by the count where the others are by their weights


@dataclass(frozen=True)
class Block:
    """A loss with its options, to be called on blocks of the arrays `names`."""

    loss: losses.Loss[Any]
    names: tuple[str, ...]
    options: Mapping[str, Any]
    spread: bool  # whether blocks are broadcast against each other

    def __getstate__(self) -> dict[str, Any]:
        """A loss of the caller's own has no name to be found by in another process: its formulas travel."""
        state = dict(vars(self))
        if getattr(losses, self.loss.call.__name__, None) is not self.loss:
            state["loss"] = self.loss.call
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        loss = state["loss"]
        vars(self).update(state, loss=loss if isinstance(loss, losses.Loss) else losses.Loss(loss))

    def call(self, where: Place, arrays: Sequence[Any], **options: Any) -> Call:
        """The call on these blocks, with `options` in place of the loss's own."""
        arrays = [only(block) for block in arrays]
        if self.spread:
            shape = tuple(part.stop - part.start for part in where)
            arrays = [array if array.shape == shape else np.broadcast_to(array, shape) for array in arrays]
        return self.loss.call(**dict(zip(self.names, arrays, strict=True)) | dict(self.options) | options)


@dataclass(frozen=True)
class SumsOf(Block):
    """The sums of a block's losses."""

    def __call__(self, where: Place, *blocks: Any) -> Sums:
        with one_thread(), placed(where):
            return self.call(where, blocks).accumulate(None)


@dataclass(frozen=True)
class LossesOf(Block):
    """The losses of a block's samples."""

    def __call__(self, where: Place, *blocks: Any) -> Any:
        with one_thread(), placed(where):
            return self.call(where, blocks).evaluate()


@dataclass(frozen=True)
class TotalsOf(Block):
    """(sum of weights, count) of a block's samples that are not ignored, by their class indices alone."""

    classes: int = 0

    def __call__(self, where: Place, target: Any, *weights: Any) -> Any:
        weight = np.concatenate([on_host(part) for part in flat(weights[0])]) if weights else None
        with placed(where):
            return np.array(checked_totals(self, where, target, self.classes, weight))


def checked_totals(loss: Block, where: Place, target: Any, classes: int, weight: Any = None) -> tuple[float, int]:
    """The sum of weights and the number of the samples that count; IndexError where an index is none of the classes."""
    shape = tuple(part.stop - part.start for part in where)
    unread = np.broadcast_to(np.float32(), (*shape[:1], classes, *shape[1:]))  # only its shape matters
    options = {name: value for name, value in loss.options.items() if name == "ignore_index"}
    call: Any = losses.nll_loss.call(unread, on_host(target), weight, **options)
    call.prepare(differentiable=False)
    total, count = call.check_indices()
    return float(total), int(count)


def weight_total(weight: Any) -> Any:
    """(sum of weights, count) of a block of element weights."""
    view = dispatch.view(on_host(weight), "weight")
    return np.array([as_floats(view).sum(dtype=np.float64), weight.size])


@dataclass(frozen=True)
class GradientsOf(Block):
    """The sums of a block's losses, or its losses, and its gradients by `wrt`."""

    wrt: tuple[str, ...] = ()
    # of an argument that is not as large as a block: its axes among the block's, over the others its gradient is summed
    kept: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    factor: Factor | None = None  # where it is known without the graph

    def __call__(self, where: Place, upstream: Any, *blocks: Any) -> tuple[Any, ...]:
        upstream = self.factor or upstream
        with one_thread(), placed(where):
            call = self.call(where, blocks)
            if not isinstance(upstream, Factor):
                return self._found(call, upstream)
            if upstream.z == 1 or not self.options.get("lse_square_scale"):
                return self._found(call, upstream.scale)
            scaled: Any = self.call(where, blocks)
            scaled.lse_square_scale *= abs(upstream.z)
            if upstream.z < 0:  # the sum of weights is
                scaled.weight = -scaled.weight
            _, *grads = self._found(scaled, math.copysign(1.0, upstream.z) * upstream.scale)
            return (call.accumulate(None), *grads)

    def _found(self, call: Call, upstream: Any) -> tuple[Any, ...]:
        call.prepare(differentiable=True)
        return (self._on_cpu if call.gpu_run() is None else self._on_gpu)(call, upstream)

    def _on_cpu(self, call: Call, upstream: Any) -> tuple[Any, ...]:
        none = call.reduction == "none"
        memory = {name: self._memory(call, name) for name in self.wrt}
        if none and upstream is not None:
            upstream = as_floats(dispatch.view(upstream, "grad_output")).astype(np.float64, copy=False)
        result = call.result() if none else None
        sums = call.run_gradients(View(result.data, result.dtype) if result else None, memory, upstream)
        grads = [self._summed(name, grad.data) if name in self.kept else grad.finish() for name, grad in memory.items()]
        return (result.finish() if result else sums, *grads)

    def _memory(self, call: Call, name: str) -> Result:
        if name not in self.kept:
            return call.gradient(name, None)
        view, like, _ = call.gradient_of(name)
        return Result(np.empty(view.shape), "float64", None, like)

    def _on_gpu(self, call: Call, upstream: Any) -> tuple[Any, ...]:
        run: Any = call.gpu_run()
        value, grads = run.value_and_grad(self.wrt, upstream, [None] * len(self.wrt))
        grads = [
            self._summed(name, grad) if name in self.kept else grad for name, grad in zip(self.wrt, grads, strict=True)
        ]
        if call.reduction != "none":
            run = call.gpu_run()
            value = Sums(run.accumulate(None), call.samples, call.rows)
        return (value, *grads)

    def _summed(self, name: str, grad: Any) -> Any:
        """A float64 gradient with all axes of a block, those with an extent of 1 that are summed over."""
        kept = self.kept[name]
        if grad.ndim < len(kept):  # it had only those that are kept
            extents = iter(grad.shape)
            return grad.reshape([next(extents) if keep else 1 for keep in kept])
        return grad.sum(axis=tuple(axis for axis, keep in enumerate(kept) if not keep), dtype=np.float64, keepdims=True)


@dataclass(frozen=True)
class Finish:
    """Sums of blocks as the reduced loss."""

    reduction: str
    weighted_mean: bool
    rows: int
    dtype: str
    like: Any  # an empty array of the library that the result belongs to

    def __call__(self, states: Any, axis: Any = None, keepdims: bool = False) -> Any:
        sums = merged(states)
        sums.rows = self.rows
        return self.number(rounded(sums.value(self.reduction, self.weighted_mean), self.dtype))

    def number(self, memory: np.ndarray) -> Any:
        """The 0-d memory of a result as an array of its library."""
        found = wrap(memory, self.dtype, None)
        return found if isinstance(self.like, np.ndarray) else np.asarray(found, like=self.like)


def merged(states: Any, axis: Any = None, keepdims: bool = True) -> Sums:
    """The sums of blocks in nested lists added up, in their order."""
    total = Sums()
    for sums in flat(states):
        total += sums
    return total


def rounded_as(array: Any, dtype: Any) -> Any:
    """A float64 array rounded once to `dtype`."""
    if isinstance(array, np.ndarray):
        return np.asarray(wrap(to_memory(array, str(dtype)), str(dtype), None))
    return array.astype(dtype)


def added(arrays: Any, axis: Any = None, keepdims: bool = True) -> Any:
    """Arrays in nested lists added up, in their order."""
    first, *others = flat(arrays)
    for other in others:
        first = first + other
    return first


def same(state: Any, axis: Any = None, keepdims: bool = True) -> Any:
    """The state of a block is a sum of one."""
    return state


def pick(state: Any, number: int) -> Any:
    """One of the arrays that GradientsOf gives."""
    return only(state)[number]


@dataclass(frozen=True)
class Alone:
    """The end of a reduction over no axes: what `aggregate` makes of the one state."""

    aggregate: Any

    def __call__(self, state: Any) -> Any:
        return self.aggregate([state])


@dataclass(frozen=True)
class Folded:
    """float64 arrays in nested lists added up, and rounded once."""

    dtype: str

    def __call__(self, arrays: Any, axis: Any = None, keepdims: bool = True) -> Any:
        return rounded_as(added(arrays), self.dtype)


@dataclass(frozen=True)
class Scale:
    """The factor of gradients out of the divisor of a mean and the gradient of what comes after."""

    by_weight: bool

    def __call__(self, totals: Any, grad_output: Any) -> Factor:
        weight, count = only(totals)
        divisor, upstream = (weight if self.by_weight else count), float(on_host(grad_output))
        scale = upstream * (float(np.divide(1.0, divisor)) if divisor else float("inf"))
        ratio = weight / count if count else 0.0
        return Factor(scale, 0.0 if np.isnan(ratio) else float(ratio))


def flat(states: Any) -> Iterator[Any]:
    """What nested lists hold."""
    if isinstance(states, list):
        for state in states:
            yield from flat(state)
    else:
        yield states


def only(block: Any) -> Any:
    """A block out of the lists that Dask makes of axes that the result has not; they have one block here."""
    while isinstance(block, list):
        (block,) = block
    return block


def on_host(array: Any) -> Any:
    """A small array in the CPU's memory."""
    for copy in ("get", "copy_to_host"):  # CuPy's, Numba's
        if hasattr(array, copy):
            return getattr(array, copy)()
    return array
