"""The suite runs under JAX's strictest settings, on the CPU."""

import collections
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest
from versions import UNOPTIMIZED, enable_x64

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples in every run, or many others; no deadline, as a first call compiles.
profile = hypothesis.settings.register_profile
profile("suite", deadline=None, derandomize=True, max_examples=20)
profile("fuzz", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile("suite")


def pytest_addoption(parser):
    parser.addoption(
        "--optimized",
        action="store_true",
        help="compile as users do, which takes twice as long as all else",
    )


def pytest_configure(config):
    if not config.getoption("optimized"):
        # Also of the processes that tests start.
        os.environ |= UNOPTIMIZED
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True, scope="module")
def memory():
    """Compiled programs of a module are not kept for the next one."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """Switches double precision on for one test."""
    with enable_x64():
        yield


@pytest.fixture
def lenient():
    """Standard promotion, as JAX comes: Optax's own arithmetic mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def pytest_terminal_summary(terminalreporter):
    """Why tests were skipped, and how many for each reason."""
    reasons = collections.Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.getreports("skipped")
        if isinstance(report.longrepr, tuple)
    )
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason}")
