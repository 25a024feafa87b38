"""One process of gpu.py that holds the GPU: runs the items that it is told, a line of JSON for each.

    python gpu_worker.py '{"section": "rows", "names": [...], "quick": false}'

An error that kills the CUDA context kills this process and no more: the supervisor starts another with what is left.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "tests")]

DEAD_CONTEXT = 3
CHECK_MODULES = ("gpu_checks", "gpu_checks_values")  # each adds its checks to the list when it is imported
Order = dict[str, Any]


def _device() -> dict[str, Any]:
    """What torch tells of the GPU; empty where torch has none."""
    import torch

    if not torch.cuda.is_available():
        return {}
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size,
        "torch_cuda": torch.version.cuda,
    }


def _row(name: str, order: Order) -> Any:
    import gpu_contenders
    import gpu_timing
    from gpu_arrays import SIMULATED
    from gpu_cases import BY_NAME, HOST_CONTENDERS, HOST_TIME, cross_entropy

    rounds = 5 if order["quick"] else 15
    try:
        if name == "device":
            return _device()
        if name == "ceilings":
            return None if SIMULATED else gpu_timing.ceilings(rounds)
        if name == HOST_TIME:
            tiny = cross_entropy("float32", 32, 10, contenders=HOST_CONTENDERS)
            return gpu_timing.walk(tiny) if SIMULATED else gpu_timing.host_times(tiny)
        work = BY_NAME[name]
        return gpu_timing.walk(work) if SIMULATED else gpu_timing.measure(work, rounds)
    finally:
        gpu_contenders.free()


def _check(name: str, order: Order) -> Any:
    import gpu_checklist

    _names(name, order)
    return gpu_checklist.run(name)


def _names(name: str, order: Order) -> list[str]:
    """Of all checks."""
    import gpu_checklist

    for module in CHECK_MODULES:
        importlib.import_module(module)
    return list(gpu_checklist.CHECKS)


_RUN = {"rows": _row, "checks": _check, "names": _names}


def _context_is_dead() -> bool:
    import gpu_arrays
    import gpu_timing

    return not gpu_arrays.SIMULATED and not gpu_timing.alive()


def main(order: Order, answers: TextIO) -> int:
    def answer(**line: Any) -> None:
        print(json.dumps(line), file=answers, flush=True)

    for name in order["names"]:
        answer(begin=name)
        start = time.perf_counter()
        try:
            result, error = _RUN[order["section"]](name, order), None
        except Exception as caught:
            logging.exception("%s", name)
            result, error = None, f"{type(caught).__name__}: {caught}"[:500]
        answer(end=name, result=result, error=error, seconds=round(time.perf_counter() - start, 2))
        if _context_is_dead():
            return DEAD_CONTEXT
    return 0


if __name__ == "__main__":
    # Whatever a library prints goes to the log; this process's own lines keep the pipe.
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.exit(main(json.loads(sys.argv[1]), pipe))
