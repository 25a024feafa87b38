"""Cross-entropy over classes that are sharded: the state of each sample, how states merge, and a shard's gradient.

A cross-entropy is sum_c m[c] (lse - x[c]): the logarithm of the sum of exponentials, and for each class a mass m that
one-hot targets, class probabilities, class weights and label smoothing decide. Every shard of the classes tells its own
lse, its sum of masses and its loss relative to its own lse; three numbers a sample, of which merging makes the whole's.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import checks, dispatch
from .arrays import View
from .call import Shape, empty_like
from .checks import REDUCTIONS
from .classification import SoftmaxCall
from .kernels.pointwise import SUMS
from .kernels.targets import ELSEWHERE, LEFT_OUT
from .reductions import Sums, rounded, to_memory

Array = Any

IGNORED = -1  # in `Partials.found`


@dataclass(frozen=True, eq=False)
class Partials:
    """What a shard of the classes, or several that were merged, knows of each sample's cross-entropy.

    Plain NumPy arrays of the shape of the losses, whatever the shard's library: they pickle, and any transport moves
    them. `cross_entropy_partials` makes one of each shard, `merge` makes one of two, `finish` the loss of all.

    Attributes:
        lse: float64, log(sum_c exp(x[c])) over the classes seen; -inf where there are none, 0 for ignored samples.
        mass: float64, sum_c m[c].
        loss: float64, sum_c m[c] (lse - x[c]); 0 where lse is -inf.
        weight: float64, the class weight of the target, 0 where its class was not seen.
        found: int32, how many shards have the target's class; -1 for ignored samples.
        by_probability: whether the target holds class probabilities; then weight and found are 0.
        dtype: of the loss.
        like: an array of the library that the loss belongs to.
    """

    lse: np.ndarray
    mass: np.ndarray
    loss: np.ndarray
    weight: np.ndarray
    found: np.ndarray
    by_probability: bool
    dtype: str
    like: Any

    def merge(self, other: Partials) -> Partials:
        """The state of this one's classes and the other's together; in any order, to rounding.

        Raises:
            ValueError: states of other samples, or of another kind of target.
        """
        if self.lse.shape != other.lse.shape:
            raise ValueError(f"cannot merge the states of losses of shapes {self.lse.shape} and {other.lse.shape}")
        if self.by_probability != other.by_probability or ((self.found < 0) != (other.found < 0)).any():
            raise ValueError("cannot merge states that were made of different targets")
        with np.errstate(invalid="ignore"):
            lse = np.where(self.found < 0, 0.0, np.logaddexp(self.lse, other.lse))
        return replace(
            self,
            lse=lse,
            mass=self.mass + other.mass,
            loss=self._relative_to(lse) + other._relative_to(lse),
            weight=self.weight + other.weight,
            found=np.where(self.found < 0, self.found, self.found + other.found),
            dtype=self.dtype if self.dtype == other.dtype else _wider(self.dtype, other.dtype),
        )

    def _relative_to(self, lse: np.ndarray) -> np.ndarray:
        """sum_c m[c] (lse - x[c]) for another lse, of more classes."""
        # Without mass a distance costs nothing, even an infinite one; nor does it between two that are -inf.
        moved = (self.mass != 0) & (lse != self.lse)
        with np.errstate(invalid="ignore"):
            return self.loss + np.where(moved, self.mass * (lse - self.lse), 0.0)

    def finish(self, reduction: str = "mean", lse_square_scale: float = 0.0, dtype: Any = None) -> Array:
        """The loss, once every class was seen: what `cross_entropy` gives for the whole.

        Args:
            reduction: 'none', 'mean' or 'sum'.
            lse_square_scale: z-loss, as in `cross_entropy`.
            dtype: of the result; otherwise that of the shards.

        Returns:
            A scalar, or for 'none' an array, in the shards' library.

        Raises:
            IndexError: a target's class in no shard. ValueError: one in several; reduction, lse_square_scale.
        """
        checks.reduction_of(None, None, reduction, REDUCTIONS)
        name = self.dtype if dtype is None else checks.dtype_name(dtype)
        if reduction == "none":
            losses, squares = self._losses(lse_square_scale)
            data = to_memory(losses + squares, name)
        else:
            data = rounded(self.sums(lse_square_scale).value(reduction, not self.by_probability), name)
        return dispatch.adapter_of(self.like).wrap(np.asarray(data), name, self.like)

    def sums(self, lse_square_scale: float = 0.0) -> Sums:
        """What any reduction is made of, once every class was seen: sums that add up across batches."""
        losses, squares = self._losses(lse_square_scale)
        count = int(np.count_nonzero(self.live))
        weight = (float(count), 0.0) if self.by_probability else _exact_sum(self.weight)
        parts = dict(zip(SUMS, (*_exact_sum(losses), *weight, *_exact_sum(squares), count, 0.0), strict=True))
        return Sums(list(parts.values()), self.lse.size, len(self.lse) if self.lse.ndim else 1)

    @property
    def live(self) -> np.ndarray:
        """Which samples are not ignored."""
        return np.asarray(self.found != IGNORED)

    def _losses(self, lse_square_scale: float) -> tuple[np.ndarray, np.ndarray]:
        """Each sample's loss and z-loss."""
        self.check()
        scale = checks.option("lse_square_scale", lse_square_scale, 0)
        squares = scale * self.lse * self.lse if scale else np.zeros_like(self.lse)
        return np.where(self.lse == -np.inf, np.nan, self.loss), squares

    def check(self) -> None:
        """IndexError where a target's class is in no shard, ValueError where it is in several."""
        if self.by_probability:
            return
        for bad, kind, problem in (
            (self.found == 0, checks.ClassIndexError, "none of the shards that were merged has"),
            (self.found > 1, checks.DomainError, "several of the shards that were merged have"),
        ):
            if bad.any():
                template = f"{problem} the class that target holds at position {{position}}"
                raise checks.positioned(kind, template, [int(k) for k in np.argwhere(bad)[0]])


class _ShardCall(SoftmaxCall):
    """Cross-entropy of a shard of the classes."""

    _may_be_empty = True

    def __init__(self, shard: Any, target: Any, offset: int, num_classes: int | None, **options: Any) -> None:
        super().__init__(shard, target, "none", **options, lse_square_scale=0.0, dtype=None, out=None, check=None)
        self.offset = checks.int64("offset", operator.index(offset))
        self.whole = None if num_classes is None else operator.index(num_classes)
        if self.offset < 0:
            raise ValueError(f"offset is {offset}, expected the number of classes before the shard's first")
        if self.whole is None and self.label_smoothing > 0:
            raise ValueError("label_smoothing needs num_classes, of all shards together, which share it")

    @property
    def num_classes(self) -> int:
        return self.classes if self.whole is None else self.whole

    def prepare(self, differentiable: bool) -> None:
        super().prepare(differentiable)
        if dispatch.one_device(self.named_sources) is not None:
            raise TypeError("partials of cross-entropy run on the CPU only so far: copy the shard there")
        stop = self.offset + self.classes
        if self.whole is not None and self.whole < stop:
            raise ValueError(f"num_classes is {self.whole}, but the shard has classes {self.offset} to {stop - 1}")
        if self.by_probability:
            return
        given = super().index
        self.ignored = given == self.ignore_index
        index = self.column("int64", given.shape)
        index[...] = given  # an unsigned one that int64 does not hold becomes negative, and is out of range as well
        bad = index < 0 if self.whole is None else (index < 0) | (index >= self.whole)
        bad &= ~self.ignored
        if bad.any():
            first = int(bad.argmax())
            raise self._index_error(first, given[np.unravel_index(first, given.shape)])
        index -= self.offset
        self.mine = (index >= 0) & (index < self.classes) & ~self.ignored
        index[~self.mine] = ELSEWHERE
        index[self.ignored] = LEFT_OUT
        self.local, self.ignore_index = index, LEFT_OUT

    @property
    def index(self) -> np.ndarray:
        """Each target's class as the shard counts them."""
        return self.local

    def column(self, dtype: str, shape: Shape) -> np.ndarray:
        """Memory for a number of each sample, in the order of the shard's own."""
        return empty_like(self.logits[:, 0], shape, dtype) if self.classes else np.empty(shape, dtype)

    def _index_error(self, flat: int, value: Any) -> Exception:
        place = np.unravel_index(flat, self.t.shape)
        position = [int(k) for k in place]
        classes = "classes" if self.whole is None else f"{self.whole} classes"
        template = f"target {int(value)} at position {{position}} is out of range for {classes}"
        return checks.positioned(checks.ClassIndexError, template, position)

    def state(self) -> Partials:
        """The shard's state."""
        self.prepare(differentiable=False)
        lse, mass, loss = (self.column("float64", self.losses_shape) for _ in range(3))
        if self.classes:
            self._launch(View(loss, "float64"), {}, shard=(None, None, lse, mass))
        else:
            lse[...], mass[...], loss[...] = -np.inf, 0.0, 0.0
        found, weight = np.zeros(self.losses_shape, np.int32), np.zeros(self.losses_shape)
        if not self.by_probability:
            weights = self.class_weights("float64")
            mine = self.mine.reshape(self.losses_shape)
            found[mine], found[self.ignored.reshape(self.losses_shape)] = 1, IGNORED
            weight[mine] = 1.0 if weights is None else weights[self.local[self.mine]]
            if not self.classes:
                lse[self.ignored.reshape(self.losses_shape)] = 0.0
        like = dispatch.adapter_of(self.like).wrap(np.zeros(0), "float64", self.like)
        return Partials(lse, mass, loss, weight, found, self.by_probability, self.result_dtype, like)

    def gradient_of_shard(
        self, merged: Partials, reduction: str, lse_square_scale: float, grad_output: Any, grad_out: Any
    ) -> Array:
        """The shard's part of the whole's gradient."""
        self.prepare(differentiable=True)
        self.reduction = checks.reduction_of(None, None, reduction, REDUCTIONS)
        z_loss = checks.option("lse_square_scale", lse_square_scale, 0)
        if merged.lse.shape != self.losses_shape or merged.by_probability != self.by_probability:
            raise ValueError(
                f"merged is the state of losses of shape {merged.lse.shape}, expected {self.losses_shape} and the "
                "same kind of target"
            )
        merged.check()
        upstream = self._upstream(grad_output)
        grad = self.gradient("input", grad_out)
        none = reduction == "none"
        factor = (1.0 if upstream is None else upstream) if none else upstream
        live = merged.live
        count = live.size if self.by_probability else int(np.count_nonzero(live))
        total = 0.0 if self.by_probability else _exact_sum(merged.weight)[0]
        self.weighted_mean = not self.by_probability
        scale = factor if none else factor * self.scale(total, count, self.rows)
        pull = self.column("float64", self.losses_shape)
        with np.errstate(invalid="ignore"):
            np.multiply(merged.mass, scale, out=pull)
            if z_loss:
                scale_z = factor / count if reduction == "mean" and count else factor
                pull += merged.lse * (2.0 * z_loss * scale_z)
        if self.classes:
            per_sample = np.array(np.broadcast_to(scale, self.losses_shape)) if none else None
            number = 1.0 if none else scale
            sinks = {"input": View(grad.data, grad.dtype)}
            self._launch(None, sinks, number, 1.0, per_sample, shard=(pull, merged.lse, None, None))
        return grad.finish()


def _wider(a: str, b: str) -> str:
    """The dtype that two floating dtypes are promoted to."""
    return "float64" if "float64" in (a, b) else "float32"


def _exact_sum(numbers: np.ndarray) -> tuple[float, float]:
    """The sum of float64 numbers, and the rounding error that it has lost."""
    high = numbers.reshape(-1)
    low = np.zeros_like(high)
    with np.errstate(invalid="ignore"):
        while high.size > 1:
            if high.size % 2:
                high, low = np.append(high, 0.0), np.append(low, 0.0)
            (a, b), (c, d) = high.reshape(2, -1), low.reshape(2, -1)
            high = a + b
            back = high - a
            low = (a - (high - back)) + (b - back) + c + d
    return (float(high[0]), float(low[0])) if high.size else (0.0, 0.0)


def cross_entropy_partials(
    shard: Array,
    target: Array,
    *,
    offset: int = 0,
    num_classes: int | None = None,
    weight: Array = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
) -> Partials:
    """The state of each sample's cross-entropy over one shard of the classes, in one pass over the shard.

    A cross-entropy is sum_c m[c] (lse - x[c]) where lse = log(sum_c exp(x[c])), and the mass m[c] is, e being
    label_smoothing, ((1 - e) * q[c] + e / num_classes) * weight[c] for class probabilities q, or the one-hot vector of
    a class index. `Partials` holds lse, the sum of m[c] and the loss, over the shard's classes only.

    Args:
        shard: logits of shape (C), (N, C) or (N, C, d1, ..., dK) of C classes out of num_classes, read where they lie,
            in the CPU's memory.
        target: class indices of the whole, of any integer dtype and shape (), (N) or (N, d1, ..., dK); or class
            probabilities of the shard's classes and shape.
        offset: which class of the whole is the shard's first.
        num_classes: how many classes the whole has; needed for label_smoothing. Where it is given, an index beyond it
            is found at once, else by `Partials.finish`.
        weight: (C) class weights of the shard's classes.
        ignore_index, label_smoothing, softcap: as in `cross_entropy`.

    Returns:
        The state, to be merged with those of the other shards.

    Raises:
        ValueError: shapes, options. IndexError: a class index below 0, or not below num_classes, that is not
        ignore_index. TypeError: array types and dtypes, arrays on a GPU.

    Source: the online softmax's merge, Milakov and Gimelshein (2018); vocabulary-parallel loss, Shoeybi et al.,
    Megatron-LM (2019).

    >>> import numpy as np, fastloss
    >>> x, target = np.array([[0.8, 0.1, 0.2]]), np.array([0])
    >>> first = fastloss.cross_entropy_partials(x[:, :2], target)
    >>> rest = fastloss.cross_entropy_partials(x[:, 2:], target, offset=2)
    >>> round(float(first.merge(rest).finish()), 4)
    0.7156
    """
    return _shard_call(shard, target, offset, num_classes, weight, ignore_index, label_smoothing, softcap).state()


def cross_entropy_partials_grad(
    shard: Array,
    target: Array,
    merged: Partials,
    *,
    offset: int = 0,
    num_classes: int | None = None,
    weight: Array = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    lse_square_scale: float = 0.0,
    reduction: str = "mean",
    grad_output: Array = None,
    grad_out: Array = None,
) -> Array:
    """The gradient of the whole's cross-entropy by one shard's logits, in one pass over the shard.

    With M the sum of all masses: d loss / d x[c] = (M + 2 lse_square_scale lse) exp(x[c] - lse) - m[c] of a sample,
    times what the reduction and grad_output make of it.

    Args:
        shard, target, offset, num_classes, weight, ignore_index, label_smoothing, softcap: as they were given to
            `cross_entropy_partials`.
        merged: the state of all shards.
        lse_square_scale, reduction: as they are given to `Partials.finish`.
        grad_output: the gradient of what comes after: for reduction 'none' an array of the losses' shape (default:
            ones), otherwise a number (default 1).
        grad_out: array to write the gradient into; it may be the shard itself.

    Returns:
        An array of the shard's shape, dtype and library.

    Raises:
        ValueError: shapes, options; a class in several of the shards that were merged. IndexError: class indices out
        of range, or in none of these shards. TypeError: array types and dtypes, arrays on a GPU.

    Source: `cross_entropy_partials`.

    >>> import numpy as np, fastloss
    >>> x, target = np.array([[0.0, 0.0, 0.0, 0.0]]), np.array([0])
    >>> first = fastloss.cross_entropy_partials(x[:, :2], target)
    >>> merged = first.merge(fastloss.cross_entropy_partials(x[:, 2:], target, offset=2))
    >>> fastloss.cross_entropy_partials_grad(x[:, 2:], target, merged, offset=2).tolist()
    [[0.25, 0.25]]
    """
    call = _shard_call(shard, target, offset, num_classes, weight, ignore_index, label_smoothing, softcap)
    return call.gradient_of_shard(merged, reduction, lse_square_scale, grad_output, grad_out)


def _shard_call(
    shard: Array,
    target: Array,
    offset: int,
    num_classes: int | None,
    weight: Array,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
) -> _ShardCall:
    return _ShardCall(
        shard,
        target,
        offset,
        num_classes,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=checks.option("label_smoothing", label_smoothing, 0, 1),
        softcap=None if softcap is None else checks.option("softcap", softcap, 0, open_low=True),
    )
