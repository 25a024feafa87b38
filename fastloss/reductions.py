"""A reduction as data: sums that add up exactly across chunks, batches and machines, and what is made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .kernels.pointwise import SUMS

_LOSS, _WEIGHT, _Z, _COUNT = (SUMS.index(name) for name in ("loss", "weight", "z", "count"))


@dataclass
class Exact:
    """A float64 sum and the rounding error that it has lost."""

    high: float = 0.0
    low: float = 0.0

    def __iadd__(self, other: Exact) -> Exact:
        total = self.high + other.high
        back = total - self.high
        self.low += (self.high - (total - back)) + (other.high - back) + other.low
        self.high = total
        return self

    def __float__(self) -> float:
        # infinities and NaN are right in the high part and leave nonsense in the low one
        return self.high + self.low if math.isfinite(self.high) and math.isfinite(self.low) else self.high

    def over(self, divisor: float) -> float:
        """The quotient, of which only the result is rounded: a sum rounded first may leave it 2 ulp off. Division by 0
        is IEEE 754's."""
        if divisor == 0:
            return math.copysign(math.inf, self.high) if self.high and not math.isnan(self.high) else math.nan
        quotient = self.high / divisor
        if not (math.isfinite(self.low) and 1e-150 < abs(quotient) < 1e150):  # or the halves below leave the range
            return float(self) / divisor
        a, b = _halves(quotient), _halves(divisor)
        product = quotient * divisor
        error = ((a[0] * b[0] - product) + a[0] * b[1] + a[1] * b[0]) + a[1] * b[1]  # Dekker's exact product
        return quotient + ((self.high - product) - error + self.low) / divisor


def _halves(x: float) -> tuple[float, float]:
    """x as two numbers of 26 bits (Veltkamp)."""
    scaled = x * 134217729.0
    upper = scaled - (scaled - x)
    return upper, x - upper


class Sums:
    """What any reduction of a loss is made of: sums of losses, of weights, and counts."""

    __slots__ = ("count", "loss", "rows", "samples", "weight", "z")

    def __init__(self, raw: Any = None, samples: int = 0, rows: int = 0) -> None:
        raw = raw if raw is not None else np.zeros(len(SUMS))
        self.loss = Exact(float(raw[_LOSS]), float(raw[_LOSS + 1]))
        self.weight = Exact(float(raw[_WEIGHT]), float(raw[_WEIGHT + 1]))
        self.z = Exact(float(raw[_Z]), float(raw[_Z + 1]))  # z-loss: divided by the count even where weights are given
        self.count = int(raw[_COUNT])  # samples that are not ignored
        self.samples = samples
        self.rows = rows  # extent of the first dimension, for "batchmean"

    def __iadd__(self, other: Sums) -> Sums:
        self.loss += other.loss
        self.weight += other.weight
        self.z += other.z
        self.count += other.count
        self.samples += other.samples
        self.rows += other.rows
        return self

    def value(self, reduction: str, weighted_mean: bool) -> float:
        """The reduced loss; a mean over nothing is NaN."""
        if reduction == "sum":
            return float(_sum(self.loss, self.z))
        if reduction == "batchmean":
            return self.loss.over(self.rows)
        loss = self.loss.over(float(self.weight) if weighted_mean else self.count)
        return loss if not self.z.high else loss + self.z.over(self.count)


def _sum(a: Exact, b: Exact) -> Exact:
    total = Exact(a.high, a.low)
    total += b
    return total


def rounded(value: float, dtype: str) -> np.ndarray:
    """A float64 rounded once, to nearest even, as a 0-d array of the memory of `dtype`.

    >>> rounded(1.00390625, "bfloat16").item() == 0x3F80  # halfway: to even
    True
    """
    if dtype == "float64" or (dtype == "float32" and abs(value) < 3e38):
        return np.array(value, dtype)
    return to_memory(np.array(value, np.float64), dtype)


def to_memory(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """float64 numbers rounded once, to nearest even, as the memory of `dtype` (bfloat16 is held as uint16)."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "bfloat16":
            return numbers.astype(dtype)
        # bfloat16 has 8 significant bits, down to 2**-133; by way of float32 it would be rounded twice
        step = np.ldexp(1.0, np.maximum(np.frexp(numbers)[1] - 8, -133))
        exact = np.where(np.isfinite(numbers), np.rint(numbers / step) * step, numbers)
        return np.asarray(exact.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
