"""`make bench`: every case and contender under pytest-benchmark. Arrays are made outside the timed call."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
from cases import CASES, Call, Case


@lru_cache(maxsize=1)  # one case's arrays at a time
def built(case: Case) -> tuple[dict[str, Call], int]:
    return case.build()


@pytest.mark.parametrize(
    ("case", "contender"),
    [pytest.param(case, name, id=f"{case.name}-{name}") for case in CASES for name in case.contenders],
)
def test_loss(benchmark: Any, case: Case, contender: str) -> None:
    calls, nbytes = built(case)
    benchmark.group = case.name
    benchmark.extra_info["bytes"] = nbytes
    benchmark(calls[contender])
