"""Speed against size, a panel for each kind of work, with the device's limit drawn in."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot picks a display
import matplotlib.pyplot as plt
from record import OURS, Document, Row

Panel = dict[str, list[tuple[int, float]]]  # contender -> (size, GB/s)
LIMIT = "limit"
FEWEST = 3  # points that make a line worth drawing
COLUMNS = 3


def panel_of(row: Row) -> tuple[str, int] | None:
    """The kind of work, and its size: classes of (rows, classes), elements of (elements)."""
    found = re.fullmatch(r"(.*?) (\d[\d,]*(?: x \d[\d,]*)*)", row["work"])
    if found is None:
        return None
    shape = [int(extent.replace(",", "")) for extent in found[2].split(" x ")]
    return (found[1], shape[-1]) if len(shape) <= 2 else None


def panels(document: Document) -> dict[str, Panel]:
    """Points of every kind of work with at least `FEWEST` sizes; rows without a limit are too small to have a speed.

    Of two rows of one size (1,024 classes, but not as many rows) the one of more bytes stands.
    """
    found: dict[str, dict[int, Row]] = {}
    for row in document["rows"]:
        place = panel_of(row)
        if place and row["limit_gbs"] and row["results"].get(OURS, {}).get("gbs"):
            kind, size = place
            kept = found.setdefault(kind, {}).get(size)
            if kept is None or kept["bytes"] < row["bytes"]:
                found[kind][size] = row
    return {kind: _panel(rows) for kind, rows in found.items() if len(rows) >= FEWEST}


def _panel(rows: dict[int, Row]) -> Panel:
    panel: Panel = {}
    for size, row in sorted(rows.items()):
        for name, result in row["results"].items():
            if result.get("gbs"):
                panel.setdefault(name, []).append((size, result["gbs"]))
    return panel | {LIMIT: [(size, row["limit_gbs"]) for size, row in sorted(rows.items())]}


def plot(document: Document, path: Path) -> bool:
    """Write a PNG; False, and no file, where there is nothing to draw."""
    kinds = panels(document)
    if not kinds:
        return False
    columns = min(COLUMNS, len(kinds))
    rows = -(-len(kinds) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 3.4 * rows + 0.6), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(kinds) :]:
        axis.remove()
    names = list(dict.fromkeys(name for panel in kinds.values() for name in panel if name != LIMIT))
    colors = {name: f"C{k}" for k, name in enumerate(names)}
    for axis, (kind, panel) in zip(axes.flat, kinds.items(), strict=False):
        for name, points in panel.items():
            style = {"color": "black", "linestyle": "--"} if name == LIMIT else {"color": colors[name], "marker": "."}
            axis.plot(*zip(*points, strict=True), label=name, **style)
        axis.set_title(kind, fontsize="small")
        axis.set_xscale("log", base=2 if "loss" in kind else 10)
        axis.set_xlabel("classes" if "cross_entropy" in kind and "binary" not in kind else "elements")
        axis.set_ylabel("GB/s")
        axis.set_ylim(bottom=0)
    figure.suptitle(f"{document['device']['name']}, {document['date'][:10]}")
    handles = {
        label: line for axis in figure.axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return True
