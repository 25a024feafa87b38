"""A small call of every loss on Numba's device arrays, to be run under compute-sanitizer: each array is an allocation
of exactly its size, and no other library's kernels are in the way. Exits 1 where a value is wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def calls() -> int:
    """Number of calls that were made; raises AssertionError for a value out of bounds."""
    import numpy as np
    from numba import cuda

    from table import ROWS, assert_within, value_bound

    rng = np.random.default_rng(0)
    made = 0
    # few classes, a block a row, rows that are not aligned; sizes that leave heads and tails
    for row in ROWS:
        for shape in ((5, 3), (3, 131)) if row.classes else ((7, 41),):
            sample = row.draw(rng, shape, np.float32, row.everything())
            here = _on_device(sample, cuda.to_device)
            for reduction in ("none", "mean"):
                got = row.call(here, reduction=reduction).copy_to_host()
                truth = row.truth(sample, reduction).value
                # twice the CPU's, whose differences and weighted losses are float64
                bound = 2 * value_bound(row, sample, reduction, np.float32)
                assert_within(got, truth, bound, np.float32, f"{row.id} {reduction}")
            row.gradient(here)
            made += 3
    made += _out_of_range(rng, cuda.to_device)
    cuda.synchronize()
    return made


def _out_of_range(rng: Any, to_device: Any) -> int:
    """Class indices that would read far outside of everything."""
    import numpy as np

    import fastloss

    logits = to_device(rng.standard_normal((6, 37)).astype(np.float32))
    target = to_device(np.array([1, -1, 37, 2**40, -(2**62), 5]))
    losses = fastloss.cross_entropy(logits, target, reduction="none").copy_to_host()
    if np.isnan(losses).tolist() != [False, True, True, True, True, False]:
        raise AssertionError(f"losses of indices out of range: {losses}")
    fastloss.value_and_grad(fastloss.cross_entropy)(logits, target)
    return 2


def _on_device(sample: Any, to_device: Any) -> Any:
    """The same sample with its arrays on the device."""
    from dataclasses import replace

    options = {name: to_device(value) if hasattr(value, "dtype") else value for name, value in sample.options.items()}
    return replace(sample, input=to_device(sample.input), target=to_device(sample.target), options=options)


if __name__ == "__main__":
    print(f"{calls()} calls, every value within its bound")
