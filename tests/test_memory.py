"""What tools return shares no memory with their arguments: either may be donated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sequences import EVERY_STORAGE, STORAGES, TWO_BYTES, long_but

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

# A kernel and a LayerNorm's scale, which stays in 32 bits.
PARAMS = {"kernel": jnp.ones([4, 3], jnp.bfloat16), "scale": jnp.ones(3)}
FULL = {"kernel": jnp.full([4, 3], 0.1), "scale": jnp.full(3, 0.2)}
WHOLE = {"m_dtype": "float32", "u_dtype": "float32"}


def trained(optimizer):
    """A state with other things in it that tools leave as they are."""
    optimizer = optax.chain(
        optax.trace(0.9), optimizer, optax.scale_by_schedule(lambda count: 0.1)
    )
    return optimizer.update(FULL, optimizer.init(FULL), FULL)[1]


def in_half(optimizer):
    """Parameters and a state with residuals, also among other states."""
    params = jax.tree.map(jnp.copy, PARAMS)
    optimizer = optax.chain(optax.ema(0.9), master_weights(optimizer))
    return params, optimizer.update(params, optimizer.init(params), params)[1]


@jax.numpy_dtype_promotion("standard")
def some_tools(**storage):
    """Functions and their arguments; Optax mixes dtypes."""
    optimizer = adamax(**storage)
    new = optax.chain(optax.trace(0.9), optimizer, optax.scale(1.0))
    return {
        "moments": (moments, (trained(optimizer),)),
        "convert_state to what it is": (convert_state, (trained(optimizer),)),
        "convert_state": (
            functools.partial(convert_state, **WHOLE),
            (trained(optimizer),),
        ),
        "from_optax": (from_optax, (trained(optax.adamax(0.1)),)),
        "to_optax": (to_optax, (trained(optimizer),)),
        "insert_state": (insert_state, (new.init(FULL), trained(optimizer))),
        "full_params": (full_params, in_half(optimizer)),
        "set_full_params": (
            set_full_params,
            (*in_half(optimizer), jax.tree.map(jnp.copy, FULL)),
        ),
    }


def delete(tree):
    """As a donation does."""
    for leaf in jax.tree.leaves(tree):
        leaf.delete()


TOOLS = pytest.mark.parametrize("name", some_tools())


@pytest.mark.parametrize("storage", long_but([TWO_BYTES], STORAGES.values()))
@TOOLS
def test_arguments_may_be_donated(name, storage):
    tool, arguments = some_tools(**storage)[name]
    expected = jax.device_get(tool(*arguments))
    result = tool(*arguments)
    delete(arguments)
    jax.tree.map(np.testing.assert_array_equal, result, expected)


@EVERY_STORAGE
@TOOLS
def test_results_may_be_donated(name, storage):
    """All of a result, since no two arrays of it share memory either."""
    tool, arguments = some_tools(**storage)[name]
    expected = jax.device_get(arguments)
    result = tool(*arguments)
    jax.jit(lambda x: x, donate_argnums=0, keep_unused=True)(result)
    delete(result)
    jax.tree.map(np.testing.assert_array_equal, arguments, expected)


@TOOLS
def test_numpy_arrays_are_copied_too(name):
    """As of a state that was fetched from the devices."""
    tool, arguments = some_tools()[name]
    arguments = jax.tree.map(np.array, jax.device_get(arguments))
    result = tool(*arguments)
    expected = jax.tree.map(np.array, result)
    for leaf in jax.tree.leaves(arguments):
        leaf[...] = 7
    jax.tree.map(np.testing.assert_array_equal, result, expected)


def test_an_average_of_the_weights_outlives_a_donated_step():
    optimizer = master_weights(adamax(0.1))
    params = jax.tree.map(jnp.copy, PARAMS)
    state = optimizer.init(params)
    average = full_params(params, state)

    def step(params, state):
        updates, state = optimizer.update(params, state, params)
        with jax.numpy_dtype_promotion("standard"):
            return optax.apply_updates(params, updates), state

    jax.jit(step, donate_argnums=(0, 1))(params, state)
    assert params["scale"].is_deleted()
    assert np.array_equal(average["scale"], np.ones(3))
