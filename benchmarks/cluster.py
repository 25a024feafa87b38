"""A Zarr store larger than its workers, evaluated on a Dask cluster of which one worker is killed midway.

    python benchmarks/cluster.py            8 GB, two workers of one thread, about three minutes and 8 GB of disk
    python benchmarks/cluster.py --gb 1     smaller

Reads the store once. Prints what the workers took at most (resident memory, twenty times a second) and how far the
value is from a float64 sum over NumPy's own logarithms. The store goes to a temporary folder and is deleted.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import zarr
from distributed import LocalCluster

CLASSES = 1000
BASE_ROWS = 16_384  # 66 MB: the store repeats them in other orders, with other targets
ZARR_ROWS = 1024  # of a chunk; fewer in a small store, so that there are tasks enough to lose a worker between
TASK = "evaluate_rows"


def build(folder: Path, rows: int) -> float:
    """Writes logits.zarr and target.npy; returns their mean cross-entropy."""
    rng = np.random.default_rng()
    base = 3 * rng.standard_normal((min(BASE_ROWS, rows), CLASSES), dtype=np.float32)
    wide = base.astype(np.float64)
    top = wide.max(1)
    lse = np.log(np.exp(wide - top[:, None]).sum(1)) + top
    chunks = max(1, min(ZARR_ROWS, rows // 100)), CLASSES
    store = zarr.create_array(folder / "logits.zarr", shape=(rows, CLASSES), chunks=chunks, dtype="f4")
    target = rng.integers(0, CLASSES, rows)
    losses = np.empty(rows)
    for number, start in enumerate(range(0, rows, len(base))):
        order = np.roll(np.arange(len(base)), 7 * number)[: rows - start]
        block = slice(start, start + len(order))
        store[block] = base[order]
        losses[block] = lse[order] - wide[order, target[block]]
    np.save(folder / "target.npy", target)
    return math.fsum(losses) / rows


def left(cluster: LocalCluster) -> int | None:
    """How many tasks are still to be done; None before the first is known."""

    async def count() -> list[str]:
        return [task.state for key, task in cluster.scheduler.tasks.items() if str(key).startswith(TASK)]

    states = cluster.sync(count)
    return sum(state not in ("memory", "released", "forgotten") for state in states) if states else None


def workers(cluster: LocalCluster) -> dict[Any, int]:
    """The process of each worker that runs now."""
    return {name: nanny.pid for name, nanny in cluster.workers.items() if nanny.pid}


def measure(folder: Path, words: list[str], limit: str) -> dict[str, Any]:
    """Runs the command on two workers, kills the first when half of the tasks are done."""
    peak: dict[str, int] = {}
    found: dict[str, Any] = {"killed_with_tasks_left": None}
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, memory_limit=limit, dashboard_address=None
    ) as cluster:
        command = [sys.executable, "-m", "fastloss", "evaluate", "cross-entropy", "logits.zarr", "target.npy", "--json"]
        began = time.perf_counter()
        process = subprocess.Popen(
            [*command, *words, "--scheduler", cluster.scheduler_address],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        tasks = 0
        while process.poll() is None:
            for name, pid in workers(cluster).items():
                label = f"worker {name} (process {pid})"
                try:
                    peak[label] = max(peak.get(label, 0), psutil.Process(pid).memory_info().rss)
                except psutil.NoSuchProcess:  # the one that was killed
                    continue
            if found["killed_with_tasks_left"] is None and (now := left(cluster)):
                tasks = max(tasks, now)
                if now <= tasks // 2:
                    found["killed_with_tasks_left"] = now
                    os.kill(next(iter(workers(cluster).values())), signal.SIGKILL)
            time.sleep(0.05 if tasks > 200 else 0.01)
        out, err = process.communicate()
        seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"status {process.returncode}: {err}")
    report = json.loads(out)
    return found | {
        "tasks": tasks,
        "seconds": seconds,
        "gb_per_s": report["bytes"] / report["seconds"] / 1e9,
        "samples": report["samples"],
        "value": report["value"],
        "peak_mb": {name: peak[name] / 1e6 for name in sorted(peak)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=8.0)
    parser.add_argument("--chunk-mb", default="64")
    parser.add_argument("--limit", default="1.5GB", help="memory of a worker, which Dask would restart above it")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = max(1, round(args.gb * 1e9 / (4 * CLASSES)))
    with tempfile.TemporaryDirectory(prefix="fastloss-cluster-") as name:
        began = time.perf_counter()
        expected = build(Path(name), rows)
        build_seconds = time.perf_counter() - began
        found = measure(Path(name), ["--chunk-mb", args.chunk_mb], args.limit)
    found |= {"rows": rows, "expected": expected, "error": abs(found["value"] - expected) / expected}
    if args.json:
        print(json.dumps(found))
        return
    size = rows * CLASSES * 4 / 1e9
    print(f"store             ({rows:,}, {CLASSES:,}) float32, {size:.3g} GB, built in {build_seconds:.0f} s")
    print(f"tasks             {found['tasks']:,}, a worker killed with {found['killed_with_tasks_left']} left")
    print(f"seconds           {found['seconds']:.1f} ({found['gb_per_s']:.3g} GB/s once started)")
    for worker, peak in found["peak_mb"].items():
        print(f"{worker:<33}{peak:,.0f} MB at most")
    print(f"value             {found['value']:.17g}")
    print(f"expected          {expected:.17g}, relative error {found['error']:.2g}")


if __name__ == "__main__":
    main()
