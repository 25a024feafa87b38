"""How much memory this process has held."""

from __future__ import annotations

from pathlib import Path


def peak(reset: bool = False) -> int:
    """The most memory that this process has held, in bytes; `reset` starts anew from what it holds now."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
