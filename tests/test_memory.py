"""What tools return shares no memory with their arguments: either may be donated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sequences import STORAGES, long_but

from adamax_jax import (
    adamax,
    convert_state,
    from_optax,
    full_params,
    insert_state,
    master_weights,
    moments,
    set_full_params,
    to_optax,
)

# A kernel, and a scale which stays in 32 bits; of one shape, since each operation is
# compiled for each shape.
PARAMS = {"kernel": np.ones([4, 3], jnp.bfloat16), "scale": np.ones([4, 3], "f")}
FULL = {"kernel": np.full([4, 3], 0.1, "f"), "scale": np.full([4, 3], 0.2, "f")}
WHOLE = {"m_dtype": "float32", "u_dtype": "float32"}


def trained(optimizer):
    """A state with other things in it that tools leave as they are."""
    optimizer = optax.chain(
        optax.trace(0.9), optimizer, optax.scale_by_schedule(lambda count: 0.1)
    )
    return after_a_step(optimizer, FULL)


@functools.partial(jax.jit, static_argnums=0)
def after_a_step(optimizer, params):
    return optimizer.update(params, optimizer.init(params), params)[1]


def in_half(optimizer):
    """Parameters and a state with residuals, also among other states."""
    optimizer = optax.chain(optax.ema(0.9), master_weights(optimizer))
    return PARAMS, after_a_step(optimizer, PARAMS)


@functools.cache
@jax.numpy_dtype_promotion("standard")
def tools(storage):
    """Functions and their arguments; Optax mixes dtypes."""
    optimizer = adamax(**STORAGES[storage])
    new = optax.chain(optax.trace(0.9), optimizer, optax.scale(1.0))
    state, half = trained(optimizer), in_half(optimizer)
    pairs = {
        "moments": (moments, (state,)),
        "convert_state to what it is": (convert_state, (state,)),
        "convert_state": (functools.partial(convert_state, **WHOLE), (state,)),
        "from_optax": (from_optax, (trained(optax.adamax(0.1)),)),
        "to_optax": (to_optax, (state,)),
        "insert_state": (insert_state, (new.init(FULL), state)),
        "full_params": (full_params, half),
        "set_full_params": (set_full_params, (*half, FULL)),
    }
    return {name: (tool, jax.device_get(args)) for name, (tool, args) in pairs.items()}


def tool_and_arguments(name, storage="own"):
    """A function and arrays of its own."""
    tool, arguments = tools(storage)[name]
    return tool, jax.tree.map(jnp.array, arguments)


donate = jax.jit(lambda x: x, donate_argnums=0, keep_unused=True)


def delete(tree):
    """As a donation does."""
    for leaf in jax.tree.leaves(tree):
        leaf.delete()


TOOLS = pytest.mark.parametrize(
    "name",
    [
        "moments",
        "convert_state to what it is",
        "convert_state",
        "from_optax",
        "to_optax",
        "insert_state",
        "full_params",
        "set_full_params",
    ],
)


@pytest.mark.parametrize("storage", long_but(["two bytes"], STORAGES))
@TOOLS
def test_arguments_may_be_donated(name, storage):
    tool, arguments = tool_and_arguments(name, storage)
    expected = jax.device_get(tool(*arguments))
    result = tool(*arguments)
    delete(arguments)
    jax.tree.map(np.testing.assert_array_equal, result, expected)


@pytest.mark.parametrize("storage", STORAGES)
@TOOLS
def test_results_may_be_donated(name, storage):
    """All of a result, since no two arrays of it share memory either."""
    tool, arguments = tool_and_arguments(name, storage)
    expected = jax.device_get(arguments)
    result = tool(*arguments)
    donate(result)
    delete(result)
    jax.tree.map(np.testing.assert_array_equal, arguments, expected)


@TOOLS
def test_numpy_arrays_are_copied_too(name):
    """As of a state that was fetched from the devices."""
    tool, arguments = tool_and_arguments(name)
    arguments = jax.tree.map(np.array, jax.device_get(arguments))
    result = tool(*arguments)
    expected = jax.tree.map(np.array, result)
    for leaf in jax.tree.leaves(arguments):
        leaf[...] = 7
    jax.tree.map(np.testing.assert_array_equal, result, expected)


def test_an_average_of_the_weights_outlives_a_donated_step():
    optimizer = master_weights(adamax(0.1))
    params = jax.tree.map(jnp.array, PARAMS)
    state = optimizer.init(params)
    average = full_params(params, state)

    def step(params, state):
        updates, state = optimizer.update(params, state, params)
        with jax.numpy_dtype_promotion("standard"):
            return optax.apply_updates(params, updates), state

    jax.jit(step, donate_argnums=(0, 1))(params, state)
    assert params["scale"].is_deleted()
    assert np.array_equal(average["scale"], np.ones([4, 3]))
