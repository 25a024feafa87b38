"""The kernels of `RowsKernel`, one a phase, and the emitted functions that they are put together from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..exact import two_sum
from ..vecmath import where
from .device import Int, Lanes, below, cuda, divided, emitted, full, integer, lanes_of, larger, loop, smaller, when
from .memory import load, store, store_lanes
from .rows import OWN, SAVED, SAVED_BYTES
from .softmax import IGNORED, INVALID, LIVE, Outcome, Scales
from .sums import Reduction, closing, no_sums

if TYPE_CHECKING:
    from .rows import RowsKernel


class _Parts:
    """The emitted functions that a phase's kernel is put together from. `member` is the number of a thread among those
    of its row, `low` and `stop` bound its classes."""

    def __init__(self, k: RowsKernel) -> None:
        width = k.group * k.lanes  # classes between a thread's vectors

        def places(first: Int, vectors: int) -> list[Int]:
            return [first + u * width for u in range(vectors)]

        @emitted
        def start(a: Any) -> Any:
            return *no_sums(a[0], k.compute), Lanes(k.scales(a))

        @emitted
        def begin(a: Any, r: Int) -> Any:
            """Of row r: places, and the bounds of its vectors."""
            p = k.places(a, r)
            head, vectors = k.extent(a, p)
            return p, head, head + vectors * k.lanes

        @emitted
        def label(a: Any, r: Int) -> Any:
            """The class index of row r, and whether it is live; of rows past the last, that it is not."""

            def found() -> list[Any]:
                return list(k.label(a, k.places(a, r)))

            none = [integer(a[0], 0), integer(a[0], IGNORED)]
            t, kind = when(r < a[k.at["samples"]], found, lambda: none)
            return t, kind

        @emitted
        def piece(a: Any, slot: Int, low: Int, stop: Int) -> Any:
            """The bounds of a slice."""
            slices = a[k.at["slices"]]
            n, steps = slot % slices, (stop - low + k.step - 1) // k.step
            return low + steps * n // slices * k.step, smaller(low + steps * (n + 1) // slices * k.step, stop)

        @emitted
        def own(a: Any, p: Any, t: Int) -> Any:
            """The target's logit, its part of the cap's gradient, and its weight."""
            one, zero = full(a[0], k.compute, 1.0), full(a[0], k.compute, 0.0)
            if k.index is None:
                return Lanes([zero, one, one])
            z, bent = k.read(a, p, t, 1)
            weight = k.weight_of(a, t)
            return Lanes([z[0], one if bent is None else 1.0 - bent[0] * bent[0], one if weight is None else weight])

        @emitted
        def nothing(a: Any) -> Any:
            """The state of no classes."""
            return Lanes(k.empty(a[0]))

        @emitted
        def odd(a: Any, p: Any, member: Int) -> Any:
            """The state of the class outside the vectors that is this thread's, or of none."""
            empty = k.empty(a[0])
            if k.lanes == 1:
                return Lanes(empty)
            c, there = k.odd_class(a, p, member)

            def take() -> list[Any]:
                return k.absorb(empty, list(k.read(a, p, c, 1)[0]), k.masses(a, p, c, 1))

            return Lanes(when(there, take, lambda: empty))

        @emitted
        def sweep(a: Any, p: Any, low: Int, stop: Int, member: Int, state: Any) -> Any:
            """The state with the thread's part of a range of vectors."""

            def take(vectors: int) -> Any:
                def absorb(c: Int, *state: Any) -> list[Any]:
                    at = places(c, vectors)
                    logits = [z for c in at for z in k.read(a, p, c, k.lanes)[0]]
                    masses = [q for c in at for q in k.masses(a, p, c, k.lanes)] if k.soft else None
                    return k.absorb(state, logits, masses)

                return absorb

            mine = member * k.lanes
            many, one = take(k.vectors), take(1)
            c, state = loop(low, stop, k.step, list(state), lambda c, *state: many(c + mine, *state))
            return Lanes(loop(c + mine, stop + (width - 1), width, state, one)[1])

        @emitted
        def hold(a: Any, p: Any, low: Int, stop: Int, member: Int) -> Any:
            """A row's logits in registers; -inf beyond the last."""
            lanes = Lanes()
            for c in places(low + member * k.lanes, k.vectors):
                found = k.read(a, p, smaller(c, stop - k.lanes), k.lanes)[0]
                lanes += [where(c < stop, z, -float("inf")) for z in found]
            return lanes

        @emitted
        def absorb_held(a: Any, p: Any, low: Int, stop: Int, member: Int, held: Any, state: Any) -> Any:
            masses = None
            if k.soft:
                masses = []
                for c in places(low + member * k.lanes, k.vectors):
                    found = k.masses(a, p, smaller(c, stop - k.lanes), k.lanes)
                    masses += [where(c < stop, q, 0.0) for q in found]
            return Lanes(k.absorb(list(state), list(held), masses))

        @emitted
        def total(state: Any) -> Any:
            return Lanes(k.group_total(list(state)))

        @emitted
        def finish(a: Any, p: Any, own: Any, state: Any, scales: Any) -> Any:
            """What spreading needs: `own`, then the outcome."""
            outcome = k.finish(a, list(state), own[0], own[2], k.upstream_scales(p, Scales(*scales)))
            return Lanes([*own, *outcome])

        @emitted
        def count(p: Any, member: Int, done: Any, sums: Any, counts: Any) -> Any:
            """The sums with a live sample, by the row's first thread, which also writes its loss."""
            outcome, first = Outcome(*done[OWN:]), member == 0
            when(first, lambda: k.write_loss(p, outcome.loss + outcome.z))
            zero = full(outcome.loss, k.compute, 0.0)
            parts: list[Any] = []
            for n, x in enumerate((outcome.loss, outcome.weight, outcome.z)):
                parts += two_sum(sums[2 * n : 2 * n + 2], where(first, x, zero))
            return Lanes(parts), (where(first, counts[0] + 1, counts[0]), counts[1])

        @emitted
        def skip(p: Any, member: Int, kind: Int, sums: Any, counts: Any) -> Any:
            """The sums with a sample that is ignored, or that is invalid: its loss is NaN and has no weight."""
            first, bad = member == 0, kind == INVALID
            zero = full(sums[0], k.compute, 0.0)
            nothing = where(bad, full(sums[0], k.compute, float("nan")), zero)
            when(first, lambda: k.write_loss(p, nothing))
            parts = [*two_sum(sums[:2], where(first, nothing, zero)), *sums[2:]]
            return Lanes(parts), (counts[0], where(first & bad, counts[1] + 1, counts[1]))

        def write(a: Any, p: Any, c: Int, done: Any, found: Any, lanes: int) -> None:
            """The gradients of `lanes` classes from c on, of which `found` are the logits; none is the target index."""
            outcome = Outcome(*done[OWN:])
            z, bent = found
            probabilities, weights = k.read_probabilities(p, c, lanes), k.weights(a, c, lanes)
            q, w, cap = ([None] * lanes if x is None else list(x) for x in (probabilities, weights, bent))
            if k.grad:
                masses = [k.mass_of(a, q[n], w[n]) if k.soft else None for n in range(lanes)]
                gradients = [k.gradient(outcome, z[n], cap[n], masses[n]) for n in range(lanes)]
                address = k.place(p, "grad") + c * k.size("grad")
                store_lanes(address, lanes_of(gradients), k.grad, k.pairs)
            if k.grad_target:
                gradients = [k.gradient_of_target(a, outcome, z[n], q[n], w[n]) for n in range(lanes)]
                address = k.place(p, "grad_target") + c * k.size("grad_target")
                store_lanes(address, lanes_of(gradients), k.grad_target, k.pairs)

        @emitted
        def write_odd(a: Any, p: Any, member: Int, done: Any) -> None:
            if k.lanes > 1:
                c, there = k.odd_class(a, p, member)
                when(there, lambda: write(a, p, c, done, k.read(a, p, c, 1), 1))

        @emitted
        def write_target(a: Any, p: Any, bounds: Any, nth: Int, member: Int, t: Int, done: Any) -> None:
            """The target index's gradient, by the thread that has written another one there; `nth` is the slice."""
            if not k.grad or k.index is None:
                return
            own, outcome = done[:OWN], Outcome(*done[OWN:])
            mass = k.mass_of(a, None, own[2] if k.weight else None) if k.soft else None
            g = (k.gradient(outcome, own[0], None, mass) - outcome.pulled) * own[1]
            (low, stop), place = bounds, k.place(p, "grad") + t * k.size("grad")
            head, vectors = k.extent(a, p)
            in_vector = divided(divided(t - head, integer(t, k.lanes), False)[0], integer(t, k.group), False)[1]
            odd = where(t < head, t, t - vectors * k.lanes)
            among_vectors = below(t - head, vectors * k.lanes)
            mine = where(among_vectors, in_vector, odd) == member
            here = where(among_vectors, below(t - low, stop - low), nth == 0)
            when(mine & here, lambda: store(place, g, k.grad or ""))

        @emitted
        def spread(a: Any, p: Any, bounds: Any, member: Int, done: Any) -> None:
            """The gradients of the thread's part of a range of vectors, whose logits are read again."""

            def put(vectors: int) -> Any:
                def write_vectors(c: Int) -> None:
                    at = places(c, vectors)
                    found = [k.read(a, p, c, k.lanes) for c in at]  # before anything is written
                    for c, logits in zip(at, found, strict=True):
                        write(a, p, c, done, logits, k.lanes)

                return write_vectors

            low, stop = bounds
            mine = member * k.lanes
            many, one = put(k.vectors), put(1)
            c, _ = loop(low, stop, k.step, [], lambda c: many(c + mine))
            loop(c + mine, stop + (width - 1), width, [], one)

        @emitted
        def spread_held(a: Any, p: Any, bounds: Any, member: Int, done: Any, held: Any) -> None:
            """The gradients of the logits in registers."""
            low, stop = bounds
            for u, c in enumerate(places(low + member * k.lanes, k.vectors)):
                z = held[u * k.lanes : (u + 1) * k.lanes]
                bent = [x / k.number(a, "softcap") for x in z] if k.softcap else None

                def put(c: Int = c, found: Any = (z, bent)) -> None:
                    write(a, p, c, done, found, k.lanes)

                when(c < stop, put)

        @emitted
        def blank(a: Any, p: Any, c: Int, kind: Int) -> None:
            """The gradients of a class of a row that is not live."""
            nothing = where(kind == INVALID, full(a[0], k.compute, float("nan")), full(a[0], k.compute, 0.0))
            for name in ("grad", "grad_target"):
                if storage := getattr(k, name):
                    store(k.place(p, name) + c * k.size(name), nothing, storage)

        def saved(a: Any, slot: Int, n: int) -> Int:
            return a[k.at["states"]] + slot * SAVED_BYTES + 8 * n

        @emitted
        def save(a: Any, slot: Int, numbers: Any) -> None:
            for n, x in enumerate(numbers):
                store(saved(a, slot, n), x, k.compute)

        @emitted
        def restore(a: Any, slot: Int) -> Any:
            return Lanes(load(saved(a, slot, n), k.compute, k.compute) for n in range(SAVED))

        @emitted
        def absorb_saved(a: Any, slot: Int, state: Any) -> Any:
            """The state with a slice's."""
            other = [load(saved(a, slot, n), k.compute, k.compute) for n in range(len(state))]
            top = larger(state[0], other[0])
            parts = [k.rescaled(list(one), top) for one in (state, other)]
            return Lanes([top, *(x + y for x, y in zip(*parts, strict=True))])

        self.start, self.begin, self.label, self.piece = start, begin, label, piece
        self.own, self.nothing = own, nothing
        self.odd, self.sweep, self.hold, self.absorb_held, self.total = odd, sweep, hold, absorb_held, total
        self.finish, self.count, self.skip = finish, count, skip
        self.write_odd, self.write_target, self.blank = write_odd, write_target, blank
        self.spread, self.spread_held = spread, spread_held
        self.save, self.restore, self.absorb_saved = save, restore, absorb_saved
        self.close = closing(k.reduction or Reduction(k.compute, "sums"), k.threads)


def _whole(k: RowsKernel) -> Any:
    f = _Parts(k)
    start, begin, label, own_values, odd, sweep, hold, absorb_held, total, finish, count, skip, close = (
        f.start, f.begin, f.label, f.own, f.odd, f.sweep, f.hold, f.absorb_held, f.total, f.finish, f.count, f.skip,
        f.close,
    )  # fmt: skip
    write_odd, write_target, spread, spread_held, blank = (
        f.write_odd, f.write_target, f.spread, f.spread_held, f.blank
    )  # fmt: skip
    group, per_block, resident = k.group, k.threads // k.group, k.resident
    reduced, gradient = k.reduction is not None, k.differentiates
    samples, classes = k.at["samples"], k.at["classes"]

    def rows(a):  # type: ignore[no-untyped-def]
        sums, counts, scales = start(a)
        member = cuda.threadIdx.x % group
        r = cuda.blockIdx.x * per_block + cuda.threadIdx.x // group
        t, kind = label(a, r)
        while r < a[samples]:
            p, low, stop = begin(a, r)
            following = r + cuda.gridDim.x * per_block
            next_t, next_kind = label(a, following)  # the next row's logits need not wait for it
            if kind == LIVE:
                own = own_values(a, p, t)
                state = odd(a, p, member)
                if resident:
                    held = hold(a, p, low, stop, member)
                    done = finish(a, p, own, total(absorb_held(a, p, low, stop, member, held, state)), scales)
                    if gradient:
                        write_odd(a, p, member, done)
                        spread_held(a, p, (low, stop), member, done, held)
                else:
                    done = finish(a, p, own, total(sweep(a, p, low, stop, member, state)), scales)
                    if gradient:
                        write_odd(a, p, member, done)
                        spread(a, p, (low, stop), member, done)
                if gradient:
                    write_target(a, p, (low, stop), 0, member, t, done)
                sums, counts = count(p, member, done, sums, counts)
            else:
                if gradient:
                    c = member
                    while c < a[classes]:
                        blank(a, p, c, kind)
                        c += group
                sums, counts = skip(p, member, kind, sums, counts)
            r, t, kind = following, next_t, next_kind
        if reduced:
            close(a, sums, counts)

    return rows


def _part(k: RowsKernel) -> Any:
    f = _Parts(k)
    begin, label, piece, nothing, odd, sweep, total, save = (
        f.begin, f.label, f.piece, f.nothing, f.odd, f.sweep, f.total, f.save
    )  # fmt: skip
    samples, slices_at = k.at["samples"], k.at["slices"]

    def part(a):  # type: ignore[no-untyped-def]
        slices, member = a[slices_at], cuda.threadIdx.x
        slot = cuda.blockIdx.x
        while slot < a[samples] * slices:
            p, head, end = begin(a, slot // slices)
            if label(a, slot // slices)[1] == LIVE:
                low, stop = piece(a, slot, head, end)
                state = nothing(a)
                if slot % slices == 0:  # the first slice takes the odd classes
                    state = odd(a, p, member)
                state = total(sweep(a, p, low, stop, member, state))
                if member == 0:
                    save(a, slot, state)
            slot += cuda.gridDim.x

    return part


def _merge(k: RowsKernel) -> Any:
    f = _Parts(k)
    start, begin, label, own_values, nothing, absorb_saved, total, finish, count, skip, save, close = (
        f.start, f.begin, f.label, f.own, f.nothing, f.absorb_saved, f.total, f.finish, f.count, f.skip, f.save,
        f.close,
    )  # fmt: skip
    group, per_block, reduced, gradient = k.group, k.threads // k.group, k.reduction is not None, k.differentiates
    samples, slices_at = k.at["samples"], k.at["slices"]

    def merge(a):  # type: ignore[no-untyped-def]
        sums, counts, scales = start(a)
        slices, member = a[slices_at], cuda.threadIdx.x % group
        r = cuda.blockIdx.x * per_block + cuda.threadIdx.x // group
        while r < a[samples]:
            p, _, _ = begin(a, r)
            t, kind = label(a, r)
            if kind == LIVE:
                own = own_values(a, p, t)
                state = nothing(a)
                n = member
                while n < slices:
                    state = absorb_saved(a, r * slices + n, state)
                    n += group
                done = finish(a, p, own, total(state), scales)
                sums, counts = count(p, member, done, sums, counts)
                if gradient and member == 0:  # the gradient may replace the logits: the target's goes along
                    save(a, a[samples] * slices + r, done)
            else:
                sums, counts = skip(p, member, kind, sums, counts)
            r += cuda.gridDim.x * per_block
        if reduced:
            close(a, sums, counts)

    return merge


def _spread(k: RowsKernel) -> Any:
    f = _Parts(k)
    begin, label, piece, restore, spread, write_odd, write_target, blank = (
        f.begin, f.label, f.piece, f.restore, f.spread, f.write_odd, f.write_target, f.blank
    )  # fmt: skip
    group, samples, classes, slices_at = k.group, k.at["samples"], k.at["classes"], k.at["slices"]

    def spread_slices(a):  # type: ignore[no-untyped-def]
        slices, member = a[slices_at], cuda.threadIdx.x
        slot = cuda.blockIdx.x
        while slot < a[samples] * slices:
            r = slot // slices
            p, head, end = begin(a, r)
            t, kind = label(a, r)
            if kind == LIVE:
                done = restore(a, a[samples] * slices + r)
                bounds = piece(a, slot, head, end)
                if slot % slices == 0:
                    write_odd(a, p, member, done)
                spread(a, p, bounds, member, done)
                write_target(a, p, bounds, slot % slices, member, t, done)
            else:
                c = slot % slices * group + member
                while c < a[classes]:
                    blank(a, p, c, kind)
                    c += slices * group
            slot += cuda.gridDim.x

    return spread_slices

PHASES = {"whole": _whole, "part": _part, "merge": _merge, "spread": _spread}
