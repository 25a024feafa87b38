"""Threads change no bit of any result, however few chunks there are for them.

The file is also the script that its test runs in fresh processes: `python test_scheduling.py`.
"""

import ctypes
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastloss
from fastloss.backends import cpu
from fastloss.backends.cpu import CHUNK, PARALLEL_BYTES, Task
from table import ROWS, Rng, Row, name_of

HERE = Path(__file__).resolve()


def task_of(row: Row, shape: tuple[int, ...], rng: Rng) -> tuple[object, Task]:
    """A call that has run, which keeps its arrays, and its task."""
    sample = row.draw(rng, shape)
    call = row.function.call(sample.input, sample.target)
    call.evaluate()
    assert call.task is not None
    return call, call.task


def digests() -> str:
    """A digest of each loss's sums on threads, for one chunk and more."""
    rng = np.random.default_rng(5)
    found = []
    for row in ROWS:
        for shape in ((3, 4), (2000, 20), (90, 1000), (9000, 5)):
            _, task = task_of(row, shape, rng)
            found.append(hashlib.sha256(task.entry((), parallel=True)()).hexdigest())
    return "\n".join(found)


if __name__ == "__main__":
    print(digests())


@pytest.mark.parametrize("row", ROWS, ids=name_of)
@pytest.mark.parametrize("shape", [(3, 4), (1, 3000), (2000, 20), (90, 1000), (9000, 5)], ids=str)
def test_threads_and_none(row: Row, shape: tuple[int, ...], rng: Rng) -> None:
    _, task = task_of(row, shape, rng)
    assert task.entry((), parallel=True)() == task.entry(())()


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_any_number_of_threads(threads: int) -> None:
    """More than the machine has, and more than there are chunks."""
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])
    environment = os.environ | {"NUMBA_NUM_THREADS": str(threads), "PYTHONPATH": path}
    done = subprocess.run([sys.executable, str(HERE)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == digests()


def test_small_work_stays_on_one_thread(rng: Rng) -> None:
    """Of the cheapest loss: from `PARALLEL_BYTES` on, and from two chunks on."""
    for elements in (CHUNK, PARALLEL_BYTES // 8 - 1, PARALLEL_BYTES // 8):
        x, y = rng.uniform(size=(2, elements)).astype(np.float32)
        call = fastloss.mse_loss.call(x, y)
        call.evaluate()
        assert call.task is not None
        assert call.task.parallel == (8 * elements >= PARALLEL_BYTES)


def test_a_driver_without_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(lambda nbytes: 0)
    address = ctypes.cast(nothing, ctypes.c_void_p).value
    monkeypatch.setattr(cpu, "memory", lambda: {"allocate": address, "free": address})
    x = np.ones((5, 7), np.float32)
    with pytest.raises(MemoryError, match="scratch"):
        fastloss.cross_entropy(x, np.zeros(5, np.int64), ignore_index=-7)
    with pytest.raises(MemoryError, match="scratch"):
        fastloss.mse_loss(x, x, reduction="sum")
