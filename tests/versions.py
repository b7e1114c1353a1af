"""What differs between versions, and between a test's compiler and a user's."""

import contextlib
import functools
import importlib.util
import os

import jax
import optax
import pytest

# Half of a run would be LLVM's and MLIR's work. Before JAX 0.11, XLA on the CPU has an
# older way to kernels, which takes half as long; libtpu reads the same flags and ends
# the process at this one.
own = ["--xla_cpu_parallel_codegen_split_count=1"]
# The compiler's options, where a claim is about what it makes of a program.
AS_USERS_DO = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
}
if jax.__version_info__ < (0, 11) and not importlib.util.find_spec("libtpu"):
    own.append("--xla_cpu_use_fusion_emitters=false")
    AS_USERS_DO["xla_cpu_use_fusion_emitters"] = True
others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag not in own]
UNOPTIMIZED = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": " ".join(others + own),
}

as_users_compile = functools.partial(jax.jit, compiler_options=AS_USERS_DO)

needs_new_xla = pytest.mark.skipif(
    jax.__version_info__ < (0, 10),
    reason="XLA before JAX 0.10 copies and fuses otherwise",
)

needs_new_optax = pytest.mark.skipif(
    tuple(map(int, optax.__version__.split(".")[:3])) < (0, 2, 7),
    reason="Optax before 0.2.7 does otherwise itself",
)

TRAINERS = 'pip install -e ".[trainers]"'


def installed(package, command=TRAINERS):
    """The package, or a test is skipped and the command named that installs it."""
    return pytest.importorskip(package, reason=f"{package} is missing: {command}")


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
