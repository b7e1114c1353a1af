"""The optimizer against the paper in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from sequences import gradients, trajectory

from adamax_jax import moments, scale_by_adamax

# Decay rates that float32 holds exactly, so that the only errors are roundings ...
EXACT = {"b1": 0.875, "b2": 1 - 2**-10}
# ... and the defaults as float32 holds them: its 0.999 is 0.99900001287, which alone
# moves u by 1.3e-8 for every step since a coordinate's last record gradient.
DEFAULT = {"b1": float(np.float32(0.9)), "b2": float(np.float32(0.999))}
# ... and with a bounded growth, of which float32 holds the factor exactly.
BOUNDED = {"b1": 0.875, "b2": 1 - 2**-6, "max_growth": 1.125}


def errors(ours, g, **options):
    """The largest errors of m, u and the update, each relative to its size.

    A mean of gradients of both signs can cancel to nothing, so errors of m and of the
    update are measured against the same mean of the gradients' magnitudes.
    """
    update, state = ours
    expected = [np.stack(x) for x in zip(*reference.adamax(g, **options), strict=True)]
    sizes = [
        np.stack(x) for x in zip(*reference.adamax(abs(g), **options), strict=True)
    ]
    for actual, exact, size in zip(
        (state.m, state.u, update), expected, sizes, strict=True
    ):
        error = np.abs(np.asarray(actual).astype(exact.dtype) - exact)
        assert np.all(error[size == 0] == 0)
        yield np.max(error[size > 0] / size[size > 0])


@pytest.mark.parametrize("eps_inside", [True, False])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    ("decays", "tolerance"),
    [(EXACT, 1e-6), (DEFAULT, 2e-6), (BOUNDED, 2e-6)],
    ids=["exact", "default", "bounded growth"],
)
def test_float32(decays, tolerance, nesterov, eps_inside):
    options = decays | {"nesterov": nesterov, "eps_inside": eps_inside}
    g = gradients().astype(np.float32)
    ours = trajectory(scale_by_adamax(**options), jnp.asarray(g))
    assert max(errors(ours, g.astype(np.float64), **options)) < tolerance


@pytest.mark.parametrize("eps_inside", [True, False])
@pytest.mark.parametrize("nesterov", [False, True])
def test_float64(x64, nesterov, eps_inside):
    options = {"nesterov": nesterov, "eps_inside": eps_inside}
    g = gradients()
    ours = trajectory(scale_by_adamax(**options), jnp.asarray(g))
    assert ours[0].dtype == jnp.float64
    assert max(errors(ours, g, **options)) < 1e-14


@pytest.mark.parametrize("eps_inside", [True, False])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.complex64, 1e-6), (jnp.complex128, 1e-14)]
)
def test_complex_gradients_count_by_their_modulus(
    x64, dtype, tolerance, nesterov, eps_inside
):
    options = EXACT | {"nesterov": nesterov, "eps_inside": eps_inside}
    g = np.asarray(gradients() + 1j * gradients(seed=1), dtype)
    update, state = trajectory(scale_by_adamax(**options), jnp.asarray(g))
    assert update.dtype == dtype
    assert state.m.dtype == dtype
    assert state.u.dtype == jnp.finfo(dtype).dtype
    exact = g.astype(np.complex128)
    assert max(errors((update, state), exact, **options)) < tolerance


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn])
def test_half_precision_gradients_are_computed_in_float32(dtype):
    g = jnp.asarray(gradients(decades=4), jnp.float32).astype(dtype)
    optimizer = scale_by_adamax(**EXACT, m_dtype="float32", u_dtype="float32")
    update, state = trajectory(optimizer, g)
    assert state.u.dtype == state.m.dtype == jnp.float32
    assert update.dtype == dtype
    exact = np.asarray(g.astype(jnp.float32), np.float64)
    ours = (update.astype(jnp.float32), state)
    m_error, u_error, _ = errors(ours, exact, **EXACT)
    assert max(m_error, u_error) < 2e-6
    # Rounded once, at the end: half an ulp of the gradient's dtype, or of its smallest
    # number.
    info = jnp.finfo(dtype)
    np.testing.assert_allclose(
        update.astype(jnp.float32),
        [step.update for step in reference.adamax(exact, **EXACT)],
        rtol=0.51 * float(info.eps),
        atol=0.51 * float(info.smallest_subnormal) + 2e-6,
    )


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_u_decays_after_a_spike(dtype):
    """2000 zero gradients after a spike of 1 leave 0.999^2000; bfloat16 kept 1.0."""
    g = jnp.zeros([2001, 1], dtype).at[0].set(1)
    update, state = trajectory(scale_by_adamax(), g)
    _, u = moments(jax.tree.map(lambda x: x[-1], state))
    # Rounded once, in storage, and never again; float32 multiplies 2000 times.
    once = 1e-4 if dtype == jnp.float32 else 2**-8
    assert float(u[0]) == pytest.approx(0.999**2000, rel=once)
    assert bool(jnp.all(jnp.isfinite(update)))


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("eps_inside", [True, False])
def test_zero_gradient_moves_nothing(eps, eps_inside):
    transformation = scale_by_adamax(eps=eps, eps_inside=eps_inside)
    zeros = [jnp.zeros([3, 2], x) for x in (jnp.float16, jnp.bfloat16, jnp.float32)]
    updates, _ = trajectory(transformation, zeros)
    for update in updates:
        np.testing.assert_array_equal(update, np.zeros([3, 2]))


@pytest.mark.parametrize("b1", [0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999])
@pytest.mark.parametrize("traced", [False, True])
def test_first_update_is_the_sign_of_the_gradient(b1, traced):
    g = jnp.array([-3.0, 0.0, 1e-4, 1e20])

    def first(b1):
        transformation = scale_by_adamax(b1, eps=0.0)
        return transformation.update(g, transformation.init(g))[0]

    update = jax.jit(first)(jnp.float32(b1)) if traced else first(b1)
    np.testing.assert_array_max_ulp(np.asarray(update), np.sign(g), maxulp=2)


def test_count_saturates():
    transformation = scale_by_adamax(nesterov=True)
    state = transformation.init(jnp.ones(1))
    most = jnp.array(jnp.iinfo(jnp.int32).max, jnp.int32)
    update, state = transformation.update(jnp.ones(1), state._replace(count=most))
    assert int(state.count) == most
    assert float(update[0]) == pytest.approx(0.9 * 0.1 + 0.1)
