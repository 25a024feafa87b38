"""Class indices of any integer type: a class to look at, and what becomes of the sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from . import storage
from .values import CACHE_LINE, I32, I64, LANES, SIZE, Value, constant, iota, when

IGNORED, LIVE, INVALID = 0, 1, 2  # a sample's fate, an int32
# Where classes are one shard of the whole, int64 indices count from its first class; these are no class of it.
ELSEWHERE, LEFT_OUT = -1, -2


def within(left: Value) -> Value:
    """Which of sixteen lanes are among `left` samples."""
    return iota(left.b, LANES) < left.at_most(LANES).trunc(I32)


MAX_CHOSEN = 4  # vectors of which `chosen` is faster than loads from memory, one by one


def chosen(t: Value, vectors: Sequence[Value]) -> Value:
    """In each lane what lies there in the vector of class t."""
    found = vectors[0]
    for c, vector in enumerate(vectors[1:], 1):
        found = (t == c).select(vector, found)
    return found


class Targets(NamedTuple):
    """Where class indices lie, in which storage, and what they are compared with (int64)."""

    address: Value
    storage: str
    classes: Value
    ignore_index: Value
    sharded: bool = False  # whether a sample lives on whose class is ELSEWHERE, which then is its class

    def one(self, i: Value) -> tuple[Value, Value]:
        """Sample i's class as int64, 0 where it does not live, and its fate."""
        low, high = self._halves(self._at(i).load(storage.MEMORY[self.storage]))
        fate = self._fate(low, high)
        return (fate == LIVE).select(low.sext(I64) if self.sharded else low.zext(I64), 0), fate

    def clamped(self, i: Value) -> Value:
        """Sample i's class as int64, or any where it has none."""
        t = self.unchecked(i)
        return t.below(self.classes).select(t, 0)

    def unchecked(self, i: Value) -> Value:
        """Sample i's index as int64, which need not be a class."""
        raw = self._at(i).load(storage.MEMORY[self.storage])
        return raw if raw.elem == I64 else raw.zext(I64) if self._unsigned else raw.sext(I64)

    def sixteen(self, i: Value, left: Value) -> tuple[Value, Value, Value]:
        """The same of samples i .. i + 16, the classes as int32, of which all but `left` are IGNORED; and whether all
        of them live, as nearly always: who branches on that needs no masks."""
        low, high = self._sixteen_halves(i)
        narrow = low if high is None else (high == 0).select(low, -1)
        outside = ~narrow.below(self.classes.trunc(I32))
        usual = ~outside.any() & (left >= LANES) & ~self.ignore_index.below(self.classes)
        live = Value(i.b, constant(low.type, LIVE))

        def unusual() -> list[Value]:
            fate = within(left).select(self._fate(low, high), IGNORED)
            return [(fate == LIVE).select(low, 0), fate]

        t, fate = when(usual, lambda: [low, live], unusual)
        return t, fate, usual

    def low(self, i: Value) -> Value:
        """The classes of sixteen samples as int32; any number for those that have none."""
        return self._sixteen_halves(i)[0]

    def _sixteen_halves(self, i: Value) -> tuple[Value, Value | None]:
        elem = storage.MEMORY[self.storage]
        if elem != I64:
            return self._halves(self._at(i).load(elem, LANES))
        a, b = ((self._at(i) + k * LANES * SIZE[I32]).load(I32, LANES) for k in range(2))
        # by shuffles: half the instructions of comparing 64 bits
        low, high = (a.shuffle(b, range(k, 2 * LANES, 2)) for k in range(2))
        return low, high

    def prefetch(self, i: Value, level: int) -> None:
        """Ask for sixteen samples' indices."""
        for k in range(0, LANES * storage.itemsize(self.storage), CACHE_LINE):
            (self._at(i) + k).prefetch(level)

    def _at(self, i: Value) -> Value:
        return self.address + i * storage.itemsize(self.storage)

    @property
    def _unsigned(self) -> bool:
        return self.storage.startswith("u")

    def _halves(self, raw: Value) -> tuple[Value, Value | None]:
        """Class indices as int32, and their upper halves where they have 64 bits."""
        if raw.elem == I64:
            return raw.trunc(I32), (raw >> 32).trunc(I32)
        if raw.elem == I32:
            return raw, None
        return raw.zext(I32) if self._unsigned else raw.sext(I32), None

    def _fate(self, t: Value, high: Value | None) -> Value:
        ignore = self.ignore_index
        inside, ignored = t.below(self.classes.trunc(I32)), t == ignore.trunc(I32)
        if high is None:  # what does not fit the storage is none of its numbers
            bits = 8 * storage.itemsize(self.storage)
            low, top = (0, 2**bits - 1) if self._unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            ignored = ignored & ((ignore >= low) & (ignore <= top))
        else:
            inside = inside & (high == 0)
            ignored = ignored & (high == (ignore >> 32).trunc(I32))
            if self._unsigned:
                ignored = ignored & (high >= 0)
        if self.sharded:
            return ignored.select(Value(t.b, constant(t.type, IGNORED)), LIVE)
        live = (inside & ~ignored).select(Value(t.b, constant(t.type, LIVE)), IGNORED)
        return (inside | ignored).select(live, INVALID)
