"""One small adapter per array library: how to look at an array's memory, and how to hand a result back.

An adapter is a module with a function::

    view(array, differentiable=False) -> View     # no copy; raises TypeError for what cannot be read

where arrays lie in the CPU's memory, one more::

    wrap(data, dtype, like) -> array              # NumPy memory as an array of the library `like` belongs to

where they lie on a GPU, instead of it::

    empty(shape, dtype, like) -> array            # new memory in C order, on the device of `like`
    stream(like) -> int                           # the CUDA stream that the caller works on, on that device

and, where a library's later work does not wait for that stream, the word that the caller has to wait for the kernel
before it hands a result out or lets go of an array that it read (`view` lets our stream wait for the library's)::

    SYNCHRONISES = True

and, where calls on small arrays should be fast, two more::

    key(array) -> Hashable | None                 # all that tells how to read it, but its address; None: look again
    address(array) -> int                         # of its first element
    KEYED = (type, ...)                           # the only types whose arrays `key` is asked about; absent: any

Arrays that hold no numbers here and now (a tracer's, a graph's) are somebody else's to evaluate::

    engine(array) -> Engine | None                # who evaluates the losses of this array; None: its memory is read

`differentiable` says that a gradient was asked for, so an array that records gradients may be read. dtypes are names:
"float32", "bfloat16", "int64", ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from ..losses import Loss


class Engine(Protocol):
    """Evaluates losses of arrays that cannot be read yet. `arguments` are the loss's own, by name; absent: default."""

    def evaluate(self, loss: Loss[Any], arguments: Mapping[str, Any]) -> Any:
        """What the loss function returns."""

    def value_and_grad(
        self,
        loss: Loss[Any],
        arguments: Mapping[str, Any],
        names: Sequence[str],
        grad_output: Any,
        grad_outs: Sequence[Any],
    ) -> tuple[Any, list[Any]]:
        """The value, and the gradients by the arguments `names`."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """An array's memory on a GPU: described here, touched by kernels only."""

    address: int  # of the first element; 0 where there is none
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes
    itemsize: int
    device: int  # CUDA's number of the GPU
    owner: Any  # whoever keeps the memory
    writable: bool = True
    stream: int | None = None  # whose work must have ended before the memory is read, where the owner names one


class View(NamedTuple):
    """An array's memory."""

    data: Any  # a NumPy array (bfloat16 is held as uint16), or DeviceMemory
    dtype: str  # "float32", "bfloat16", "int64", ...
    weak: bool = False  # a Python number or list, whose dtype gives way to the others'

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape  # type: ignore[no-any-return]

    @property
    def device(self) -> int | None:
        """CUDA's number of the GPU that the memory is on; None for the CPU."""
        return self.data.device if isinstance(self.data, DeviceMemory) else None

    @property
    def writable(self) -> bool:
        return self.data.writable if isinstance(self.data, DeviceMemory) else bool(self.data.flags.writeable)
