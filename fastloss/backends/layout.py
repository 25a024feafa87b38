"""Describes arrays of any layout to the kernels' drivers as rows of integers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..arrays import View
from ..kernels.records import INDEX, N_CLASSY, STRIDES

Shape = tuple[int, ...]


def address(array: np.ndarray) -> int:
    """Where an array's first element lies."""
    return int(array.__array_interface__["data"][0])


def collapse(shape: Shape, strides: Sequence[Shape]) -> tuple[Shape, list[Shape]]:
    """The fewest dimensions that describe the same elements: axes sorted by the first array's strides, then merged.

    >>> collapse((2, 3, 4), [(48, 16, 4), (0, 16, 4)])
    ((2, 12), [(48, 4), (0, 4)])
    """
    keep = [k for k, extent in enumerate(shape) if extent != 1]
    if all(strides[0][k] for k in keep):
        keep.sort(key=lambda k: -abs(strides[0][k]))
    merged: list[tuple[int, list[int]]] = []  # outermost first: extent and each array's stride
    for k in keep:
        steps = [stride[k] for stride in strides]
        if merged and all(outer == inner * shape[k] for outer, inner in zip(merged[-1][1], steps, strict=True)):
            merged[-1] = (merged[-1][0] * shape[k], steps)
        else:
            merged.append((shape[k], steps))
    if not merged:
        return (1,), [(0,) for _ in strides]
    return tuple(extent for extent, _ in merged), list(zip(*(steps for _, steps in merged), strict=True))


def record(array: np.ndarray, strides: Shape, class_step: int, in_place: bool) -> list[int]:
    """One array's row for the drivers, in the order of `kernels.records`' columns.

    `in_place`: whether its strides allow a kernel to work on it directly.
    """
    start, native = address(array), bool(array.dtype.isnative)
    direct = in_place and native and start % array.itemsize == 0
    return [start, array.itemsize, int(direct), int(not native), class_step, *strides]


def linear(shape: Shape, strides: Shape, itemsize: int) -> bool:
    """Whether elements lie side by side in C order."""
    if shape == (1,):
        return True
    outer = all(strides[k] == strides[k + 1] * shape[k + 1] for k in range(len(shape) - 1))
    return outer and strides[-1] == itemsize


def records(arrays: Sequence[np.ndarray]) -> tuple[Shape, list[list[int]]]:
    """The pointwise drivers' `shape` and `records`, for arrays of one shape (broadcast ones have strides of 0)."""
    shape, strides = collapse(arrays[0].shape, [array.strides for array in arrays])
    rows = [record(a, s, 0, linear(shape, s, a.itemsize)) for a, s in zip(arrays, strides, strict=True)]
    return shape, rows


class Samples:
    """The layout of a row loss: `arrays` in `records`' order (None where absent), the first `N_CLASSY` of them of shape
    (N, C, d1, ...), the others of shape (N, d1, ...)."""

    def __init__(self, arrays: Sequence[np.ndarray | None]) -> None:
        self.arrays = arrays
        present = {k: array for k, array in enumerate(arrays) if array is not None}
        outer = {k: self._without_classes(k, array.strides) for k, array in present.items()}
        first = next(iter(present))
        extents = self._without_classes(first, present[first].shape)
        self.shape, strides = collapse(extents, list(outer.values()))
        self.strides = dict(zip(present, strides, strict=True))
        self.total = math.prod(self.shape)

    def _without_classes(self, k: int, extents: Shape) -> Shape:
        return (extents[0], *extents[2:]) if k < N_CLASSY else extents

    def classes_adjoin(self, k: int) -> bool:
        """Whether the classes of array k lie side by side."""
        array = self.arrays[k]
        return array is not None and array.strides[1] == array.itemsize

    def samples_adjoin(self, k: int) -> bool:
        """Whether the samples of array k lie side by side, along the innermost dimension at least."""
        array = self.arrays[k]
        return array is not None and (self.strides[k][-1] == array.itemsize or self.shape == (1,))

    def records(self, by_row: bool) -> list[list[int]]:
        """One row for each array, zeros for those that are absent; `by_row`: for kernels that want a sample's classes
        side by side, not a class's samples."""
        table = [[0] * (STRIDES + len(self.shape)) for _ in self.arrays]
        for k, strides in self.strides.items():
            array = self.arrays[k]
            if array is None:
                continue
            if k < N_CLASSY:
                step = array.strides[1]
                aligned = all(stride % array.itemsize == 0 for stride in (step, *strides))
                in_place = aligned and (self.classes_adjoin(k) if by_row else self.samples_adjoin(k))
            else:
                step = int(k == INDEX and array.dtype.kind == "u")
                in_place = linear(self.shape, strides, array.itemsize)
            table[k] = record(array, strides, step, in_place)
        return table


def as_floats(view: View) -> np.ndarray:
    """The numbers of a view as a NumPy array that can be computed with."""
    if view.dtype != "bfloat16":
        return view.data
    return (view.data.astype(np.uint32) << 16).view(np.float32)
