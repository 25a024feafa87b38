"""When do threads pay? Times tasks on one thread and on Numba's, around the sizes from which threads are used.

    python benchmarks/scheduling.py [--threads 1 2 4] [--kinds mse cross_entropy-1000 ...]

Each number of threads has a process of its own. A line is a kind of loss and a size: bytes that are read and written,
chunks, microseconds on one thread and on all, and what fastloss chooses. The choices are `PARALLEL_BYTES`, `CHUNK`,
`LARGE_CHUNK` and `MANY` in fastloss/backends/cpu.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import fastloss
from fastloss.backends.cpu import Task

ROUNDS = 25
SPAN = 400e-6  # seconds that calls of one round take


def pointwise(name: str, gradient: bool = False) -> Callable[[int], tuple[Any, Task | None]]:
    """A call over so many elements, which keeps the arrays alive, and its task."""

    def make(elements: int) -> tuple[Any, Task | None]:
        rng = np.random.default_rng(elements)
        x, y = rng.uniform(size=(2, elements)).astype(np.float32)
        return _asked(getattr(fastloss, name).call(x, y), gradient)

    return make


def cross_entropy(classes: int, gradient: bool = False) -> Callable[[int], tuple[Any, Task | None]]:
    def make(elements: int) -> tuple[Any, Task | None]:
        rng = np.random.default_rng(elements)
        rows = max(1, elements // classes)
        x, y = rng.standard_normal((rows, classes)).astype(np.float32), rng.integers(0, classes, rows)
        return _asked(fastloss.cross_entropy.call(x, y), gradient)

    return make


def _asked(call: Any, gradient: bool) -> tuple[Any, Task | None]:
    """A call once it has run; with its results, which its task writes again."""
    kept = call.value_and_grad(["input"], None, [None]) if gradient else call.evaluate()
    return (call, kept), call.task


KINDS: dict[str, Callable[[int], tuple[Any, Task | None]]] = {
    "mse": pointwise("mse_loss"),
    "binary_cross_entropy": pointwise("binary_cross_entropy"),
    "mse-gradient": pointwise("mse_loss", gradient=True),
    "cross_entropy-3": cross_entropy(3),
    "cross_entropy-10": cross_entropy(10),
    "cross_entropy-100": cross_entropy(100),
    "cross_entropy-1000": cross_entropy(1000),
    "cross_entropy-10-gradient": cross_entropy(10, gradient=True),
    "cross_entropy-1000-gradient": cross_entropy(1000, gradient=True),
}
SIZES = tuple(2**k for k in range(13, 21))


def microseconds(*contenders: Callable[[], Any]) -> list[float]:
    """The least time of a call of each, interleaved."""
    repeats = []
    for contender in contenders:
        contender()
        start = time.perf_counter()
        contender()
        repeats.append(max(1, int(SPAN / (time.perf_counter() - start))))
    best = [float("inf")] * len(contenders)
    for _ in range(ROUNDS):
        for k, contender in enumerate(contenders):
            contender()  # wakes the threads
            start = time.perf_counter()
            for _ in range(repeats[k]):
                contender()
            best[k] = min(best[k], (time.perf_counter() - start) / repeats[k])
    return [1e6 * seconds for seconds in best]


def measure(kinds: list[str]) -> None:
    """Print a line of JSON for each kind and size: this process's number of threads."""
    for kind in kinds:
        for elements in SIZES:
            kept, task = KINDS[kind](elements)
            if task is None or task.chunks < 2:
                continue
            serial, threaded = microseconds(task.entry(()), task.entry((), parallel=True))
            fields = {"kind": kind, "bytes": task.nbytes, "chunks": task.chunks, "serial": serial, "parallel": threaded}
            print(json.dumps(fields | {"chosen": "parallel" if task.parallel else "serial"}), flush=True)
            del kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.kinds)
        return
    root = Path(__file__).resolve().parents[1]
    print(f"{'kind':28} {'threads':>7} {'KiB':>7} {'chunks':>6} {'serial us':>10} {'parallel us':>11}  chosen")
    for threads in arguments.threads:
        environment = os.environ | {"NUMBA_NUM_THREADS": str(threads), "PYTHONPATH": str(root)}
        command = [sys.executable, __file__, "--measure", "--kinds", *arguments.kinds]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        for line in map(json.loads, done.stdout.splitlines()):
            serial, threaded = line["serial"], line["parallel"]
            better = "serial" if threads == 1 or serial < threaded else "parallel"
            note = "" if line["chosen"] == better or threads == 1 else f", {better} is better"
            print(
                f"{line['kind']:28} {threads:7} {line['bytes'] / 1024:7.0f} {line['chunks']:6} {serial:10.1f} "
                f"{threaded:11.1f}  {line['chosen']}{note}"
            )


if __name__ == "__main__":
    main()
