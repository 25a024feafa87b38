"""What a benchmark's JSON holds and how its figures read: shared by gpu.py, compare.py, startup.py and report.py."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Document = dict[str, Any]
Row = dict[str, Any]
Goal = dict[str, Any]
Table = list[list[str]]  # the first line is the head

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FORMAT = 1
OURS = "fastloss"
NOT_MEASURED = "not yet measured"
PACKAGES = (
    *("numpy", "numba", "llvmlite", "numba-cuda", "cuda-core", "cuda-bindings", "torch", "triton", "liger-kernel"),
    *("cupy-cuda12x", "cupy-cuda13x", "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "ml_dtypes", "tbb"),
    "pytest",
)


def versions() -> dict[str, str]:
    """Versions of Python, of fastloss in this checkout, and of the packages that are installed."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    import fastloss

    found = {"python": platform.python_version(), OURS: fastloss.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The checkout's commit, marked when files differ from it; None in a copy without its history."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def header(kind: str, device: dict[str, Any] | None, dry_run: bool = False) -> Document:
    """A document without figures; `kind` is "gpu" or "cpu"."""
    return {
        "format": FORMAT,
        "kind": kind,
        "dry_run": dry_run,
        "complete": False,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python3", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "commit": commit(),
        "platform": platform.platform(),
        "device": device,
        "versions": versions(),
        "rows": [],
    }


def save(document: Document, path: Path) -> None:
    """Write it whole or not at all: a run may be killed at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    beside.replace(path)


def load(path: Path) -> Document:
    """A document that `save` wrote. Raises ValueError for anything else."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT or document.get("kind") not in ("gpu", "cpu"):
        raise ValueError(f"{path} is not a result of gpu.py or compare.py in format {FORMAT}")
    return document


# ---- rows


def row(
    work: str,
    nbytes: int | None,  # read once and written once; None where bytes are not the point
    results: Mapping[str, dict[str, Any]],  # by contender: "ms", or null and "error"
    limit_gbs: float | None = None,
    goal: Goal | None = None,
    section: str = "goals",
    limit: str | None = "copy",  # what the limit is of
) -> Row:
    """One piece of work with what follows from its times: GB/s, fractions of the limit, ratios, the goal's verdict."""
    for result in results.values():
        ms = result.get("ms")
        result["gbs"] = nbytes / ms / 1e6 if nbytes and ms else None
        result["fraction"] = result["gbs"] / limit_gbs if result["gbs"] and limit_gbs else None
    made: Row = {"work": work, "section": section, "bytes": nbytes, "limit": limit, "limit_gbs": limit_gbs}
    made["results"] = dict(results)
    others = [name for name in results if name != OURS]
    made["ratios"] = {name: ratio(made, name) for name in others}
    made["goal"] = goal
    made["met"] = met(made)
    return made


def time_of(row: Row, contender: str = OURS) -> float | None:
    """Milliseconds, None where there are none."""
    ms: float | None = row["results"].get(contender, {}).get("ms")
    return ms


def ratio(row: Row, contender: str) -> float | None:
    """How many times as long as fastloss it takes."""
    theirs, ours = time_of(row, contender), time_of(row)
    return theirs / ours if theirs and ours else None


def _parts(row: Row) -> list[tuple[str, float | None, bool]]:
    """Of a goal: its text, what was measured, and whether that is enough."""
    goal, ours = row.get("goal") or {}, row["results"].get(OURS, {})
    parts: list[tuple[str, float | None, bool]] = []
    if "fraction" in goal:
        got = ours.get("fraction")
        limit = row.get("limit", "copy")
        parts.append((f"{goal['fraction']:.2f} of {limit}", got, got is not None and got >= goal["fraction"]))
    if "peers" in goal:
        peers = [value for name in row["results"] if name != OURS and (value := ratio(row, name))]
        got = min(peers, default=None)
        parts.append(("no peer faster", got, got is not None and got >= goal["peers"]))
    for name, least in goal.get("versus", {}).items():
        got = ratio(row, name)
        parts.append((f"{least:g}x {name}", got, got is not None and got >= least))
    if "ms" in goal:
        unit, size = ("us", 1e-3) if goal["ms"] < 1 else ("ms", 1)
        got = ours.get("ms")
        parts.append((f"{goal['ms'] / size:g} {unit}", got and got / size, got is not None and got <= goal["ms"]))
    return parts


def met(row: Row) -> bool | None:
    """Whether all of the goal was reached; None without a goal, or while a part of it is unmeasured and none failed."""
    parts = _parts(row)
    if any(got is not None and not enough for _, got, enough in parts):
        return False
    return True if parts and all(enough for _, _, enough in parts) else None


def goal_text(row: Row) -> str:
    return ", ".join(text for text, _, _ in _parts(row))


def verdict(row: Row) -> str:
    """Of a goal: yes, no with what was reached, or what is unmeasured."""
    parts = _parts(row)
    if not parts:
        return ""
    missed = [f"{figure(got)} for {text}" for text, got, enough in parts if got is not None and not enough]
    if missed:
        return "no: " + ", ".join(missed)
    unmeasured = [text for text, got, _ in parts if got is None]
    if not unmeasured:
        return "yes"
    return NOT_MEASURED if len(unmeasured) == len(parts) else f"but for {', '.join(unmeasured)}: {NOT_MEASURED}"


# ---- cells


def figure(value: float | None) -> str:
    """Three digits; nothing where there is no number."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def time_cell(row: Row, contender: str = OURS) -> str:
    """Milliseconds, or why there are none; nothing for who did not take part."""
    result = row["results"].get(contender)
    if result is None:
        return ""
    return figure(result["ms"]) if result.get("ms") else str(result.get("error") or NOT_MEASURED)


def ratio_cell(row: Row, contender: str) -> str:
    """The ratio, or why there is none."""
    value = ratio(row, contender)
    return figure(value) if value else time_cell(row, contender)


# ---- documents and tables


def measured(document: Document) -> bool:
    return not document["dry_run"]


def contenders(document: Document, rows: Sequence[Row]) -> list[str]:
    """Whoever took part beside fastloss, in the order of their first rows, and who was absent."""
    present = (name for row in rows for name in row["results"] if name != OURS)
    return list(dict.fromkeys([*present, *document.get("absent", {})]))


def markdown(table: Table) -> str:
    """A table whose first row is its head; none without a second."""
    if len(table) < 2:
        return ""
    lines = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"
