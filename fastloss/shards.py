"""Several files as one array, along the first axis."""

from __future__ import annotations

import contextlib
import glob
import re
from typing import Any

import numpy as np

from fastloss.files import Array, InputError, Reader, open_one


class ShardedReader(Reader):
    """The rows of several files, by their names; numbers in names count as numbers: shard-2 comes before shard-10."""

    def __init__(self, spec: str, pattern: str, suffix: str, member: str | None) -> None:
        paths = sorted(glob.glob(pattern, recursive=True), key=_natural)
        if not paths:
            raise InputError(f"{spec}: no file matches")
        self._suffix, self._member = suffix, member
        self._ends: list[int] = []
        rows = 0
        for path in paths:
            with contextlib.closing(self._open(path)) as part:
                if not self._ends:
                    like, self._grain = part, part.grain
                if not part.shape:
                    raise InputError(f"{part.name}: a single number, expected an array as a part of {spec}")
                if (part.row_shape, part.dtype) != (like.row_shape, like.dtype):
                    raise InputError(
                        f"{part.name}: rows of shape {part.row_shape} and dtype {part.dtype}, expected "
                        f"{like.row_shape} and {like.dtype} as in {like.name}"
                    )
                rows += part.rows
                self._ends.append(rows)
        super().__init__(spec, (rows, *like.row_shape), like.dtype)
        self.paths = paths
        self._row, self._number = 0, 0
        self._part: Reader | None = None

    @property
    def grain(self) -> int:
        return self._grain

    def skip(self, rows: int) -> None:
        goal = self._row + rows
        while self._row < goal:
            left = self._left()
            count = min(left, goal - self._row)
            if self._part is not None or count < left:  # a part that is passed over whole is not opened
                self._current().skip(count)
            self._row += count

    def read(self, rows: int) -> Array:
        whole: Array | None = None
        done = 0
        while done < rows:
            count = min(self._left(), rows - done)
            chunk = self._current().read(count)
            self._row += count
            if count == rows:
                return chunk
            if whole is None:
                whole = np.empty((rows, *self.row_shape), self.dtype)
            whole[done : done + count] = chunk  # before the next part is opened: it is good until then
            done += count
        return np.empty((0, *self.row_shape), self.dtype) if whole is None else whole

    def _left(self) -> int:
        """How many rows the part that the next row is in has left."""
        while self._row >= self._ends[self._number]:
            self._number += 1
            self.close()
        return self._ends[self._number] - self._row

    def _open(self, path: str) -> Reader:
        return open_one(path, self._suffix, self._member)

    def _current(self) -> Reader:
        if self._part is None:
            self._part = self._open(self.paths[self._number])
        return self._part

    def close(self) -> None:
        if self._part is not None:
            self._part.close()
            self._part = None


def _natural(path: str) -> list[Any]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]
