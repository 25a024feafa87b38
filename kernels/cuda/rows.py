"""Cross-entropy where a sample's classes lie side by side: a warp or a block takes a row.

A row that fits its threads' registers is read once, for value and gradient; a longer one is read again, from the L2
cache where that holds it. Few very long rows are cut into slices, a block each: `part` leaves the slices' states,
`merge` makes losses of them, `spread` writes gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..vecmath import where
from .device import (
    WARP,
    Int,
    Lanes,
    barrier,
    below,
    cuda,
    each,
    emitted,
    exchange_all,
    fold,
    full,
    integer,
    larger,
    load,
    load_lanes,
    loop,
    shared,
    smaller,
    store,
    store_lanes,
    thread_index,
    when,
)
from .softmax import CLASSY, INVALID, LIVE, Outcome, Scales, SoftmaxKernel
from .sums import Reduction, add_pair, closing, no_sums

OUTCOME_BYTES = 8 * len(Outcome._fields)  # what `part` leaves of a slice, and `merge` of a row
_GROUP_BYTES = 8 * 4  # what a warp tells the others of its state


@dataclass(frozen=True, kw_only=True)
class RowsKernel(SoftmaxKernel):
    """A row of classes at a time."""

    lanes: int  # classes of a vector: 16 bytes of the narrowest array, or 1 where rows do not lie alike
    vectors: int = 4  # loads that a thread has in flight
    group: int = 256  # threads of a row: a warp or all
    resident: bool = False  # a row has at most group * vectors * lanes classes, beside those before and after
    phase: str = "whole"  # or "part", "merge", "spread"

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The kernel's arguments: rows that are cut have `slices`, whose states or outcomes lie at `states`."""
        return (*super().fields, "slices", "states")

    @property
    def step(self) -> int:
        """Classes that a row's threads take at a time."""
        return self.group * self.vectors * self.lanes

    # rows in memory

    def extent(self, a: Any, p: Any) -> tuple[Int, Int]:
        """How many classes stand before the first aligned vector, and the number of vectors."""
        classes = a[self.at["classes"]]
        if self.lanes == 1:
            return integer(classes, 0), classes
        before = (0 - self.place(p, "logits")) & (self.lanes * self.size("logits") - 1)
        head = smaller(before // self.size("logits"), classes)
        return head, (classes - head) // self.lanes

    def odd_class(self, a: Any, p: Any, member: Int) -> tuple[Int, Any]:
        """The class outside the vectors that a thread takes, and whether there is one."""
        classes = a[self.at["classes"]]
        head, vectors = self.extent(a, p)
        after = head + vectors * self.lanes
        c = where(member < head, member, after + member - head)
        return c, c < classes

    def read(self, a: Any, p: Any, c: Int, lanes: int) -> tuple[Any, Any]:
        """Logits c, c + 1, ... and tanh(x / softcap) where they are capped."""
        x = load_lanes(self.place(p, "logits") + c * self.size("logits"), self.logits, self.compute, lanes)
        return self.capped(a, x)

    def masses(self, a: Any, p: Any, c: Int, lanes: int) -> Any:
        """The classes' masses; None where they have none."""
        if not self.soft:
            return None
        weights = self.weights(a, c, lanes)
        probabilities = self.read_probabilities(p, c, lanes)
        out = [
            self.mass_of(
                a, None if probabilities is None else probabilities[k], None if weights is None else weights[k]
            )
            for k in range(lanes)
        ]
        return out

    def weights(self, a: Any, c: Int, lanes: int) -> Any:
        return [self.weight_of(a, c + k) for k in range(lanes)] if self.weight else None

    def read_probabilities(self, p: Any, c: Int, lanes: int) -> Any:
        if self.probabilities is None:
            return None
        address = self.place(p, "probabilities") + c * self.size("probabilities")
        return load_lanes(address, self.probabilities, self.compute, lanes)

    # threads of a row

    def group_total(self, state: Sequence[Any]) -> list[Any]:
        """The state of the whole row, in all of its threads."""
        top = state[0]
        mask = WARP // 2
        while mask:
            top = larger(top, exchange_all([top], mask)[0])
            mask //= 2
        warps = self.group // WARP
        if warps > 1:
            top = self._over_warps([top], warps, 0, larger)[0]
        parts = self.rescaled(state, top)
        mask = WARP // 2
        while mask:
            parts = [x + y for x, y in zip(parts, exchange_all(parts, mask), strict=True)]
            mask //= 2
        if warps > 1:
            parts = self._over_warps(parts, warps, 8, lambda x, y: x + y)
        return [top, *parts]

    def _over_warps(self, parts: list[Any], warps: int, offset: int, combine: Any) -> list[Any]:
        """Each part combined over the block's warps, in their order."""
        like = parts[0]
        place, thread = shared(like, "fastloss_rows", warps * _GROUP_BYTES) + offset, self.member(like)

        def leave() -> None:
            for k, part in enumerate(parts):
                store(place + (thread // WARP) * _GROUP_BYTES + 8 * k, part, self.compute)

        when(thread % WARP == 0, leave)
        barrier(like)

        def take(warp: Int, *state: Any) -> list[Any]:
            row = place + warp * _GROUP_BYTES
            return [combine(x, load(row + 8 * k, self.compute, self.compute)) for k, x in enumerate(state)]

        first = [load(place + 8 * k, self.compute, self.compute) for k in range(len(parts))]
        return loop(integer(like, 1), integer(like, warps), 1, first, take)[1]

    def member(self, like: Any) -> Int:
        """The number of this thread among those of its row."""
        return thread_index(like) % self.group if self.group < self.threads else thread_index(like)

    # states and outcomes in memory

    def save(self, address: Int, values: Sequence[Any]) -> None:
        for k, value in enumerate(values):
            store(address + 8 * k, value, self.compute)

    def restore(self, address: Int, count: int) -> list[Any]:
        return [load(address + 8 * k, self.compute, self.compute) for k in range(count)]

    # the kernel

    def build(self) -> Any:
        """The kernel of this phase."""
        return {"whole": _whole, "part": _part, "merge": _merge, "spread": _spread}[self.phase](self)


class _Parts:
    """The emitted functions that a phase's kernel is put together from."""

    def __init__(self, k: RowsKernel) -> None:
        wanted = [name for name in ("grad", "grad_target") if getattr(k, name)]

        @emitted
        def start(a: Any) -> Any:
            sums, counts = no_sums(a[0], k.compute)
            scales = k.scales(a)
            return sums, counts, Lanes(scales)

        @emitted
        def begin(a: Any, r: Int) -> Any:
            p = k.places(a, r)
            head, vectors = k.extent(a, p)
            return p, *k.label(a, p), head, vectors

        @emitted
        def own(a: Any, p: Any, t: Int) -> Any:
            """The target's logit, its part of the cap's gradient, and its weight."""
            one, zero = full(a[0], k.compute, 1.0), full(a[0], k.compute, 0.0)
            if k.index is None:
                return Lanes([zero, one, one])
            z, bent = k.read(a, p, t, 1)
            slope = one if bent is None else 1.0 - bent[0] * bent[0]
            weight = k.weight_of(a, t)
            return Lanes([z[0], slope, one if weight is None else weight])

        @emitted
        def empty(a: Any) -> Any:
            return Lanes(k.empty(a[0]))

        @emitted
        def odd(a: Any, p: Any, member: Int, state: Any) -> Any:
            """The state with the class outside the vectors that is this thread's."""
            if k.lanes == 1:
                return state
            c, there = k.odd_class(a, p, member)

            def take() -> list[Any]:
                return k.absorb(list(state), list(k.read(a, p, c, 1)[0]), k.masses(a, p, c, 1))

            return Lanes(when(there, take, lambda: list(state)))

        def absorb(vectors: int) -> Any:
            @emitted
            def take(a: Any, p: Any, first: Int, state: Any) -> Any:
                """The state with `vectors` vectors, the group's width apart."""
                places = [first + u * (k.group * k.lanes) for u in range(vectors)]
                logits = [z for c in places for z in k.read(a, p, c, k.lanes)[0]]
                masses = [q for c in places for q in k.masses(a, p, c, k.lanes)] if k.soft else None
                return Lanes(k.absorb(list(state), logits, masses))

            return take

        @emitted
        def hold(a: Any, p: Any, first: Int, stop: Int) -> Any:
            """Vectors for the registers; -inf beyond the last."""
            lanes = Lanes()
            for u in range(k.vectors):
                c = first + u * (k.group * k.lanes)
                found = k.read(a, p, smaller(c, stop - k.lanes), k.lanes)[0]
                lanes += [where(c < stop, z, -float("inf")) for z in found]
            return lanes

        @emitted
        def absorb_held(a: Any, p: Any, first: Int, stop: Int, held: Any, state: Any) -> Any:
            masses = None
            if k.soft:
                masses = []
                for u in range(k.vectors):
                    c = first + u * (k.group * k.lanes)
                    found = k.masses(a, p, smaller(c, stop - k.lanes), k.lanes)
                    masses += [where(c < stop, q, 0.0) for q in found]
            return Lanes(k.absorb(list(state), list(held), masses))

        @emitted
        def total(state: Any) -> Any:
            return Lanes(k.group_total(list(state)))

        @emitted
        def finish(a: Any, p: Any, own: Any, state: Any, scales: Any) -> Any:
            return Lanes(k.finish(a, list(state), own[0], own[2], k.upstream_scales(p, Scales(*scales))))

        @emitted
        def count(p: Any, member: Int, outcome: Any, sums: Any, counts: Any) -> Any:
            """The sums with a live sample, by the row's first thread, which also writes its loss."""
            done = Outcome(*outcome)
            first = member == 0
            when(first, lambda: k.write_loss(p, done.loss + done.z))
            zero = full(done.loss, k.compute, 0.0)
            added = [where(first, x, zero) for x in (done.loss, done.weight, done.z)]
            parts: list[Any] = []
            for n, x in enumerate(added):
                parts += add_pair(sums[2 * n : 2 * n + 2], x, 0.0)
            return Lanes(parts), (where(first, counts[0] + 1, counts[0]), counts[1])

        @emitted
        def skip(p: Any, member: Int, kind: Int, sums: Any, counts: Any) -> Any:
            """The sums with a sample that is ignored, or that is invalid: its loss is NaN and has no weight."""
            first, bad = member == 0, kind == INVALID
            nothing = where(bad, full(sums[0], k.compute, float("nan")), full(sums[0], k.compute, 0.0))
            when(first, lambda: k.write_loss(p, nothing))
            parts = [*add_pair(sums[:2], where(first, nothing, full(sums[0], k.compute, 0.0)), 0.0), *sums[2:]]
            return Lanes(parts), (counts[0], where(first & bad, counts[1] + 1, counts[1]))

        def gradients(a: Any, p: Any, c: Int, t: Int, outcome: Any, own: Any, z: Any, bent: Any, lanes: int) -> None:
            """Write the gradients of `lanes` classes from c on."""
            done = Outcome(*outcome)
            probabilities = k.read_probabilities(p, c, lanes)
            weights = k.weights(a, c, lanes)
            results = {}
            for name in wanted:
                values = []
                for n in range(lanes):
                    q = None if probabilities is None else probabilities[n]
                    w = None if weights is None else weights[n]
                    if name == "grad":
                        mass = k.mass_of(a, q, w) if k.soft else None
                        values.append(k.gradient(a, done, z[n], None if bent is None else bent[n], mass))
                    else:
                        values.append(k.gradient_of_target(a, done, z[n], q, w))
                results[name] = Lanes(values)
            at_target = None
            if k.grad and k.index is not None:
                mass = k.mass_of(a, None, own[2] if k.weight else None) if k.soft else None
                at_target = (k.gradient(a, done, own[0], None, mass) - done.pulled) * own[1]
            for name, values in results.items():
                storage = getattr(k, name)
                row = k.place(p, name)
                address = row + c * k.size(name)
                store_lanes(address, _lanes(values), storage, k.pairs)
                if name == "grad" and at_target is not None:
                    target = row + t * k.size(name)
                    when(
                        below(t - c, integer(t, lanes)),
                        lambda target=target, storage=storage: store(target, at_target, storage),
                    )

        def write(vectors: int) -> Any:
            @emitted
            def put(a: Any, p: Any, first: Int, t: Int, outcome: Any, own: Any) -> None:
                """The gradients of `vectors` vectors, whose logits are read again."""
                places = [first + u * (k.group * k.lanes) for u in range(vectors)]
                found = [k.read(a, p, c, k.lanes) for c in places]
                for c, (z, bent) in zip(places, found, strict=True):
                    gradients(a, p, c, t, outcome, own, z, bent, k.lanes)

            return put

        @emitted
        def write_held(a: Any, p: Any, first: Int, stop: Int, t: Int, outcome: Any, mixed: Any) -> None:
            """The gradients of the vectors in registers; `mixed` is what the target index needs, then they."""
            own, held = mixed[:3], mixed[3:]
            for u in range(k.vectors):
                c = first + u * (k.group * k.lanes)
                z = held[u * k.lanes : (u + 1) * k.lanes]
                cap = k.number(a, "softcap") if k.softcap else None
                bent = None if cap is None else [x / cap for x in z]

                def put(c: Int = c, z: Any = z, bent: Any = bent) -> None:
                    gradients(a, p, c, t, outcome, own, z, bent, k.lanes)

                when(c < stop, put)

        @emitted
        def write_odd(a: Any, p: Any, member: Int, t: Int, outcome: Any, own: Any) -> None:
            if k.lanes == 1:
                return
            c, there = k.odd_class(a, p, member)

            def put() -> None:
                z, bent = k.read(a, p, c, 1)
                gradients(a, p, c, t, outcome, own, z, bent, 1)

            when(there, put)

        @emitted
        def blank(a: Any, p: Any, c: Int, kind: Int) -> None:
            """The gradient of a class of a row that is not live."""
            nothing = where(kind == INVALID, full(a[0], k.compute, float("nan")), full(a[0], k.compute, 0.0))
            for name in wanted:
                store(k.place(p, name) + c * k.size(name), nothing, getattr(k, name))

        @emitted
        def save(a: Any, slot: Int, values: Any) -> None:
            k.save(a[k.at["states"]] + slot * OUTCOME_BYTES, list(values))

        @emitted
        def restore(a: Any, slot: Int) -> Any:
            return Lanes(k.restore(a[k.at["states"]] + slot * OUTCOME_BYTES, len(Outcome._fields)))

        @emitted
        def absorb_saved(a: Any, slot: Int, state: Any) -> Any:
            """The state with a slice's."""
            saved = k.restore(a[k.at["states"]] + slot * OUTCOME_BYTES, len(state))
            top = larger(state[0], saved[0])
            parts = [k.rescaled(list(one), top) for one in (state, saved)]
            return Lanes([top, *(x + y for x, y in zip(*parts, strict=True))])

        self.start, self.begin, self.own, self.empty, self.odd = start, begin, own, empty, odd
        self.absorb, self.absorb_one = absorb(k.vectors), absorb(1)
        self.hold, self.absorb_held, self.total, self.finish = hold, absorb_held, total, finish
        self.count, self.skip = count, skip
        self.write, self.write_one, self.write_held, self.write_odd = write(k.vectors), write(1), write_held, write_odd
        self.blank, self.save, self.restore, self.absorb_saved = blank, save, restore, absorb_saved
        self.close = closing(k.reduction or Reduction(k.compute, "sums"), k.threads)


def _lanes(values: Any) -> Any:
    """Lanes for a store: the simulator's are an array."""
    import numpy as np

    from ..values import Value

    return values if isinstance(values[0], Value) else np.array(values)


def _whole(k: RowsKernel) -> Any:
    f = _Parts(k)
    start, begin, own_values, empty, odd = f.start, f.begin, f.own, f.empty, f.odd
    absorb, absorb_one, hold, absorb_held = f.absorb, f.absorb_one, f.hold, f.absorb_held
    total, finish, count, skip = f.total, f.finish, f.count, f.skip
    write, write_one, write_held, write_odd, blank, close = (
        f.write, f.write_one, f.write_held, f.write_odd, f.blank, f.close
    )  # fmt: skip
    group, lanes, per_block = k.group, k.lanes, k.threads // k.group
    width, step = k.group * k.lanes, k.step
    resident, reduced, gradient = k.resident, k.reduction is not None, bool(k.grad or k.grad_target)
    samples, classes = k.at["samples"], k.at["classes"]

    def rows(a):  # type: ignore[no-untyped-def]
        sums, counts, scales = start(a)
        member = cuda.threadIdx.x % group
        first_row = cuda.blockIdx.x * per_block + cuda.threadIdx.x // group
        for r in range(first_row, a[samples], cuda.gridDim.x * per_block):
            p, t, kind, head, vectors = begin(a, r)
            if kind == LIVE:
                first, stop = head + member * lanes, head + vectors * lanes
                own = own_values(a, p, t)
                state = odd(a, p, member, empty(a))
                if resident:
                    held = hold(a, p, first, stop)
                    state = total(absorb_held(a, p, first, stop, held, state))
                    outcome = finish(a, p, own, state, scales)
                    if gradient:
                        write_odd(a, p, member, t, outcome, own)
                        write_held(a, p, first, stop, t, outcome, own + held)
                else:
                    full_steps = (stop - head) // step
                    rest = head + full_steps * step + member * lanes
                    for c in range(first, first + full_steps * step, step):
                        state = absorb(a, p, c, state)
                    for c in range(rest, stop, width):
                        state = absorb_one(a, p, c, state)
                    state = total(state)
                    outcome = finish(a, p, own, state, scales)
                    if gradient:
                        write_odd(a, p, member, t, outcome, own)
                        for c in range(first, first + full_steps * step, step):
                            write(a, p, c, t, outcome, own)
                        for c in range(rest, stop, width):
                            write_one(a, p, c, t, outcome, own)
                sums, counts = count(p, member, outcome, sums, counts)
            else:
                if gradient:
                    for c in range(member, a[classes], group):
                        blank(a, p, c, kind)
                sums, counts = skip(p, member, kind, sums, counts)
        if reduced:
            close(a, sums, counts)

    return rows


def _part(k: RowsKernel) -> Any:
    f = _Parts(k)
    begin, empty, odd, absorb, absorb_one, total, save = (
        f.begin, f.empty, f.odd, f.absorb, f.absorb_one, f.total, f.save
    )  # fmt: skip
    lanes, width, step = k.lanes, k.group * k.lanes, k.step
    samples, slices_at = k.at["samples"], k.at["slices"]

    def part(a):  # type: ignore[no-untyped-def]
        slices, member = a[slices_at], cuda.threadIdx.x
        for slot in range(cuda.blockIdx.x, a[samples] * slices, cuda.gridDim.x):
            p, t, kind, head, vectors = begin(a, slot // slices)
            if kind == LIVE:
                piece = slot % slices
                steps = (vectors * lanes + step - 1) // step
                low = head + (steps * piece // slices) * step
                stop = min(head + (steps * (piece + 1) // slices) * step, head + vectors * lanes)
                state = empty(a)
                if piece == 0:
                    state = odd(a, p, member, state)
                full_steps = max(stop - low, 0) // step
                first = low + member * lanes
                for c in range(first, first + full_steps * step, step):
                    state = absorb(a, p, c, state)
                for c in range(first + full_steps * step, stop, width):
                    state = absorb_one(a, p, c, state)
                state = total(state)
                if member == 0:
                    save(a, slot, state)

    return part


def _merge(k: RowsKernel) -> Any:
    f = _Parts(k)
    start, begin, own_values, empty, absorb_saved, total, finish, count, skip, save, close = (
        f.start, f.begin, f.own, f.empty, f.absorb_saved, f.total, f.finish, f.count, f.skip, f.save, f.close
    )  # fmt: skip
    group, reduced, gradient = k.group, k.reduction is not None, bool(k.grad or k.grad_target)
    per_block = k.threads // k.group
    samples, slices_at = k.at["samples"], k.at["slices"]

    def merge(a):  # type: ignore[no-untyped-def]
        sums, counts, scales = start(a)
        slices, member = a[slices_at], cuda.threadIdx.x % group
        first_row = cuda.blockIdx.x * per_block + cuda.threadIdx.x // group
        for r in range(first_row, a[samples], cuda.gridDim.x * per_block):
            p, t, kind, head, vectors = begin(a, r)
            if kind == LIVE:
                own = own_values(a, p, t)
                state = empty(a)
                for piece in range(member, slices, group):
                    state = absorb_saved(a, r * slices + piece, state)
                outcome = finish(a, p, own, total(state), scales)
                sums, counts = count(p, member, outcome, sums, counts)
                if gradient and member == 0:  # the gradient may replace the logits: the target's goes along
                    save(a, a[samples] * slices + r, own + outcome[3:])
            else:
                sums, counts = skip(p, member, kind, sums, counts)
        if reduced:
            close(a, sums, counts)

    return merge


def _spread(k: RowsKernel) -> Any:
    f = _Parts(k)
    begin, restore, write, write_one, write_odd, blank = (
        f.begin, f.restore, f.write, f.write_one, f.write_odd, f.blank
    )  # fmt: skip
    lanes, width, step, group = k.lanes, k.group * k.lanes, k.step, k.group
    samples, classes, slices_at = k.at["samples"], k.at["classes"], k.at["slices"]

    def spread(a):  # type: ignore[no-untyped-def]
        slices, member = a[slices_at], cuda.threadIdx.x
        for slot in range(cuda.blockIdx.x, a[samples] * slices, cuda.gridDim.x):
            r, piece = slot // slices, slot % slices
            p, t, kind, head, vectors = begin(a, r)
            if kind == LIVE:
                steps = (vectors * lanes + step - 1) // step
                low = head + (steps * piece // slices) * step
                stop = min(head + (steps * (piece + 1) // slices) * step, head + vectors * lanes)
                outcome = restore(a, a[samples] * slices + r)
                own = outcome[:3]
                if piece == 0:
                    write_odd(a, p, member, t, outcome, own)
                full_steps = max(stop - low, 0) // step
                first = low + member * lanes
                for c in range(first, first + full_steps * step, step):
                    write(a, p, c, t, outcome, own)
                for c in range(first + full_steps * step, stop, width):
                    write_one(a, p, c, t, outcome, own)
            else:
                for c in range(piece * group + member, a[classes], slices * group):
                    blank(a, p, c, kind)

    return spread
