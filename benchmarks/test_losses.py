"""`make bench`: every case and contender under pytest-benchmark. Arrays are made outside the timed call."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
from cases import CASES, CONTENDERS, Case


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def built(request: pytest.FixtureRequest) -> Iterator[tuple[Case, dict[str, Any], int]]:
    case: Case = request.param
    calls, nbytes = case.build()
    yield case, calls, nbytes
    del calls
    gc.collect()


@pytest.mark.parametrize("contender", CONTENDERS)
def test_loss(benchmark: Any, built: tuple[Case, dict[str, Any], int], contender: str) -> None:
    case, calls, nbytes = built
    if contender not in calls:
        pytest.skip(f"{case.name} has no {contender} contender")
    benchmark.group = case.name
    benchmark.extra_info["bytes"] = nbytes
    benchmark(calls[contender])
