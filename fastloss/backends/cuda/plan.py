"""How a call ran on a GPU, for the next one on arrays of the same kind: only addresses and the stream are new."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from ... import checks
from ...arrays import View
from .driver import Device, Launch


class GPUPlan:
    """The launches of a loss that has no arrays but input and target, whose addresses modulo `alignment` chose the
    kernels. `patches` say which launch's which argument is
    the address of what: input and target come first, then what is returned, then temporaries."""

    def __init__(
        self,
        device: Device,
        adapter: ModuleType,
        launches: Sequence[Launch],
        patches: Sequence[tuple[int, int, int]],
        sources: Sequence[View],
        results: Sequence[View],
        temporaries: Sequence[View],
        alignment: int,
    ) -> None:
        self.device, self.adapter, self.launches, self.patches = device, adapter, launches, patches
        self._modulus = alignment
        self._alignment = tuple(view.data.address % alignment for view in sources)
        self._new = [(view.shape, view.dtype) for view in (*results, *temporaries)]
        self._new_alignment = [view.data.address % alignment for view in results if view.shape]
        self._n_results = len(results)
        self._templates = [list(launch.arguments) for launch in launches]

    def run(self, x: int, y: int, like: Any) -> Any:
        """The loss of arrays at these addresses, with its gradients where they were asked for; None where the arrays
        are aligned otherwise, or must be looked at first."""
        modulus = self._modulus
        if (x % modulus, y % modulus) != self._alignment or checks.requested():
            return None
        adapter = self.adapter
        arrays = [adapter.empty(shape, dtype, like) for shape, dtype in self._new]
        addresses = (x, y, *map(adapter.address, arrays))
        results = zip(self._new[: self._n_results], addresses[2:], strict=False)
        if [address % modulus for (shape, _), address in results if shape] != self._new_alignment:
            return None
        arguments = [template.copy() for template in self._templates]
        for launch, argument, of in self.patches:
            arguments[launch][argument] = addresses[of]
        self.device.launch(self.launches, adapter.stream(like), arguments)
        return arrays[0] if self._n_results == 1 else arrays[: self._n_results]
