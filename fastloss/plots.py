"""The distribution of per-sample losses: counted in bounded memory, drawn for screen, print and greyscale."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fastloss.extras import needed
from fastloss.files import InputError

if TYPE_CHECKING:
    from fastloss.evaluate import Report

    Floats = npt.NDArray[np.float64]

FORMATS = (".png", ".svg", ".pdf")

# Sign, exponent and 11 bits of mantissa of a float32: a bin is at most 2**-11 = 0.05 % wide, the table 8 MB.
KEY_BITS = 20
SHIFT = np.uint32(32 - KEY_BITS)
SIGN = np.uint32(1 << 31)
LARGEST = float(np.finfo(np.float32).max)

INK, FAINT, BAR, LINE = "#1a1a1a", "#707070", "#7fa3c7", "#12355b"
CLASS_BARS = 40  # more do not fit beside each other with their names
UNITS = {
    "l1_loss": "units of the input",
    "mse_loss": "units of the input, squared",
    "smooth_l1_loss": "units of the input",
    "huber_loss": "units of the input, squared",
}  # the others are logarithms of probabilities: nats


class Histogram:
    """Exact counts over bins as fine as a float32 of 12 significant bits: one pass, whatever the range."""

    def __init__(self) -> None:
        self._count = np.zeros(1 << KEY_BITS, np.int64)
        self._sum = 0.0
        self.nan = 0

    def add(self, losses: npt.NDArray[Any]) -> None:
        """Counts losses, (n,)."""
        for start in range(0, losses.size, 1 << 18):  # the copies below stay in cache
            block = losses[start : start + (1 << 18)]
            with np.errstate(over="ignore"):
                valid = block[~np.isnan(block)].astype(np.float32) + np.float32(0)  # -0 becomes 0
            self.nan += len(block) - len(valid)
            with np.errstate(invalid="ignore"):  # inf - inf
                self._sum += float(valid.sum(dtype=np.float64))
            np.add.at(self._count, _keys(valid), 1)

    @property
    def size(self) -> int:
        """Number of losses, NaN included."""
        return int(self._count.sum()) + self.nan

    @property
    def mean(self) -> float:
        """Unweighted mean of the losses."""
        return float("nan") if self.nan or not self.size else self._sum / self.size

    def counts(self) -> tuple[Floats, Floats, npt.NDArray[np.int64]]:
        """Lower edges, upper edges and counts of the bins that hold anything; infinities have their own."""
        keys = np.flatnonzero(self._count)
        lower, upper = _edge(keys), _edge(keys + 1)
        negative, positive = _keys(np.array([-np.inf, np.inf], np.float32))
        lower[keys == negative] = -np.inf
        upper[keys == positive] = np.inf
        upper[lower == 0] = 0  # what float32 cannot tell from 0 by 12 significant bits
        return lower, upper, self._count[keys]


def _keys(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    """The fine bin of each value, in the order of the values."""
    bits = values.view(np.uint32)
    ordered: npt.NDArray[np.uint32] = np.where(bits & SIGN, ~bits, bits | SIGN) >> SHIFT
    return ordered


def _edge(keys: npt.NDArray[Any]) -> Floats:
    """The smallest value of each fine bin."""
    ordered = (keys.astype(np.uint64) << np.uint64(SHIFT)).astype(np.uint32)
    bits = np.where(ordered & SIGN, ordered ^ SIGN, ~ordered)
    with np.errstate(invalid="ignore"):  # the edge behind an infinity has the bits of a NaN
        return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def _quantile(values: Floats, count: npt.NDArray[np.int64], share: float) -> float:
    """The value that `share` of the losses do not exceed."""
    total = np.cumsum(count)
    return float(values[np.searchsorted(total, share * total[-1])])


def check_plot_name(path: str) -> None:
    """Refuses a picture that cannot be drawn, before any work is done."""
    if os.path.splitext(path)[1].lower() not in FORMATS:
        raise InputError(f"{path}: unknown kind of picture, expected a name in {', '.join(FORMATS)}")
    _figure_class()


def _figure_class() -> Any:
    with needed("matplotlib", by="--plot", extra="plots", error=InputError):
        return importlib.import_module("matplotlib.figure").Figure


def draw(report: Report, file: BinaryIO, kind: str) -> None:
    """Draws the report's histogram, and below it its classes if they were counted, as a png, svg or pdf."""
    style = {
        "font.family": "DejaVu Sans",  # ships with matplotlib: the same picture everywhere
        "font.size": 9,
        "axes.edgecolor": FAINT,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.color": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "svg.fonttype": "none",
        "pdf.fonttype": 42,
    }
    figure_class = _figure_class()
    with importlib.import_module("matplotlib").rc_context(style):
        rows = 1 if report.by_class is None else 2
        figure = figure_class(figsize=(6.8, 3.6 if rows == 1 else 6.4), layout="constrained", facecolor="white")
        axes = figure.subplots(rows, 1, squeeze=False)[:, 0]
        _draw_distribution(report, axes[0])
        if report.by_class is not None:
            _draw_classes(report, axes[1])
        figure.savefig(file, format=kind, dpi=200)


def _what(report: Report) -> str:
    return "sample" if report.job.loss.over_classes else "element"


def _unit(report: Report) -> str:
    return UNITS.get(report.job.loss.function, "nats")


def _draw_distribution(report: Report, axes: Any) -> None:
    histogram = report.histogram
    if histogram is None:
        raise ValueError("the report was made without a histogram")
    lower, upper, count = histogram.counts()
    total = histogram.size
    name = os.path.basename(report.readers["input"].name)
    axes.set_title(f"{report.job.loss.name} of {name}", loc="left", weight="bold", pad=20)
    finite = np.isfinite(lower) & np.isfinite(upper)
    infinite = int(count[~finite].sum())
    lower, upper, count = lower[finite], upper[finite], count[finite]
    notes = [f"{total:,} {_what(report)}s"]
    if report.ignored:
        notes[0] += f" ({report.ignored:,} ignored)"
    if not len(count):
        axes.text(0.5, 0.5, "no finite losses", transform=axes.transAxes, ha="center")
        axes.set(xticks=[], yticks=[])
    else:
        notes += _draw_bars(report, axes, lower, upper, count, total)
    odd = {"infinite": infinite, "nan": histogram.nan}
    notes += [f"{number:,} {name}" for name, number in odd.items() if number]
    axes.text(0, 1.03, " · ".join(notes), transform=axes.transAxes, color=FAINT, size=8)


def _draw_bars(
    report: Report, axes: Any, lower: Floats, upper: Floats, count: npt.NDArray[np.int64], total: int
) -> list[str]:
    """Draws the bars and the marks over them; returns what has to be said in words."""
    middle = (lower + upper) / 2
    positive = lower > 0
    logarithmic = False
    if lower[0] >= 0 and positive.any():
        low, high = (_quantile(middle[positive], count[positive], share) for share in (0.005, 0.995))
        logarithmic = high / low > 50
    # All but the few that would stretch the axis: the smallest on a log scale, else the largest.
    if logarithmic:
        last = float(upper[-1])
        first = max(_quantile(lower[positive], count[positive], 0.003), last * 1e-8)
        edges = np.geomspace(first, last, _bars(total) + 1)
        axes.set_xscale("log")
    else:
        first, last = float(lower[0]), _quantile(upper, count, 0.999)
        if upper[-1] - first < 1.5 * (last - first):
            last = float(upper[-1])
        edges = np.linspace(first, last, _bars(total) + 1)
        if last - first <= 1e-3 * abs(last) or last == first:  # all the same: one bar in the middle
            edges = (first + last) / 2 + np.linspace(-0.5, 0.5, 14)
    edges = np.unique(_edge(_keys(edges.astype(np.float32))))  # bars made of whole fine bins
    edges[-1] = max(edges[-1], last)
    height = np.histogram(middle, edges, weights=count)[0] * 100 / total
    width = np.diff(np.log(edges) if logarithmic else edges)
    axes.stairs(height * np.median(width) / width, edges, fill=True, facecolor=BAR, edgecolor=LINE, linewidth=0.6)

    notes = []
    for number, where in (
        (int(count[middle < edges[0]].sum()), f"below {edges[0]:.3g}"),
        (int(count[middle > edges[-1]].sum()), f"above {edges[-1]:.3g}"),
    ):
        if number:
            notes.append(f"{number:,} ({number / total:.2%}) {where} not drawn")
    for name, value, dash in (
        ("mean", report.histogram.mean if report.histogram else np.nan, "-"),
        ("median", _quantile(middle, count, 0.5), "--"),
        ("p95", _quantile(middle, count, 0.95), ":"),
        ("largest", upper[-1], "none"),
    ):
        at = [value, value] if edges[0] <= value <= edges[-1] else []
        axes.plot(
            at, [0, 1][: len(at)], linestyle=dash, color=INK, linewidth=1.3, label=f"{name} {value:.4g}",
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    axes.set_xlabel(f"loss per {_what(report)} ({_unit(report)}{', log scale' if logarithmic else ''})")
    axes.set_ylabel(f"% of {_what(report)}s per bar")
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0)
    _legend(axes)
    return notes


def _legend(axes: Any) -> None:
    """Beside the axes, where it covers nothing."""
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1), borderpad=0, handlelength=2)


def _bars(total: int) -> int:
    return int(np.clip(2 * np.cbrt(total), 12, 72))  # Rice's rule, within what the width can show


def _draw_classes(report: Report, axes: Any) -> None:
    by_class = report.by_class
    if by_class is None:
        raise ValueError("the report was made without classes")
    mean, count = by_class.mean, by_class.count
    seen = np.flatnonzero(count)
    title = "mean loss by class"
    if len(seen) > CLASS_BARS:
        seen = seen[np.argsort(-mean[seen], kind="stable")[:CLASS_BARS]]
        title = f"the {CLASS_BARS} of {len(count):,} classes with the highest mean loss"
    axes.set_title(title, loc="left", weight="bold")
    place = np.arange(len(seen))
    height = np.where(np.isfinite(mean[seen]), mean[seen], 0)
    axes.bar(place, height, width=0.8, color=BAR, edgecolor=LINE, linewidth=0.6)
    for x, index in enumerate(seen):
        if not np.isfinite(mean[index]):
            axes.annotate(f"{mean[index]}", (x, 0), (0, 3), textcoords="offset points", ha="center")
    names = [f"{index}\nn = {count[index]:,}" if len(seen) <= 10 else f"{index}" for index in seen]
    axes.set_xticks(place, names, rotation=90 if len(seen) > 20 else 0)
    axes.set_xlabel("class")
    axes.set_ylabel(f"mean loss ({_unit(report)})")
    mean_of_all = np.nan if report.mean is None else report.mean
    axes.axhline(mean_of_all, color=INK, linewidth=1.3, label=f"all {mean_of_all:.4g}")
    axes.margins(x=0.01)
    _legend(axes)
