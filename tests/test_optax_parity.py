"""The installed Optax's AdaMax, replaced by the import alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sequences import descend, gradients, trajectory
from versions import as_users_compile, needs_new_optax

import adamax_jax

# Optax's AdaMax is refused under strict promotion.
pytestmark = pytest.mark.usefixtures("lenient")


@pytest.mark.parametrize(
    ("b1", "b2", "eps", "off_an_update"),
    [
        (0.9, 0.999, 1e-8, 1e-6),
        (0.5, 0.9, 1e-3, 1e-6),
        # Here Optax's 1 - b1^t cancels by more than 1e-6 (see below).
        (0.99, 0.9999, 0.0, 3e-6),
    ],
)
def test_scale_by_adamax_step_by_step(b1, b2, eps, off_an_update):
    g = jnp.asarray(gradients(), jnp.float32)
    if eps == 0:
        # Optax divides 0 by 0 in the coordinate that never sees a gradient.
        g = g.at[:, :].set(jnp.where(g == 0, 1e-3, g))
    ours, theirs = (
        trajectory(module.scale_by_adamax(b1, b2, eps), g, as_users_compile)
        for module in (adamax_jax, optax)
    )
    (update, state), (optax_update, optax_state) = ours, theirs
    np.testing.assert_array_equal(state.count, optax_state.count)
    np.testing.assert_array_max_ulp(
        np.asarray(state.m), np.asarray(optax_state.mu), maxulp=1
    )
    np.testing.assert_array_max_ulp(
        np.asarray(state.u), np.asarray(optax_state.nu), maxulp=1
    )
    np.testing.assert_allclose(update, optax_update, rtol=off_an_update, atol=0)


def test_nesterov_corrects_biases_as_optax_does():
    """With an eps beside which sqrt(v) and u vanish, both return the mean alone."""
    g = jnp.asarray(gradients(steps=50, decades=2), jnp.float32)
    ours = adamax_jax.scale_by_adamax(eps=1e10, eps_inside=False, nesterov=True)
    optaxs = optax.scale_by_adam(eps=1e10, nesterov=True)
    np.testing.assert_allclose(
        trajectory(ours, g)[0] * 1e10, trajectory(optaxs, g)[0] * 1e10, atol=1e-5
    )


@pytest.mark.parametrize("b1", [0.9, 0.99, 0.999, 0.9999])
def test_bias_correction_is_more_accurate_than_optax(b1):
    """A constant gradient of 1 has updates of exactly 1."""
    ours, _ = trajectory(adamax_jax.scale_by_adamax(b1), jnp.ones([100, 1]))
    optaxs, _ = trajectory(optax.scale_by_adamax(b1), jnp.ones([100, 1]))
    error = float(jnp.max(jnp.abs(ours - 1)))
    optax_error = float(jnp.max(jnp.abs(optaxs - 1)))
    assert error < 2e-6
    assert optax_error > error
    if b1 >= 0.999:
        assert optax_error > 10 * error


@pytest.mark.parametrize("name", ["adamax", "adamaxw"])
@pytest.mark.parametrize(
    "arguments",
    [
        (2e-3,),
        (1e-3, 0.8, 0.95, 1e-6),
        (optax.cosine_decay_schedule(1e-2, 200),),
    ],
)
def test_aliases_with_positional_arguments(name, arguments):
    g = jnp.asarray(gradients(steps=200), jnp.float32)
    params = jnp.linspace(-1, 1, g.shape[1])
    ours = descend(getattr(adamax_jax, name)(*arguments), params, g)
    optaxs = descend(getattr(optax, name)(*arguments), params, g)
    for ours_t, optax_t in zip(ours, optaxs, strict=True):
        np.testing.assert_allclose(ours_t, optax_t, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "mask",
    [
        None,
        {"a": True, "b": {"c": False, "d": True}},
        {"a": False, "b": True},
        lambda params: jax.tree.map(lambda p: p.ndim > 0, params),
    ],
    ids=["none", "tree", "prefix", "callable"],
)
@pytest.mark.parametrize(
    "weight_decay",
    [
        pytest.param(0.1, id="number"),
        pytest.param(
            optax.linear_schedule(0.2, 0.0, 30), id="schedule", marks=needs_new_optax
        ),
    ],
)
def test_adamaxw_decays_what_optax_decays(mask, weight_decay):
    params = {
        "a": jnp.arange(1.0, 4.0),
        "b": {"c": jnp.ones([]), "d": jnp.ones([2, 2])},
    }
    rng = np.random.default_rng(0)
    gs = [
        jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
        for _ in range(40)
    ]
    options = {"weight_decay": weight_decay, "mask": mask}
    ours = descend(adamax_jax.adamaxw(0.01, **options), params, gs)
    optaxs = descend(optax.adamaxw(0.01, **options), params, gs)
    for ours_t, optax_t in zip(ours, optaxs, strict=True):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), ours_t, optax_t
        )
