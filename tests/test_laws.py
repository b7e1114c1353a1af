"""What AdaMax promises for every sequence of gradients, beside the paper's equations.

That u is the decayed maximum and the first step a sign: `test_reference.py`.
"""

import functools
import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from sequences import compiled_trajectory

from adamax_jax import scale_by_adamax

STEPS, SIZE = 12, 5

# Gradients of 20 decades and both signs, with zeros. Float32 subnormals are left out:
# XLA on the CPU takes them for zero.
magnitudes = st.one_of(
    st.just(0.0), st.floats(-10, 10).map(lambda exponent: 10.0**exponent)
)
numbers = st.tuples(magnitudes, st.sampled_from([-1.0, 1.0])).map(np.prod)
sequences = st.lists(numbers, min_size=STEPS * SIZE, max_size=STEPS * SIZE).map(
    lambda values: np.reshape(np.float32(values), [STEPS, SIZE])
)
DECAYS = [(0.9, 0.999), (0.5, 0.75), (0.0, 0.9), (0.99, 0.999)]
FLOORS = [0.0, 1e-8, 1e-3]
# Each is compiled anew: a quarter of all, with every value of one beside every value of
# another.
CONFIGURATIONS = [
    {
        "b1": b1,
        "b2": b2,
        "eps": eps,
        "nesterov": (i + j) % 2 == 1,
        "eps_inside": (i // 2 + j) % 2 == 1,
        "max_growth": 1.25 if (i + 2 * j) % 3 == 1 else None,
    }
    for i, (b1, b2) in enumerate(DECAYS)
    for j, eps in enumerate(FLOORS)
]
decays = st.sampled_from(DECAYS)
configurations = st.sampled_from(CONFIGURATIONS)
without_nesterov = st.sampled_from([c for c in CONFIGURATIONS if not c["nesterov"]])


def test_configurations_cover_all_pairs():
    def pairs(configurations):
        names = ["b1", "eps", "nesterov", "eps_inside"]
        for one, other in itertools.combinations(names, 2):
            yield {(c[one], c[other]) for c in configurations}

    every = [
        {"b1": b1, "eps": eps, "nesterov": nesterov, "eps_inside": eps_inside}
        for b1, _ in DECAYS
        for eps in FLOORS
        for nesterov in (False, True)
        for eps_inside in (False, True)
    ]
    assert list(pairs(CONFIGURATIONS)) == list(pairs(every))


@functools.cache
def compiled(*decays, **options):
    return compiled_trajectory(scale_by_adamax(*decays, **options))


def run(g, *decays, **options):
    """Updates, m and u after each step."""
    update, state = compiled(*decays, **options)(jnp.asarray(g))
    return np.asarray(update), np.asarray(state.m), np.asarray(state.u)


@given(numbers, decays)
def test_constant_gradient_gives_constant_sign(number, decays):
    g = np.full([STEPS, SIZE], number, np.float32)
    b1, b2 = decays
    update, _, _ = run(g, b1, b2, eps=0.0)
    # Each step rounds m twice by half an ulp, and the mean forgets at rate 1 - b1.
    np.testing.assert_allclose(update, np.sign(g), atol=2e-7 / (1 - b1))


def tight_bound(b1, b2, t):
    """The largest |m_t| / ((1 - b1^t) u_t) that any gradients can reach."""
    return (1 - b1) / (1 - b1**t) * (1 - (b1 / b2) ** t) / (1 - b1 / b2)


@given(sequences, without_nesterov)
def test_update_is_bounded(g, configuration):
    update, _, _ = run(g, **configuration)
    b1, b2 = configuration["b1"], configuration["b2"]
    bounds = tight_bound(b1, b2, np.arange(1, STEPS + 1))
    assert np.all(bounds <= (1 - b1) / (1 - b1 / b2) * (1 + 1e-12))
    assert np.all(np.abs(update) <= bounds[:, None] * (1 + 1e-5))


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.999), (0.5, 0.75), (0.99, 0.999)])
def test_bound_is_tight(b1, b2):
    """Gradients that shrink by b2 a step reach it at every step."""
    t = np.arange(1, 301)
    g = np.float32(b2**t)[:, None]
    update, _, _ = run(g, b1, b2, eps=0.0)
    np.testing.assert_allclose(update[:, 0], tight_bound(b1, b2, t), rtol=1e-4)


@given(sequences, st.integers(-40, 40), decays, st.booleans())
def test_scaling_by_a_power_of_two_changes_no_bit(g, exponent, decays, nesterov):
    scaled = np.ldexp(g, exponent).astype(np.float32)
    update, _, _ = run(g, *decays, eps=0.0, nesterov=nesterov)
    scaled_update, _, _ = run(scaled, *decays, eps=0.0, nesterov=nesterov)
    np.testing.assert_array_equal(update, scaled_update)


@given(sequences, configurations)
def test_flipping_signs_flips_updates(g, configuration):
    update, m, u = run(g, **configuration)
    flipped_update, flipped_m, flipped_u = run(-g, **configuration)
    np.testing.assert_array_equal(flipped_update, -update)
    np.testing.assert_array_equal(flipped_m, -m)
    np.testing.assert_array_equal(flipped_u, u)


def assert_same(actual, expected):
    """Equal to the last bit in u, and in m and the update but for rounding.

    Another leaf size or lane may fuse the products of m differently. As m may cancel,
    it is measured against u.
    """
    update, state = actual
    expected_update, expected_state = expected
    np.testing.assert_array_equal(state.u, expected_state.u)
    size = jnp.where(state.u > 0, state.u, 1)
    np.testing.assert_allclose(state.m / size, expected_state.m / size, atol=1e-6)
    np.testing.assert_allclose(update, expected_update, atol=1e-6)


@given(sequences, st.permutations(range(SIZE)), configurations)
def test_permuting_coordinates_permutes_updates(g, order, configuration):
    run = compiled(**configuration)
    permuted = run(jnp.asarray(g[:, order]))
    order = np.array(order)
    expected = jax.tree.map(lambda x: x if x.ndim < 2 else x[:, order], run(g))
    assert_same(permuted, expected)


@given(sequences, configurations)
def test_leaf_by_leaf_is_the_same_as_concatenated(g, configuration):
    run = compiled(**configuration)
    whole = run(jnp.asarray(g))
    parts = run({"a": jnp.asarray(g[:, :1]), "b": [jnp.asarray(g[:, 1:])]})

    def concatenate(tree):
        return jnp.concatenate([tree["a"], tree["b"][0]], axis=1)

    update, state = parts
    state = state._replace(m=concatenate(state.m), u=concatenate(state.u))
    assert_same((concatenate(update), state), whole)
