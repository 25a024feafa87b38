"""The processes of gpu.py: pytest, and workers that hold the GPU and may die of it."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from record import ROOT

HERE = Path(__file__).resolve().parent
TESTS = "tests/gpu"
OUT_OF_TIME = "not run: the time limit"
# In place of setup.cfg's: a borrowed machine has another pytest, and libraries that warn.
SETTINGS = """\
[pytest]
addopts = -m "not slow"
markers =
    slow: needs minutes or many gigabytes
"""


def environment(simulated: bool) -> dict[str, str]:
    """For child processes."""
    made = {name: value for name, value in os.environ.items() if name not in ("NUMBA_ENABLE_CUDASIM", "FASTLOSS_CHECK")}
    made["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # JAX would take three quarters of the GPU for itself
    made["PYTHONUNBUFFERED"] = "1"
    if simulated:
        made |= {"NUMBA_ENABLE_CUDASIM": "1", "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    return made


def stop(process: subprocess.Popen[Any]) -> None:
    """End a process and all that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# ---- workers


@dataclass
class Item:
    """One item's end: a result, or an error."""

    name: str
    result: Any = None
    error: str | None = None
    seconds: float = 0.0
    out_of_time: bool = False


def _lines(stream: IO[str], into: queue.Queue[str | None]) -> None:
    for line in stream:
        into.put(line)
    into.put(None)


def supervised(
    order: dict[str, Any],
    names: list[str],
    environment: dict[str, str],
    log: Path,
    end: float,  # of time.monotonic()
    stall: float,  # seconds that one item may take
) -> Iterator[Item]:
    """Every item's end, in order. What kills a worker, or hangs it, costs the item in hand; a new one goes on."""
    left = list(names)
    while left:
        if time.monotonic() >= end:
            for name in left:
                yield Item(name, error=OUT_OF_TIME, out_of_time=True)
            return
        before = len(left)
        for item in _worker(order, left, environment, log, end, stall):
            left.remove(item.name)
            yield item
        if len(left) == before:  # it died before it began: so would the next
            for name in left:
                yield Item(name, error=f"the worker process did not start; see {log.name}")
            return


def _worker(
    order: dict[str, Any], names: list[str], environment: dict[str, str], log: Path, end: float, stall: float
) -> Iterator[Item]:
    """What one process gets done."""
    command = [sys.executable, str(HERE / "gpu_worker.py"), json.dumps(order | {"names": names})]
    with log.open("a") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, start_new_session=True
        )
        lines: queue.Queue[str | None] = queue.Queue()
        assert process.stdout is not None
        reader = threading.Thread(target=_lines, args=(process.stdout, lines), daemon=True)
        reader.start()
        current, since = "", time.monotonic()
        try:
            while True:
                line = lines.get(timeout=max(0.0, min(end, since + stall) - time.monotonic()))
                if line is None:
                    break
                answer = json.loads(line)
                if "begin" in answer:
                    current, since = answer["begin"], time.monotonic()
                else:
                    yield Item(answer["end"], answer["result"], answer["error"], answer["seconds"])
                    current, since = "", time.monotonic()
        except queue.Empty:
            late = time.monotonic() >= end
            if current:
                error = OUT_OF_TIME if late else f"not finished after {stall:.0f} s"
                yield Item(current, error=error, seconds=time.monotonic() - since, out_of_time=late)
            return
        finally:
            stop(process)
            reader.join(10)
            process.stdout.close()
        if current:
            status = f"signal {-process.returncode}" if process.returncode < 0 else f"exit status {process.returncode}"
            yield Item(current, error=f"the process died: {status}; see {log.name}", seconds=time.monotonic() - since)


# ---- pytest


def pytest_run(folder: Path, environment: dict[str, str], seconds: float, collect_only: bool) -> dict[str, Any]:
    """Counts, and every test's outcome, of tests/gpu."""
    found: dict[str, Any] = {"counts": {}, "tests": [], "failed": False, "message": None}
    if not (ROOT / TESTS).is_dir():
        return found | {"message": f"no folder {TESTS}"}
    if find_spec("pytest") is None:
        return found | {"message": "pytest is not installed"}
    xml = folder / "pytest.xml"
    xml.unlink(missing_ok=True)
    settings = folder / "pytest.ini"
    settings.write_text(SETTINGS)
    command = [sys.executable, "-m", "pytest", TESTS, "-rf", "-p", "no:cacheprovider", f"--junitxml={xml}"]
    command += ["-c", str(settings), f"--rootdir={ROOT}", f"--confcutdir={ROOT}"]
    if collect_only:
        command.append("--collect-only")
    elif find_spec("xdist"):
        command += ["--numprocesses", str(min(8, os.cpu_count() or 1))]  # compiling is what takes the time
    with (folder / "pytest.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        message = _finish(process, seconds)
    status = process.returncode
    found["tests"] = outcomes(xml)
    found["counts"] = dict(Counter(test["outcome"] for test in found["tests"]))
    if message is None and status not in (0, 1, 5):
        message = f"pytest's exit status is {status}; see pytest.log"
    if collect_only:
        message = message or "collected only"
    return found | {"failed": status not in (0, 5) and message != OUT_OF_TIME, "message": message}


def _finish(process: subprocess.Popen[Any], seconds: float) -> str | None:
    """Wait; past the limit interrupt it, so that it writes down what it has."""
    try:
        process.wait(None if seconds == float("inf") else max(0.0, seconds))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            stop(process)
        return OUT_OF_TIME
    return None


def outcomes(xml: Path) -> list[dict[str, Any]]:
    """Every test of a JUnit file; none where it was not written."""
    try:
        cases = ET.parse(xml).getroot().iter("testcase")
    except (OSError, ET.ParseError):
        return []
    tests = []
    names = {"failure": "failed", "error": "failed", "skipped": "not run"}
    for case in cases:
        ends = [(names[child.tag], child.get("message")) for child in case if child.tag in names]
        outcome, message = ends[0] if ends else ("passed", None)
        name = f"{case.get('classname')}::{case.get('name')}"
        seconds = float(case.get("time") or 0)
        tests.append({"name": name, "outcome": outcome, "message": message and message[:500], "seconds": seconds})
    return tests
