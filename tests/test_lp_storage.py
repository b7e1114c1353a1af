"""m and u of the L^p family in few bytes: averages that are rounded without bias."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sequences import STORAGES, compiled_step, long_but

from adamax_jax import (
    ScaleByAdamaxState,
    adamax,
    full_params,
    lp_adam,
    lp_adamw,
    master_weights,
    scale_by_adam,
    scale_by_lp_adam,
    zero_shardings,
)
from adamax_jax._formats import NORMS
from adamax_jax._update import dither_of

B2 = 0.999
NARROW = {
    "bfloat16": {"m_dtype": "bfloat16", "u_dtype": "bfloat16"},
    "three bytes": {"m_dtype": "int8", "u_dtype": "bfloat16"},
    "two bytes": {"m_dtype": "int8", "u_dtype": "uint8"},
}
EVERY_NARROW = pytest.mark.parametrize("storage", NARROW.values(), ids=NARROW)
# The largest standard deviations of log(u): those of rare and of fading gradients.
NOISE = {"bfloat16": 0.07, "uint8": 0.33}
# And how far the means over coordinates, of u and of log(u), may be off.
LEVEL = {"bfloat16": 0.01, "uint8": 0.06}
STEPS, COORDINATES = 20_000, 256


def read_u(state):
    read = jax.jit(NORMS[state.u.dtype.name].read)
    return np.asarray(read(state.u, 1.0), np.float64)


def exact(gradients, p, b1=0.9, eps=1e-8):
    """u after the last step and all updates, in float64, from the paper's v."""
    m = v = np.zeros(gradients.shape[1:])
    updates = []
    for t, g in enumerate(np.float64(gradients), start=1):
        w = (1 - B2**p) / (1 - B2 ** (p * t))
        v = (1 - w) * v + w * np.abs(g) ** p
        m = b1 * m + (1 - b1) * g
        updates.append(m / (1 - b1**t) / (v ** (1 / p) + eps))
    return v ** (1 / p), np.array(updates)


@functools.partial(jax.jit, static_argnums=0)
def run(transformation, gradients):
    def body(state, g):
        update, state = transformation.update(g, state)
        return state, update

    return jax.lax.scan(body, transformation.init(gradients[0]), gradients)


def kinds():
    """Sequences of one coordinate."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=STEPS)
    t = np.arange(STEPS)
    return {
        "noise": noise,
        "constant": np.full(STEPS, 0.7),
        "spikes": noise * np.where(t % 997 == 0, 100.0, 1.0),
        "rare": noise * (t % 50 == 0),
        "fading": noise * np.exp(-t / 2000),
        "falling": noise * np.where(t < STEPS // 2, 1.0, 1e-3),
        "ended": noise * (t < STEPS - 5000),
    }


@pytest.mark.parametrize(
    "kind",
    long_but(["noise", "constant", "rare"], kinds()),
)
@pytest.mark.parametrize("u_dtype", ["bfloat16", "uint8"])
@pytest.mark.parametrize("p", long_but([2.0], [2.0, 3.5]))
def test_u_has_no_bias(p, u_dtype, kind):
    """Many coordinates of similar gradients, each with a threshold of its own.

    Without gradients u is a random walk whose mean is right: its logarithm is not.
    """
    scale = 2.0 ** np.random.default_rng(1).uniform(-1, 1, COORDINATES)
    gradients = np.float32(kinds()[kind][:, None] * scale)
    state, updates = run(scale_by_lp_adam(p, b2=B2, u_dtype=u_dtype), gradients)
    u, expected_updates = exact(gradients, p)
    ratio = read_u(state) / u
    standard_error = np.std(ratio) / COORDINATES**0.5
    assert abs(np.mean(ratio) - 1) < LEVEL[u_dtype] + 3 * standard_error
    if kind != "ended":
        assert abs(np.mean(np.log(ratio))) < LEVEL[u_dtype]
        assert np.std(np.log(ratio)) < NOISE[u_dtype]
    # The lengths of all steps, and of the last hundred; after the end there are none.
    # 1/u is longer on average, the more so the more noise there is.
    off = {"bfloat16": 0.02, "uint8": 0.12 if kind == "spikes" else 0.07}[u_dtype]
    for part in (slice(None), slice(-100, None)):
        actual = np.mean(np.abs(updates[part]))
        expected = np.mean(np.abs(expected_updates[part]))
        assert abs(actual - expected) < off * expected + 1e-30


def test_rounded_to_nearest_u_would_stay():
    """Why it is not: at b2 = 0.999 a step changes u by less than half a unit."""
    gradients = np.full([3000, COORDINATES], 0.5, np.float32)
    gradients[0] = 4.0
    state, _ = run(
        scale_by_lp_adam(2.0, b2=B2**0.5, u_dtype="uint8"), jnp.asarray(gradients)
    )
    exact = np.sqrt(0.25 + 16 * 0.999**3000 * 0.001 / (1 - 0.999**3000))
    assert abs(np.log(np.mean(read_u(state)) / exact)) < 0.1


@EVERY_NARROW
@pytest.mark.parametrize("p", long_but([2.0], [2.0, 1.8, 3.5, 16.0]))
def test_steps_follow_float32(storage, p):
    """The same travel, and no step is turned around."""
    rng = np.random.default_rng(2)
    g = rng.normal(0.3, 1.0, [4000, COORDINATES]) * 10.0 ** rng.uniform(
        -4, 3, COORDINATES
    )
    g = np.float32(g)
    _, expected = run(scale_by_lp_adam(p, b2=B2), g)
    _, actual = run(scale_by_lp_adam(p, b2=B2, **storage), g)
    travel, exact = (np.mean(np.asarray(x[500:]), (0, 1)) for x in (actual, expected))
    assert abs(travel / exact - 1) < (0.09 if "uint8" in storage.values() else 0.01)
    difference = np.std(np.asarray(actual)[500:] - np.asarray(expected)[500:])
    assert difference < (0.5 if "uint8" in storage.values() else 0.1) * np.std(expected)


@EVERY_NARROW
def test_a_step_after_a_rare_gradient_is_longer_than_1(storage):
    """Up to the bound of 5.15 for p = 2: m in int8 is a ratio to 8 u."""
    g = np.full([3000, 256], 1e-6, np.float32)
    g[1000::500] = 1.0
    g[-10:] = 1.0
    # Not all alike, or all were rounded alike.
    g = g * np.float32(np.random.default_rng(0).uniform(0.5, 2, 256))
    _, expected = run(scale_by_lp_adam(2.0, b2=B2**0.5), g)
    _, actual = run(scale_by_lp_adam(2.0, b2=B2**0.5, **storage), g)
    assert 2.5 < np.max(expected) < 7.27
    # Codes of m are a sixteenth apart at most, and all are rounded alike.
    last = slice(-10, None)
    np.testing.assert_allclose(
        np.mean(actual[last], 1), np.mean(expected[last], 1), rtol=1 / 16
    )


@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
@pytest.mark.parametrize("nesterov", [False, True])
def test_infinity_is_adamax(storage, nesterov):
    g = np.float32(np.random.default_rng(3).normal(size=[50, 40]))
    options = {"nesterov": nesterov, **storage}
    optimizer = lp_adam(0.1, jnp.inf, eps_inside=True, **options)
    actual, expected = (run(o, g) for o in (optimizer, adamax(0.1, **options)))
    chex.assert_trees_all_equal(actual, expected)
    assert isinstance(actual[0][0], ScaleByAdamaxState)


@EVERY_NARROW
def test_a_traced_order(storage):
    g = np.float32(np.random.default_rng(3).normal(size=[300, 40]))
    known, _ = run(scale_by_lp_adam(3.0, **storage), g)
    traced = jax.jit(lambda p: run(scale_by_lp_adam(p, **storage), g)[0])(3.0)
    np.testing.assert_allclose(read_u(traced), read_u(known), rtol=0.5)
    assert abs(np.mean(np.log(read_u(traced) / read_u(known)))) < 0.05


@EVERY_NARROW
def test_none_leaves_m_and_u_as_they_are(storage):
    params = {"a": np.ones(3, np.float32), "b": np.ones(3, np.float32)}
    transformation = scale_by_lp_adam(2.0, **storage)
    step = jax.jit(transformation.update)
    _, state = step(params, transformation.init(params))
    update, after = step({"a": params["a"], "b": None}, state)
    assert update["b"] is None
    chex.assert_trees_all_equal(
        (after.m["b"], after.u["b"]), (state.m["b"], state.u["b"])
    )


@pytest.mark.parametrize("u_dtype", ["bfloat16", "uint8"])
def test_complex_parameters(u_dtype):
    rng = np.random.default_rng(4)
    g = np.complex64(rng.normal(size=[2000, 64, 2]) @ [1, 1j])
    state, update = run(scale_by_lp_adam(2.0, b2=B2**0.5, u_dtype=u_dtype), g)
    expected, _ = run(scale_by_lp_adam(2.0, b2=B2**0.5), g)
    assert state.u.dtype == u_dtype and np.iscomplexobj(update)
    assert abs(np.mean(np.log(read_u(state) / expected.u))) < 0.05


@EVERY_NARROW
@pytest.mark.parametrize(
    "value", long_but([0.0, 1e-45, 3e38], [0.0, 1e-45, 1e-38, 1e-12, 1e9, 3e38])
)
def test_ends_of_the_range(storage, value):
    """Finite, and downhill; a uint8 u ends at 3.2e9, and so does what m sees."""
    g = np.full([200, 8], value, np.float32)
    state, update = run(scale_by_lp_adam(2.0, eps=0.0, **storage), g)
    assert np.all(np.isfinite(update)) and np.all(update >= 0)
    assert np.all(np.isfinite(read_u(state)))
    if value == 0:
        assert not np.any(update) and not np.any(read_u(state))


@EVERY_NARROW
def test_not_a_number_is_seen(storage):
    g = np.ones([200, 8], np.float32)
    g[10, 1] = np.nan
    _, update = run(scale_by_lp_adam(2.0, **storage), g)
    update = np.asarray(update)
    assert np.all(np.isnan(update[10:, 1])) and not np.any(np.isnan(update[:, 0]))


@pytest.mark.parametrize(
    ("storage", "jit"),
    long_but(
        [("bfloat16", True), ("three bytes", True), ("two bytes", False)],
        itertools.product(NARROW, [False, True]),
    ),
)
def test_derivatives(storage, jit):
    """Of one step, as if nothing was rounded."""
    storage = NARROW[storage]

    def loss(g, optimizer):
        state = optimizer.init(g)
        return jnp.sum(optimizer.update(g, state)[0] * jnp.array([1.0, 2.0, 3.0]))

    g = np.float32([0.5, -2.0, 1e-3])
    for derivative in (jax.grad, jax.jacfwd):
        by_g = derivative(loss)
        expected = jax.jit(by_g, static_argnums=1)(g, scale_by_lp_adam(2.0, eps=0.1))
        by_g = jax.jit(by_g, static_argnums=1) if jit else by_g
        actual = by_g(g, scale_by_lp_adam(2.0, eps=0.1, **storage))
        np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_adamw_in_six_bytes():
    """Parameters in bfloat16 with 2 + 2 + 2 bytes each, in a masked tree."""
    params = {
        "kernel": np.ones([32, 8], jnp.bfloat16),
        "bias": np.ones(8, jnp.bfloat16),
    }
    optimizer = master_weights(
        lp_adamw(1e-3, 2.0, mask={"kernel": True, "bias": False}, **NARROW["two bytes"])
    )
    state = optimizer.init(params)
    arrays = [x for x in jax.tree.leaves((params, state)) if x.ndim]
    assert sum(x.nbytes for x in arrays) == 6 * (32 * 8 + 8)
    with jax.numpy_dtype_promotion("standard"):
        full = full_params(*compiled_step(optimizer)(params, state, params))
    np.testing.assert_allclose(full["kernel"], 1 - 1e-3 - 1e-7, rtol=1e-4)


@EVERY_NARROW
def test_shardings(storage):
    mesh = jax.make_mesh((1,), ("data",))
    params = {"kernel": jnp.ones([8, 4])}
    state = zero_shardings(scale_by_lp_adam(2.0, **storage), params, mesh, "data")
    assert state.u["kernel"].spec[0] == state.m["kernel"].spec[0] == "data"


@pytest.mark.parametrize("name", ["m_dtype", "u_dtype"])
def test_errors(name):
    with pytest.raises(ValueError, match=f"{name} must be None or one of float64, "):
        lp_adam(0.1, 2.0, **{name: "float16"})
    for p, b1, b2, bound in ((2.0, 0.9, 0.8, "inf"), (1.0, 0.9, 0.999, "100")):
        with pytest.raises(
            ValueError,
            match=rf"m / \(8 u\), .* 10.46, .* with p={p}, b1={b1} and b2={b2} it may "
            rf"reach {bound}\. Use",
        ):
            lp_adam(0.1, p, b1=b1, b2=b2, m_dtype="int8")
    state = scale_by_lp_adam(2.0, **NARROW["two bytes"]).init(jnp.ones(2))
    with pytest.raises(TypeError, match=r"m .* has dtype int8, but .* stores float32"):
        scale_by_lp_adam(2.0).update(jnp.ones(2), state)


def test_thresholds_are_spread_over_an_array():
    """One for each number: of a thousand numbers at 3/10, three hundred round up."""

    @functools.partial(jax.jit, static_argnums=0)
    def is_rounded_up(shape, count):
        u = jnp.full(shape, 1 + 0.3 * 2.0**-7)
        return NORMS["bfloat16"].average(u, dither_of(count)) > 1

    for shape in ((1000,), (40, 25), (4, 1, 250), (1, 1000)):
        for count in range(20):
            assert abs(np.sum(is_rounded_up(shape, count)) - 300) <= 3
    ups = [is_rounded_up((), count) for count in range(2000)]
    assert np.mean(ups) == pytest.approx(0.3, abs=0.04)


@pytest.mark.long
@pytest.mark.parametrize(
    ("u_dtype", "noise", "after_waiting"),
    [("bfloat16", 0.03, 0.11), ("uint8", 0.21, 0.76)],
)
def test_the_noise_of_how_it_works(u_dtype, noise, after_waiting):
    """After 10^5 steps, as after 3000; and after 5000 more without gradients."""
    narrow, exact = scale_by_adam(u_dtype=u_dtype), scale_by_adam()
    size = 1024

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def ratios(states, first, last, scale=1.0):
        def body(states, i):
            g = scale * jax.random.normal(
                jax.random.fold_in(jax.random.key(0), i), (size,)
            )
            pairs = zip((narrow, exact), states, strict=True)
            return tuple(o.update(g, state)[1] for o, state in pairs), None

        states, _ = jax.lax.scan(body, states, jnp.arange(first, last))
        return states, NORMS[u_dtype].read(states[0].u, 1.0) / states[1].u

    start = tuple(o.init(jnp.zeros(size)) for o in (narrow, exact))
    early, ratio = ratios(start, 0, 3000)
    assert np.std(ratio) == pytest.approx(noise, rel=0.25)
    _, waited = ratios(early, 0, 5000, 0.0)
    assert np.std(waited) == pytest.approx(after_waiting, rel=0.15)
    assert np.mean(waited) == pytest.approx(1, abs=4 * after_waiting / size**0.5)
    _, late = ratios(early, 3000, 100_000)
    assert np.std(late) == pytest.approx(noise, rel=0.25)
    assert np.mean(late) == pytest.approx(
        1, abs=0.005 if u_dtype == "bfloat16" else 0.05
    )
