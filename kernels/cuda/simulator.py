"""A scheduler for Numba's CUDA simulator: the threads of a block take turns, each until it waits for the others.

Numba's own gives each CUDA thread one of the operating system's, and polls them: seconds for a block of 64, which as
greenlets takes milliseconds. It also knows no warps, whose lanes meet here at a shuffle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from greenlet import getcurrent, greenlet
from numba import cuda
from numba.cuda.simulator import kernel as _numba
from numba.cuda.simulator.kernelapi import Dim3

from .device import WARP


class Thread(greenlet):
    """A CUDA thread."""

    def __init__(self, block: Block, number: int, place: Sequence[int]) -> None:
        super().__init__(block.call)
        self.block, self.number = block, number
        self.threadIdx, self.blockIdx = Dim3(*place), Dim3(*block.place)
        self.waits_for = ""  # "block" or "warp"
        self.given: Any = None  # to the other lanes of its warp

    def wait(self, others: str) -> None:
        """Until all threads of the block, or of the warp, wait likewise."""
        self.waits_for = others
        self.parent.switch()

    def exchange(self, value: Any, mask: int) -> Any:
        """What the lane whose number differs from mine in the bits of `mask` gives."""
        self.given = value
        self.wait("warp")
        found = self.block.threads[self.number ^ mask].given
        self.wait("warp")  # nobody gives anew before all have read
        return found


class Block(_numba.BlockManager):
    """The threads of a block."""

    def run(self, grid_point: Sequence[int], *arguments: Any) -> None:
        """Run the kernel to its end in every thread."""
        self.place = grid_point
        self.call = lambda: self._f(*arguments)
        self.memory: dict[str, Any] = {}  # shared, by name
        points = np.ndindex(*self._block_dim)
        self.threads = [Thread(self, number, point) for number, point in enumerate(points)]
        ready = self.threads
        while ready:
            for thread in ready:
                thread.switch()
            ready = self._met([thread for thread in self.threads if not thread.dead])

    @staticmethod
    def _met(alive: list[Thread]) -> list[Thread]:
        """Who may go on: all of a warp, or of the block. Threads that have ended are not waited for."""
        if all(thread.waits_for == "block" for thread in alive):
            return alive
        warps: dict[int, list[Thread]] = {}
        for thread in alive:
            warps.setdefault(thread.number // WARP, []).append(thread)
        free = [lanes for lanes in warps.values() if all(lane.waits_for == "warp" for lane in lanes)]
        if not free:
            raise RuntimeError("deadlock: the threads of a warp wait for different things")
        return [lane for lanes in free for lane in lanes]


def current() -> Thread:
    """The CUDA thread that runs."""
    found: Thread = getcurrent()
    return found


def launch(kernel: Any, blocks: int, threads: int, arguments: Sequence[int]) -> None:
    """Run a kernel, a Python function over a tuple of integers."""
    kept, _numba.BlockManager = _numba.BlockManager, Block
    try:
        cuda.jit(kernel)[blocks, threads](tuple(arguments))
    finally:
        _numba.BlockManager = kept
