"""The suite runs under JAX's strictest settings, on the CPU."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """Switches double precision on for one test."""
    with jax.enable_x64(True):
        yield
