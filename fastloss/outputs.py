"""Output files that appear under their names whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fastloss.files import InputError


class Output:
    """A file written beside its destination and moved there by `commit`; `close` throws away the rest."""

    def __init__(self, path: str, inputs: Iterable[str]) -> None:
        self.name = path
        self.path = os.path.realpath(path)  # a link goes on pointing at what it points at
        folder = os.path.dirname(self.path)
        if not os.path.isdir(folder):
            raise InputError(f"{path}: the folder {folder} does not exist")
        if os.path.isdir(self.path):
            raise InputError(f"{path}: is a directory, expected the name of a file to write")
        if os.path.exists(self.path) and not os.path.isfile(self.path):
            # moving a file onto a device would replace the device
            raise InputError(f"{path}: is not a regular file, expected the name of a file to write")
        for other in inputs:
            if os.path.exists(self.path) and os.path.exists(other) and os.path.samefile(self.path, other):
                raise InputError(f"{path}: is also an input, expected another name to write to")
        self._part = os.path.join(folder, f".{os.path.basename(self.path)}.{secrets.token_hex(4)}.part")
        with self._explained():
            self.file: BinaryIO = open(self._part, "xb")  # noqa: SIM115 - closed by commit or close

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"{self.name}: cannot be written: {error.strerror or error}") from None

    def write_header(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        """Begins a .npy of this dtype and shape."""
        entries = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        with self._explained():
            np.lib.format.write_array_header_1_0(self.file, entries)

    def write(self, array: npt.NDArray[Any]) -> None:
        """Appends the elements of a contiguous array."""
        with self._explained():
            self.file.write(array.data)

    @contextlib.contextmanager
    def writing(self) -> Iterator[BinaryIO]:
        """The file, for others to write to."""
        with self._explained():
            yield self.file

    def commit(self) -> None:
        """Moves the finished file to its name."""
        with self._explained():
            self.file.flush()
            os.fsync(self.file.fileno())  # a full disk may be noticed only here
            self.file.close()
            os.replace(self._part, self.path)

    def close(self) -> None:
        """Removes what was not committed."""
        with contextlib.suppress(OSError):
            self.file.close()  # tries again to write what did not fit
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._part)
