"""Kernels compiled for older x86 CPUs, run on this one: what newer ones have instructions for, these compute."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import pytest
from ml_dtypes import bfloat16

from fastloss.kernels import compiler
from table import BY_ID, check_gradient, check_value

HERE = Path(__file__)
FEATURES = {
    "x86-64": set(),
    "x86-64-v3": {"fma", "avx2", "float16"},
    "x86-64-v4": {"fma", "avx2", "avx512", "float16"},
}
CROSS_ENTROPY = [(3, 1), (37, 3), (37, 10), (53, 31), (40, 100), (9, 300), (2, 21, 40)]
POINTWISE = [(7,), (1000,)]
LOSSES = ("l1_loss", "smooth_l1_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits")


def losses() -> None:
    """Values and gradients of this process's kernels."""
    rng = np.random.default_rng(int(os.environ.get("FASTLOSS_TEST_SEED", "0")))
    work = [("cross_entropy", shape) for shape in CROSS_ENTROPY]
    work += [(name, shape) for name in LOSSES for shape in POINTWISE]
    for name, shape in work:
        row = BY_ID[name]
        for dtype in ("float32", bfloat16, "float16"):
            sample = row.draw(rng, shape, dtype)
            for reduction in ("none", "mean"):
                check_value(row, sample, reduction)
            check_gradient(row, sample, "mean")


@pytest.mark.parametrize("cpu", FEATURES)
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="runs what is compiled for x86-64")
def test_losses(cpu: str) -> None:
    features = compiler.features_of(compiler.machine())
    if not FEATURES[cpu] <= features:
        pytest.skip(f"this CPU is older than {cpu}")
    done = subprocess.run([sys.executable, str(HERE), cpu], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["done", *sorted(FEATURES[cpu])]


def main(cpu: str) -> None:
    own = compiler.machine
    compiler.machine = lambda *_: own(llvm.get_process_triple(), cpu)  # type: ignore[assignment]
    compiler.cached = lambda key, make: make()  # the disk cache knows of one CPU
    losses()
    print("done", *sorted(compiler.features_of(compiler.machine())))


if __name__ == "__main__":
    main(sys.argv[1])
