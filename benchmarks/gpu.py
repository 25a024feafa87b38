"""Everything that needs a GPU, in one run: tests, checks, then timings beside the device's own limits.

    python3 benchmarks/gpu.py OUT_FOLDER [--quick] [--only tests|benchmarks] [--dry-run] [--time-limit SECONDS]

Runs from a plain checkout: no install, no network. It writes one JSON into OUT_FOLDER after every step, so that a
killed run leaves what it had, and prints a short table last. --dry-run walks through all of it in Numba's CUDA
simulator, at tiny sizes, and times nothing. Exit status: 0; 1 where a test or check failed; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_process
import record
from gpu_cases import CONTENDERS, GOALS, HOST_CONTENDERS, HOST_GOAL, HOST_TIME, SWEEP, Work
from gpu_process import OUT_OF_TIME
from record import Document, Row

SIMULATOR = "Numba's CUDA simulator"
# nvidia-smi's names; all are read, none is ever set
CLOCKS = (
    *("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "temperature.gpu"),
    *("power.draw", "power.limit", "memory.total", "memory.used", "utilization.gpu", "persistence_mode"),
)
CHECK_STALL, ROW_STALL = 240.0, 150.0  # seconds that one item may take


def find_gpu() -> dict[str, Any] | None:
    """Name and compute capability of the first GPU, from the driver; None where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1" if os.name == "posix" else "nvcuda.dll")
    except OSError:
        return None
    count, device = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        return None
    name, version = ctypes.create_string_buffer(256), ctypes.c_int()
    capability = [ctypes.c_int(), ctypes.c_int()]
    driver.cuDeviceGet(ctypes.byref(device), 0)
    driver.cuDeviceGetName(name, len(name), device)
    for found, attribute in zip(capability, (75, 76), strict=True):  # COMPUTE_CAPABILITY_MAJOR, _MINOR
        driver.cuDeviceGetAttribute(ctypes.byref(found), attribute, device)
    driver.cuDriverGetVersion(ctypes.byref(version))
    return {
        "name": name.value.decode(),
        "compute_capability": ".".join(str(part.value) for part in capability),
        "cuda_driver_api": f"{version.value // 1000}.{version.value % 1000 // 10}",
        "gpus": count.value,
    }


def clocks() -> dict[str, str]:
    """The card's state as it is found."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    cells = [cell.strip() for cell in done.stdout.strip().split(",")]
    return dict(zip(CLOCKS, cells, strict=True)) if len(cells) == len(CLOCKS) else {}


class Run:
    """One run of this script: what it was told, the document it fills, and how much time is left."""

    def __init__(self, options: argparse.Namespace, device: dict[str, Any] | None) -> None:
        self.options, self.folder = options, Path(options.out)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.end = time.monotonic() + options.time_limit if options.time_limit else float("inf")
        self.document = record.header("gpu", device or {"name": SIMULATOR}, options.dry_run)
        if options.commit:
            self.document["commit"] = options.commit
        self.document |= {"quick": options.quick, "ceilings": None, "pytest": None, "checks": []}
        name = device["name"].replace(" ", "-") if device else "dry-run"
        stamp = self.document["date"][:19].replace(":", "").replace("-", "")
        self.path = self.folder / f"gpu-{name}-{stamp}.json"
        self.log = self.folder / "gpu.log"

    def left(self) -> float:
        """Seconds, some of them kept for the table."""
        return self.end - time.monotonic() - 5

    def save(self) -> None:
        record.save(self.document, self.path)

    def items(self, section: str, names: list[str], seconds: float, stall: float) -> Iterator[gpu_process.Item]:
        order = {"section": section, "quick": self.options.quick}
        environment = gpu_process.environment(self.options.dry_run)
        return gpu_process.supervised(order, names, environment, self.log, time.monotonic() + seconds, stall)

    # ---- tests

    def tests(self) -> None:
        """tests/gpu under pytest, then the checks of gpu_checks.py; together at most three quarters of the time."""
        whole = self.options.only == "tests"
        print("pytest tests/gpu ...", flush=True)
        collect_only = self.options.dry_run and self.options.quick
        environment = gpu_process.environment(self.options.dry_run)
        found = gpu_process.pytest_run(self.folder, environment, self.left() / 2, collect_only)
        self.document["pytest"] = found
        self.save()
        print("  " + tests_line(found), flush=True)
        end = self.left() if whole else self.left() / 2
        (listed,) = self.items("names", ["checks"], self.left(), CHECK_STALL)
        for item in self.items("checks", listed.result or [], end, CHECK_STALL) if listed.result else [listed]:
            result = item.result or {"outcome": "not run" if item.out_of_time else "failed", "message": item.error}
            self.document["checks"].append({"name": item.name, **result, "seconds": item.seconds})
            self.save()
            message = f": {result['message']}" if result["message"] else ""
            print(f"  {result['outcome']:8}{item.name} ({item.seconds:.0f} s){message[:300]}", flush=True)

    # ---- benchmarks

    def benchmarks(self) -> None:
        works = GOALS if self.options.quick else [*GOALS, *SWEEP]
        by_name = {work.name: work for work in works}
        names = ["device", "ceilings", HOST_TIME, *by_name]
        print(f"{len(works) + 1} rows of timings ...", flush=True)
        limit: float | None = None
        for item in self.items("rows", names, self.left(), ROW_STALL):
            if item.name == "device":
                self.document["device"] |= item.result or {}
            elif item.name == "ceilings":
                self.document["ceilings"] = item.result
                limit = (item.result or {}).get("copy_gbs")
                print(f"  {ceilings_line(self.document)} {item.error or ''}", flush=True)
            else:
                row = row_of(by_name.get(item.name), item, limit)
                self.document["rows"].append(row)
                print(f"  {row_line(row)}  ({item.seconds:.0f} s)", flush=True)
            self.save()
        self.document["clocks_after"] = {} if self.options.dry_run else clocks()


def row_of(work: Work | None, item: gpu_process.Item, limit: float | None) -> Row:
    """A row of the document; an item without a result is one in which nobody has a time, and says why."""
    contenders = work.contenders if work else HOST_CONTENDERS
    results = item.result or {name: {"ms": None, "error": item.error} for name in contenders}
    if work is None:
        return record.row(item.name, None, results, goal=HOST_GOAL)
    return record.row(work.name, work.nbytes, results, limit, work.goal, work.section)


# ---- what is printed


def tests_line(found: dict[str, Any]) -> str:
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(found["counts"].items()))
    return f"tests/gpu: {counts or 'nothing run'}" + (f" ({found['message']})" if found["message"] else "")


def ceilings_line(document: Document) -> str:
    found = document["ceilings"]
    if not found:
        return f"copy and read bandwidth: {record.NOT_MEASURED}"
    return f"copy {found['copy_gbs']:,.0f} GB/s (read + write), read {found['read_gbs']:,.0f} GB/s"


def row_line(row: Row) -> str:
    """Work, then each contender's milliseconds."""
    cells = (f"{name} {record.time_cell(row, name)}" for name in row["results"])
    return f"{row['work']}: {'; '.join(cells)}"


def table(document: Document) -> list[str]:
    """The short table: issue 6's rows, in columns."""
    others = [name for name in CONTENDERS if name != record.OURS]
    lines = [["work", "MB", "ms", "GB/s", "of copy", *(f"x {name}" for name in others), "goal", "met"]]
    for row in document["rows"]:
        if row["section"] != "goals":
            continue
        ours = row["results"].get(record.OURS, {})
        lines.append(
            [
                row["work"],
                record.figure(row["bytes"] and row["bytes"] / 1e6),
                record.time_cell(row)[:40],
                record.figure(ours.get("gbs")),
                record.figure(ours.get("fraction")),
                *(record.ratio_cell(row, name)[:20] for name in others),
                record.goal_text(row),
                record.verdict(row),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def summary(document: Document) -> list[str]:
    """The end of the output: tests, limits, the table."""
    device = document["device"]
    lines = ["", f"{device['name']}, compute capability {device.get('compute_capability', 'none')}, {document['date']}"]
    if document["pytest"]:
        lines.append(tests_line(document["pytest"]))
    if document["checks"]:
        counts = Counter(check["outcome"] for check in document["checks"])
        lines.append("checks: " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
        lines += [f"  failed: {check['name']}" for check in document["checks"] if check["outcome"] == "failed"]
    if document["rows"]:
        lines += [ceilings_line(document), *table(document)]
    return lines


def failures(document: Document) -> bool:
    """Whether a test, a check or fastloss itself failed. A goal that was missed is no failure, nor is lack of time."""
    tests = document["pytest"] or {"failed": False}
    errors = {row["results"].get(record.OURS, {}).get("error") for row in document["rows"]}
    outcomes = {check["outcome"] for check in document["checks"]}
    return bool(tests["failed"] or "failed" in outcomes or errors - {None, OUT_OF_TIME})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT_FOLDER", help="where the JSON and the logs go; made if it is not there")
    parser.add_argument("--quick", action="store_true", help="issue 6's rows only, and fewer rounds")
    parser.add_argument("--only", choices=("tests", "benchmarks"))
    parser.add_argument("--dry-run", action="store_true", help="in Numba's CUDA simulator; nothing is timed")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop in good order before it")
    parser.add_argument("--commit", help="what was measured, for a copy of the checkout that has no .git")
    options = parser.parse_args(arguments)
    device = None if options.dry_run else find_gpu()
    if device is None and not options.dry_run:
        print("gpu.py: no NVIDIA GPU here; --dry-run walks through everything without one", file=sys.stderr)
        return 2
    run = Run(options, device)
    if device:
        run.document["clocks_before"] = clocks()
    run.save()
    if options.only != "benchmarks":
        run.tests()
    if options.only != "tests":
        run.benchmarks()
    run.document["complete"] = True
    run.save()
    print("\n".join(summary(run.document)), flush=True)
    print(f"written: {run.path}")
    return int(failures(run.document))


if __name__ == "__main__":
    sys.exit(main())
