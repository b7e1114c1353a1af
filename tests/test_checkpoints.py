"""A run that was stopped, saved and resumed is the uninterrupted run, to the bit."""

import functools
import io
import pickle
import tempfile
from pathlib import Path
from typing import NamedTuple

import chex
import eight_devices
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sequences import STORAGES
from versions import installed

from adamax_jax import adamax, adamaxw, zero_shardings

P = PartitionSpec
STEPS, STOP = 30, 11
EVERY_STORAGE = pytest.mark.parametrize("name", STORAGES)


def make_optimizer(storage):
    return optax.chain(
        optax.clip_by_global_norm(10.0),
        adamaxw(optax.linear_schedule(0.1, 0.01, STEPS), **storage),
    )


def make_params():
    return {"kernel": jnp.ones([16, 8]), "inner": [jnp.zeros(16), jnp.ones([])]}


def run(step, params, state, steps):
    """A quadratic with a moving target, so that no two gradients are alike."""
    for t in steps:
        params, state = step(params, state, jnp.float32(t))
    return params, state


def make_step(optimizer):
    def loss(params, t):
        terms = [jnp.sum((p - jnp.sin(t + p)) ** 2) for p in jax.tree.leaves(params)]
        return sum(terms[1:], terms[0])

    @jax.jit
    def step(params, state, t):
        gradients = jax.grad(loss)(params, t)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def by_pickle(tree, template, path):
    return pickle.loads(pickle.dumps(tree))


def by_flax_bytes(tree, template, path):
    return flax.serialization.from_bytes(template, flax.serialization.to_bytes(tree))


def by_flax_state_dict(tree, template, path):
    state_dict = flax.serialization.to_state_dict(tree)
    return flax.serialization.from_state_dict(template, state_dict)


def by_orbax(tree, template, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "checkpoint", abstract(template))


def by_orbax_manager(tree, template, path):
    with ocp.CheckpointManager(path / "run") as manager:
        manager.save(STOP, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()
    with ocp.CheckpointManager(path / "run") as manager:
        assert manager.latest_step() == STOP
        return manager.restore(STOP, args=ocp.args.StandardRestore(abstract(template)))


def by_equinox(tree, template, path):
    eqx = installed("equinox")
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, tree)
    file.seek(0)
    return eqx.tree_deserialise_leaves(file, template)


def abstract(tree):
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


WAYS = [
    by_pickle,
    by_flax_bytes,
    by_flax_state_dict,
    by_orbax,
    by_orbax_manager,
    by_equinox,
]


class Runs(NamedTuple):
    """New parameters and state; those where a run was stopped, and where it ended.

    And those of a run that was stopped and forgot its state.
    """

    fresh: tuple
    stopped: tuple
    ended: tuple
    forgetful: tuple


@functools.cache
def runs_in(name):
    optimizer = make_optimizer(STORAGES[name])
    step = make_step(optimizer)
    fresh = make_params(), optimizer.init(make_params())
    stopped = run(step, *fresh, range(STOP))
    return Runs(
        fresh=fresh,
        stopped=stopped,
        ended=run(step, *fresh, range(STEPS)),
        forgetful=run(step, stopped[0], fresh[1], range(STOP, STEPS)),
    )


@functools.cache
def another_step(name):
    """As another process has it: made from an optimizer of its own."""
    return make_step(make_optimizer(STORAGES[name]))


@EVERY_STORAGE
@pytest.mark.parametrize("way", WAYS)
def test_resumed_equals_uninterrupted(way, name, tmp_path):
    runs = runs_in(name)
    restored = way(runs.stopped, runs.fresh, tmp_path)
    assert jax.tree.structure(restored) == jax.tree.structure(runs.stopped)
    chex.assert_trees_all_equal(restored, runs.stopped)
    chex.assert_trees_all_equal_dtypes(restored, runs.stopped)
    resumed = run(another_step(name), *restored, range(STOP, STEPS))
    chex.assert_trees_all_equal(resumed, runs.ended)


@EVERY_STORAGE
def test_the_state_is_needed(name):
    """Without it the run is another."""
    runs = runs_in(name)
    kernels = [params["kernel"] for params, _ in (runs.forgetful, runs.ended)]
    assert not np.allclose(*kernels, atol=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_every_dtype_comes_back(way, tmp_path):
    """Also bfloat16, which NumPy itself does not know."""
    params = make_params()
    states, templates = {}, {}
    for m_dtype, u_dtype in [("int8", "uint8"), ("bfloat16", "bfloat16")]:
        optimizer = adamax(m_dtype=m_dtype, u_dtype=u_dtype)
        templates[m_dtype] = optimizer.init(params)
        states[m_dtype] = optimizer.update(params, templates[m_dtype])[1]
    restored = way(states, templates, tmp_path)
    assert jax.tree.structure(restored) == jax.tree.structure(states)
    chex.assert_trees_all_equal_dtypes(restored, states)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(states), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@EVERY_STORAGE
def test_a_masked_optimizer_goes_through_orbax(name, tmp_path):
    """Parts that hold nothing, optax.MaskedNode and None, come back as they were."""
    params = {"a": jnp.ones([4, 2]), "b": jnp.ones(3), "c": None}
    optimizer = optax.masked(
        adamax(0.1, **STORAGES[name]), {"a": True, "b": False, "c": False}
    )
    _, state = optimizer.update(params, optimizer.init(params), params)
    restored = by_orbax(state, optimizer.init(params), tmp_path)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    chex.assert_trees_all_equal(restored, state)


@pytest.mark.parametrize("name", ["own", "two bytes"])
def test_a_flax_train_state_goes_through_orbax_and_bytes(name, tmp_path):
    template = TrainState.create(
        apply_fn=None, params=make_params(), tx=make_optimizer(STORAGES[name])
    )

    def step(_, state):
        return state.apply_gradients(grads=jax.tree.map(jnp.cos, state.params))

    train = jax.jit(lambda state, steps: jax.lax.fori_loop(0, steps, step, state))
    saved, expected = train(template, STOP), train(template, STEPS)
    for restored in (
        by_orbax_manager(saved, template, tmp_path),
        by_flax_bytes(saved, template, tmp_path),
    ):
        # What is not saved, the functions, comes from the template.
        resumed = template.replace(
            step=restored.step, params=restored.params, opt_state=restored.opt_state
        )
        resumed = train(resumed, STEPS - STOP)
        assert int(resumed.step) == STEPS
        chex.assert_trees_all_equal(resumed.params, expected.params)
        chex.assert_trees_all_equal(resumed.opt_state, expected.opt_state)


@pytest.mark.parametrize("name", ["own", "two bytes"])
def test_an_nnx_optimizer_goes_through_orbax(name, tmp_path):
    x = jnp.linspace(-1, 1, 48).reshape(12, 4)
    tx = make_optimizer(STORAGES[name])

    def new():
        model = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)
        optimizer.update(model, grads)

    def train(both, steps):
        with jax.numpy_rank_promotion("allow"):
            for _ in steps:
                step(*both)
        return both

    expected = nnx.state(train(new(), range(STEPS)))
    saved = nnx.state(train(new(), range(STOP)))
    resumed = new()
    template = nnx.state(resumed)
    nnx.update(resumed, by_orbax(saved, template, tmp_path))
    train(resumed, range(STOP, STEPS))
    chex.assert_trees_all_equal(nnx.state(resumed), expected)


def check_onto_another_mesh():
    """Saved from one device or from eight, resumed on eight, four by two, or one."""

    def mesh(*shape):
        names = ("data", "model")[: len(shape)]
        devices = jax.devices()[: int(np.prod(shape))]
        return jax.make_mesh(
            shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=devices
        )

    layouts = {
        "one": (mesh(1), P()),
        "eight": (mesh(8), P()),
        "four by two": (mesh(4, 2), P(None, "model")),
    }

    @functools.cache
    def placed(optimizer, name):
        """New parameters and a new state, the state divided over the data axis."""
        layout, kernel = layouts[name]
        params = {"kernel": jnp.ones([16, 8]), "bias": jnp.zeros(16)}
        specs = {"kernel": kernel, "bias": P()}
        params = {
            key: jax.device_put(value, NamedSharding(layout, specs[key]))
            for key, value in params.items()
        }
        shardings = zero_shardings(optimizer, params, layout, "data")
        return params, jax.jit(optimizer.init, out_shardings=shardings)(params)

    def gradients(t):
        rng = np.random.default_rng(t)
        return {
            "kernel": np.float32(rng.normal(size=[16, 8])),
            "bias": np.float32(rng.normal(size=16)),
        }

    @functools.cache
    def step_in(optimizer, layout):
        """Elementwise: of the state no bit depends on the layout."""

        def step(params, state, g):
            updates, state = optimizer.update(g, state, params)
            return optax.apply_updates(params, updates), state

        shardings = jax.tree.map(lambda x: x.sharding, placed(optimizer, layout))
        return jax.jit(step, out_shardings=shardings)

    def train(optimizer, layout, params, state, steps):
        for t in steps:
            params, state = step_in(optimizer, layout)(params, state, gradients(t))
        return params, state

    for storage in STORAGES.values():
        optimizer = adamax(0.1, **storage)
        saved = {
            layout: train(optimizer, layout, *placed(optimizer, layout), range(STOP))
            for layout in layouts
        }
        expected = train(optimizer, "one", *saved["one"], range(STOP, STEPS))
        for source, target in [
            ("one", "eight"),
            ("eight", "one"),
            ("eight", "four by two"),
            ("four by two", "eight"),
        ]:
            template = placed(optimizer, target)
            with tempfile.TemporaryDirectory() as folder:
                restored = by_orbax(saved[source], template, Path(folder))
            for x, y in zip(
                jax.tree.leaves(restored), jax.tree.leaves(template), strict=True
            ):
                assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
            params, state = train(optimizer, target, *restored, range(STOP, STEPS))
            chex.assert_trees_all_equal(state, expected[1])
            chex.assert_trees_all_close(params, expected[0], rtol=0, atol=2**-20)


CHECKS = eight_devices.named(check_onto_another_mesh)


@pytest.mark.parametrize("check", CHECKS)
def test_on_eight_devices(check):
    assert eight_devices.problem(__file__, check) is None


if __name__ == "__main__":
    eight_devices.main(CHECKS)
