"""A scheduler for Numba's CUDA simulator: one thread runs at a time, until it waits for others.

Numba's own polls all threads of a block while they compete for the interpreter: 3 s for a block of 64, here 20 ms. It
also knows no warps, whose lanes meet here at a shuffle.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
from numba.cuda.simulator import kernel as _simulator

from .device import WARP


class _Thread(_simulator.BlockThread):  # type: ignore[misc,name-defined]
    """A CUDA thread: it runs when the scheduler lets it, and gives control back when it waits or ends."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.go, self.done = threading.Semaphore(0), False
        self.meeting: Any = None  # what it waits for
        self.given: Any = None  # to the lanes of its warp

    def run(self) -> None:
        self.go.acquire()
        try:
            super().run()
        finally:
            self.done = True
            self._manager.control.release()

    def wait(self, meeting: Any) -> None:
        """Until all who must be there wait for the same."""
        self.meeting = meeting
        self._manager.control.release()
        self.go.acquire()
        if self.abort:
            raise RuntimeError("another thread of this block failed")

    def syncthreads(self) -> None:
        self.wait("block")

    def exchange(self, value: Any, mask: int) -> Any:
        """What the lane whose number differs from mine in the bits of `mask` gives."""
        self.given = value
        self.wait("warp")
        found = self._manager.threads[self.thread_id ^ mask].given
        self.wait("warp")  # nobody gives anew before all have read
        return found


class _Block(_simulator.BlockManager):  # type: ignore[misc,name-defined]
    """The threads of a block."""

    def run(self, grid_point: Any, *arguments: Any) -> None:
        self.control = threading.Semaphore(0)
        self.memory: dict[str, Any] = {}
        self.threads = [
            _Thread(lambda: self._f(*arguments), self, grid_point, point, self._debug)
            for point in np.ndindex(*self._block_dim)
        ]
        for thread in self.threads:
            thread.start()
        waiting: set[int] = set()
        while not all(thread.done for thread in self.threads):
            ready = [t for t in self.threads if not t.done and t.thread_id not in waiting]
            for thread in ready:
                thread.go.release()
                self.control.acquire()
                if thread.exception:
                    self._abort()
                    raise thread.exception[0].with_traceback(thread.exception[1])
                if not thread.done:
                    waiting.add(thread.thread_id)
            waiting -= self._released(waiting)

    def _released(self, waiting: set[int]) -> set[int]:
        """Who may go on: a warp or the block that has met; a thread that has ended is not waited for."""
        alive = [t for t in self.threads if not t.done]
        if all(t.meeting == "block" for t in alive):
            return waiting
        free: set[int] = set()
        for warp in {t.thread_id // WARP for t in alive}:
            lanes = [t for t in alive if t.thread_id // WARP == warp]
            if all(t.meeting == "warp" for t in lanes):
                free.update(t.thread_id for t in lanes)
        if alive and not free:
            raise RuntimeError("deadlock: threads of one warp wait for different things")
        return free

    def _abort(self) -> None:
        for thread in self.threads:
            if not thread.done:
                thread.abort = True
                thread.go.release()
                self.control.acquire()


def launch(kernel: Any, blocks: int, threads: int, arguments: Iterable[int]) -> None:
    """Run a kernel, a Python function over a tuple of integers."""
    from numba import cuda

    original, _simulator.BlockManager = _simulator.BlockManager, _Block
    try:
        cuda.jit(kernel)[blocks, threads](tuple(arguments))
    finally:
        _simulator.BlockManager = original
