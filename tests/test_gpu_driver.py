"""From a call to a launched kernel, on a machine without a GPU: what the CUDA driver is asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from posing_as_gpu import STREAM

OURS, CALLERS = 41, 7  # contexts
POSING = Path(__file__).with_name("posing_as_gpu.py")


def asked(capability: tuple[int, int]) -> list[list[Any]]:
    """What one process asked of the driver, in order."""
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "0", "PYTHONPATH": str(POSING.parents[1])}
    command = [sys.executable, str(POSING), json.dumps(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=[(7, 5), (9, 0), (12, 0)], ids=["sm_75", "sm_90", "sm_120"])
def log(request: pytest.FixtureRequest) -> list[list[Any]]:
    return asked(request.param)


def test_kernels_are_launched_on_the_callers_stream_in_the_arrays_context(log: list[list[Any]]) -> None:
    launches = [entry for entry in log if entry[0] == "launch"]
    assert len(launches) == 7
    for _, stream, grid, block, name, arguments, context in launches:
        assert stream == STREAM
        assert context == OURS
        assert 1 <= grid <= 1600
        assert block in (128, 256)
        assert "kernel" in name
        assert all(isinstance(argument, int) for argument in arguments)


def test_the_callers_context_is_its_own_again(log: list[list[Any]]) -> None:
    contexts = [entry[1] for entry in log if entry[0] == "context"]
    assert contexts == [OURS, CALLERS] * (len(contexts) // 2)


def test_a_kernel_is_loaded_once(log: list[list[Any]]) -> None:
    """One for cross_entropy, four for the gradient under a mean, one for a Meter's sums."""
    loads = [entry for entry in log if entry[0] == "load"]
    assert loads == [["load", True, OURS]] * 6


def test_the_second_call_is_a_plan_with_new_memory(log: list[list[Any]]) -> None:
    first, second = [entry for entry in log if entry[0] == "launch"][:2]
    assert first[:5] == second[:5]
    assert first[5][0] != second[5][0]  # the result
    assert first[5][1:] == second[5][1:]


def test_only_a_stream_that_an_array_names_is_waited_for(log: list[list[Any]]) -> None:
    assert [entry for entry in log if entry[0] == "wait"] == [["wait", STREAM, 0xCAFE]]


def test_only_a_meter_synchronises(log: list[list[Any]]) -> None:
    waits = [k for k, entry in enumerate(log) if entry[0] == "synchronize"]
    assert len(waits) == 1
    assert log[waits[0] - 1][0] == "read"
    assert log[waits[0] - 1][2] == 64
