"""What the oldest versions that pyproject.toml allows have under other names."""

import contextlib

import jax
import optax
import pytest

needs_new_xla = pytest.mark.skipif(
    jax.__version_info__ < (0, 10),
    reason="XLA before JAX 0.10 copies and fuses otherwise",
)

needs_new_optax = pytest.mark.skipif(
    tuple(map(int, optax.__version__.split(".")[:3])) < (0, 2, 7),
    reason="Optax before 0.2.7 does otherwise itself",
)

# Before JAX 0.7.1.
set_mesh = getattr(jax, "set_mesh", None) or jax.sharding.use_mesh


def reshard(tree, shardings):
    """``jax.sharding.reshard``."""
    if hasattr(jax.sharding, "reshard"):
        return jax.sharding.reshard(tree, shardings)
    # Before JAX 0.7.
    from jax.experimental import shard

    return shard.reshard(tree, shardings)


def shard_map(f, *, check_vma=True, **options):
    """``jax.shard_map``."""
    if hasattr(jax, "shard_map"):
        return jax.shard_map(f, check_vma=check_vma, **options)
    # Before JAX 0.6.1.
    from jax.experimental.shard_map import shard_map

    return shard_map(f, check_rep=check_vma, **options)


@contextlib.contextmanager
def enable_x64(enabled=True):
    """``jax.enable_x64``, which is there since JAX 0.8."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", enabled)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def as_pure(tree):
    """``flax.nnx.as_pure``: arrays without the boxes around them."""
    from flax import nnx

    # `pure` before Flax 0.12.
    return nnx.as_pure(tree) if hasattr(nnx, "as_pure") else nnx.pure(tree)
