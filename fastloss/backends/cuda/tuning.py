"""How kernels are laid out on a GPU: one table by compute capability, and how it was found.

No row was measured yet: the numbers follow from the machine code (docs/cuda-kernels.md) and from Little's law, 40 KB in
flight on each multiprocessor of an H100. `benchmarks/gpu.py` measures them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """Sizes are powers of 2."""

    pointwise_threads: int = 256
    pointwise_blocks: int = 8  # at most, on each multiprocessor
    row_threads: tuple[int, ...] = (128, 256, 512)  # of a block that takes a row, the fewest that hold it
    long_row_threads: int = 512  # of a row that no block holds
    row_blocks: int = 16  # at most, on each multiprocessor
    vectors: int = 4  # 16-byte loads that a thread has in flight
    slice_blocks: int = 4  # blocks on each multiprocessor where few long rows are cut
    slice_classes: int = 16384  # of a slice, at least
    sample_threads: int = 128
    tile_classes: int = 64  # rows of at most so many pass through shared memory


# sm_75 has 65,536 registers for 1,024 threads on a multiprocessor, the others for 2,048 (sm_86, sm_89: 1,536).
TUNING: dict[tuple[int, int], Tuning] = {
    (7, 5): Tuning(pointwise_blocks=4, row_blocks=8),
    (8, 0): Tuning(),
    (9, 0): Tuning(),
    (10, 0): Tuning(),
}
# The simulator is told to be small: every branch is taken by arrays that it can finish.
SIMULATOR = Tuning(
    pointwise_threads=32,
    pointwise_blocks=1,
    row_threads=(32, 64),
    long_row_threads=64,
    row_blocks=1,
    vectors=1,
    slice_blocks=1,
    slice_classes=512,
    sample_threads=32,
    tile_classes=16,
)


def tuning_for(capability: tuple[int, int]) -> Tuning:
    """The row of the newest capability that is not newer."""
    known = [known for known in sorted(TUNING) if known <= capability]
    return TUNING[known[-1] if known else min(TUNING)]
