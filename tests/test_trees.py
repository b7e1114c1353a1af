"""Containers of every kind, and gradients that are None."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sequences import LONGEST_STEP, ROUNDING_LEAVES, STORAGES, long_but

from adamax_jax import (
    adamax,
    adamaxw,
    convert_state,
    from_optax,
    insert_state,
    lp_adam,
    lp_adamw,
    moments,
    scale_by_adamax,
    to_optax,
)

NARROW = {
    "bfloat16": STORAGES["bfloat16"],
    "two bytes": STORAGES["two bytes"],
    "uint8 u": {"u_dtype": "uint8"},
}
EVERY_NARROW = pytest.mark.parametrize("storage", NARROW.values(), ids=NARROW)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    """A container that looks at what is put into it, as a user's may."""

    w: jax.Array
    b: jax.Array

    def __post_init__(self):
        assert isinstance(self.w, jax.Array), self.w
        assert isinstance(self.b, jax.Array), self.b
        assert self.w.ndim == 2
        assert self.b.ndim == 1


def model():
    return {
        "first": Linear(jnp.ones([3, 3]), jnp.ones(3)),
        "second": [Linear(jnp.full([3, 3], 0.5), jnp.zeros(3)), jnp.ones(3)],
    }


OPTIMIZERS = {
    "adamax": adamax,
    "adamaxw": adamaxw,
    "a whole tree's mask": partial(adamaxw, mask=True),
    "a mask of none": partial(adamaxw, mask=None),
    "a mask's prefix": partial(adamaxw, mask={"first": True, "second": False}),
    "a mask's function": partial(adamaxw, mask=lambda params: True),
    "two bytes": partial(adamaxw, **STORAGES["two bytes"]),
    "bfloat16": partial(adamax, **STORAGES["bfloat16"]),
    "shared": partial(adamax, shared_axes=-1),
    "shared by a function": partial(adamaxw, shared_axes=lambda path, leaf: -1),
    "shared, in one byte": partial(adamaxw, m_dtype="int8", shared_axes=0),
    "lp_adam": partial(lp_adam, p=3),
    "lp_adamw": partial(lp_adamw, p=3),
    "lp_adamw, a whole tree's mask": partial(lp_adamw, p=3, mask=True),
}


def test_the_container_refuses_what_is_no_array():
    """Else the tests below would say nothing."""
    for other in (True, None, (jnp.ones([1, 1]), 1)):
        with pytest.raises(AssertionError):
            jax.tree.map(lambda leaf, other=other: other, model())
    with pytest.raises(AssertionError):
        jax.tree.map(jnp.ravel, model())


@pytest.mark.parametrize("name", long_but([*OPTIMIZERS][::3], OPTIMIZERS))
def test_arrays_alone_are_put_into_containers(name):
    params = model()
    optimizer = OPTIMIZERS[name](0.1)
    before = optimizer.init(params)
    updates, state = optimizer.update(params, before, params)
    chex.assert_trees_all_equal_structs(updates, params)
    chex.assert_trees_all_equal_structs(state, before)
    # The same leaves in a list have the same steps, but for those without decay.
    if name != "a mask's prefix":
        leaves = jax.tree.leaves(params)
        alone, _ = optimizer.update(leaves, optimizer.init(leaves), leaves)
        chex.assert_trees_all_equal(jax.tree.leaves(updates), alone)
    # And one None stands for a whole container, which would refuse it as a field.
    for part, other, update in (
        ("first", "second", optimizer.update),
        ("second", "first", jax.jit(optimizer.update)),
    ):
        missing = params | {part: None}
        some, new = update(missing, before, params)
        chex.assert_trees_all_equal_structs(some, missing)
        chex.assert_trees_all_close(some[other], updates[other], rtol=1e-6)
        chex.assert_trees_all_equal_structs(new, before)
        chex.assert_trees_all_equal_dtypes(new, before)
    # But not for all of the gradients, which a loop forgot to return.
    for update in (optimizer.update, jax.jit(optimizer.update)):
        with pytest.raises(TypeError, match="The gradients are None"):
            update(None, before, params)


KINDS = [(name, axes) for name in STORAGES for axes in (None, -1)]


@pytest.mark.parametrize(("name", "shared_axes"), long_but([("two bytes", -1)], KINDS))
def test_states_of_such_containers_are_read_converted_and_inserted(name, shared_axes):
    params = model()
    optimizer = adamaxw(**STORAGES[name], shared_axes=shared_axes)
    new = optimizer.init(params)
    _, state = optimizer.update(params, new, params)
    targets = ({"m_dtype": "float32", "u_dtype": "float32"}, *NARROW.values())

    # An eager call compiles a program for each operation and shape.
    @jax.jit
    def tools(new, state):
        converted = [convert_state(state, **target) for target in targets]
        return moments(state), converted, [insert_state(new, s) for s in converted]

    m_and_u, converted, inserted = tools(new, state)
    for tree in m_and_u:
        assert isinstance(tree["first"], Linear)
    for one, other in zip(converted, inserted, strict=True):
        chex.assert_trees_all_equal_structs(one, state)
        chex.assert_trees_all_equal_dtypes(other, new)
    theirs = to_optax(state)
    assert isinstance(theirs[0].nu["first"], Linear)
    theirs = optax.adamaxw(0.1).init(params)[0] if shared_axes is None else theirs
    back = from_optax(theirs)
    assert isinstance(jax.tree.leaves(back, is_leaf=is_linear)[1], Linear)
    if shared_axes is not None:
        chex.assert_trees_all_equal(insert_state(new, back)[0].count, state[0].count)


def is_linear(node):
    return isinstance(node, Linear)


def test_a_gradient_of_none_keeps_that_part_of_the_state():
    params = {"a": np.ones(3, "f"), "b": {"c": np.ones(3, "f"), "d": np.ones([], "f")}}
    optimizer = adamaxw()
    _, state = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    types = jax.tree.map(jax.typeof, state)
    for missing in [
        {"a": params["a"], "b": {"c": None, "d": params["b"]["d"]}},
        {"a": params["a"], "b": None},
    ]:
        updates, new_state = jax.jit(optimizer.update)(missing, state, params)
        chex.assert_trees_all_equal_structs(updates, missing)
        assert jax.tree.map(jax.typeof, new_state) == types
        chex.assert_trees_all_equal(new_state[0].m["b"]["c"], state[0].m["b"]["c"])
        chex.assert_trees_all_equal(new_state[0].u["b"]["c"], state[0].u["b"]["c"])
        assert not np.array_equal(new_state[0].m["a"], state[0].m["a"])


@EVERY_NARROW
def test_a_none_gradient_counts_as_zero_where_u_is_narrow(storage):
    """u decays with the others, and m does not stay behind to make a huge step."""
    params = {"a": np.ones(3, "f"), "b": {"c": np.full(3, 2.0, "f")}}
    optimizer = scale_by_adamax(**storage)

    @jax.jit
    def train(state, g, steps):
        return jax.lax.fori_loop(
            0, steps, lambda _, state: optimizer.update(g, state)[1], state
        )

    state = train(optimizer.init(params), params, steps=20)
    zero = {"a": params["a"], "b": {"c": np.zeros(3, "f")}}
    expected = train(state, zero, steps=5000)
    step = jax.jit(optimizer.update)
    for missing in (
        {"a": params["a"], "b": None},
        {"a": params["a"], "b": {"c": None}},
    ):
        later = train(state, missing, steps=5000)
        updates, _ = step(missing, later)
        chex.assert_trees_all_equal_structs(updates, missing)
        chex.assert_trees_all_equal(later, expected)
        small = jax.tree.map(lambda p: np.float32(1e-3) * p, params)
        update, _ = step(small, later)
        assert np.all(np.abs(update["b"]["c"]) <= LONGEST_STEP / ROUNDING_LEAVES)


def test_none_stands_for_a_whole_subtree_of_a_shared_u():
    """Narrow u decay with all the others, by their common scale."""
    params = model()
    optimizer = adamax(shared_axes=-1, **STORAGES["two bytes"])
    _, state = optimizer.update(params, optimizer.init(params))
    _, new = optimizer.update(params | {"first": None}, state)
    zeros = jax.tree.map(jnp.zeros_like, params["first"])
    _, expected = optimizer.update(params | {"first": zeros}, state)
    chex.assert_trees_all_equal(new, expected)
    # A wide one stays as it is.
    optimizer = adamax(shared_axes=-1)
    _, state = optimizer.update(params, optimizer.init(params))
    _, new = optimizer.update(params | {"first": None}, state)
    chex.assert_trees_all_equal(new[0].u["first"], state[0].u["first"])
