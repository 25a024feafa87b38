"""What the cross-entropy kernels share: arguments, a row's mergeable state, its loss and its gradient.

A state is (highest, exponentials) and, where classes have mass beside the target index, (mass, dot): the largest logit
so far, the sum of exp(logit - highest), of the classes' masses, of mass * (logit - highest).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from ..storage import itemsize
from ..vecmath import log, tanh, where
from .build import Kernel
from .device import Int, below, both, divided, each, exp_of_negative, fold, full, integer, larger, number, to_float
from .memory import load, load_int, store
from .sums import FIRST_FIELDS, Reduction, quotient, read_row

CLASSY = ("logits", "probabilities", "grad", "grad_target")  # arrays of shape (N, C, ...)
PER_SAMPLE = ("index", "upstream", "losses")  # of shape (N, ...)
NUMBERS = ("scale", "scale_z", "keep", "share", "lse_square_scale", "softcap")  # floats, passed as their bits

IGNORED, LIVE, INVALID = range(3)  # what a sample is
_INFINITY = float("inf")


class Scales(NamedTuple):
    """By what a sample's gradients are multiplied: those of the loss and of the z-loss."""

    loss: Any
    z: Any


class Outcome(NamedTuple):
    """What a sample's state amounts to."""

    loss: Any
    z: Any
    weight: Any
    base: Any  # what is subtracted from logits before exp
    share: Any  # times exp(logit - base): the softmax's part of the gradient
    pulled: Any  # the target index's part
    lse: Any
    scale: Any


@dataclass(frozen=True, kw_only=True)
class SoftmaxKernel(Kernel):
    """The options that change a kernel. Storages are names of `storage.MEMORY`."""

    compute: str  # "float32" or "float64"
    logits: str
    index: str | None = None  # storage of class indices
    probabilities: str | None = None  # or of class probabilities
    weight: str | None = None  # of class weights
    smoothing: bool = False
    z_loss: bool = False
    softcap: bool = False
    upstream: str | None = None  # of a gradient of each sample's loss
    factor: str | None = None  # of the one number by which gradients of a reduced loss are multiplied
    by_weight: bool = False  # gradients are divided by the sum of weights, of which a row of sums is given
    losses: str | None = None
    grad: str | None = None
    grad_target: str | None = None
    weight_terms: bool = False  # grad_target is what the gradient of the class weights adds up, instead
    reduction: Reduction | None = None
    ndim: int = 1  # dimensions of the samples

    @property
    def key(self) -> tuple[object, ...]:
        """What tells this kernel from every other, for the disk cache."""
        return (type(self).__name__, *(getattr(self, name) for name in self.__dataclass_fields__))

    @property
    def soft(self) -> bool:
        """Whether classes other than the target index have mass."""
        return self.probabilities is not None or self.smoothing

    @cached_property
    def arrays(self) -> tuple[str, ...]:
        """Names of the arrays that there are."""
        return tuple(name for name in CLASSY + PER_SAMPLE if getattr(self, name))

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The kernel's arguments. A `NAME_step` is the distance of classes in bytes; strides are those of samples."""
        names = [*FIRST_FIELDS, "samples", "classes", "ignore_index", "factor", "stats", *NUMBERS]
        names += [*self.arrays] + [f"{name}_step" for name in self.arrays if name in CLASSY]
        names += ["weight", "weight_step"] if self.weight else []
        names += [f"extent{d}" for d in range(self.ndim)]
        names += [f"{name}_stride{d}" for name in self.arrays for d in range(self.ndim)]
        return tuple(names)

    @cached_property
    def at(self) -> dict[str, int]:
        """Positions of the arguments."""
        return {name: k for k, name in enumerate(self.fields)}

    # what follows is computed in a kernel: `a` are its arguments

    def number(self, a: Any, name: str) -> Any:
        """A float among the arguments."""
        return number(a[self.at[name]], self.compute)

    def places(self, a: Any, i: Int) -> tuple[Int, ...]:
        """Where sample i lies in each of `arrays`."""
        places = [a[self.at[name]] for name in self.arrays]
        for d in reversed(range(self.ndim)):
            i, inner = divided(i, a[self.at[f"extent{d}"]], self.long) if d else (i, i)
            places = [
                place + inner * a[self.at[f"{name}_stride{d}"]]
                for place, name in zip(places, self.arrays, strict=True)
            ]
        return tuple(places)

    def place(self, p: Any, name: str) -> Int:
        """Of the places, that in the array `name`."""
        return p[self.arrays.index(name)]

    def label(self, a: Any, p: Any) -> tuple[Int, Int]:
        """A sample's class index, and whether it is live, ignored or invalid; index 0 where it is not live."""
        if self.index is None:
            return integer(a[0], 0), integer(a[0], LIVE)
        t = load_int(self.place(p, "index"), self.index)
        inside, ignored = below(t, a[self.at["classes"]]), t == a[self.at["ignore_index"]]
        if self.index == "uint64":  # what loads as a negative number is none
            ignored = both(ignored, below(t, 2**63 - 1))
        kind = where(ignored, integer(a[0], IGNORED), where(inside, integer(a[0], LIVE), integer(a[0], INVALID)))
        return where(kind == LIVE, t, integer(a[0], 0)), kind

    def capped(self, a: Any, x: Any) -> tuple[Any, Any]:
        """A logit, and tanh(x / softcap) where logits are capped, else 0."""
        if not self.softcap:
            return x, None
        cap = self.number(a, "softcap")
        bent = each(lambda x: tanh(x * (1.0 / cap)), x)
        return each(lambda t: t * cap, bent), bent

    def weight_of(self, a: Any, c: Int) -> Any:
        """The weight of class c; None where there are no weights."""
        if self.weight is None:
            return None
        return load(a[self.at["weight"]] + c * a[self.at["weight_step"]], self.weight, self.compute)

    def mass_of(self, a: Any, probability: Any, weight: Any) -> Any:
        """Of a class, beside what the target index has."""
        mass = self.number(a, "share") if probability is None else probability
        if probability is not None and self.smoothing:
            mass = mass * self.number(a, "keep") + self.number(a, "share")
        return mass if weight is None else mass * weight

    def empty(self, like: Any) -> list[Any]:
        """The state of no classes."""
        zero = full(like, self.compute, 0.0)
        return [full(like, self.compute, -_INFINITY), zero, *([zero, zero] if self.soft else [])]

    def exp(self, x: Any) -> Any:
        """exp of x <= 0, as exact as the logits are."""
        return exp_of_negative(x, exact=self.logits not in ("float16", "bfloat16"))

    @staticmethod
    def base_of(highest: Any) -> Any:
        """What can be subtracted: the largest logit, or 0 where all are -inf."""
        return where(highest == -_INFINITY, 0.0, highest)

    def absorb(self, state: Sequence[Any], logits: Sequence[Any], masses: Sequence[Any] | None) -> list[Any]:
        """The state with more classes."""
        highest, exponentials, *soft = state
        top = larger(highest, fold(larger, logits))
        base = self.base_of(top)
        more = fold(lambda x, y: x + y, [self.exp(z - base) for z in logits])
        out = [top, exponentials * self.exp(highest - base) + more]
        if masses is not None:
            mass, dot = soft
            dot = dot + self._moved(mass, highest, base)
            terms = [where(q == 0.0, 0.0, q * (z - base)) for q, z in zip(masses, logits, strict=True)]
            out += [mass + fold(lambda x, y: x + y, list(masses)), dot + fold(lambda x, y: x + y, terms)]
        return out

    def _moved(self, mass: Any, highest: Any, base: Any) -> Any:
        """What dot changes by where another base is subtracted."""
        return where(mass == 0.0, 0.0, mass * (self.base_of(highest) - base))

    def rescaled(self, state: Sequence[Any], top: Any) -> list[Any]:
        """What adds up when states that saw different logits are merged under the largest of them all."""
        highest, exponentials, *soft = state
        base = self.base_of(top)
        out = [exponentials * self.exp(highest - base)]
        if soft:
            mass, dot = soft
            out += [mass, dot + self._moved(mass, highest, base)]
        return out

    def scales(self, a: Any) -> Scales:
        """What all samples' gradients are multiplied by."""
        scale, scale_z = self.number(a, "scale"), self.number(a, "scale_z")
        if self.factor:
            factor = load(a[self.at["factor"]], self.factor, self.compute)
            scale, scale_z = scale * factor, scale_z * factor
        if self.by_weight:
            row, (count, _) = read_row(a[self.at["stats"]], self.compute)
            one, zero = full(scale, self.compute, 1.0), full(scale, self.compute, 0.0)
            scale = scale * quotient((one, zero), row[2:4])
            scale_z = scale_z / to_float(count, self.compute)
        return Scales(scale, scale_z)

    def finish(self, a: Any, state: Sequence[Any], z: Any, weight: Any, scales: Scales) -> Outcome:
        """A live sample's loss and what its gradient needs; z and weight are those of its target index."""
        highest, exponentials, *soft = state
        base = self.base_of(highest)
        rest = log(exponentials)
        lse = base + rest
        mass, loss = soft[0] if soft else 0.0, soft[0] * rest - soft[1] if soft else 0.0
        pulled = full(base, self.compute, 0.0)
        if self.index is not None:
            own = self.number(a, "keep") * weight
            loss, mass, pulled = own * ((base - z) + rest) + loss, own + mass, own * scales.loss
        pull, z_loss = mass * scales.loss, base * 0.0
        if self.z_loss:
            k = self.number(a, "lse_square_scale")
            z_loss, pull = k * lse * lse, pull + 2.0 * k * scales.z * lse
        return Outcome(loss, z_loss, weight, base, pull / exponentials, pulled, lse, scales.loss)

    def gradient(self, outcome: Outcome, z: Any, bent: Any, mass: Any) -> Any:
        """d loss / d logit of a class that is not the target index."""
        g = self.exp(z - outcome.base) * outcome.share
        g = g if mass is None else g - mass * outcome.scale
        return g if bent is None else g * (1.0 - bent * bent)

    def gradient_of_target(self, a: Any, outcome: Outcome, z: Any, probability: Any, weight: Any) -> Any:
        """d loss / d class probability; for the class weights, this sample's part of d loss / d weight."""
        g = (outcome.lse - z) * outcome.scale
        if self.weight_terms:
            mass = self.mass_of(a, probability, None)
            return where(mass == 0.0, 0.0, mass * g)
        g = g * self.number(a, "keep")
        return g if weight is None else g * weight

    def write_loss(self, p: Any, loss: Any) -> None:
        """A sample's loss, where losses are wanted."""
        if self.losses:
            store(self.place(p, "losses"), loss, self.losses)

    def upstream_scales(self, p: Any, scales: Scales) -> Scales:
        """With the gradient of this sample's loss."""
        if self.upstream is None:
            return scales
        up = load(self.place(p, "upstream"), self.upstream, self.compute)
        return Scales(scales.loss * up, scales.z * up)

    def size(self, name: str) -> int:
        """Bytes of an element of the array `name`."""
        return itemsize(getattr(self, name))
