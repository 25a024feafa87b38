"""Fresh random inputs in every run: the seed is printed, and FASTLOSS_TEST_SEED draws the same again.

Where there is no GPU, tests of kernels for GPUs run in Numba's simulator, which is chosen before Numba is imported.
"""

import collections
import ctypes
import os
import secrets
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings


def gpus() -> int:
    """The number of GPUs that CUDA can use."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return count.value if not driver.cuInit(0) and not driver.cuDeviceGetCount(ctypes.byref(count)) else 0


if not gpus():
    os.environ["NUMBA_ENABLE_CUDASIM"] = "1"

SEED = int(os.environ.get("FASTLOSS_TEST_SEED") or secrets.randbits(32))
os.environ["FASTLOSS_TEST_SEED"] = str(SEED)  # the worker processes of pytest-xdist draw the same

# No deadline: the first call of a kernel compiles it. No database: nothing is left in the checkout.
settings.register_profile(
    "fastloss", deadline=None, database=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fastloss")

VARIANTS = pytest.StashKey[set[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[VARIANTS] = set()
    if getattr(config.option, "hypothesis_seed", "unknown") is None:
        config.option.hypothesis_seed = str(SEED)


def pytest_report_header() -> str:
    return f"FASTLOSS_TEST_SEED={SEED}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist
        session.config.workeroutput["variants"] = sorted(session.config.stash[VARIANTS])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """pytest-xdist: a worker has ended."""
    node.config.stash[VARIANTS].update(getattr(node, "workeroutput", {}).get("variants", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if variants := config.stash[VARIANTS]:
        kinds = collections.Counter(variant.split()[0] for variant in variants)
        how = "simulated" if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1" else "run on the GPU"
        shown = ", ".join(f"{kind} {n}" for kind, n in sorted(kinds.items()))
        terminalreporter.write_line(f"{len(variants)} variants of CUDA kernels {how}: {shown}")
    passed = terminalreporter.stats.get("passed", [])
    if compiled := sum(("cuda", "compiled") in report.user_properties for report in passed):
        terminalreporter.write_line(f"{compiled} variants of CUDA kernels compiled and read: docs/cuda-kernels.md")
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(f"inputs of this run: FASTLOSS_TEST_SEED={SEED}")


@pytest.fixture(scope="session")
def variants(pytestconfig: pytest.Config) -> set[str]:
    """Names of the CUDA kernels that tests have run, for the summary."""
    return pytestconfig.stash[VARIANTS]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator of the run's seed and the test's own name, whatever else runs beside it."""
    return np.random.default_rng([SEED, zlib.crc32(request.node.name.encode())])
