"""Speed against size, a panel for each kind of work, with the device's limit drawn in; and bars for each work."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot picks a display
import matplotlib.pyplot as plt
from record import OURS, Document, Row

Panel = dict[str, list[tuple[int, float]]]  # contender -> (size, GB/s)
LIMIT = "limit"
GRADIENT = "value and gradient"
FEWEST = 3  # points that make a line worth drawing
COLUMNS = 3


def panel_of(row: Row, kind: str) -> tuple[str, int] | None:
    """The kind of work, and its size: elements; on a GPU, for (rows, classes), classes."""
    found = re.fullmatch(r"(.*?) (\d[\d,]*(?: x \d[\d,]*)*)", row["work"])
    if found is None:
        return None
    shape = [int(extent.replace(",", "")) for extent in found[2].split(" x ")]
    if len(shape) > 2:
        return None
    if kind == "cpu" and len(shape) == 2:
        return f"{found[1]}, {shape[1]:,} classes", math.prod(shape)
    return found[1], shape[-1]


def panels(document: Document) -> dict[str, Panel]:
    """Points of every kind of work with at least `FEWEST` sizes.

    Of two rows of one size (1,024 classes, but not as many rows) the one of more bytes stands.
    """
    found: dict[str, dict[int, Row]] = {}
    for row in document["rows"]:
        place = panel_of(row, document["kind"])
        if place and row["results"].get(OURS, {}).get("gbs"):
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
    limit = [(size, row["limit_gbs"]) for size, row in sorted(rows.items()) if row["limit_gbs"]]
    return panel | ({LIMIT: limit} if limit else {})


def plot(document: Document, path: Path) -> bool:
    """Write a PNG; False, and no file, where there is nothing to draw."""
    kinds = panels(document)
    if not kinds:
        return False
    columns = min(COLUMNS, math.ceil(math.sqrt(len(kinds))))
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
        axis.set_ylabel("GB/s")
        if document["kind"] == "cpu":  # from calls of a microsecond to gigabytes
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_xlabel("elements")
        else:
            axis.set_xscale("log", base=2 if "loss" in kind else 10)
            axis.set_xlabel("classes" if "cross_entropy" in kind and "binary" not in kind else "elements")
            axis.set_ylim(bottom=0)
    _save(figure, document, path)
    return True


def bars(document: Document, path: Path) -> bool:
    """Shares of the limit, a bar for each contender on each of the goals' work, as a PNG; False where there is none."""
    rows = [row for row in document["rows"] if row["section"] == "goals" and row["limit_gbs"]]
    if document["kind"] != "cpu" or not rows:
        return False
    gradients = [[row for row in rows if (GRADIENT in row["work"]) == gradient] for gradient in (False, True)]
    shown = [part for part in gradients if part]
    names = list(dict.fromkeys(name for row in rows for name in row["results"]))
    size = 6.4 * len(shown), 0.42 * max(map(len, shown)) + 1.4
    figure, axes = plt.subplots(1, len(shown), figsize=size, squeeze=False, layout="constrained")
    height = 0.85 / len(names)
    for axis, part in zip(axes.flat, shown, strict=True):
        for k, name in enumerate(names):
            shares = [row["results"].get(name, {}).get("fraction") or 0.0 for row in part]
            places = [place + (k - (len(names) - 1) / 2) * height for place in range(len(part))]
            axis.barh(places, shares, height, label=name, color=f"C{k}")
        axis.axvline(1, color="black", linestyle="--", label=LIMIT)
        axis.set_yticks(range(len(part)), [_short(row["work"]) for row in part], fontsize="small")
        axis.set_ylim(len(part) - 0.5, -0.5)  # from the top down
        axis.set_xlabel("share of the limit")
        axis.set_title("value and gradient" if part is gradients[1] else "value", fontsize="small")
    _save(figure, document, path)
    return True


def _short(work: str) -> str:
    return work.replace(f" {GRADIENT}", "").replace(" float32", "").replace("binary_cross_entropy", "bce")


def _save(figure: Any, document: Document, path: Path) -> None:
    """With a title, and one legend for all panels."""
    figure.suptitle(f"{document['device']['name']}, {document['date'][:10]}")
    handles = {
        label: line for axis in figure.axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
