"""The suite runs under JAX's strictest settings, on the CPU."""

import collections
import gc
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
profile("fuzz", deadline=None, max_examples=3000, print_blob=True)
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


def pytest_collection_modifyitems(items):
    """The largest files first, so that no process waits for another one at the end."""
    items.sort(key=lambda item: -item.path.stat().st_size)
    # Looking for garbage takes a tenth of the time otherwise. (gc.freeze would hide
    # imported objects from Hypothesis, which looks for generators.)
    gc.set_threshold(100_000, 20, 50)


# How many programs were compiled since they were last forgotten; each takes a megabyte.
compiled = []


@jax.monitoring.register_event_duration_secs_listener
def count(event, seconds, **_):
    if event.endswith("backend_compile_duration"):
        compiled.append(seconds)


@pytest.fixture(autouse=True)
def memory(request):
    yield
    if len(compiled) > 450:
        jax.clear_caches()
        compiled.clear()


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
    """How many tests were skipped and why, and the command that lets them run."""
    skipped = collections.defaultdict(list)
    for report in terminalreporter.getreports("skipped"):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        why, _, command = reason.partition(": ")
        skipped[command].append(why)
    for command, reasons in skipped.items():
        why = "; ".join(sorted(set(reasons)))
        line = f"{len(reasons)} skipped: {why.replace(' is missing; ', ', ')}"
        terminalreporter.write_line(f"{line}: {command}" if command else line)
