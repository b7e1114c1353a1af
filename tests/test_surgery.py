"""States that are saved, stored otherwise, cut and put together, as a page shows it."""

import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding
from sequences import ONE_BYTE, STORAGES, long_but, train
from test_readme import page, run, section

from adamax_jax import (
    adamax,
    convert_state,
    diagnose,
    full_params,
    insert_state,
    master_weights,
    moments,
    set_full_params,
)

PAGE = page("checkpoints")
OPTIMIZER = 'adamax(1e-2, m_dtype="int8", u_dtype="uint8")'
ALL_STORAGES = STORAGES | {"shared": ONE_BYTE}


def in_storages(*plain):
    """In these storages, and in the others in the long run."""
    return pytest.mark.parametrize("storage", long_but(plain, ALL_STORAGES))


# An eager call compiles a program for each operation and shape.
read = jax.jit(moments)
COMPILED = {
    "insert_state": jax.jit(insert_state, static_argnames="missing"),
    "convert_state": jax.jit(convert_state, static_argnames=["m_dtype", "u_dtype"]),
}

# u without drift, m rounded up or down once more.
TOLERANCE = {"rtol": 0.13, "atol": 0.02}


@pytest.fixture(autouse=True, scope="module")
def as_it_comes():
    """A page's code runs under JAX's defaults, and so does all: each compiles anew."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def blocks(heading):
    return re.findall(
        r"^```python\n(.*?)^```", section(PAGE, heading), re.DOTALL | re.MULTILINE
    )


@functools.cache
def names_before(storage):
    """The names that the page's first block leaves behind."""
    (setup,) = blocks("Models that change")
    setup = setup.replace(OPTIMIZER, "adamax(1e-2, **storage)")
    # Gradients that differ in size, by their columns.
    setup = setup.replace("update(params", "update(gradients")
    assert "**storage" in setup and "update(gradients" in setup
    gradients = {
        name: np.float32(np.tile(10.0 ** -np.arange(width), [height, 1]))
        for name, height, width in [
            ("embedding", 100, 8),
            ("backbone", 8, 8),
            ("head", 8, 10),
        ]
    }
    return run(setup, storage=ALL_STORAGES[storage], gradients=gradients)


def after(heading, storage, **tools):
    """The names that a section leaves behind, and the state before it."""
    (recipe,) = blocks(heading)
    recipe = recipe.replace("update(params", "update(gradients")
    names = names_before(storage)
    return run(recipe, **names | tools), names["state"]


def same(actual, expected, names):
    for name in names:
        chex.assert_trees_all_equal(
            *(
                {k: x[name] for k, x in zip("mu", read(s), strict=True)}
                for s in (actual, expected)
            )
        )


def is_new(state, name, shape):
    m, u = read(state)
    assert m[name].shape == shape
    assert not np.any(m[name]) and not np.any(u[name])


def next_updates(optimizer, state, params):
    """Finite, and as long as a step may be."""
    updates, state = jax.jit(optimizer.update)(params, state, params)
    for update in jax.tree.leaves(updates):
        assert np.all(np.isfinite(update)) and np.max(np.abs(update)) < 1.2e-2
    return updates, state


@in_storages("two bytes")
def test_a_layer_is_added(storage):
    names, before = after("A layer is added", storage)
    same(names["state"], before, ["embedding", "backbone", "head"])
    is_new(names["state"], "layer", (8, 8))
    updates, _ = next_updates(names["optimizer"], names["state"], names["deeper"])
    # m_1 / u_1 is 1 - b1, at a count of 4 corrected by 1 - 0.9^4.
    np.testing.assert_allclose(updates["layer"], -1e-3 / (1 - 0.9**4), rtol=0.15)
    # And what is not new takes its own next step.
    own, _ = names["optimizer"].update(names["gradients"], before)
    both, _ = names["optimizer"].update(
        names["gradients"] | {"layer": np.ones([8, 8], np.float32)}, names["state"]
    )
    chex.assert_trees_all_equal({name: both[name] for name in own}, own)


@in_storages("two bytes")
def test_frozen_parameters_begin_to_train(storage):
    names, before = after("Frozen parameters begin to train", storage, **COMPILED)
    same(names["state"], before, ["head"])
    is_new(names["state"], "backbone", (8, 8))
    assert int(names["state"][0].count) == 3
    next_updates(names["optimizer"], names["state"], names["params"])


@in_storages("two bytes")
def test_a_vocabulary_grows(storage):
    names, before = after("A vocabulary grows", storage, **COMPILED)
    same(names["state"], before, ["backbone", "head"])
    for new, old in zip(read(names["state"]), read(before), strict=True):
        assert np.array_equal(new["embedding"][:100], old["embedding"])
        assert new["embedding"].shape[0] == 120 and not np.any(new["embedding"][100:])
    next_updates(names["optimizer"], names["state"], names["larger"])


@in_storages("two bytes")
def test_a_head_is_replaced(storage):
    names, before = after("A head is replaced", storage, **COMPILED)
    same(names["state"], before, ["embedding", "backbone"])
    is_new(names["state"], "head", (8, 5))
    next_updates(names["optimizer"], names["state"], names["replaced"])


@in_storages("two bytes")
def test_one_optimizer_becomes_several_and_one_again(storage):
    heading = "One optimizer becomes several, and one again"
    names, before = after(heading, storage, **COMPILED)
    same(names["joined"], before, ["head"])
    m, u = read(before)
    slow_m, slow_u = read(names["split"].inner_states["slow"])
    # Brought into float32, which rounds nothing.
    chex.assert_trees_all_equal(slow_m["backbone"], m["backbone"])
    np.testing.assert_array_equal(
        slow_u["backbone"], np.broadcast_to(u["backbone"], [8, 8])
    )
    joined_m, joined_u = read(names["joined"])
    np.testing.assert_allclose(joined_m["backbone"], m["backbone"], rtol=1e-6)
    np.testing.assert_allclose(joined_u["backbone"], u["backbone"], rtol=1e-6)
    next_updates(names["groups"], names["split"], names["params"])
    next_updates(names["optimizer"], names["joined"], names["params"])


@in_storages()
def test_the_states_of_several_workers_become_one(storage):
    names, _ = after("The states of several workers become one", storage, **COMPILED)
    (m1, u1), (m2, u2) = (read(state) for state in names["states"])
    m, u = read(names["state"])
    for name in m:
        np.testing.assert_allclose(m[name], (m1[name] + m2[name]) / 2, **TOLERANCE)
        expected = np.maximum(u1[name], u2[name])
        np.testing.assert_allclose(u[name], expected, rtol=0.13)


@pytest.mark.parametrize(
    ("storage", "jit"),
    long_but(
        [("two bytes", False), ("shared", True)],
        itertools.product(ALL_STORAGES, [False, True]),
    ),
)
def test_what_is_kept_is_stored_beside_another_scale(storage, jit):
    """A part of a running state, where the given one is older."""
    gradients = {
        name: np.full([3, 4], size, np.float32)
        for name, size in (("a", 3), ("b", 1e-3))
    }

    def state_of(names, steps):
        g = {name: gradients[name] for name in names}
        optimizer = adamax(**ALL_STORAGES[storage])

        @jax.jit
        def train(state, steps):
            return jax.lax.fori_loop(
                0, steps, lambda _, state: optimizer.update(g, state)[1], state
            )

        return train(optimizer.init(g), steps)

    whole, part = state_of("ab", 100), state_of("a", 1000)
    insert = COMPILED["insert_state"] if jit else insert_state
    result = insert(whole, part, missing="keep")
    assert int(result[0].count) == 1000
    same(result, part, "a")
    for new, old in zip(read(result), read(whole), strict=True):
        np.testing.assert_allclose(new["b"], old["b"], rtol=0.13)
    # With the same scale, nothing is rounded.
    chex.assert_trees_all_equal(insert(whole, whole, missing="keep"), whole)
    again = insert(whole, state_of("a", 100), missing="keep")
    chex.assert_trees_all_equal(again, whole)


def test_what_is_missing_is_an_error_otherwise():
    params = {"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}
    whole, part = adamax().init(params), adamax().init({"a": params["a"]})
    with pytest.raises(ValueError, match=r"no leaf at \['b'\]\. With missing='keep' "):
        insert_state(whole, part)
    with pytest.raises(ValueError, match=r"missing must be 'raise' or 'keep', got 'd"):
        insert_state(whole, part, missing="drop")
    other = adamax().init({"c": params["a"]})
    with pytest.raises(ValueError, match=r"optimizer's state has no leaf at \['c'\]"):
        insert_state(whole, other, missing="keep")


def test_restoring_into_what_was_saved():
    convert, on_a_mesh, master = blocks("Save, restore, store otherwise")
    names = run(convert)
    chex.assert_trees_all_equal(
        names["state"],
        COMPILED["convert_state"](
            names["saved_by"].update(
                names["params"], names["saved_by"].init(names["params"])
            )[1],
            m_dtype="int8",
            u_dtype="uint8",
        ),
    )
    restored = run(on_a_mesh, **names)["restored"]
    chex.assert_trees_all_equal(restored, names["restored"])
    assert restored[0].m["kernel"].sharding.mesh.axis_names == ("data",)
    before = names["params"]
    names = run(master, **names)
    chex.assert_trees_all_equal(full_params(names["params"], names["state"]), before)
    assert names["state"].residual["kernel"].dtype == jnp.int8


def test_tools_of_optax_for_trees():
    params = {"a": jnp.ones(2), "b": jnp.arange(3), "c": jnp.ones(2, jnp.bfloat16)}
    for optimizer in (adamax(), master_weights(adamax())):
        state = optimizer.init(params)
        specs = {"a": "A", "b": "B", "c": "C"}
        with pytest.raises(ValueError, match="None"):
            optax.tree.map_params(optimizer, lambda x, s: s, state, specs)
        mapped = optax.tree.map_params(
            optimizer, lambda x, s: s, state, specs, is_leaf=lambda x: x is None
        )
        found = optax.tree.get(mapped, "ScaleByAdamaxState")
        assert found.m == found.u == specs
    assert mapped.residual == specs
    assert int(optax.tree.get(state, "ScaleByAdamaxState").count) == 0
    with pytest.raises(KeyError, match="multiple values for 'count'"):
        optax.tree.get(state, "count")


def test_a_state_of_zeros_counts_as_new():
    """As jax.tree.map(jnp.zeros_like, state) resets one."""
    params = {"a": np.ones(3, np.float32)}
    for storage in STORAGES.values():
        optimizer = adamax(**storage)
        new = optimizer.init(params)
        zeros = jax.tree.map(jnp.zeros_like, new)

        @jax.jit
        def step(state, optimizer=optimizer):
            update, after = optimizer.update(params, state)
            return update, moments(after), diagnose(state)

        *step_of_zeros, figures = step(zeros)
        *expected, figures_of_new = step(new)
        assert str(figures) == str(figures_of_new)
        # Beside another u_scale, u is rounded otherwise.
        chex.assert_trees_all_close(step_of_zeros, expected, rtol=2e-3)
        chex.assert_trees_all_equal(COMPILED["convert_state"](zeros), new)
        chex.assert_trees_all_equal(COMPILED["insert_state"](new, zeros), new)


MIXED = {"kernel": np.ones([4, 3], jnp.bfloat16), "norm": np.ones(3, np.float32)}


def trained_mixed():
    """With a u_scale other than 1, for the kernel's u."""
    optimizer = adamax(1e-2)
    state = optimizer.init(MIXED)
    step = jax.jit(optimizer.update)
    for _ in range(3):
        _, state = step(MIXED, state, MIXED)
    assert state[0].u_scale != 1
    return optimizer, state


def test_groups_of_one_precision_each():
    """Where no u is stored below 32 bits, u_scale is 1 again."""
    optimizer, state = trained_mixed()
    groups = optax.partition(
        {"a": adamax(1e-2), "b": optimizer, "none": adamax(1e-2)},
        {"kernel": "a", "norm": "b"},
    )
    new = groups.init(MIXED)
    insert = COMPILED["insert_state"]
    parts = {name: insert(p, state) for name, p in new.inner_states.items()}
    updates, _ = groups.update(MIXED, new._replace(inner_states=parts), MIXED)
    expected, _ = optimizer.update(MIXED, state, MIXED)
    chex.assert_trees_all_equal(updates, expected)
    m, u = read(state)
    part_m, part_u = read(parts["b"])
    assert np.array_equal(part_m["norm"], m["norm"])
    assert np.array_equal(part_u["norm"], u["norm"])


def test_the_only_leaf_in_half_precision_is_replaced():
    optimizer, state = trained_mixed()
    old = state[0]
    old = old._replace(m=old.m | {"kernel": None}, u=old.u | {"kernel": None})
    new = MIXED | {"kernel": np.ones([4, 5], jnp.bfloat16)}
    insert = COMPILED["insert_state"]
    result = insert(optimizer.init(new), old, missing="keep")
    same(result, state, ["norm"])
    is_new(result, "kernel", (4, 5))


def test_members_of_ensembles_are_not_mixed_up():
    """Each has its own u_scale, which may not stretch along the parameters' axes."""
    storage = STORAGES["two bytes"]
    rates, params = np.float32([0.9, 0.99, 0.999]), np.ones([3, 3], np.float32)

    def train(b2, p):
        optimizer = adamax(1e-2, 0.5, b2, **storage)
        state = optimizer.init(p)
        for g in (p, 0 * p, 0 * p):
            _, state = optimizer.update(g, state)
        return state

    states = jax.jit(jax.vmap(train))(rates, params)
    new = jax.vmap(adamax(1e-2).init)(params)
    for missing in ("raise", "keep"):
        with pytest.raises(ValueError, match=r"u_scale has shape \(3,\).*jax\.vmap"):
            insert_state(new, states, missing=missing)
    inserted, (_, u) = jax.jit(
        lambda new, states: (
            jax.vmap(insert_state)(new, states),
            jax.vmap(moments)(states),
        )
    )(new, states)
    chex.assert_trees_all_equal(inserted[0].u, u)
    # Where nothing is stored otherwise, all members are inserted at once.
    same_storage = jax.vmap(adamax(1e-2, 0.5, **storage).init)(params)
    chex.assert_trees_all_equal(insert_state(same_storage, states)[0], states[0])


def test_a_container_of_several_arrays_is_not_that_of_one():
    """Only around a single array does it stand for it, as Flax NNX's variables."""
    ones = np.ones(8, np.float32)
    old = adamax().init({"norm": ones})
    new = adamax().init({"norm": {"bias": ones, "scale": ones}})
    for target, given in ((new, old), (old, new)):
        for missing in ("raise", "keep"):
            with pytest.raises(ValueError, match=r"no leaf at \['norm'\]"):
                insert_state(target, given, missing=missing)
    boxed = adamax().init({"norm": {"value": ones}})
    for target, given in ((boxed, old), (old, boxed)):
        insert_state(target, given)


def test_master_weights_keep_their_residuals():
    """If they are carried over: insert_state leaves all else new."""
    params = {"a": np.ones(4, jnp.bfloat16)}
    optimizer = master_weights(adamax(1e-3))
    params, state = train(optimizer, params, optimizer.init(params), [params] * 3)
    deeper = params | {"layer": np.ones(4, jnp.bfloat16)}
    full = full_params(params, state) | {"layer": np.full(4, 1.001, np.float32)}
    insert = COMPILED["insert_state"]
    new = insert(optimizer.init(deeper), state, missing="keep")
    deeper, new = jax.jit(set_full_params)(deeper, new, full)
    chex.assert_trees_all_equal(full_params(deeper, new), full)
    np.testing.assert_allclose(full["a"], 0.997, rtol=1e-5)


@pytest.mark.parametrize("storage", long_but(["two bytes"], STORAGES))
def test_states_in_the_memory_of_the_host(storage):
    params = {"a": np.ones(3, np.float32)}
    optimizer = adamax(**STORAGES[storage])
    _, state = optimizer.update(params, optimizer.init(params))
    on_host = jax.device_put(
        state, SingleDeviceSharding(jax.devices()[0], memory_kind="unpinned_host")
    )
    for tool in (moments, convert_state):
        chex.assert_trees_all_equal(jax.device_get(tool(on_host)), tool(state))
    chex.assert_trees_all_equal(insert_state(optimizer.init(params), on_host), state)


def test_states_without_numbers():
    """Templates of checkpoints: what is not computed with them, may be done."""
    template = jax.eval_shape(adamax().init, {"a": jnp.ones(3)})
    assert moments(template) == (template[0].m, template[0].u)
    assert convert_state(template) == template
