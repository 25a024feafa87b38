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
from .device import WARP, Int, barrier, exchange_all, integer, larger, loop, shared, smaller, thread_index, when
from .memory import load, load_lanes, store
from .softmax import Outcome, SoftmaxKernel

OWN = 3  # what is kept of the target index: logit, slope of the cap, weight
SAVED = OWN + len(Outcome._fields)
SAVED_BYTES = 8 * SAVED  # what `part` leaves of a slice, and `merge` of a row
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

    @property
    def differentiates(self) -> bool:
        """Whether gradients are written."""
        return bool(self.grad or self.grad_target)

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
        q, w = ([None] * lanes if x is None else list(x) for x in (probabilities, weights))
        return [self.mass_of(a, q[k], w[k]) for k in range(lanes)]

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

    # the kernel

    def build(self) -> Any:
        """The kernel of this phase."""
        from .row_phases import PHASES

        return PHASES[self.phase](self)
