"""Memory for large results, which is kept when they are gone: to touch new memory for the first time takes longer than
to write a gradient to it.

Value and gradient of (2,048, 32,000) logits take 17 ms so on two cores of Zen 4, and 29 in new memory. One piece is
kept, and marked as free: the system takes it back when it is short of memory.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from typing import Any

import numpy as np

# From here on C libraries ask the system for memory and give it back at once, so that every result touches it anew.
LARGE = 32 * 1024 * 1024
KEPT = 1  # pieces: as many as a training step has gradients of logits

# Linux alone has both: memory that is marked as free keeps its place until others need it.
_FREE, _HUGE = (getattr(mmap, name, None) for name in ("MADV_FREE", "MADV_HUGEPAGE"))
AVAILABLE = sys.platform == "linux" and _FREE is not None and _HUGE is not None

_kept: list[mmap.mmap] = []  # appended to and popped from by any thread, and by destructors at any moment: no lock


class _Piece:
    """Owns memory for as long as arrays are in it."""

    def __init__(self, memory: mmap.mmap) -> None:
        self.memory = memory
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (len(memory),), "data": (address, False)}

    def __del__(self, free: int | None = _FREE, kept: list[mmap.mmap] = _kept, keep: int = KEPT) -> None:
        if free is not None:
            self.memory.madvise(free)
            kept.append(self.memory)
            del kept[:-keep]


def _piece(nbytes: int) -> _Piece:
    """Memory that is kept and large enough, but not twice as large, or new memory."""
    while _kept:
        try:
            memory = _kept.pop()
        except IndexError:  # another thread was faster
            break
        if nbytes <= len(memory) < 2 * nbytes:
            return _Piece(memory)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if _HUGE is not None:
        memory.madvise(_HUGE)
    return _Piece(memory)


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """`numpy.empty`, in C order."""
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    if not AVAILABLE or nbytes < LARGE:
        return np.empty(shape, dtype)
    try:
        piece = _piece(nbytes)
    except OSError:  # NumPy tells of memory that is not there as everybody expects it
        return np.empty(shape, dtype)
    found: np.ndarray = np.asarray(piece)[:nbytes].view(dtype).reshape(shape)
    return found


def empty_like(array: np.ndarray, dtype: Any = None) -> np.ndarray:
    """`numpy.empty_like`, of whatever layout, as a plain array."""
    if array.flags.c_contiguous:
        return empty(array.shape, dtype or array.dtype)
    return np.empty_like(array, dtype=dtype, subok=False)
