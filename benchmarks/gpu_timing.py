"""Device time of calls: CUDA events around batches that are queued behind a sleeping kernel, contenders in turn.

The sleep holds the GPU until a whole batch is queued, so that what is timed is the device and not Python. Input sets
rotate, so that no call finds its input in the L2 cache.
"""

from __future__ import annotations

import gc
import logging
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from gpu_arrays import Pair, tensors
from gpu_cases import HOST_CONTENDERS, Work
from gpu_contenders import Contender, NotHereError, Truth, contender

BATCH_MS = 2.0  # a round of one contender takes about this long,
MOST = 40  # of at most this many calls: a launch queue holds about a thousand kernels
LONGEST_SLEEP_MS = 30.0
MAX_SETS = 512

Result = dict[str, Any]


@cache
def cycles_per_ms() -> float:
    """Of the kernel that sleeps."""
    torch.cuda._sleep(1 << 20)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.cuda._sleep(1 << 26)
    end.record()
    end.synchronize()
    return float((1 << 26) / start.elapsed_time(end))


def sleep(ms: float) -> None:
    """Keep the current stream busy."""
    torch.cuda._sleep(int(ms * cycles_per_ms()))


def sets_of(nbytes: int) -> int:
    """How many input sets fill the L2 cache five times over, at least two."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return min(MAX_SETS, max(2, -(-5 * l2 // nbytes)))


class Clock:
    """Times one contender, batch after batch."""

    def __init__(self, contender: Contender, sets: int) -> None:
        self.contender, self.sets, self.next = contender, sets, 0
        self.times: list[float] = []
        self.queued = 0  # batches that were queued whole before the first call began
        for _ in range(3):
            self._wait(self._calls(1))
        host, total = self._estimate(5)
        self.repeats = max(1, min(MOST, round(BATCH_MS / total)))
        self.sleep_ms = min(LONGEST_SLEEP_MS, 0.2 + 1.5 * self.repeats * host)

    def _calls(self, count: int) -> Any:
        result = None
        for _ in range(count):
            result = self.contender.run(self.next % self.sets)
            self.next += 1
        return result

    def _wait(self, result: Any) -> None:
        if self.contender.wait:
            self.contender.wait(result)
        torch.cuda.synchronize()

    def _estimate(self, count: int) -> tuple[float, float]:
        """Milliseconds of a call on the host, and until the GPU has done it."""
        start = time.perf_counter()
        result = self._calls(count)
        host = time.perf_counter() - start
        self._wait(result)
        return host / count * 1e3, (time.perf_counter() - start) / count * 1e3

    def round(self) -> None:
        """One batch."""
        if self.contender.wait:
            self.times.append(self._estimate(self.repeats)[1])
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        sleep(self.sleep_ms)
        start.record()
        self._calls(self.repeats)
        end.record()
        self.queued += not start.query()
        end.synchronize()
        self.times.append(start.elapsed_time(end) / self.repeats)

    def result(self) -> Result:
        """The median, how far the quartiles are apart, and whether the time is the device's alone."""
        low, middle, high = statistics.quantiles(self.times, n=4)
        return {
            "ms": middle,
            "spread": (high - low) / middle,
            "clock": "host" if self.contender.wait else "events",
            "device_time_alone": 2 * self.queued > len(self.times),
            "calls_a_round": self.repeats,
            "rounds": len(self.times),
        }


def reason(error: Exception) -> str:
    """One short line for a table."""
    if "out of memory" in str(error).lower() or "RESOURCE_EXHAUSTED" in str(error):
        return "out of memory"
    if isinstance(error, NotHereError | ValueError):
        return str(error)[:200]
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]


def alive() -> bool:
    """Whether the CUDA context still works: after some errors nothing in the process does."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def interleaved(clocks: dict[str, Clock], rounds: int) -> dict[str, Result]:
    """Rounds of all contenders in an order that rotates; who fails on the way drops out."""
    results: dict[str, Result] = {}
    names = list(clocks)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if name in results:
                continue
            try:
                clocks[name].round()
            except Exception as error:
                logging.exception("%s", name)
                results[name] = {"ms": None, "error": reason(error)}
    return results | {name: clock.result() for name, clock in clocks.items() if name not in results}


def prepared(name: str, work: Work, sets: list[Pair], truth: Truth) -> Contender:
    """A contender whose first result was right."""
    made = contender(name, work, sets)
    truth.check(name, made.run(0))
    return made


def measure(work: Work, rounds: int) -> dict[str, Result]:
    """Every contender's time, or why there is none."""
    sets = [tensors(work) for _ in range(sets_of(work.nbytes))]
    truth = Truth(work, sets[0])
    failed: dict[str, Result] = {}
    clocks: dict[str, Clock] = {}
    for name in work.contenders:
        try:
            clocks[name] = Clock(prepared(name, work, sets, truth), len(sets))
        except Exception as error:
            logging.exception("%s: %s", work.name, name)
            failed[name] = {"ms": None, "error": reason(error)}
    timed = interleaved(clocks, rounds) if clocks else {}
    return {name: (failed | timed)[name] for name in work.contenders}


def walk(work: Work) -> dict[str, Result]:
    """The dry run: every contender's code once, on a tiny input, with nothing timed."""
    work = work.tiny()
    sets = [tensors(work) for _ in range(2)]
    truth = Truth(work, sets[0])
    results: dict[str, Result] = {}
    for name in work.contenders:
        results[name] = {"ms": None}
        try:
            prepared(name, work, sets, truth).run(1)
        except NotHereError as absent:
            logging.info("%s: %s", name, absent)
        except Exception as error:
            logging.exception("%s: %s", work.name, name)
            results[name]["error"] = reason(error)
    return results


def ceilings(rounds: int) -> dict[str, Any]:
    """GB/s of a copy on the device, read plus written, and of a sum that only reads; 1 GiB, float32."""
    sets = [(torch.randn(1 << 28, device="cuda"), torch.empty(1 << 28, device="cuda")) for _ in range(2)]
    nbytes = sets[0][0].nbytes
    clocks = {
        "copy": Clock(Contender(lambda k: sets[k][1].copy_(sets[k][0])), 2),
        "read": Clock(Contender(lambda k: sets[k][0].sum()), 2),
    }
    found = interleaved(clocks, rounds)
    return {
        "copy_gbs": 2 * nbytes / found["copy"]["ms"] / 1e6,
        "read_gbs": nbytes / found["read"]["ms"] / 1e6,
        "bytes_read": nbytes,
        "copy_spread": found["copy"]["spread"],
        "read_spread": found["read"]["spread"],
    }


def host_times(work: Work, count: int = 1000) -> dict[str, Result]:
    """Milliseconds until a call returns with its kernels launched, median of `count`; the GPU is never behind by more
    than 50 calls, and waiting for it is not timed."""
    sets = [tensors(work)]
    truth = Truth(work, sets[0])
    results: dict[str, Result] = {}
    for name in HOST_CONTENDERS:
        try:
            run = prepared(name, work, sets, truth).run
            times = _host_times(run, count)
            low, middle, high = statistics.quantiles(times, n=4)
            results[name] = {"ms": middle, "spread": (high - low) / middle, "clock": "host", "rounds": count}
        except Exception as error:
            logging.exception("%s: %s", work.name, name)
            results[name] = {"ms": None, "error": reason(error)}
    return results


def _host_times(run: Callable[[int], Any], count: int) -> list[float]:
    times = []
    for _ in range(50):
        run(0)
    gc.disable()
    try:
        for number in range(count):
            if number % 50 == 0:
                torch.cuda.synchronize()
            start = time.perf_counter()
            run(0)
            times.append((time.perf_counter() - start) * 1e3)
    finally:
        gc.enable()
        torch.cuda.synchronize()
    return times
