"""The table of the README: each case in Optax's AdaMax, and here."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from versions import as_users_compile

import adamax_jax

OPTAX_IS_THE_README_S = pytest.mark.skipif(
    optax.__version__ != "0.2.8", reason="the README's table is about Optax 0.2.8"
)


def both(optax_value, our_value):
    """Runs a test for Optax's module and ours, with what each is expected to give."""
    return pytest.mark.parametrize(
        ("module", "expected"),
        [
            pytest.param(optax, optax_value, marks=OPTAX_IS_THE_README_S, id="optax"),
            pytest.param(adamax_jax, our_value, id="adamax_jax"),
        ],
    )


# JAX as it comes; one test asks for strict promotion.
pytestmark = pytest.mark.usefixtures("lenient")


def first_step(module, params, gradients):
    optimizer = module.adamax(1e-3)
    state = optimizer.init(params)
    updates, new_state = optimizer.update(gradients, state, params)
    return state[0], updates, new_state[0]


@both(np.nan, 0)
def test_float16_zero_gradient(module, expected):
    zero = jnp.zeros(1, jnp.float16)
    _, update, _ = first_step(module, zero, zero)
    np.testing.assert_array_equal(update, expected)


@both("1.000", "0.135")
def test_bfloat16_u_after_a_spike(module, expected):
    g = jnp.ones(1, jnp.bfloat16)
    optimizer = module.scale_by_adamax()
    _, state = optimizer.update(g, optimizer.init(g))
    decay = jax.jit(lambda state: optimizer.update(0 * g, state)[1])
    for _ in range(2000):
        state = decay(state)
    u = adamax_jax.moments(state)[1] if module is adamax_jax else state.nu
    assert f"{float(u[0]):.3f}" == expected
    assert f"{0.999**2000:.3f}" == "0.135"


def state_bytes(optimizer, params):
    arrays = [x for x in jax.tree.leaves(optimizer.init(params)) if x.ndim]
    return sum(x.nbytes for x in arrays) / params.size


def test_bytes_of_state():
    params = jnp.ones(1000)
    assert state_bytes(optax.adamax(1e-3), params) == 8
    assert state_bytes(adamax_jax.adamax(), params) == 8
    for name, size in {"bfloat16": 4, "8 bits": 2}.items():
        m, u = ("int8", "uint8") if name == "8 bits" else (name, name)
        assert state_bytes(adamax_jax.adamax(m_dtype=m, u_dtype=u), params) == size


@both(False, True)
def test_state_dtype_is_fixed_by_init(module, expected):
    params = jnp.ones(1, jnp.bfloat16)
    before, _, after = first_step(module, params, jnp.ones(1, jnp.float32))
    same = jax.tree.map(jax.typeof, before) == jax.tree.map(jax.typeof, after)
    assert same == expected


@both(False, True)
def test_none_gradient_keeps_the_state(module, expected):
    params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    before, _, after = first_step(module, params, {"a": jnp.ones(1), "b": None})
    assert (jax.tree.structure(before) == jax.tree.structure(after)) == expected


@both(False, True)
@pytest.mark.parametrize(
    ("params", "gradients"),
    [(jnp.ones(3), jnp.ones([])), (jnp.arange(3), jnp.ones(3))],
    ids=["broadcast", "integer"],
)
def test_bad_input_is_refused(module, expected, params, gradients):
    try:
        first_step(module, {"a": params}, {"a": gradients})
    except (TypeError, ValueError) as error:
        assert expected
        assert "['a']" in str(error)
    else:
        assert not expected


@both(jnp.complex64, jnp.float32)
def test_dtype_of_u_for_complex_parameters(module, expected):
    params = jnp.ones(1, jnp.complex64)
    state, _, _ = first_step(module, params, params)
    assert (state.u if module is adamax_jax else state.nu).dtype == expected


@both(False, True)
def test_strict_promotion(module, expected):
    with jax.numpy_dtype_promotion("strict"):
        try:
            first_step(module, jnp.ones(1), jnp.ones(1))
        except ValueError:
            assert not expected
        else:
            assert expected


@both(2e-4, 2e-6)
def test_error_of_a_constant_gradients_update(module, expected):
    g = jnp.ones(1)
    optimizer = module.scale_by_adamax(0.9999)
    state = optimizer.init(g)
    step = jax.jit(optimizer.update)
    worst = 0.0
    for _ in range(100):
        update, state = step(g, state)
        worst = max(worst, abs(float(update[0]) - 1))
    assert worst == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize("b1", [0.99, 0.9999, 0.999999])
def test_a_traced_b1_has_no_larger_error(b1):
    """1 - b1^t is not the difference of two numbers near 1."""

    @jax.jit
    def worst(b1):
        optimizer = adamax_jax.scale_by_adamax(b1)
        g = jnp.ones(1)
        updates = []
        state = optimizer.init(g)
        for _ in range(10):
            update, state = optimizer.update(g, state)
            updates.append(update)
        return jnp.max(jnp.abs(jnp.stack(updates) - 1))

    assert worst(jnp.float32(b1)) < 2e-6


@both(0.99, 0.014)
def test_bfloat16_parameters_on_a_noisy_quadratic(module, expected):
    optimizer = module.adamax(1e-3)
    if module is adamax_jax:
        optimizer = adamax_jax.master_weights(optimizer)
    distance = distance_to_the_minimum(optimizer, jnp.bfloat16, steps=20_000)
    assert distance == pytest.approx(expected, rel=0.02)


def test_float32_parameters_on_a_noisy_quadratic():
    distance = distance_to_the_minimum(optax.adamax(1e-3), jnp.float32, steps=20_000)
    assert distance == pytest.approx(0.014, rel=0.02)


def distance_to_the_minimum(optimizer, dtype, steps):
    """From 1, in the root mean square over 1000 dimensions."""

    def step(carry, key):
        params, state = carry
        noise = jax.random.normal(key, params.shape)
        g = (params.astype(jnp.float32) - minimum + noise).astype(dtype)
        updates, state = optimizer.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    minimum = jax.random.normal(jax.random.key(1), [1000])
    params = (minimum + jax.random.rademacher(jax.random.key(2), [1000])).astype(dtype)
    keys = jax.random.split(jax.random.key(3), steps)
    run = as_users_compile(lambda *args: jax.lax.scan(step, *args)[0])
    params, state = run((params, optimizer.init(params)), keys)
    if isinstance(state, adamax_jax.MasterWeightsState):
        params = adamax_jax.full_params(params, state)
    return float(jnp.sqrt(jnp.mean((params.astype(jnp.float32) - minimum) ** 2)))
