"""All contenders on all of the work, interleaved, beside the speed of this machine's memory.

    python benchmarks/compare.py [part of a case's name ...] [--quick] [--save] [--json FILE]

--save keeps the figures in benchmarks/results/, from which benchmarks/report.py writes the page and the README's table.
"""

from __future__ import annotations

import argparse
import gc
import platform
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import contenders
import numpy as np
import record
import startup
from cases import CASES, CONTENDERS, Case
from contenders import AbsentError, Call
from limits import limit

import fastloss
from fastloss import runtime

ROUNDS = 11
QUICK_ROUNDS = 5
FEWEST = 3
SHORTEST, SHORTEST_IN_CACHE = 1e-3, 10e-3  # seconds of a turn: shorter calls are repeated
PATIENCE = 1.0  # seconds that one contender's rounds may take: slower ones take part in fewer of them
WAKING = 15e-3  # seconds that another core took to take part, at times, on a virtual machine
UNTIMED = 0.1  # seconds: longer calls are not slowed by a pause before them, and need no untimed one
SLOW = 2.0  # seconds: such a call is timed once
LIMIT = "limit"


def measured(
    calls: dict[str, Call], rounds: int, shortest: float, known: dict[str, float] | None = None
) -> dict[str, list[float]]:
    """Seconds of each call, round by round, all contenders in turn; `known` are those of calls already made.

    Other libraries' threads spin for a while, and the first parallel calls after a sleep pay for waking a core: so
    each turn is a sleep, `WAKING` seconds of untimed calls, and timed ones back to back for about `shortest` seconds.
    """
    once = {name: (known or {}).get(name) or _seconds(call, 1) for name, call in calls.items()}
    repeats = {name: max(1, round(shortest / seconds)) for name, seconds in once.items()}
    times = {name: [seconds] if seconds >= UNTIMED else [] for name, seconds in once.items()}
    turns: dict[str, int] = {}
    for name, seconds in once.items():
        fewest = 1 if seconds >= SLOW else FEWEST
        fewer = max(fewest, int(PATIENCE / (seconds if times[name] else 2 * seconds)))
        turns[name] = (rounds if name in (record.OURS, LIMIT) else min(rounds, fewer)) - len(times[name])
    gc.disable()
    try:
        for done in range(1, rounds + 1):
            for name, call in calls.items():
                if done * turns[name] // rounds == (done - 1) * turns[name] // rounds:
                    continue
                time.sleep(0.02)
                if once[name] < UNTIMED:
                    awake = time.perf_counter() + WAKING
                    call()
                    while time.perf_counter() < awake:
                        call()
                times[name].append(_seconds(call, repeats[name]))
    finally:
        gc.enable()
    return times


def _seconds(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def calls_of(
    case: Case, x: np.ndarray, y: np.ndarray, absent: dict[str, str]
) -> tuple[dict[str, Call], dict[str, str], dict[str, float]]:
    """The contenders' calls, each made once and its result compared with ours; why others have none; and the seconds
    of first calls that were slow and did not compile anything."""
    calls: dict[str, Call] = {}
    known: dict[str, float] = {}
    errors: dict[str, str] = {}
    ours: Any = None  # fastloss is the first
    for name in case.contenders:
        if name in absent:
            continue
        try:
            call = contenders.contender(name, case, x, y)
            start = time.perf_counter()
            result = call()
            seconds = time.perf_counter() - start
            if name == record.OURS:
                ours = result
            if record.OURS in calls:
                contenders.check(case, result, ours)
            calls[name] = call
            if seconds >= SLOW and name not in contenders.COMPILING:
                known[name] = seconds
        except AbsentError as error:
            absent[name] = str(error)
        except Exception as error:  # noqa: BLE001 - whatever goes wrong in a library costs its cell alone
            errors[name] = " ".join(f"{error or type(error).__name__}".split())[:200]
    return calls, errors, known


def row_of(case: Case, rounds: int, absent: dict[str, str]) -> record.Row:
    """One piece of work, timed."""
    x, y = case.operands()
    calls, errors, known = calls_of(case, x, y, absent)
    bound, nbytes = limit(case.limit, case.nbytes) if case.limit else (None, 0)
    if bound:
        bound()  # compiled
        calls[LIMIT] = bound
    times = measured(calls, rounds, SHORTEST_IN_CACHE if case.in_cache else SHORTEST, known)
    bandwidth = nbytes / statistics.median(times.pop(LIMIT)) / 1e9 if bound else None
    results: dict[str, dict[str, Any]] = {}
    for name in case.contenders:
        if name in times:
            # In the caches nothing but other processes disturbs a call: its best is its own time.
            best = min if case.in_cache else statistics.median
            results[name] = {"ms": best(times[name]) * 1e3, "rounds": len(times[name])}
        elif name in errors:
            results[name] = {"ms": None, "error": errors[name]}
    return record.row(case.name, case.nbytes, results, bandwidth, case.goal, case.section, case.limit)


def cpu_name() -> str:
    """As the processor calls itself, with LLVM's name for its kind."""
    kind = runtime.versions()["cpu"]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or kind
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]} ({kind})" if models else kind


def path_for(document: record.Document) -> Path:
    """Of --save: the CPU and the day."""
    name = re.sub(r"[^a-z0-9]+", "-", document["device"]["name"].lower()).strip("-")
    return record.RESULTS / f"cpu-{name}-{document['date'][:10]}.json"


def _line(row: record.Row) -> str:
    """As the run prints it; the columns of `_head`."""
    ours = row["results"].get(record.OURS, {})
    cells = [f"{row['work']:<58}", f"{record.time_cell(row):>9.9}", f"{record.figure(ours.get('gbs')):>8}"]
    cells.append(f"{record.figure(ours.get('fraction')):>6}")
    cells += [f"{record.ratio_cell(row, name):>13.13}" for name in CONTENDERS[1:]]
    return "  ".join([*cells, record.goal_text(row), record.verdict(row)]).rstrip()


def _head() -> str:
    cells = [f"{'work':<58}", f"{'ms':>9}", f"{'GB/s':>8}", f"{'limit':>6}"]
    return "  ".join([*cells, *(f"{name:>13}" for name in CONTENDERS[1:]), "goal"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="part of a case's name")
    parser.add_argument("--quick", action="store_true", help="two minutes: fewer cases, fewer rounds")
    parser.add_argument("--save", action="store_true", help="keep the figures in benchmarks/results/")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write them to this file")
    options = parser.parse_args()
    if options.save and (options.parts or options.quick):
        parser.error("--save keeps whole runs; --json FILE takes any")
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    device = {"name": cpu_name(), "threads": fastloss.get_num_threads()}
    absent: dict[str, str] = {}
    document = record.header("cpu", device) | {"rounds": rounds, "partial": bool(options.parts or options.quick)}
    document["absent"] = absent
    path = options.json or (path_for(document) if options.save else None)
    print(f"{device['name']}, {device['threads']} threads, {rounds} rounds; contenders in multiples of fastloss's time")
    print(_head(), flush=True)

    def add(*rows: record.Row) -> None:
        for row in rows:
            print(_line(row), flush=True)
        document["rows"] += rows
        if path:
            record.save(document, path)

    chosen = [case for case in CASES if not options.parts or any(part in case.name for part in options.parts)]
    for case in chosen:
        if options.quick and not case.quick:
            continue
        if case.nbytes * 1.25 > contenders.available():
            document.setdefault("skipped", {})[case.name] = why = f"{case.nbytes / 1e9:.0f} GB do not fit the memory"
            print(f"{case.name:<58}  skipped: {why}", flush=True)
            continue
        try:
            add(row_of(case, rounds, absent))
        except ImportError as error:
            document.setdefault("skipped", {})[case.name] = str(error)
            print(f"{case.name:<58}  skipped: {error}", flush=True)
        contenders.free()
    if not options.parts:
        add(*startup.rows(document, options.quick))
    document["complete"] = True
    for name, why in absent.items():
        print(f"without {name}: {why}")
    if path:
        record.save(document, path)
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
