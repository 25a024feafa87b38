"""A fresh process to its first result, with the caches warm and with empty ones; and what each kernel takes to compile.

python benchmarks/startup.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record

PROCESSES, COLD_PROCESSES = 7, 3
QUICK_PROCESSES, QUICK_COLD_PROCESSES = 3, 1
WARM_GOAL, COLD_GOAL = {"ms": 800.0}, {"ms": 4000.0}

# What the process runs, and the arrays that it calls it with.
WORKS = {
    "cross_entropy float32 32 x 10": ("cross_entropy", "np.ones((32, 10), np.float32), np.zeros(32, np.int64)"),
    "mse_loss float32 32 x 10": ("mse_loss", "np.ones((32, 10), np.float32), np.zeros((32, 10), np.float32)"),
}
PACKAGES = ("numpy", "fastloss", "llvmlite", "numba", "scipy")
STAGES = ("Python", *(f"import {package}" for package in PACKAGES), "kernels and the call")

# Run by a process of its own, which imports nothing before; arguments: start, function, arrays. The time of an import
# belongs to the package that is imported, without what that imports of the others.
PROCESS = f"""
import sys, time
began = time.monotonic()
import builtins
seconds, stack = dict.fromkeys({PACKAGES!r}, 0.0), []
plain, mark = builtins.__import__, [began]
def spend(package):
    now = time.monotonic()
    if package:
        seconds[package] += now - mark[0]
    mark[0] = now
def timed(name, globals=None, locals=None, fromlist=(), level=0):
    root = (name if level == 0 else (globals or {{}}).get("__package__") or "").partition(".")[0]
    if root not in seconds or stack[-1:] == [root]:
        return plain(name, globals, locals, fromlist, level)
    spend(stack[-1] if stack else None)
    stack.append(root)
    try:
        return plain(name, globals, locals, fromlist, level)
    finally:
        spend(stack.pop())
builtins.__import__ = timed
import numpy as np
import fastloss
result = float(getattr(fastloss, sys.argv[2])(*eval(sys.argv[3])))
builtins.__import__ = plain
done = time.monotonic()
import json
print(json.dumps([done - float(sys.argv[1]), began - float(sys.argv[1]), *seconds.values()]))
"""

# Every item of `fastloss warmup`'s common set in one process, without a cache: what several need counts for the first.
COMPILING = """
import json
from fastloss.warmup import compiled_kernels, items
found, before = [], len(compiled_kernels())
for item in items():
    seconds = item.run()
    after = len(compiled_kernels())
    found.append((str(item), seconds, after - before))
    before = after
print(json.dumps(found))
"""


def _run(code: str, cache: Path, *arguments: str) -> Any:
    """What a fresh process prints as JSON; `cache` holds all of its kernels."""
    folders = {"FASTLOSS_CACHE_DIR": str(cache), "NUMBA_CACHE_DIR": str(cache / "numba")}
    paths = os.pathsep.join(filter(None, [str(record.ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | folders | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return json.loads(done.stdout)


def first_result(work: str, cache: Path) -> list[float]:
    """Seconds from the start of a process to its first result, and of `STAGES`."""
    name, arrays = WORKS[work]
    total, *stages = _run(PROCESS, cache, repr(time.monotonic()), name, arrays)
    return [total, *stages, total - sum(stages)]


def _medians(runs: list[list[float]]) -> list[float]:
    return [statistics.median(column) * 1e3 for column in zip(*runs, strict=True)]


def rows(document: record.Document, quick: bool = False) -> list[record.Row]:
    """Of a result: a row for each work, warm and without caches. `document` gets the stages and the kernels too."""
    warm, cold = (QUICK_PROCESSES, QUICK_COLD_PROCESSES) if quick else (PROCESSES, COLD_PROCESSES)
    made: list[record.Row] = []
    stages: dict[str, list[float]] = {}

    def add(work: str, runs: list[list[float]], goal: record.Goal) -> None:
        total, *parts = _medians(runs)
        stages[work] = parts
        results = {record.OURS: {"ms": total, "rounds": len(runs)}}
        made.append(record.row(work, None, results, goal=goal, section="startup", limit=None))

    with tempfile.TemporaryDirectory() as folder:
        for work in WORKS:
            caches = [Path(folder, f"{work} {k}") for k in range(cold)]
            cold_runs = [first_result(work, cache) for cache in caches]
            add(f"fresh process, warm cache: {work}", [first_result(work, caches[0]) for _ in range(warm)], WARM_GOAL)
            add(f"fresh process, empty caches: {work}", cold_runs, COLD_GOAL)
        document["startup"] = {"stages": list(STAGES), "ms": stages}
        if not quick:
            document["compiling"] = _run(COMPILING, Path(folder, "compiling"))
    return made


def stages_table(document: record.Document) -> list[list[str]]:
    """Milliseconds of each stage; the first line is the head."""
    found = document.get("startup")
    if not found:
        return []
    lines = [[work, *(f"{ms:,.0f}" for ms in parts)] for work, parts in found["ms"].items()]
    return [["milliseconds", *found["stages"]], *lines]


def compiling_table(document: record.Document) -> list[list[str]]:
    """Seconds and kernels of each call; the first line is the head."""
    found = document.get("compiling")
    lines = [[name, f"{seconds:.2f}", str(kernels)] for name, seconds, kernels in found or ()]
    return [["first call without a cache", "seconds", "kernels"], *lines] if found else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer processes, no table of kernels")
    document: record.Document = {}
    for row in rows(document, parser.parse_args().quick):
        print(f"{row['work']:<60}  {record.time_cell(row):>6} ms  goal {record.goal_text(row)}: {record.verdict(row)}")
    for table in (stages_table(document), compiling_table(document)):
        print()
        for line in table:
            print("  ".join([f"{line[0]:<60}", *(f"{cell:>20}" for cell in line[1:])]))


if __name__ == "__main__":
    main()
