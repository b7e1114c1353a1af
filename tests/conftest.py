"""The suite runs under JAX's strictest settings, on the CPU."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest
from versions import enable_x64

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples in every run, or many others; no deadline, as a first call compiles.
profile = hypothesis.settings.register_profile
profile("suite", deadline=None, derandomize=True, max_examples=20)
profile("fuzz", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile("suite")


@pytest.fixture
def x64():
    """Switches double precision on for one test."""
    with enable_x64():
        yield
