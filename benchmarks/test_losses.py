"""Every case and contender under pytest-benchmark; for some: `pytest benchmarks -k "mse_loss-float32-1000 and JAX"`.

Arrays are made, and calls compiled, outside the timed call.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import contenders
import numpy as np
import pytest
from cases import CASES, Case

BY_NAME = {case.name: case for case in CASES}


@lru_cache(maxsize=1)  # one case's arrays at a time
def operands(name: str) -> tuple[np.ndarray, np.ndarray]:
    contenders.free()
    return BY_NAME[name].operands()


def label(case: Case, name: str) -> str:
    """As pytest's -k can tell it apart: `cross_entropy-float32-65536x1000-torch`."""
    return f"{case.name}-{name}".replace(",", "").replace(" x ", "x").replace(" ", "-")


@pytest.mark.parametrize(
    ("case", "name"),
    [pytest.param(case, name, id=label(case, name)) for case in CASES for name in case.contenders],
)
def test_loss(benchmark: Any, case: Case, name: str) -> None:
    if case.nbytes * 1.25 > contenders.available():
        pytest.skip("the arrays do not fit the memory")
    try:
        call = contenders.contender(name, case, *operands(case.name))
    except (contenders.AbsentError, ImportError, MemoryError) as error:
        pytest.skip(str(error))
    benchmark.group = case.name
    benchmark.extra_info["bytes"] = case.nbytes
    benchmark(call)
