"""Meter: a loss over a stream of batches, exact whatever their sizes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from . import losses
from .reductions import Sums

_SHORT = {"l1": "l1_loss", "mse": "mse_loss", "nll": "nll_loss", "smooth_l1": "smooth_l1_loss", "huber": "huber_loss",
          "bce": "binary_cross_entropy", "bce_with_logits": "binary_cross_entropy_with_logits"}  # fmt: skip


class Meter:
    """The reduced loss over everything seen so far: sums of losses and weights, never a mean of means.

    Args:
        loss: name of a function of fastloss, "cross_entropy" or "cross-entropy", "mse_loss" or "mse", ...
        options: that function's own; reduction is 'mean' (default), 'sum', or 'batchmean' for kl_div.

    The sums carry their rounding errors along, so batches of any size and order of merging give the value of one call
    on everything, to 1 ulp of float64. Meters pickle; a failed update changes nothing.

    Raises:
        ValueError: unknown loss, reduction 'none'. TypeError: options that the loss does not have.

    >>> import numpy as np, fastloss
    >>> meter = fastloss.Meter("mse")
    >>> meter.update(np.array([1.0, 2.0]), np.zeros(2))
    >>> meter.update(np.array([3.0]), np.zeros(1))
    >>> round(meter.compute(), 6)
    4.666667
    """

    def __init__(self, loss: str, **options: Any) -> None:
        name = loss.replace("-", "_")
        self.loss = _SHORT.get(name, name)
        function = getattr(losses, self.loss, None)
        if not isinstance(function, losses.Loss):
            known = sorted(name for name, value in vars(losses).items() if isinstance(value, losses.Loss))
            raise ValueError(f"loss is {loss!r}, expected one of {', '.join(known)}")
        if options.get("reduction") == "none" or "out" in options:
            raise ValueError("a Meter reduces: reduction is 'mean', 'sum' or 'batchmean', and there is no out")
        self._call = function.call
        # an unknown option, or one out of its range, must fail here and not at the first batch
        self.reduction = self._call(np.zeros(1), np.zeros(1), **options).reduction
        self.options = options
        self.reset()

    def reset(self) -> None:
        """Forget everything seen."""
        self._sums = Sums()
        self._weighted_mean = True

    def update(self, input: Any, target: Any, *, per_sample: np.ndarray | None = None, **operands: Any) -> None:
        """Add a batch. `operands` are arrays that belong to it (weight=, pos_weight=); the losses of its samples go
        into `per_sample`, a float32 or float64 array of the shape that reduction='none' gives, where it is given."""
        call = self._call(input, target, **(self.options | operands))
        batch = call.accumulate(per_sample)
        if self._sums.samples and batch.samples and call.weighted_mean != self._weighted_mean:
            raise ValueError("a batch with weights cannot be added to batches without, nor the other way round")
        if batch.samples:
            self._weighted_mean = call.weighted_mean
        self._sums += batch

    def merge(self, other: Meter) -> None:
        """Add all that another Meter of the same loss and options has seen."""
        if (self.loss, self.reduction) != (other.loss, other.reduction) or not _equal(self.options, other.options):
            raise ValueError(f"cannot merge a Meter of {other} into one of {self}")
        if not self._sums.samples:
            self._weighted_mean = other._weighted_mean
        self._sums += copy.deepcopy(other._sums)

    def compute(self) -> float:
        """The reduced loss so far; a mean over nothing is NaN."""
        return self._sums.value(self.reduction, self._weighted_mean)

    @property
    def samples(self) -> int:
        """Rows (cross_entropy, nll_loss) or elements seen, ignored ones included."""
        return self._sums.samples

    @property
    def ignored(self) -> int:
        """Samples that ignore_index left out."""
        return self._sums.samples - self._sums.count

    @property
    def weight_sum(self) -> float:
        """Sum of the weights of the samples that count; their number where there are no weights."""
        return float(self._sums.weight)

    @property
    def loss_sum(self) -> float:
        """Sum of the weighted losses, as reduction='sum' gives it."""
        return self._sums.value("sum", self._weighted_mean)

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"Meter({self.loss!r}{options})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_call"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._call = getattr(losses, self.loss).call


def _equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
