"""Sharded parameters on eight devices.

The tests run in a process of their own, which has eight virtual CPU devices:
this file called as a script.
"""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sequences import STORAGES

from adamax_jax import adamax, adamaxw, moments


def check_explicit_sharding():
    """Every leaf of the state keeps its type, sharding included."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        for dtype in (jnp.float16, jnp.float32, jnp.complex64):
            params = jnp.ones([2, 8, 4], dtype)
            params = jax.device_put(
                params, NamedSharding(mesh, PartitionSpec(None, "x"))
            )
            for optimizer in (
                adamax(),
                adamaxw(nesterov=True),
                adamax(u_dtype="uint8"),
            ):
                state = optimizer.init(params)
                types = jax.tree.map(jax.typeof, state)
                assert types[0].m.sharding.spec == PartitionSpec(None, "x", None)
                assert types[0].u.sharding.spec == PartitionSpec(None, "x", None)
                for update in (optimizer.update, jax.jit(optimizer.update)):
                    _, new_state = update(params, state, params)
                    assert jax.tree.map(jax.typeof, new_state) == types
                assert (
                    jax.tree.map(jax.typeof, jax.jit(optimizer.init)(params)) == types
                )


def check_sharded_equals_one_device():
    """State follows the parameters' sharding, and no bit depends on it."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    gradients = jnp.asarray(rng.normal(size=[5, 16, 4]), jnp.float32)
    for storage in STORAGES.values():
        check_shardings(mesh, gradients, adamaxw(0.1, **storage))


def check_shardings(mesh, gradients, optimizer):
    results = []
    for sharding in (
        jax.sharding.SingleDeviceSharding(jax.devices()[0]),
        NamedSharding(mesh, PartitionSpec()),
        NamedSharding(mesh, PartitionSpec("x")),
    ):
        params = jax.device_put(jnp.ones([16, 4]), sharding)
        state = optimizer.init(params)
        assert state[0].m.sharding.is_equivalent_to(sharding, 2)
        step = jax.jit(optimizer.update)
        for g in gradients:
            updates, state = step(jax.device_put(g, sharding), state, params)
        assert state[0].u.sharding.is_equivalent_to(sharding, 2)
        results.append(jax.tree.map(np.asarray, (updates, state)))
        # Element by element: no device needs to hear of another.
        compiled = step.lower(params, state, params).compile().as_text()
        collectives = ("all-", "reduce-scatter", "collective")
        assert not any(name in compiled for name in collectives)
    (updates, state), *others = results
    for other_updates, other_state in others:
        # u to the last bit; the products in m may be fused another way.
        np.testing.assert_array_equal(other_state[0].u, state[0].u)
        np.testing.assert_allclose(other_updates, updates, rtol=0, atol=1e-6)
        (m, u), (other_m, _) = (
            jax.tree.map(np.asarray, moments(s)) for s in (state, other_state)
        )
        # One code of int8 at most, where a product decides on which side it falls.
        np.testing.assert_allclose(other_m / u, m / u, rtol=0, atol=0.02)


CHECKS = {
    check.__name__: check
    for check in (check_explicit_sharding, check_sharded_equals_one_device)
}


@pytest.mark.parametrize("check", CHECKS)
def test_on_eight_devices(check):
    done = subprocess.run(
        [sys.executable, "-W", "error", __file__, check],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "checked on 8 devices\n"


if __name__ == "__main__":
    CHECKS[sys.argv[1]]()
    print(f"checked on {len(jax.devices())} devices")
