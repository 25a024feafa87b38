"""Cross-entropy with a thread for each sample, or for some neighbours: short rows, and classes that lie apart.

Classes that lie apart (images, transposed arrays) are read where they are, neighbouring samples by neighbouring
threads. Short rows that lie side by side pass through shared memory, a tile of them at a time, so that memory is read
and written 16 bytes at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..exact import two_sum
from ..storage import itemsize
from ..vecmath import where
from .device import (
    Int,
    Lanes,
    barrier,
    cuda,
    each,
    emitted,
    fold,
    full,
    integer,
    lanes_of,
    loop,
    shared,
    short,
    smaller,
)
from .memory import VECTOR_BYTES, load, load_lanes, store, store_lanes
from .softmax import INVALID, LIVE, Outcome, Scales, SoftmaxKernel
from .sums import Reduction, closing, no_sums

UNROLL = 4  # classes read together
_SKEW = 5  # a word of shared memory is left out after every 32: rows of 2**k classes then differ in their banks


@dataclass(frozen=True, kw_only=True)
class SamplesKernel(SoftmaxKernel):
    """A sample, or `lanes` neighbours, for each thread."""

    lanes: int = 1
    tile: int = 0  # classes, at most, of the rows that pass through shared memory; 0: none do

    @property
    def wanted_threads(self) -> int:
        """Fewer than others: a thread's samples have states of their own."""
        return 384

    def skewed(self, n: Int) -> Int:
        """The place in shared memory of a tile's element n, in bytes."""
        n = short(n)
        return (n + (n >> _SKEW)) * itemsize(self.compute)

    def element(self, a: Any, row: Int, c: Int) -> Int:
        """The place in a tile of a row's class."""
        return self.skewed(short(row) * short(a[self.at["classes"]]) + short(c))

    def tile_address(self, like: Any) -> Int:
        elements = self.threads * self.tile
        return shared(like, "fastloss_tile", (elements + (elements >> _SKEW) + 1) * itemsize(self.compute))

    def logits_of(self, a: Any, p: Any, row: Int, c: Int) -> Any:
        """The logits of class c, a lane for each sample; `row` is the sample's in its tile."""
        if self.tile:
            place = self.tile_address(c) + self.element(a, row, c)
            return load_lanes(place, self.compute, self.compute, 1)
        place = self.place(p, "logits") + c * a[self.at["logits_step"]]
        return load_lanes(place, self.logits, self.compute, self.lanes)

    def masses(self, a: Any, p: Any, c: Int) -> Any:
        """The masses of class c; None where classes have none."""
        weight = self.weight_of(a, c)
        if self.probabilities is None:
            return lanes_of([self.mass_of(a, None, weight)] * self.lanes) if self.smoothing else None
        return each(lambda q: self.mass_of(a, q, weight), self.read_probabilities(a, p, c))

    def read_probabilities(self, a: Any, p: Any, c: Int) -> Any:
        place = self.place(p, "probabilities") + c * a[self.at["probabilities_step"]]
        return load_lanes(place, self.probabilities or "", self.compute, self.lanes)

    def own(self, a: Any, p: Any, row: Int, t: Any) -> tuple[Any, Any]:
        """Of each sample, its target's logit and weight."""
        logits, weights = [], []
        for n in range(self.lanes):
            if self.tile:
                logits += list(self.logits_of(a, p, row, t[n]))
            else:
                place = self.place(p, "logits") + n * self.size("logits") + t[n] * a[self.at["logits_step"]]
                logits.append(load(place, self.logits, self.compute))
            weight = self.weight_of(a, t[n])
            weights.append(full(a[0], self.compute, 1.0) if weight is None else weight)
        return self.capped(a, lanes_of(logits))[0], lanes_of(weights)

    def of_neighbour(self, a: Any, p: Any, name: str, n: int) -> Any:
        """The places of the n-th of the thread's samples, right in the array `name`."""
        places = list(p)
        places[self.arrays.index(name)] = self.place(p, name) + n * a[self.at[f"{name}_stride{self.ndim - 1}"]]
        return tuple(places)

    def build(self) -> Any:
        """The kernel."""
        k = self
        wanted = [name for name in ("grad", "grad_target") if getattr(k, name)]

        @emitted
        def start(a: Any) -> Any:
            return *no_sums(a[0], k.compute), Lanes(k.scales(a))

        @emitted
        def begin(a: Any, i: Int) -> Any:
            """Places, class indices and kinds of the thread's samples."""
            p = k.places(a, i * k.lanes)
            labels = [k.label(a, k.of_neighbour(a, p, "index", n) if k.index else p) for n in range(k.lanes)]
            return p, tuple(t for t, _ in labels), tuple(kind for _, kind in labels)

        @emitted
        def empty(a: Any) -> Any:
            return tuple(lanes_of([x] * k.lanes) for x in k.empty(a[0]))

        def absorb(classes: int) -> Any:
            @emitted
            def take(a: Any, p: Any, row: Int, c: Int, state: Any) -> Any:
                """The states with `classes` classes from c on."""
                found = [k.capped(a, k.logits_of(a, p, row, c + n))[0] for n in range(classes)]
                masses = [k.masses(a, p, c + n) for n in range(classes)] if k.soft else []
                size = len(state)

                def absorbed(*x: Any) -> Any:
                    logits, rest = x[size : size + classes], x[size + classes :]
                    return tuple(k.absorb(x[:size], logits, rest or None))

                return each(absorbed, *state, *found, *masses)

            return take

        @emitted
        def finish(a: Any, p: Any, row: Int, t: Any, state: Any, scales: Any) -> Any:
            z, weight = k.own(a, p, row, t) if k.index else (full(a[0], k.compute, 0.0), full(a[0], k.compute, 1.0))
            size = len(state)
            of_samples = [
                k.upstream_scales(k.of_neighbour(a, p, "upstream", n) if k.upstream else p, Scales(*scales))
                for n in range(k.lanes)
            ]
            by, by_z = (lanes_of(column) for column in zip(*of_samples, strict=True))

            def finished(*x: Any) -> Any:
                z, weight, *scales = x[size:]
                return tuple(k.finish(a, x[:size], z, weight, Scales(*scales)))

            return each(finished, *state, z, weight, by, by_z)

        @emitted
        def count(a: Any, p: Any, kinds: Any, outcome: Any, sums: Any, counts: Any) -> Any:
            """The sums with the thread's samples; their losses are written."""
            done = Outcome(*outcome)
            live, bad = _equal(kinds, LIVE), _equal(kinds, INVALID)
            nothing = _blank(k, a, bad)
            loss = each(where, live, done.loss, nothing)
            both = each(lambda ok, x, z, no: where(ok, x + z, no), live, done.loss, done.z, nothing)
            if k.losses:
                for n in range(k.lanes):
                    k.write_loss(k.of_neighbour(a, p, "losses", n), both[n])
            zero = full(a[0], k.compute, 0.0)
            weight, z = (each(where, live, x, zero) for x in (done.weight, done.z))
            parts: list[Any] = []
            for n, lanes in enumerate((loss, weight, z)):
                parts += two_sum(sums[2 * n : 2 * n + 2], fold(lambda x, y: x + y, lanes))
            one, none = integer(a[0], 1), integer(a[0], 0)
            n_live = fold(lambda x, y: x + y, [where(kind == LIVE, one, none) for kind in kinds])
            n_bad = fold(lambda x, y: x + y, [where(kind == INVALID, one, none) for kind in kinds])
            return Lanes(parts), (counts[0] + n_live, counts[1] + n_bad)

        def write(classes: int) -> Any:
            @emitted
            def put(a: Any, p: Any, row: Int, c: Int, labels: Any, outcome: Any) -> None:
                """The gradients of `classes` classes from c on; all is read before anything is written."""
                t, kinds = labels
                done = Outcome(*outcome)
                live, nothing = _equal(kinds, LIVE), _blank(k, a, _equal(kinds, INVALID))
                results = []
                for n in range(classes):
                    z, bent = k.capped(a, k.logits_of(a, p, row, c + n))
                    weight = k.weight_of(a, c + n)
                    for name in wanted:
                        if name == "grad":
                            mass = k.masses(a, p, c + n) if k.soft else None
                            g = _gradient(k, a, done, z, bent, mass, _equal(t, c + n) if k.index else None)
                        else:
                            q = k.read_probabilities(a, p, c + n)
                            g = each(
                                lambda z, q, lse, by, w=weight: k.gradient_of_target(
                                    a, done._replace(lse=lse, scale=by), z, q, w
                                ),
                                z, q, done.lse, done.scale,
                            )  # fmt: skip
                        results.append((name, n, each(where, live, g, nothing)))
                for name, n, g in results:
                    if k.tile and name == "grad":
                        place = k.tile_address(c) + k.element(a, row, c + n)
                        store_lanes(place, g, k.compute, k.pairs)
                    else:
                        place = k.place(p, name) + (c + n) * a[k.at[f"{name}_step"]]
                        store_lanes(place, g, getattr(k, name), k.pairs)

            return put

        vector = VECTOR_BYTES // min(k.size(name) for name in ("logits", "grad") if getattr(k, name))

        def over_tile(a: Any, tile: Int, thread: Int, by_vector: Any, by_one: Any) -> None:
            """Both functions take the position of a tile's element; the first of `vector` of them."""
            classes = a[k.at["classes"]]
            n = smaller(a[k.at["samples"]] - tile * k.threads, integer(tile, k.threads)) * classes
            vectors = n // vector
            last = k.threads - 1

            def of_vector(v: Int) -> None:
                by_vector(v * vector)

            loop(thread, vectors + last, k.threads, [], of_vector)
            loop(vectors * vector + thread, n + last, k.threads, [], by_one)

        @emitted
        def stage(a: Any, tile: Int, thread: Int) -> None:
            """A tile's logits into shared memory."""
            begin = a[k.at["logits"]] + tile * k.threads * a[k.at["classes"]] * k.size("logits")
            place = k.tile_address(tile)

            def take(n: Int, lanes: int) -> None:
                found = load_lanes(begin + n * k.size("logits"), k.logits, k.compute, lanes)
                for j in range(lanes):
                    store(place + k.skewed(n + j), found[j], k.compute)

            over_tile(a, tile, thread, lambda n: take(n, vector), lambda n: take(n, 1))

        @emitted
        def flush(a: Any, tile: Int, thread: Int) -> None:
            """A tile's gradients out of shared memory."""
            if not k.grad:
                return
            begin = a[k.at["grad"]] + tile * k.threads * a[k.at["classes"]] * k.size("grad")
            place = k.tile_address(tile)

            def put(n: Int, lanes: int) -> None:
                found = lanes_of([load(place + k.skewed(n + j), k.compute, k.compute) for j in range(lanes)])
                store_lanes(begin + n * k.size("grad"), found, k.grad or "", k.pairs)

            over_tile(a, tile, thread, lambda n: put(n, vector), lambda n: put(n, 1))

        @emitted
        def wait(a: Any) -> None:
            barrier(a[0])

        absorb_some, absorb_one, write_some, write_one = absorb(UNROLL), absorb(1), write(UNROLL), write(1)
        close = closing(k.reduction or Reduction(k.compute, "sums"), k.threads)
        reduced, gradient, tiled, threads, lanes = k.reduction is not None, bool(wanted), k.tile > 0, k.threads, k.lanes
        samples, classes = k.at["samples"], k.at["classes"]

        def of_samples(a):  # type: ignore[no-untyped-def]
            sums, counts, scales = start(a)
            groups = a[samples] // lanes
            unrolled = a[classes] // UNROLL * UNROLL
            thread = cuda.threadIdx.x
            tile = cuda.blockIdx.x
            while tile * threads < groups:
                i = tile * threads + thread
                if tiled:
                    stage(a, tile, thread)
                    wait(a)
                if i < groups:
                    p, t, kinds = begin(a, i)
                    state = empty(a)
                    c = 0
                    while c < unrolled:
                        state = absorb_some(a, p, thread, c, state)
                        c += UNROLL
                    while c < a[classes]:
                        state = absorb_one(a, p, thread, c, state)
                        c += 1
                    outcome = finish(a, p, thread, t, state, scales)
                    sums, counts = count(a, p, kinds, outcome, sums, counts)
                    if gradient:
                        c = 0
                        while c < unrolled:
                            write_some(a, p, thread, c, (t, kinds), outcome)
                            c += UNROLL
                        while c < a[classes]:
                            write_one(a, p, thread, c, (t, kinds), outcome)
                            c += 1
                if tiled:
                    if gradient:
                        wait(a)
                        flush(a, tile, thread)
                    wait(a)
                tile += cuda.gridDim.x
            if reduced:
                close(a, sums, counts)

        return of_samples


def _gradient(k: SamplesKernel, a: Any, done: Outcome, z: Any, bent: Any, mass: Any, hot: Any) -> Any:
    """d loss / d logit of a class of each sample; `hot` where it is the target index."""

    def plain(z: Any, base: Any, share: Any, by: Any, *mass: Any) -> Any:
        outcome = done._replace(base=base, share=share, scale=by)
        return k.gradient(outcome, z, None, mass[0] if mass else None)

    g = each(plain, z, done.base, done.share, done.scale, *([] if mass is None else [mass]))
    g = g if hot is None else each(lambda hot, g, pulled: where(hot, g - pulled, g), hot, g, done.pulled)
    return g if bent is None else each(lambda g, bent: g * (1.0 - bent * bent), g, bent)


def _blank(k: SamplesKernel, a: Any, bad: Any) -> Any:
    """What stands for samples that are not live: NaN where they are invalid, else 0."""
    nan, zero = full(a[0], k.compute, float("nan")), full(a[0], k.compute, 0.0)
    return each(lambda bad: where(bad, nan, zero), bad)


def _equal(numbers: Any, number: Any) -> Any:
    """Which of the integers are `number`."""
    return lanes_of([n == number for n in numbers])
