"""Fresh random inputs in every run: the seed is printed, and FASTLOSS_TEST_SEED draws the same again."""

import os
import secrets
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

SEED = int(os.environ.get("FASTLOSS_TEST_SEED") or secrets.randbits(32))
os.environ["FASTLOSS_TEST_SEED"] = str(SEED)  # the worker processes of pytest-xdist draw the same

# No deadline: the first call of a kernel compiles it. No database: nothing is left in the checkout.
settings.register_profile(
    "fastloss", deadline=None, database=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fastloss")


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "hypothesis_seed", "unknown") is None:
        config.option.hypothesis_seed = str(SEED)


def pytest_report_header() -> str:
    return f"FASTLOSS_TEST_SEED={SEED}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(f"inputs of this run: FASTLOSS_TEST_SEED={SEED}")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator of the run's seed and the test's own name, whatever else runs beside it."""
    return np.random.default_rng([SEED, zlib.crc32(request.node.name.encode())])
