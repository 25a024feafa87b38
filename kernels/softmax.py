"""Softmax cross-entropy: the kernels' options, and which layout serves which arrays."""

from __future__ import annotations

from dataclasses import dataclass

from . import storage
from .compiler import Variant
from .softmax_flat import FlatKernel
from .softmax_packed import PackedKernel
from .softmax_planes import PlanesKernel
from .softmax_rows import KEPT_LOGITS, RowsKernel
from .softmax_samples import GATHERED, ShortKernel, TileKernel
from .values import CACHE_LINE, F32, LANES, SIZE, Value

KERNELS = {
    "flat": FlatKernel,
    "packed": PackedKernel,
    "planes": PlanesKernel,
    "rows": RowsKernel,
    "short": ShortKernel,
    "tile": TileKernel,
}


@dataclass(frozen=True)
class SoftmaxVariant(Variant):
    """One kernel: the options that change the loop. Storages are names of `storage.MEMORY`."""

    layout: str  # of `KERNELS`
    few: int  # the number of classes where it is compiled in ("short", "packed", "planes"), else 0
    compute: str  # "float32" or "float64"
    logits: str  # storage
    probabilities: str | None = None  # storage of class probabilities; None: class indices
    index: str = "int64"  # storage of these
    weighted: bool = False  # class weights of the compute type
    smoothing: bool = False
    z_loss: bool = False
    softcap: bool = False
    upstream: bool = False  # a float64 gradient of each sample's loss
    losses: str | None = None
    grad: str | None = None
    grad_target: str | None = None
    # Classes are one shard of the whole. Without `grad` each sample's state is written: losses, lse and mass, float64.
    # With it the whole's lse, `merged`, is given, and `pull`, what the whole's softmax counts for in the gradient.
    shard: bool = False
    stream: bool = False  # `grad` goes past the caches; not with "short" where `few` is 0

    @property
    def plain(self) -> bool:
        """Whether the loss is the logarithm of the sum of exponentials less the target's logit."""
        options = self.probabilities or self.weighted or self.smoothing or self.z_loss
        return not (options or self.shard)

    @property
    def key(self) -> tuple[object, ...]:
        """What tells this kernel from every other, for the disk cache."""
        return ("softmax", *(getattr(self, name) for name in self.__dataclass_fields__))

    def emit(self, n: Value, arrays: Value, parameters: Value, sums: Value) -> None:
        """`void kernel(n, arrays, parameters, sums)` over n samples; adds to the float64 slots `SUMS`."""
        KERNELS[self.layout](self, n, arrays, parameters, sums).emit()


def scratch_bytes(variant: SoftmaxVariant, classes: int, tile: int) -> int:
    """The scratch that a kernel needs, where it takes tiles of so many samples."""
    if variant.layout == "rows" and variant.grad:
        return max(classes, KEPT_LOGITS) * storage.itemsize(variant.compute)
    if variant.layout == "flat":
        return (classes * tile * SIZE[F32] + CACHE_LINE) * (2 if variant.grad else 1)
    if variant.layout in ("packed", "planes"):
        return (classes + 2 if variant.grad else 2) * tile * SIZE[F32]
    if variant.layout == "tile":
        return classes * tile * storage.itemsize(variant.compute)
    if variant.layout == "short" and variant.few and variant.stream:
        return classes * GATHERED * storage.itemsize(variant.compute)
    if variant.layout == "short" and not variant.few:
        return classes * LANES * storage.itemsize(variant.compute) * (2 if variant.probabilities else 1)
    return 0
