"""The ready-made optimizers against the reference, in every dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from sequences import descend, gradients

from adamax_jax import adamax, adamaxw

STEPS, RATE, DECAY = 20, 0.01, 0.1


def expected_params(params, g, weight_decay, **options):
    """The parameters after each step in float64."""
    for step in reference.adamax(g, **options):
        params = params - RATE * (step.update + weight_decay * params)
        yield params


DTYPES = [
    jnp.float16,
    jnp.bfloat16,
    jnp.float32,
    jnp.float64,
    jnp.complex64,
    jnp.complex128,
]


def wide(dtype):
    """The dtype of the parameters for gradients of another: float32 at least."""
    return jnp.float32 if jnp.dtype(dtype).itemsize < 4 else dtype


def gradients_of(dtype):
    g = gradients(steps=STEPS, decades=2)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        g = g + 1j * gradients(steps=STEPS, decades=2, seed=1)
    return jnp.asarray(g).astype(dtype)


@pytest.mark.parametrize("eps_inside", [True, False])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
def test_parameters_follow_the_reference(x64, decoupled, nesterov, eps_inside):
    """Gradients in every dtype, each beside parameters in float32 or wider."""
    options = {"nesterov": nesterov, "eps_inside": eps_inside, "eps": 0.1}
    optimizer = (
        adamaxw(RATE, weight_decay=DECAY, **options)
        if decoupled
        else adamax(RATE, **options)
    )
    g = [gradients_of(dtype) for dtype in DTYPES]
    params = [
        jnp.linspace(-2, 2, x.shape[1]).astype(wide(dtype))
        for x, dtype in zip(g, DTYPES, strict=True)
    ]

    def step(carry, g):
        params, state = carry
        updates, state = optimizer.update(g, state, params)
        # A step of wider parameters than the gradients is not rounded to the latter.
        assert [u.dtype for u in updates] == [p.dtype for p in params]
        params = [p + u.astype(p.dtype) for p, u in zip(params, updates, strict=True)]
        return (params, state), params

    run = jax.jit(lambda p, g: jax.lax.scan(step, (p, optimizer.init(p)), g)[1])
    for dtype, start, g_all, actual in zip(
        DTYPES, params, g, run(params, g), strict=True
    ):
        exact_dtype = np.result_type(wide(dtype), np.float64)
        exact = expected_params(
            np.asarray(start).astype(exact_dtype),
            np.asarray(g_all.astype(wide(dtype))).astype(exact_dtype),
            DECAY * decoupled,
            **options,
        )
        # The step has the parameter's dtype, whatever the gradient's.
        atol = 4 * float(jnp.finfo(wide(dtype)).eps)
        for t, (now, expected) in enumerate(zip(actual, exact, strict=True), start=1):
            np.testing.assert_allclose(now, expected, rtol=0, atol=t * atol)


def test_mask_function_is_given_the_parameters():
    """Not the updates, whose dtype may differ; and None gradients do not disturb it."""
    params = {"a": jnp.ones(2), "c": {"d": jnp.ones([2, 2])}}
    seen = []

    def mask(tree):
        seen.append(jax.tree.map(lambda p: p.dtype, tree))
        return jax.tree.map(lambda p: p.ndim > 1, tree)

    optimizer = adamaxw(1.0, weight_decay=0.5, mask=mask)
    grads = {
        "a": jnp.zeros(2, jnp.bfloat16),
        "c": {"d": jnp.zeros([2, 2], jnp.bfloat16)},
    }
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert all(dtypes["a"] == jnp.float32 for dtypes in seen)
    np.testing.assert_array_equal(updates["a"].astype(jnp.float32), np.zeros(2))
    np.testing.assert_array_equal(updates["c"]["d"].astype(jnp.float32), -0.5)
    for missing in ({"d": None}, None):
        grads = {"a": jnp.zeros(2), "c": missing}
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        assert updates["c"] == missing


def test_decay_of_parameters_beyond_the_gradients_range():
    """float16 gradients, a float32 parameter above 65504: the decay is finite."""
    params = jnp.full(1, 1e5)
    optimizer = adamaxw(1e-3, weight_decay=1e-4)
    g = jnp.ones(1, jnp.float16)
    updates, _ = optimizer.update(g, optimizer.init(params), params)
    assert float(updates[0]) == pytest.approx(-1e-3 * (1 + 10), rel=2e-3)


def test_decay_is_added_in_float32_and_rounded_once():
    """A step of -1/4 and a decay of a little over half a unit in the last place."""
    half_a_unit = 2.0**-10
    params = jnp.full(1, 1.01 * half_a_unit, jnp.bfloat16)
    optimizer = adamaxw(1.0, b1=0.0, weight_decay=1.0, eps=3.0, u_dtype="float32")
    g = jnp.ones(1, jnp.bfloat16)
    updates, _ = optimizer.update(g, optimizer.init(params), params)
    one_unit_more = jnp.nextafter(jnp.bfloat16(0.25), jnp.bfloat16(1))
    assert updates.dtype == jnp.bfloat16
    assert updates[0] == -one_unit_more


def test_quadratic_is_minimised():
    optimizer = adamax(optax.linear_schedule(0.1, 0.0, 400))

    def step(_, carry):
        params, state = carry
        updates, state = optimizer.update(2 * params, state)
        return optax.apply_updates(params, updates), state

    params = jnp.array([1.0, -2.0, 3.0])
    params, _ = jax.lax.fori_loop(0, 400, step, (params, optimizer.init(params)))
    np.testing.assert_allclose(params, np.zeros(3), atol=1e-2)


def test_unsigned_learning_rate_points_downhill():
    (params,) = descend(adamax(jnp.uint8(1)), jnp.zeros(1), [jnp.ones(1)])
    assert float(params[0]) == pytest.approx(-1)


def test_the_counts_of_schedules_stop_at_the_largest_number(lenient):
    """As in Optax, and as the count of AdaMax does."""
    optimizer = adamaxw(lambda t: 0.1 * (t >= 0), weight_decay=lambda t: 0.0 * t)
    params = jnp.ones(2)
    state = optimizer.init(params)
    most = np.iinfo(np.int32).max
    state = optax.tree.set(state, count=jnp.int32(most - 1))
    for _ in range(3):
        updates, state = optimizer.update(params, state, params)
        assert (updates < 0).all()
    counts = [x for x in jax.tree.leaves(state) if x.dtype == jnp.int32]
    assert [int(count) for count in counts] == [most] * 3
