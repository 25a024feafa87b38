"""Softmax cross-entropy without options over samples that lie side by side for each class (images, transposed arrays):
class by class, in long pieces of memory, read once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import storage
from .softmax_exp import ShiftedExp
from .softmax_shared import BYTES, SharedReferenceKernel
from .targets import MAX_CHOSEN
from .values import F32, I32, LANES, Value, full, loop, when

UNROLL = 4  # classes whose exponentials are added before their sum is: it waits in the nearest cache
# Logits of a block: memory is read in long pieces, which stay in L2 until the targets' have been picked. With a
# gradient their exponentials wait as well, in L1, and while it is written the next block's logits are asked for.
BLOCK_LOGITS, WITH_GRADIENT = 1 << 15, 1 << 13
MAX_BLOCK = 4096  # samples of a block, whose sums stay in L1


def block_of(classes: int, gradient: bool) -> int:
    """How many samples make a block."""
    logits = WITH_GRADIENT if gradient else BLOCK_LOGITS
    return max(LANES, min(MAX_BLOCK, logits // classes // LANES * LANES))


class PlanesKernel(SharedReferenceKernel):
    """Scratch holds a block's sums, behind them its targets' logits, and, where gradients are wanted, its exponentials
    class by class. Of few classes the number is compiled in, and all are taken at once."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.first = [self.begin + c for c in range(self.v.few or 1)]  # classes that a sum begins with
        self.early = bool(self.v.few)

    def place(self, i: Value, c: Value) -> Value:
        """Where sample i's logit of class c is in memory."""
        return self.a["logits"] + i * self.size + c * self.a["logits_step"]

    def ask_for(self, place: Value) -> None:
        """Ask for what lies at this place of the next block, into L2: (16, 21, 256, 256) takes 3.2 ms so, 3.4 where
        what lies 512 bytes ahead is asked for, and with its gradient 5.3, not 6.6."""
        (place + self.tile * self.size).prefetch(level=2)

    def kept(self, j: Value, c: Value) -> Value:
        """Where the exponential of class c of the block's j-th sample is."""
        return self.scratch + ((c + 2) * self.tile + j) * BYTES

    def exponentiate(self, start: Value, stop: Value) -> tuple[ShiftedExp, Value]:
        shifted = self.exponential_for(self.place(start, self.begin))

        def add(classes: Sequence[Value], seen: Value, fresh: bool = False) -> list[Value]:
            def sixteen(j: Value, seen: Value) -> list[Value]:
                logits = []

                def factors(c: Value) -> tuple[Value, Value]:
                    nonlocal seen
                    at = self.place(start + j, c)
                    self.ask_for(at)
                    logits.append(self.logits(at))
                    p, scale, seen = shifted.watched(logits[-1], seen)
                    return p, scale

                part = self.added(j, classes, factors)
                total = part if fresh else (self.scratch + j * BYTES).load(F32, LANES) + part
                (self.scratch + j * BYTES).store(total)
                if self.early and self.v.few <= MAX_CHOSEN:
                    self.choose_early(start + j, j, logits)
                elif self.early:
                    self.pick_early(start + j, j)
                return [seen]

            return loop(self.begin, stop - start, LANES, [seen], sixteen)[1]

        seen = add(self.first, full(self.b, I32, LANES), fresh=True)
        (seen_of_all,) = self.by_turns(seen, add)
        return shifted, ~shifted.overflowed(seen_of_all)

    def by_turns(self, state: Sequence[Value], body: Callable[..., Sequence[Value]]) -> list[Value]:
        """`state = body(classes, *state)` for all classes but the first ones: some together, then what is left."""
        if self.v.few:
            return list(state)

        def turn(many: int) -> Callable[..., Sequence[Value]]:
            return lambda c, *state: body([c + k for k in range(many)], *state)

        c, state = loop(self.begin + 1, self.classes, UNROLL, state, turn(UNROLL))
        return loop(c, self.classes, 1, state, turn(1))[1]

    def added(self, j: Value, classes: Sequence[Value], factors: Callable[[Value], tuple[Value, Value]]) -> Value:
        """The sum of some exponentials, by themselves: of a long sum they would round off more."""
        terms = []
        for c in classes:
            p, scale = factors(c)
            if self.v.grad:
                self.kept(j, c).store(p * scale)
            terms.append((p, scale))
        (p, scale), *others = terms
        total = p * scale
        for p, scale in others:
            total = p.fma(scale, total)
        return total

    def over_classes(self, state: Sequence[Value], body: Callable[..., Sequence[Value]]) -> list[Value]:
        return loop(self.begin, self.classes, 1, state, body)[1]

    def again(self, i: Value, j: Value) -> tuple[Value, Value, Value]:
        def larger(c: Value, highest: Value) -> list[Value]:
            z = self.logits(self.place(i, c))
            return [(z > highest).select(z, highest)]

        (highest,) = self.over_classes([full(self.b, F32, LANES, float("-inf"))], larger)

        offset, count = self.own_reference(highest)
        exponential = ShiftedExp(count, short=True, capped=False)

        def add(classes: Sequence[Value]) -> Value:
            return self.added(j, classes, lambda c: exponential.factors(self.logits(self.place(i, c)) - offset))

        (total,) = self.by_turns([add(self.first)], lambda classes, total: [total + add(classes)])
        return offset, count, total

    def keep(self, i: Value, j: Value, t: Value, share: Value, own: Value, usual: Value) -> None:
        if self.v.few:
            self.write_at_once(i, j, t, share, own, usual)
            return
        (self.scratch + j * BYTES).store(share)  # whose sums have been read

        def clear() -> None:
            def some(c: Value) -> list[Value]:
                self.kept(j, c).store((own == 0.0).select(0.0, self.kept(j, c).load(F32, LANES)))
                return []

            self.over_classes([], some)

        when(~usual, clear)
        for k in range(LANES):
            at = self.kept(j + k, self.targets.clamped(i + k))
            at.store(at.load(F32) - own.lane(k))

    def write_at_once(self, i: Value, j: Value, t: Value, share: Value, own: Value, usual: Value) -> None:
        """The gradients of samples i .. i + 16, of few classes."""
        kind = self.v.grad or ""
        target = self.a["grad"] + i * storage.itemsize(kind)

        def written(stream: bool, all_live: bool) -> None:
            for c in range(self.v.few):
                self.ask_for(self.place(i, self.begin + c))
                e = self.kept(j, self.begin + c).load(F32, LANES)
                gradient = self.gradients(e, c, t, own, share, all_live)
                storage.store(target + c * self.a["grad_step"], gradient, kind, stream)

        self.written_at_once(target | self.a["grad_step"], usual, written)

    def hand_over(self, start: Value, stop: Value) -> None:
        if self.v.few:  # `keep` has written them
            return
        kind = self.v.grad or ""
        size = storage.itemsize(kind)

        def written(stream: bool) -> None:
            def one(c: Value) -> None:
                out = self.a["grad"] + start * size + c * self.a["grad_step"]

                def sixteen(j: Value) -> None:
                    self.ask_for(self.place(start + j, c))
                    gradient = self.kept(j, c).load(F32, LANES) * (self.scratch + j * BYTES).load(F32, LANES)
                    storage.store(out + j * size, gradient, kind, stream)

                loop(self.begin, stop - start, LANES, [], sixteen)

            loop(self.begin, self.classes, 1, [], one)

        self.streamed((self.a["grad"] + start * size) | self.a["grad_step"], written)
