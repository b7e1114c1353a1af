"""Every number survives a compiler that takes out casts to half precision and back.

XLA:GPU does so by default (``xla_allow_excess_precision``): of a float32 that is cast
to float16 and back, nothing is rounded. Here programs run as after that.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import Literal
from sequences import STORAGES

from adamax_jax import (
    adamax,
    convert_state,
    full_params,
    lp_adam,
    master_weights,
    moments,
    set_full_params,
)

HALF = (jnp.bfloat16, jnp.float16)
EVERY_HALF = pytest.mark.parametrize("dtype", HALF)
EVERY_RESIDUAL = pytest.mark.parametrize("residual_dtype", ["int16", "int8"])


# optax.apply_updates adds float32 updates to parameters in half precision.
pytestmark = pytest.mark.usefixtures("lenient")


def with_excess_precision(function):
    """The function, jitted, without pairs of casts to half precision and back."""

    @jax.jit
    def run(*args):
        jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        results = evaluate(jaxpr, [(x, None) for x in jax.tree.leaves(args)])
        return jax.tree.unflatten(
            jax.tree.structure(shapes), [number for number, _ in results]
        )

    return run


def evaluate(closed, args):
    """The results of a jaxpr, as pairs of a number and what it was cast from."""
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.invars, args, strict=True))
    values |= {
        x: (c, None) for x, c in zip(jaxpr.constvars, closed.consts, strict=True)
    }

    def read(x):
        return (x.val, None) if isinstance(x, Literal) else values[x]

    for eqn in jaxpr.eqns:
        operands = [read(x) for x in eqn.invars]
        name, params = eqn.primitive.name, eqn.params
        if name in ("jit", "pjit", "custom_jvp_call"):
            results = evaluate(params.get("jaxpr", params.get("call_jaxpr")), operands)
        else:
            results = eqn.primitive.bind(*(x for x, _ in operands), **params)
            results = results if eqn.primitive.multiple_results else [results]
            results = [(x, None) for x in results]
        if name in ("copy", "copy_p") and operands[0][1] is not None:
            results = [(results[0][0], operands[0][1])]
        if name == "convert_element_type":
            ((number, exact),), ((cast, _),) = operands, results
            if cast.dtype in HALF:
                results = [(cast, number)]
            elif exact is not None and cast.dtype == exact.dtype:
                results = [(exact, None)]
        values |= zip(eqn.outvars, results, strict=True)
    return [read(x) for x in jaxpr.outvars]


def test_a_pair_of_casts_is_taken_out():
    """The means of this module: else its tests could not fail."""

    @jax.jit
    def back(x):
        return jax.jit(lambda x: x.astype(jnp.float16))(x).astype(jnp.float32)

    x = jnp.float32([0.1, 0.2])
    chex.assert_trees_all_equal(with_excess_precision(back)(x), x)
    assert not np.any(back(x) == x)


def steps_of(optimizer, jit):
    @jit
    def step(params, state, g):
        updates, state = optimizer.update(g, state, params)
        return optax.apply_updates(params, updates), state

    return step


@EVERY_HALF
@EVERY_RESIDUAL
@pytest.mark.parametrize("direction", [-1, 1])
def test_small_steps_add_up(dtype, residual_dtype, direction):
    """1000 of 1e-4, far below the distance of 1 to the next number."""
    optimizer = master_weights(optax.scale(1e-4), residual_dtype)
    step = steps_of(optimizer, with_excess_precision)
    params = np.ones(3, dtype)
    state = optimizer.init(params)
    for _ in range(1000):
        params, state = step(params, state, np.full(3, direction, dtype))
    np.testing.assert_allclose(
        jax.jit(full_params)(params, state), 1 + 0.1 * direction, atol=1e-3
    )


def numbers(size, seed):
    """Of all magnitudes that both kinds of half precision have, and beyond."""
    rng = np.random.default_rng(seed)
    return np.float32(rng.normal(size=size) * 10.0 ** rng.uniform(-9, 6, size))


def cast(x, dtype):
    """In NumPy; what is beyond float16 becomes infinite."""
    with np.errstate(over="ignore"):
        return x.astype(dtype)


@EVERY_HALF
@EVERY_RESIDUAL
def test_float32_weights_are_brought_in(dtype, residual_dtype):
    full = numbers(2000, seed=0)
    params = cast(full, dtype)
    state = master_weights(optax.identity(), residual_dtype).init(params)

    def there_and_back(params, state, full):
        params, state = set_full_params(params, state, full)
        return params, state, full_params(params, state)

    expected = jax.jit(there_and_back)(params, state, full)
    actual = with_excess_precision(there_and_back)(params, state, full)
    chex.assert_trees_all_equal(actual, expected)


@EVERY_HALF
@EVERY_RESIDUAL
@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
def test_steps_have_the_same_bits(storage, dtype, residual_dtype):
    optimizer = master_weights(adamax(1e-2, **storage), residual_dtype)
    params = cast(numbers(200, seed=1), dtype)
    check_the_same_bits(optimizer, params, steps=10)


@pytest.mark.parametrize("dtype", [*HALF, jnp.float32])
@pytest.mark.parametrize("make", [adamax, functools.partial(lp_adam, 1e-2, 3.0)])
def test_steps_without_master_weights_do(make, dtype):
    check_the_same_bits(make(), cast(numbers(200, seed=1), dtype), 10)


@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
def test_conversions_do(storage):
    optimizer = adamax(m_dtype="float32", u_dtype="float32")
    g = numbers(200, seed=2)
    _, state = jax.jit(optimizer.update)(g, optimizer.init(g))

    def convert(state):
        return moments(convert_state(state, **storage))

    expected = jax.jit(convert)(state)
    chex.assert_trees_all_equal(with_excess_precision(convert)(state), expected)


def check_the_same_bits(optimizer, params, steps):
    plain, excess = (
        steps_of(optimizer, jit) for jit in (jax.jit, with_excess_precision)
    )
    expected = actual = params, optimizer.init(params)
    for i in range(steps):
        g = cast(numbers(params.shape, seed=10 + i), params.dtype)
        expected, actual = plain(*expected, g), excess(*actual, g)
        chex.assert_trees_all_equal(actual, expected)
