"""Two processes of two devices each: ZeRO-1, and a checkpoint that one of them reads.

JAX's own runtime connects them, over gloo and the loopback interface. This file called
as a script is one of the processes.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sequences import STORAGES
from versions import UNOPTIMIZED, as_users_compile

from adamax_jax import adamax, zero_shardings

P = PartitionSpec
PROCESSES, DEVICES, STEPS, BATCH = 2, 2, 8, 16


def initial():
    return {"kernel": np.ones([8, 4], np.float32), "bias": np.zeros(8, np.float32)}


def batches():
    """Numbers of so few bits that their sums are exact, in any order."""
    rng = np.random.default_rng(0)
    return np.float32(rng.integers(-64, 64, [STEPS, BATCH, 8, 5]))


def loss(params, batch):
    """Linear in the parameters: the gradient is the mean of the batch."""
    weighted = jnp.sum(params["kernel"][None] * batch[:, :, :4])
    return (weighted + jnp.sum(params["bias"][None] * batch[:, :, 4])) / BATCH


def make_step(optimizer):
    def step(params, state, batch):
        gradients = jax.grad(loss)(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def worker(process, port, folder):
    """Trains with every storage, saves each state, and says what it held."""
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        num_processes=PROCESSES,
        process_id=process,
        initialization_timeout=60,
    )
    assert len(jax.devices()) == PROCESSES * DEVICES
    assert len(jax.local_devices()) == DEVICES
    mesh = jax.make_mesh((PROCESSES * DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    replicated, divided = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    local = BATCH // PROCESSES
    held = {}
    for name, storage in STORAGES.items():
        optimizer = adamax(0.1, **storage)
        params = jax.tree.map(
            lambda p: jax.make_array_from_process_local_data(replicated, p, p.shape),
            initial(),
        )
        shardings = zero_shardings(optimizer, params, mesh, "data")
        state = jax.jit(optimizer.init, out_shardings=shardings)(params)
        step = jax.jit(make_step(optimizer), out_shardings=(replicated, shardings))
        for batch in batches():
            rows = batch[process * local : (process + 1) * local]
            rows = jax.make_array_from_process_local_data(divided, rows, batch.shape)
            # XLA's runtime for CPUs may stop for ever where steps of two processes wait
            # in a queue: seen in one of 30 runs with JAX 0.6.0.
            params, state = jax.block_until_ready(step(params, state, rows))
        arrays = jax.tree.leaves(state[0].m) + jax.tree.leaves(state[0].u)
        assert not any(x.is_fully_addressable for x in arrays)
        held[name] = sum(s.data.nbytes for x in arrays for s in x.addressable_shards)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / name, {"params": params, "state": state})
            checkpointer.wait_until_finished()
    multihost_utils.sync_global_devices("end")
    (folder / f"held{process}.json").write_text(json.dumps(held))
    jax.distributed.shutdown()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_processes(folder):
    environment = {k: v for k, v in os.environ.items() if k not in UNOPTIMIZED} | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(DEVICES),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(process), port, str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(PROCESSES)
    ]
    try:
        outputs = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output


def test_two_processes_train_and_one_restores(tmp_path):
    run_processes(tmp_path)
    for name, storage in STORAGES.items():
        optimizer = adamax(0.1, **storage)
        params = jax.tree.map(jnp.asarray, initial())
        state = optimizer.init(params)
        step = as_users_compile(make_step(optimizer))
        for batch in batches():
            params, state = step(params, state, jnp.asarray(batch))

        # Each process held one half of m and u.
        arrays = jax.tree.leaves(state[0].m) + jax.tree.leaves(state[0].u)
        for process in range(PROCESSES):
            held = json.loads((tmp_path / f"held{process}.json").read_text())
            assert held[name] == sum(x.nbytes for x in arrays) / PROCESSES

        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(
                tmp_path / name,
                jax.tree.map(
                    ocp.utils.to_shape_dtype_struct, {"params": params, "state": state}
                ),
            )
        assert jax.tree.structure(restored["state"]) == jax.tree.structure(state)
        for x, y in zip(
            jax.tree.leaves(restored["state"]), jax.tree.leaves(state), strict=True
        ):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), name
        for x, y in zip(
            jax.tree.leaves(restored["params"]), jax.tree.leaves(params), strict=True
        ):
            # The compiler may fuse another product into a sum: two ulps near 1.
            np.testing.assert_allclose(x, y, rtol=0, atol=2**-22)


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
