"""Negative log-likelihood on a GPU, and the sum of weights that means of all losses over class indices divide by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..exact import two_sum
from ..vecmath import where
from .device import Int, Lanes, cuda, emitted, full, integer, when
from .memory import load, store
from .softmax import INVALID, LIVE, SoftmaxKernel
from .sums import Reduction, closing, no_sums


@dataclass(frozen=True, kw_only=True)
class NLLKernel(SoftmaxKernel):
    """`value`: -weight[t] * x[t] of a sample for each thread. `weights`: weight[t] alone, reading no logit.
    `gradient`: -weight[t] * scale at the target and 0 elsewhere, for every class of every sample."""

    phase: str = "value"
    group: int = 1  # `gradient`: threads that write a sample's classes; more than 1 where these lie side by side

    def build(self) -> Any:
        """The kernel of this phase."""
        return self._gradient() if self.phase == "gradient" else self._value()

    def own_weight(self, a: Any, t: Int) -> Any:
        """The weight of a target."""
        weight = self.weight_of(a, t)
        return full(a[0], self.compute, 1.0) if weight is None else weight

    def _value(self) -> Any:
        k = self
        close = closing(k.reduction or Reduction(k.compute, "sums"), k.threads)

        @emitted
        def start(a: Any) -> Any:
            return no_sums(a[0], k.compute)

        @emitted
        def add(a: Any, i: Int, sums: Any, counts: Any) -> Any:
            """The sums with sample i, whose loss is written."""
            p = k.places(a, i)
            t, kind = k.label(a, p)
            zero, nan = full(a[0], k.compute, 0.0), full(a[0], k.compute, float("nan"))

            def live() -> list[Any]:
                weight = k.own_weight(a, t)
                if k.phase == "weights":
                    return [zero, weight]
                x = load(k.place(p, "logits") + t * a[k.at["logits_step"]], k.logits, k.compute)
                return [-(weight * x), weight]

            loss, weight = when(kind == LIVE, live, lambda: [where(kind == INVALID, nan, zero), zero])
            k.write_loss(p, loss)
            parts = [*two_sum(sums[:2], loss), *two_sum(sums[2:4], weight), *sums[4:]]
            one, none = integer(a[0], 1), integer(a[0], 0)
            count = counts[0] + where(kind == LIVE, one, none)
            return Lanes(parts), (count, counts[1] + where(kind == INVALID, one, none))

        reduced, threads, samples = k.reduction is not None, k.threads, k.at["samples"]

        def value(a):  # type: ignore[no-untyped-def]
            sums, counts = start(a)
            i = cuda.blockIdx.x * threads + cuda.threadIdx.x
            while i < a[samples]:
                sums, counts = add(a, i, sums, counts)
                i += cuda.gridDim.x * threads
            if reduced:
                close(a, sums, counts)

        return value

    def _gradient(self) -> Any:
        k = self
        storage = k.grad or k.logits

        @emitted
        def begin(a: Any, i: Int) -> Any:
            """Where the sample's gradients go, its class index, that class's gradient, and all others'."""
            p = k.places(a, i)
            t, kind = k.label(a, p)
            zero, nan = full(a[0], k.compute, 0.0), full(a[0], k.compute, float("nan"))
            slope = -(k.own_weight(a, t) * k.upstream_scales(p, k.scales(a)).loss)
            nothing = where(kind == INVALID, nan, zero)
            return k.place(p, "grad"), t, Lanes([where(kind == LIVE, slope, nothing), nothing])

        @emitted
        def put(a: Any, place: Int, c: Int, t: Int, slopes: Any) -> None:
            store(place + c * a[k.at["grad_step"]], where(c == t, slopes[0], slopes[1]), storage)

        group, per_block = k.group, k.threads // k.group
        samples, classes = k.at["samples"], k.at["classes"]

        def gradient(a):  # type: ignore[no-untyped-def]
            i = cuda.blockIdx.x * per_block + cuda.threadIdx.x // group
            while i < a[samples]:
                place, t, slopes = begin(a, i)
                c = cuda.threadIdx.x % group
                while c < a[classes]:
                    put(a, place, c, t, slopes)
                    c += group
                i += cuda.gridDim.x * per_block

        return gradient
