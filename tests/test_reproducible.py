"""Which bits two runs have in common; called as a script, this file is such a run.

``test_checkpoints.py`` shows that a resumed run has those of an uninterrupted one,
``test_sharding.py`` and ``test_shared_axes.py`` that one device and eight have the
same.
"""

import hashlib
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sequences import STORAGES, gradients, trajectory
from versions import as_users_compile

from adamax_jax import adamax, scale_by_adamax


def trained():
    """The bytes of parameters and state after 50 steps, for each storage."""
    for storage in STORAGES.values():
        optimizer = adamax(1e-2, max_growth=1.5, **storage)

        @jax.jit
        def step(params, state, x, optimizer=optimizer):
            def loss(params):
                return jnp.mean(jnp.tanh(x @ params["w"] + params["b"]) ** 2)

            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return jax.tree.map(jnp.add, params, updates), state

        params = {"w": jnp.ones([33, 17]), "b": jnp.zeros([1, 17])}
        state = optimizer.init(params)
        for x in jax.random.normal(jax.random.key(0), [50, 19, 33]):
            params, state = step(params, state, x)
        yield b"".join(
            np.asarray(x).tobytes() for x in jax.tree.leaves((params, state))
        )


def in_a_process(seed):
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_two_processes_of_one_machine_agree_to_the_bit():
    """Nothing depends on an order of hashes, on addresses or on a random key."""
    first = in_a_process("1")
    assert len(set(first)) == len(STORAGES)
    assert in_a_process("2") == first


@pytest.mark.parametrize("shared_axes", [None, -1])
def test_a_float32_u_has_the_bits_of_the_formula(shared_axes):
    """One product, one sum, a maximum: nothing that a compiler could fuse or reorder.

    So any device with float32 arithmetic as IEEE 754 defines it has the same u.
    """
    g = np.float32(gradients(steps=1000, size=24)).reshape(-1, 4, 6)
    optimizer = scale_by_adamax(shared_axes=shared_axes)
    _, states = trajectory(optimizer, jnp.asarray(g), as_users_compile)
    u = np.zeros([4, 6], np.float32)
    for g_t, state_u in zip(g, np.asarray(states.u), strict=True):
        u = np.maximum(np.float32(0.999) * u, np.abs(g_t) + np.float32(1e-8))
        expected = u if shared_axes is None else u.max(axis=-1, keepdims=True)
        assert state_u.tobytes() == expected.tobytes()


if __name__ == "__main__":
    for run in trained():
        print(hashlib.sha256(run).hexdigest())
