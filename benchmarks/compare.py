"""The README's table: medians of interleaved calls, beside the speed at which this machine reads memory.

python benchmarks/compare.py [part of a case's name ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import record
import torch
from cases import CASES, CONTENDERS, Call

import fastloss
from fastloss.kernels.compiler import callable_of
from fastloss.kernels.values import F32, I64, LANES, Value, full, loop

ROUNDS = 11
SHORTEST = 2e-3  # seconds


def _emit_sum(start: Value, n: Value, out: Value) -> None:
    """Sum of n float32, eight vectors at a time: bound by memory alone."""

    def body(i: Value, *sums: Value) -> list[Value]:
        return [s + (start + (i + k * LANES) * 4).load(F32, LANES) for k, s in enumerate(sums)]

    zero = full(n.b, F32, LANES)
    _, sums = loop(Value(n.b, I64(0)), n, 8 * LANES, [zero] * 8, body)
    out.store(sum(sums[1:], sums[0]).sum())


def reader(nbytes: int) -> Call:
    """A call that reads `nbytes` on all threads and does next to nothing with them."""
    data, out = np.ones(nbytes // 4, np.float32), np.zeros(1, np.float32)
    summed = callable_of(_emit_sum, 3, None)
    threads = fastloss.get_num_threads()
    pool = ThreadPoolExecutor(threads)
    share = data.size // threads

    def read() -> None:
        list(pool.map(lambda k: summed(data.ctypes.data + 4 * k * share, share, out.ctypes.data), range(threads)))

    return read


def _repeats(call: Call) -> int:
    """How many calls take `SHORTEST`: one, unless it is a tiny one."""
    call()
    start = time.perf_counter()
    call()
    return max(1, round(SHORTEST / (time.perf_counter() - start)))


def medians(calls: dict[str, Call]) -> dict[str, float]:
    """Seconds of each call. Other libraries' threads spin for a while, and the first parallel call after a sleep pays
    for waking a core: so sleep, one untimed call, then timed ones for at least `SHORTEST`, all contenders in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats = {name: _repeats(call) for name, call in calls.items()}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            time.sleep(0.02)
            call()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(values) for name, values in times.items()}


def cpu_name() -> str:
    """As the processor calls itself, with LLVM's name for its kind."""
    kind = fastloss.runtime.versions()["cpu"]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or kind
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]} ({kind})" if models else kind


def row_of(work: str, seconds: dict[str, float], nbytes: int) -> record.Row:
    """For the JSON: `seconds` by contender, with the limit's where it was timed."""
    limit = nbytes / seconds["limit"] / 1e9 if "limit" in seconds else None
    results: dict[str, dict[str, float | None]] = {
        name: {"ms": seconds[name] * 1e3} for name in reversed(CONTENDERS) if name in seconds
    }
    return record.row(work, nbytes, results, limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="part of a case's name")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures for benchmarks/report.py too")
    options = parser.parse_args()
    names = {"fastloss": fastloss.__version__, **{name: version(name) for name in ("numpy", "torch", "numba")}}
    names["Python"] = platform.python_version()
    print(", ".join(f"{name} {release}" for name, release in names.items()))
    threads, cpu = fastloss.get_num_threads(), fastloss.runtime.versions()["cpu"]
    print(f"{threads} threads, {cpu}, medians of {ROUNDS}, milliseconds\n")
    print("| work | NumPy | torch | fastloss | torch / fastloss | GB/s | of the read limit |")
    print("|---|---|---|---|---|---|---|")
    torch.set_num_threads(threads)
    document = record.header("cpu", {"name": cpu_name(), "threads": threads}) | {"rounds": ROUNDS}
    for case in CASES:
        if options.parts and not any(part in case.name for part in options.parts):
            continue
        calls, nbytes = case.build()
        large = nbytes > 1 << 25
        result = medians(calls | ({"limit": reader(nbytes)} if large else {}))
        cells = [f"{result[name] * 1e3:.3g}" if name in result else "" for name in CONTENDERS]
        limit = f"{result['limit'] / result['fastloss']:.2f}" if large else ""
        ratio, speed = result["torch"] / result["fastloss"], nbytes / result["fastloss"] / 1e9
        print(f"| {case.name} | {' | '.join(cells)} | {ratio:.2g} | {speed:.2g} | {limit} |", flush=True)
        document["rows"].append(row_of(case.name, result, nbytes))
        if options.json:
            record.save(document, options.json)
        del calls
        gc.collect()
    document["complete"] = True
    if options.json:
        record.save(document, options.json)


if __name__ == "__main__":
    main()
