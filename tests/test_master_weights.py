"""Parameters in half precision that train as float32 ones."""

import functools
import itertools
import pickle

import chex
import eight_devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import sequences
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sequences import STORAGES, long_but
from test_facts import distance_to_the_minimum
from versions import as_users_compile, installed, needs_new_xla

from adamax_jax import (
    MasterWeightsState,
    adamax,
    adamaxw,
    convert_state,
    diagnose,
    full_params,
    insert_state,
    master_weights,
    moments,
    set_full_params,
    zero_shardings,
)
from adamax_jax._lab import shapes

HALF = [jnp.bfloat16, jnp.float16]
EVERY_HALF = pytest.mark.parametrize("dtype", HALF)
EVERY_RESIDUAL = pytest.mark.parametrize("residual_dtype", ["int16", "int8"])


# optax.apply_updates adds float32 updates to parameters in half precision.
pytestmark = pytest.mark.usefixtures("lenient")


def bits(x):
    return np.asarray(x).view(
        {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
    )


def round_to_bfloat16(x):
    """To nearest, ties away from 0, in NumPy: the first half of a float32."""
    high = (np.asarray(x, np.float32).view(np.uint32) + np.uint32(0x8000)) >> 16
    return high.astype(np.uint16).view(jnp.bfloat16.dtype)


# An eager call compiles a program for each operation and shape.
read = jax.jit(full_params)
write = jax.jit(set_full_params)


@functools.partial(jax.jit, static_argnums=(1, 2))
def state_of(full, dtype, residual_dtype="int16"):
    """Half-precision parameters and a state that stand for float32 numbers."""
    params = full.astype(dtype)
    state = master_weights(optax.identity(), residual_dtype).init(params)
    return set_full_params(params, state, full)


def step_by(params, state, change, residual_dtype="int16"):
    """The parameters and the state after a change of the float32 parameters."""
    optimizer = master_weights(optax.identity(), residual_dtype)
    updates, state = optimizer.update(jnp.asarray(change), state, params)
    chex.assert_type(updates, jnp.float32)
    return optax.apply_updates(params, updates), state


compiled_step_by = jax.jit(step_by, static_argnums=3)


def numbers_of_all_kinds(size, largest=127, seed=0):
    """Random float32 numbers of all exponents and signs, and 0."""
    rng = np.random.default_rng(seed)
    exponents = rng.integers(-126, largest + 1, size)
    numbers = np.ldexp(rng.uniform(1, 2, size), exponents) * rng.choice([-1, 1], size)
    return np.append(np.float32(numbers), np.float32([0.0, -0.0]))


class TestNumbers:
    """A half-precision number and a residual are a float32 number."""

    @pytest.mark.parametrize("low", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1234])
    def test_every_first_half_of_a_float32(self, low):
        """Zeros, subnormal numbers, infinities and NaN among them."""
        x = (np.arange(2**16, dtype=np.uint32) << 16 | low).view(np.float32)
        params, state = state_of(x, jnp.bfloat16)
        back = np.asarray(read(params, state))
        expected = round_to_bfloat16(x)
        is_number = np.isfinite(x) & np.isfinite(expected.astype(np.float32))
        np.testing.assert_array_equal(bits(back)[is_number], bits(x)[is_number])
        np.testing.assert_array_equal(
            bits(params)[is_number], bits(expected)[is_number]
        )
        # What is infinite in half precision stays so, and NaN is NaN.
        overflows = np.isinf(expected.astype(np.float32)) & ~np.isnan(x)
        np.testing.assert_array_equal(back[overflows], np.sign(x[overflows]) * np.inf)
        np.testing.assert_array_equal(np.isnan(back), np.isnan(x))

    def test_float16(self):
        """Exact from 2^-16 on, and to 2^-40 below; infinite above 65520."""
        x = numbers_of_all_kinds(100_000, largest=15)
        x = x[np.abs(x) < 65_500]
        params, state = state_of(x, jnp.float16)
        np.testing.assert_array_equal(bits(params), bits(np.float16(x)))
        back = np.asarray(read(params, state))
        large = np.abs(x) >= 2.0**-16
        assert large.sum() > 10_000
        np.testing.assert_array_equal(back[large], x[large])
        assert np.max(np.abs(back - x)) <= 2.0**-40
        params, state = state_of(np.float32([7e4, np.inf, np.nan]), jnp.float16)
        np.testing.assert_array_equal(read(params, state), [np.inf, np.inf, np.nan])

    @pytest.mark.parametrize(
        ("dtype", "digits"), [(jnp.bfloat16, 16), (jnp.float16, 18)]
    )
    def test_one_byte(self, dtype, digits):
        """16 or 18 significant bits, the nearest ones."""
        x = numbers_of_all_kinds(100_000, largest=15)
        x = x[np.abs(x) < 65_500]
        params, state = state_of(x, dtype, "int8")
        back = np.asarray(read(params, state), np.float64)
        least = 2.0**-14 if dtype == jnp.float16 else 2.0**-126
        normal = np.abs(x) >= least
        error = np.abs(back - x)[normal] / np.abs(x[normal])
        assert 2.0 ** -(digits + 0.1) < np.max(error) <= 2.0**-digits
        assert np.max(np.abs(back - x)[~normal], initial=0) <= least * 2.0**-digits


class TestSteps:
    """What is added to the float32 parameters is added, to the bit."""

    def changes(self, x, seed=1):
        """Of all sizes; near the number itself, to near 0 and beyond; tiny ones."""
        rng = np.random.default_rng(seed)
        near = -x * np.float32(
            1 + np.ldexp(rng.normal(size=x.size), rng.integers(-24, 2))
        )
        small = x * np.float32(np.ldexp(rng.normal(size=x.size), -rng.integers(5, 24)))
        anything = numbers_of_all_kinds(x.size - 2, seed=seed)
        with np.errstate(over="ignore"):
            return [near, small, anything, -2 * x, np.zeros_like(x)]

    @pytest.mark.parametrize("jit", [False, True])
    def test_bfloat16(self, jit):
        x = numbers_of_all_kinds(200_000, largest=125)
        params, state = state_of(x, jnp.bfloat16)
        step = compiled_step_by if jit else step_by
        for change in self.changes(x):
            new, new_state = step(params, state, jnp.asarray(change))
            assert new.dtype == jnp.bfloat16
            actual = np.asarray(read(new, new_state))
            # In JAX, whose compiled code takes subnormal numbers for 0.
            expected = np.asarray(jnp.add(x, change))
            rounded = round_to_bfloat16(expected)
            finite = np.isfinite(rounded.astype(np.float32))
            # 0 may have either sign.
            same = (bits(actual) == bits(expected)) | (actual == expected)
            off = finite & ~same
            # A step past 0 that no update leads to.
            assert np.mean(off) < 0.01
            assert np.all(np.sign(expected[off]) != np.sign(x[off]))
            assert np.all(np.abs(expected[off]) < 2.0**-15 * np.abs(x[off]))
            error = np.abs(actual[off] - expected[off])
            assert np.all(error <= 2.0**-23 * np.abs(x[off]))
            same_params = np.asarray(new, np.float32) == rounded.astype(np.float32)
            assert np.all(same_params[finite & ~off])
            infinite = ~finite & ~np.isnan(expected)
            assert np.all(np.isinf(actual[infinite]))

    def test_past_zero_where_no_update_leads(self):
        """From 1 - 5/2^24 to -3/2^24: no float32 added to 1, its bfloat16, is that."""
        x = np.float32([1 - 5 * 2.0**-24])
        params, state = state_of(x, jnp.bfloat16)
        params, state = compiled_step_by(
            params, state, np.float32([-(1 - 2 * 2.0**-24)])
        )
        assert float(params[0]) in (-2 * 2.0**-24, -4 * 2.0**-24)
        np.testing.assert_allclose(
            read(params, state), [-3 * 2.0**-24], rtol=0, atol=2.0**-24
        )
        params, state = compiled_step_by(params, state, np.float32([1.0]))
        np.testing.assert_allclose(read(params, state), [1.0], rtol=2.0**-21)

    def test_float16(self):
        rng = np.random.default_rng(0)
        x = np.float32(
            np.ldexp(rng.normal(size=100_000), rng.integers(-13, 12, 100_000))
        )
        params, state = state_of(x, jnp.float16)
        for change in (0.01 * x, np.float32(1e-6 * rng.normal(size=x.size)), -1.5 * x):
            change = np.float32(change)
            new, new_state = compiled_step_by(params, state, change)
            assert new.dtype == jnp.float16
            before, actual = (
                np.asarray(read(p, s)) for p, s in ((params, state), (new, new_state))
            )
            expected = before + change
            large = np.abs(expected) >= 2.0**-16
            np.testing.assert_array_equal(actual[large], expected[large])
            assert np.all(np.abs(actual - expected)[~large] <= 2.0**-40)

    @EVERY_HALF
    @EVERY_RESIDUAL
    def test_what_is_not_finite_is_carried(self, dtype, residual_dtype):
        x = np.float32([1.0, 1.0, 1.0, np.inf, np.nan])
        change = np.float32([np.nan, np.inf, -np.inf, 1.0, 1.0])
        expected = [np.nan, np.inf, -np.inf, np.inf, np.nan]
        params, state = state_of(x, dtype, residual_dtype)
        params, state = compiled_step_by(params, state, change, residual_dtype)
        np.testing.assert_array_equal(np.float32(params), expected)
        np.testing.assert_array_equal(read(params, state), expected)
        params, state = compiled_step_by(
            params, state, np.ones(5, np.float32), residual_dtype
        )
        np.testing.assert_array_equal(read(params, state), expected)

    @EVERY_HALF
    def test_no_change_changes_nothing(self, dtype):
        """Nor does a parameter of -0, or one that is subnormal in half precision."""
        x = np.float32([1.2345678, -0.0, 0.0, -3e-5, 1e-7, 65_000.123])
        params, state = state_of(x, dtype)
        new, new_state = compiled_step_by(params, state, np.zeros_like(x))
        np.testing.assert_array_equal(bits(new), bits(params))
        np.testing.assert_array_equal(new_state.residual, state.residual)

    @EVERY_HALF
    def test_one_byte_has_no_bias(self, dtype):
        """A step of a 16th of its unit moves a parameter at the right mean speed."""
        unit = 2.0**-15 if dtype == jnp.bfloat16 else 2.0**-17
        x = np.float32([1.3, -1.1, 0.02, 600.0])
        # A float32 holds all of the sums.
        change = np.float32(unit / 16 * np.array([1, -1, 2.0**-6, -(2.0**9)]))
        optimizer = master_weights(optax.identity(), "int8")

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(change, state, params)
            return (optax.apply_updates(params, updates), state), None

        before = state_of(x, dtype, "int8")
        after, _ = jax.lax.scan(step, before, length=20_000)
        moved = np.float64(read(*after)) - np.float64(read(*before))
        np.testing.assert_allclose(moved, 20_000 * np.float64(change), rtol=0.05)


def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    return np.float32(data.data / 16), data.target


def perceptron(dtype):
    """Parameters, and a loss that computes in their dtype."""
    rng = np.random.default_rng(0)
    params = {
        "hidden": {
            "kernel": np.float32(rng.normal(size=[64, 32]) / 8),
            "bias": np.zeros(32, np.float32),
        },
        "scale": np.ones([], np.float32),
        "output": np.float32(rng.normal(size=[32, 10]) / 6),
    }
    params = jax.device_put(params)
    x, y = digits()
    x, y = x[:1600].reshape(50, 32, 64), y[:1600].reshape(50, 32)

    def loss(params, batch):
        x, y = batch
        hidden, output = params["hidden"], params["output"]
        x = jax.nn.relu(x.astype(dtype) @ hidden["kernel"] + hidden["bias"][None])
        logits = (x @ output).astype(jnp.float32) * params["scale"]
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return in_half(params, dtype), params, loss, (x, y)


@functools.partial(jax.jit, static_argnums=1)
def in_half(params, dtype):
    """All but the scale, which stays in float32."""
    return {
        name: p if name == "scale" else jax.tree.map(lambda p: p.astype(dtype), p)
        for name, p in params.items()
    }


@jax.jit
def in_float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


@jax.jit
def half_of(full):
    """The rounded copy of float32 master weights: to nearest, ties away from 0."""

    def rounded(p):
        high = (jax.lax.bitcast_convert_type(p, jnp.int32) + 0x8000) >> 16
        return jax.lax.bitcast_convert_type(high.astype(jnp.int16), jnp.bfloat16)

    return {
        name: p if name == "scale" else jax.tree.map(rounded, p)
        for name, p in full.items()
    }


def steps_of(optimizer, loss):
    """A training step with residuals, and one with master weights kept by hand."""
    wrapped = master_weights(optimizer)
    # Compiled also where the optimizer runs operation by operation.
    gradients_of = jax.jit(jax.grad(loss))

    def ours(carry, batch):
        params, state = carry
        gradients = gradients_of(params, batch)
        updates, state = wrapped.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    def by_hand(carry, batch):
        full, state = carry
        gradients = in_float32(gradients_of(half_of(full), batch))
        updates, state = optimizer.update(gradients, state, full)
        return optax.apply_updates(full, updates), state

    return ours, by_hand


def assert_same(ours, by_hand):
    """To the bit: parameters, what they stand for, and the state."""
    (params, state), (full, inner_state) = ours, by_hand
    chex.assert_trees_all_equal(read(params, state), full)
    chex.assert_trees_all_equal(params, half_of(full))
    chex.assert_trees_all_equal(state.inner_state, inner_state)


class TestTraining:
    """A model trained with residuals is one trained with float32 master weights."""

    OPTIMIZERS = (
        adamax(1e-3),
        adamax(1e-3, m_dtype="int8", u_dtype="uint8"),
        optax.adam(1e-3, mu_dtype=jnp.float32),
        optax.chain(
            optax.clip_by_global_norm(1.0), adamax(optax.linear_schedule(1e-2, 0, 1000))
        ),
    )

    @pytest.mark.long
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_a_thousand_steps(self, optimizer):
        """In a scan, from weights that are not rounded."""
        params, full, loss, batches = perceptron(jnp.bfloat16)
        ours, by_hand = steps_of(optimizer, loss)
        start = write(params, master_weights(optimizer).init(params), full)

        @functools.partial(jax.jit, static_argnums=0)
        def train(step, carry):
            for _ in range(20):
                carry, _ = jax.lax.scan(lambda c, b: (step(c, b), None), carry, batches)
            return carry

        end = train(ours, start)
        assert int(end[1].count) == 1000
        assert_same(end, train(by_hand, (full, optimizer.init(full))))
        assert loss(end[0], jax.tree.map(lambda x: x[0], batches)) < 0.5

    @pytest.mark.parametrize(
        "how",
        [
            "eager",
            pytest.param("jit", marks=needs_new_xla),
            pytest.param("vmap", marks=pytest.mark.long),
        ],
    )
    def test_step_by_step(self, how):
        optimizer = adamaxw(1e-3, weight_decay=0.1)
        params, full, loss, batches = perceptron(jnp.bfloat16)
        ours, by_hand = steps_of(optimizer, loss)
        a = write(params, jax.jit(master_weights(optimizer).init)(params), full)
        b = full, jax.jit(optimizer.init)(full)
        steps = 3 if how == "eager" else 50
        if how == "vmap":
            # The same member thrice, with other batches.
            a, b = (jax.tree.map(lambda x: jnp.stack([x] * 3), c) for c in (a, b))
            ours, by_hand = (jax.jit(jax.vmap(f)) for f in (ours, by_hand))
        elif how == "jit":
            ours, by_hand = as_users_compile(ours), as_users_compile(by_hand)
        for t in range(steps):
            place = jnp.array([t, t + 1, t + 2]) % 50 if how == "vmap" else t
            batch = jax.tree.map(lambda x, place=place: x[place], batches)
            a, b = ours(a, batch), by_hand(b, batch)
        assert_same(a, b)

    @pytest.mark.parametrize("gradients", [jnp.bfloat16, jnp.float16, jnp.float32])
    @EVERY_HALF
    @EVERY_RESIDUAL
    def test_gradients_of_every_dtype(self, gradients, dtype, residual_dtype):
        """The optimizer sees float32 parameters, and its steps are in float32."""
        optimizer = master_weights(adamax(1e-4), residual_dtype)
        params = {"a": np.full(4, 1.5, dtype)}
        g = {"a": np.array([1.0, -1.0, 0.5, 0.0], gradients)}
        params, state = train(optimizer, params, [g] * 10)
        tolerance = {"int16": 3e-7, "int8": 1.5e-4}[residual_dtype]
        np.testing.assert_allclose(
            read(params, state)["a"], [1.499, 1.501, 1.499, 1.5], atol=tolerance
        )

    @staticmethod
    @functools.cache
    def in_float32():
        return distance_to_the_minimum(adamax(1e-3), jnp.float32, steps=5000)

    @EVERY_RESIDUAL
    def test_a_noisy_quadratic(self, residual_dtype):
        """As near as with float32 parameters; README says what is lost without."""
        expected = self.in_float32()
        optimizer = master_weights(adamax(1e-3), residual_dtype)
        actual = distance_to_the_minimum(optimizer, jnp.bfloat16, steps=5000)
        assert actual == pytest.approx(expected, rel=0.01)


PARAMS = {
    "a": np.full([4, 3], 1.5, np.float32),
    "b": np.full(5, -0.7, np.float32),
    "c": np.ones(2, np.float32),
}
# c stays in float32.
NARROW = {"a": jnp.bfloat16, "b": jnp.bfloat16, "c": jnp.float32}


def narrow_params():
    return {name: jnp.asarray(p.astype(NARROW[name])) for name, p in PARAMS.items()}


def gradients_of(params, steps=12):
    rng = np.random.default_rng(0)
    return [
        jax.tree.map(lambda p: rng.normal(size=p.shape).astype(p.dtype), params)
        for _ in range(steps)
    ]


def train(optimizer, params, gradients, state=None):
    state = optimizer.init(params) if state is None else state
    return sequences.train(optimizer, params, state, gradients)


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "partition": lambda tx: optax.partition({"all": tx}, "all"),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, every_k_schedule=2),
    "masked": lambda tx: optax.masked(tx, {"a": True, "b": True, "c": True}),
}


class TestUse:
    """In Optax's wrappers, in models of other libraries, with this package's tools."""

    @pytest.mark.parametrize("name", WRAPPERS)
    def test_inside_what_hands_its_updates_on(self, name):
        """The same parameters as in float32, from the same gradients."""
        wrap = WRAPPERS[name]
        params = narrow_params()
        gradients = in_float32(gradients_of(params))
        after = train(wrap(master_weights(adamaxw(1e-3))), params, gradients)
        expected, _ = train(wrap(adamaxw(1e-3)), in_float32(params), gradients)
        chex.assert_trees_all_close(read(*after), expected, rtol=1e-6)
        assert {k: p.dtype for k, p in after[0].items()} == NARROW

    @pytest.mark.parametrize(
        "residual_dtype", ["int16", pytest.param("int8", marks=pytest.mark.long)]
    )
    def test_around_what_changes_updates(self, residual_dtype):
        """Weight decay, schedule-free averaging and lookahead see full parameters."""
        params = narrow_params()
        full, gradients = in_float32(params), gradients_of(params)
        rtol = {"int16": 1e-6, "int8": 2e-4}[residual_dtype]
        for inner in (
            optax.chain(optax.add_decayed_weights(0.1), adamax(1e-3), optax.scale(0.5)),
            optax.contrib.schedule_free(adamax(1e-3, b1=0.0), 1e-3),
            optax.inject_hyperparams(adamax)(learning_rate=1e-3),
            optax.apply_if_finite(adamax(1e-3), 3),
            optax.MultiSteps(adamax(1e-3), 2).gradient_transformation(),
        ):
            after = train(master_weights(inner, residual_dtype), params, gradients)
            expected, _ = train(inner, full, in_float32(gradients))
            chex.assert_trees_all_close(read(*after), expected, rtol=rtol)
        lookahead = optax.lookahead(adamax(1e-3), sync_period=3, slow_step_size=0.5)
        both = optax.LookaheadParams.init_synced(params)
        after = train(master_weights(lookahead, residual_dtype), both, gradients)
        both = optax.LookaheadParams.init_synced(full)
        expected, _ = train(lookahead, both, in_float32(gradients))
        chex.assert_trees_all_close(read(*after), expected, rtol=rtol)

    @pytest.mark.parametrize("scale", [1.0, 2.0**14])
    def test_loss_scaling(self, scale):
        """Gradients of 1e-9 are 0 in float16; scaled, they are undone in float32."""
        target = np.float32([0.5, -0.25])

        def loss(params):
            return scale * 1e-9 * jnp.sum((params - target.astype(params.dtype)) ** 2)

        params = np.zeros(2, np.float16)
        inner = optax.chain(optax.scale(1 / scale), adamax(1e-2, eps=0.0))
        optimizer = master_weights(inner)

        @jax.jit
        def run(params):
            def step(_, carry):
                params, state = carry
                updates, state = optimizer.update(jax.grad(loss)(params), state, params)
                return optax.apply_updates(params, updates), state

            start = params, optimizer.init(params)
            return full_params(*jax.lax.fori_loop(0, 200, step, start))

        expected = target if scale > 1 else np.zeros(2)
        np.testing.assert_allclose(run(params), expected, atol=0.02)

    def test_schedule_free_evaluates_full_params(self):
        params = narrow_params()
        inner = optax.contrib.schedule_free(adamax(1e-3, b1=0.0), 1e-3)
        params, state = train(master_weights(inner), params, gradients_of(params))
        averaged = optax.contrib.schedule_free_eval_params(
            state.inner_state, full_params(params, state)
        )
        chex.assert_trees_all_equal_dtypes(averaged, PARAMS)

    def test_what_is_masked_has_no_residual(self):
        params = narrow_params()
        mask = {"a": True, "b": False, "c": True}
        optimizer = optax.masked(master_weights(adamax(1e-3)), mask)
        gradients = gradients_of(params)
        state = optimizer.init(params)
        updates, state = optimizer.update(gradients[0], state, params)
        np.testing.assert_array_equal(updates["b"], gradients[0]["b"])
        full = full_params(params, state)
        chex.assert_trees_all_equal_dtypes(full, PARAMS | {"b": params["b"]})

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
    def test_other_parameters_are_left_as_they_are(self, dtype):
        params = {"a": jnp.ones(3, dtype), "none": None}
        gradients = {"a": jnp.full(3, 0.5, dtype), "none": None}
        wrapped, bare = master_weights(adamax(1e-3)), adamax(1e-3)
        updates, state = wrapped.update(gradients, wrapped.init(params), params)
        expected, inner = bare.update(gradients, bare.init(params), params)
        assert jax.tree.leaves(state.residual) == []
        chex.assert_trees_all_equal(updates, expected)
        chex.assert_trees_all_equal(state.inner_state, inner)
        chex.assert_trees_all_equal(full_params(params, state), params)

    def test_double_precision(self, x64):
        params = {"a": np.ones(3), "b": np.ones(3, jnp.bfloat16)}
        params, state = train(master_weights(adamax(1e-3)), params, [params] * 3)
        full = read(params, state)
        chex.assert_type([full["a"], full["b"]], [jnp.float64, jnp.float32])
        np.testing.assert_allclose(full["a"], 0.997, rtol=1e-9)
        np.testing.assert_allclose(full["b"], 0.997, rtol=1e-6)

    def test_a_gradient_of_none_leaves_a_parameter(self):
        params = narrow_params()
        optimizer = master_weights(adamax(1e-3))
        params, state = train(optimizer, params, gradients_of(params, 3))
        g = gradients_of(params, 1)[0] | {"a": None}
        updates, new_state = optimizer.update(g, state, params)
        assert updates["a"] is None
        np.testing.assert_array_equal(new_state.residual["a"], state.residual["a"])
        assert np.any(new_state.residual["b"] != state.residual["b"])
        assert jax.tree.structure(new_state) == jax.tree.structure(state)

    def test_flax_nnx(self):
        """nnx.Optimizer makes the intended parameters of the updates."""
        model = nnx.Linear(4, 8, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        start = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        optimizer = nnx.Optimizer(model, master_weights(adamax(1e-3)), wrt=nnx.Param)
        gradients = gradients_of(start, 20)
        for g in gradients:
            state = jax.tree.map(lambda x: x, nnx.state(model, nnx.Param))
            nnx.replace_by_pure_dict(state, g)
            optimizer.update(model, state)
        expected = train(master_weights(adamax(1e-3)), start, gradients)
        params = nnx.state(model, nnx.Param)
        assert model.kernel[...].dtype == jnp.bfloat16
        chex.assert_trees_all_equal(nnx.to_pure_dict(params), expected[0])
        full = full_params(params, optimizer.opt_state)
        # The last bit of a step of 1e-3 is 1e-10; compiled, sums are fused.
        chex.assert_trees_all_close(
            nnx.to_pure_dict(full), full_params(*expected), rtol=1e-6, atol=1e-9
        )
        again, state = set_full_params(params, optimizer.opt_state, full)
        chex.assert_trees_all_equal(nnx.to_pure_dict(again), expected[0])
        assert jax.tree.structure(state) == jax.tree.structure(optimizer.opt_state)

    def test_equinox(self):
        """Optax's apply_updates keeps the dtype; Equinox's does not: it is noticed."""
        eqx = installed("equinox")
        model = eqx.nn.Linear(3, 2, dtype=jnp.bfloat16, key=jax.random.key(0))
        optimizer = master_weights(adamax(1e-3))
        arrays = eqx.filter(model, eqx.is_inexact_array)
        state = optimizer.init(arrays)
        g = jax.tree.map(jnp.ones_like, arrays)
        updates, state = optimizer.update(g, state, arrays)
        new = optax.apply_updates(arrays, updates)
        assert new.weight.dtype == jnp.bfloat16
        wider = eqx.apply_updates(arrays, updates)
        np.testing.assert_array_equal(wider.weight, new.weight.astype(jnp.float32))
        with pytest.raises(
            TypeError, match=r"\.weight has dtype float32.*apply_updates"
        ):
            optimizer.update(g, state, wider)

    @pytest.mark.parametrize(
        ("storage", "residual_dtype"),
        long_but(
            [("own", "int16"), ("two bytes", "int8")],
            itertools.product(STORAGES, ["int16", "int8"]),
        ),
    )
    def test_the_tools_for_states_look_inside(self, storage, residual_dtype):
        params = narrow_params()
        optimizer = master_weights(adamax(1e-3, **STORAGES[storage]), residual_dtype)
        params, state = train(optimizer, params, gradients_of(params))

        @jax.jit
        def tools(state):
            wide = convert_state(state, m_dtype="float32", u_dtype="float32")
            return moments(state), diagnose(state), wide

        (m, _), figures, wide = tools(state)
        chex.assert_trees_all_equal_dtypes(m, PARAMS)
        assert figures.names == ("['a']", "['b']", "['c']")
        assert isinstance(wide, MasterWeightsState)
        chex.assert_trees_all_equal(wide.residual, state.residual)
        back = pickle.loads(pickle.dumps(state))
        chex.assert_trees_all_equal(back, state)

    def test_a_run_takes_it_up_and_leaves_it(self):
        """The state of before goes into a new one; the inner one goes on alone."""
        params = narrow_params()
        gradients = gradients_of(params)
        bare, wrapped = adamax(1e-3, m_dtype="float32", u_dtype="float32"), adamax(1e-3)
        params, state = train(bare, params, gradients[:4])
        wrapped = master_weights(wrapped)
        state = jax.jit(insert_state)(wrapped.init(params), state)
        chex.assert_trees_all_equal(state.residual, wrapped.init(params).residual)
        assert int(state.inner_state[0].count) == 4
        params, state = train(wrapped, params, gradients[4:8], state)
        _, state = train(bare, params, gradients[8:], state.inner_state)
        assert int(state[0].count) == 12

    @EVERY_HALF
    def test_weights_of_another_run(self, dtype):
        """Become half-precision parameters and residuals, and come back."""
        full = {
            "a": jnp.asarray(np.random.default_rng(0).normal(size=[3, 4]), jnp.float32)
        }
        params = jax.tree.map(lambda p: p.astype(dtype), full)
        for optimizer in (adamax(), optax.chain(optax.clip(1.0), adamax())):
            state = optax.chain(master_weights(optimizer)).init(params)
            params, state = set_full_params(params, state, full)
            chex.assert_trees_all_equal(full_params(params, state), full)
            forgotten = full_params(*set_full_params(params, state, params))
            chex.assert_trees_all_equal_dtypes(forgotten, full)
            chex.assert_trees_all_equal(
                forgotten, jax.tree.map(lambda p: p.astype(jnp.float32), params)
            )

    def test_two_models_with_the_same_paths_are_refused(self):
        """Whose residual it would be nobody knows: of a generator, a discriminator."""
        states = {}
        for name, value in (("generator", 1.001), ("discriminator", 0.999)):
            full = {"w": np.full(3, value, np.float32)}
            params = {"w": np.ones(3, jnp.bfloat16)}
            state = master_weights(adamax()).init(params)
            params, states[name] = write(params, state, full)
        message = (
            r"two residuals at \['w'\], in the MasterWeightsState at "
            r"\['discriminator'\] and at \['generator'\]"
        )
        with pytest.raises(ValueError, match=message):
            full_params(params, states)
        with pytest.raises(ValueError, match=message):
            set_full_params(params, states, full)
        # Also if the arrays of one are in containers of their own.
        boxed = states["generator"]._replace(
            residual={"w": [states["generator"].residual["w"]]}
        )
        with pytest.raises(ValueError, match=r"two residuals at \['w'\]"):
            full_params(params, (boxed, states["discriminator"]))
        for name, value in (("generator", 1.001), ("discriminator", 0.999)):
            np.testing.assert_allclose(
                read(params, states[name])["w"], value, rtol=1e-6
            )

    def test_two_optimizers_of_one_model_have_residuals_at_different_paths(self):
        params = {"a": np.ones(2, jnp.bfloat16), "b": np.ones(3, jnp.bfloat16)}
        full = {"a": np.full(2, 1.001, np.float32), "b": np.full(3, 0.999, np.float32)}
        optimizer = optax.partition(
            {"a": master_weights(adamax()), "b": master_weights(optax.sgd(0.1))},
            {"a": "a", "b": "b"},
        )
        both = write(params, optimizer.init(params), full)
        chex.assert_trees_all_equal(read(*both), full)

    @EVERY_HALF
    @EVERY_RESIDUAL
    def test_a_parameter_that_others_change(self, dtype, residual_dtype):
        """Is known to within half the distance to the next number, also at 0."""
        rng = np.random.default_rng(0)
        x = np.float32(rng.normal(size=1000))
        params, state = state_of(x, dtype, residual_dtype)
        params = np.float32(params)
        for new in (
            np.clip(params, -0.5, 0.5),
            np.maximum(params, 0),
            -np.maximum(params, 0),
            params * rng.integers(0, 2, 1000),
            np.full_like(params, np.inf),
            np.full_like(params, -np.inf),
        ):
            new = new.astype(dtype)
            full = np.asarray(read(new, state))
            rounded = np.float32(new)
            finite = np.isfinite(rounded)
            half_an_ulp = np.maximum(2.0**-8 * np.abs(rounded), 2.0**-24)
            error = np.abs(full[finite] - rounded[finite])
            assert np.all(error <= half_an_ulp[finite])
            np.testing.assert_array_equal(full[~finite], rounded[~finite])

    def test_parameters_that_are_kept_above_0(self):
        """As by optax.projections, at every step: they stay finite."""
        optimizer = master_weights(adamax(1e-2))
        params = np.full(100, 0.01, jnp.bfloat16)
        state = jax.jit(optimizer.init)(params)

        @jax.jit
        def step(params, state, g):
            updates, state = optimizer.update(g, state, params)
            params = optax.apply_updates(params, updates)
            return optax.projections.projection_non_negative(params), state

        for g in np.random.default_rng(0).normal(size=[20, 100]):
            params, state = step(params, state, g.astype(jnp.bfloat16))
        assert np.all(np.isfinite(read(params, state)))
        params = np.asarray(params)
        assert np.any(params == 0) and np.all(params >= 0)

    @EVERY_HALF
    @EVERY_RESIDUAL
    def test_derivatives_pass_as_if_nothing_was_rounded(self, dtype, residual_dtype):
        """By the learning rate, the parameters and what they stand for."""

        def loss(rate, params):
            optimizer = master_weights(optax.sgd(rate), residual_dtype)
            state = optimizer.init(params)
            for _ in range(3):
                g = jax.tree.map(lambda p: 2 * p, params)
                updates, state = optimizer.update(g, state, params)
                params = optax.apply_updates(params, updates)
            return jnp.sum(full_params(params, state) ** 2)

        params = np.array([1.5, -0.75], dtype)
        by_rate, by_params = jax.jit(jax.grad(loss, argnums=(0, 1)))(0.1, params)
        square = np.sum(np.float32(params) ** 2)
        np.testing.assert_allclose(by_rate, -12 * 0.8**5 * square, rtol=0.02)
        expected = 2 * 0.8**6 * np.float32(params)
        np.testing.assert_allclose(np.float32(by_params), expected, rtol=0.02)

    @pytest.mark.parametrize("fraction", long_but([1 / 30], [1 / 120, 1 / 30, 1 / 4]))
    def test_one_byte_moves_at_the_right_speed_with_adamax(self, fraction):
        """1000 parameters in [1, 2) and below 0, steps of a fraction of their unit."""
        unit = 2.0**-15
        optimizer = master_weights(adamax(fraction * unit), "int8")
        x = np.random.default_rng(0).uniform(1, 2, 1000)
        full = np.float32(x * np.where(np.arange(1000) % 2, 1, -1))
        params = full.astype(jnp.bfloat16)
        params, state = write(params, optimizer.init(params), full)
        g = np.ones(1000, jnp.bfloat16)

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        before = np.float64(read(params, state))
        after, _ = jax.lax.scan(step, (params, state), length=20_000)
        moved = np.float64(read(*after)) - before
        # Steps that a float32 rounds where it is added are not as long.
        exact = np.float64(np.float32(1.5) - np.float32(fraction * unit)) - 1.5
        inside = (np.abs(full) > 1.05) & (np.abs(full) < 1.95)
        np.testing.assert_allclose(moved[inside] / (20_000 * exact), 1, rtol=0.05)

    def test_an_equinox_model_with_functions_in_it(self):
        eqx = installed("equinox")
        model = eqx.nn.MLP(3, 2, 4, 1, dtype=jnp.bfloat16, key=jax.random.key(0))
        optimizer = master_weights(adamax(1e-3))
        state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
        with pytest.raises(TypeError, match=r"not an array: .*eqx\.filter"):
            optimizer.init(model)
        full = full_params(model, state)
        again, _ = set_full_params(model, state, full)
        assert full.layers[0].weight.dtype == jnp.float32
        assert again.activation is model.activation

    def test_zero_shardings_divide_the_residual(self):
        mesh = jax.make_mesh((1,), ("data",))
        params = {"w": jnp.ones([8, 4], jnp.bfloat16)}
        shardings = zero_shardings(master_weights(adamax()), params, mesh, "data")
        specs = jax.tree.map(lambda s: s.spec, shardings)
        expected = jax.sharding.PartitionSpec("data", None)
        assert specs.residual["w"] == specs.inner_state[0].m["w"] == expected

    def test_shapes_are_enough_for_init(self):
        params = narrow_params()
        shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
        optimizer = master_weights(adamax())
        expected = jax.tree.map(jax.typeof, optimizer.init(params))
        assert jax.tree.map(jax.typeof, optimizer.init(shapes)) == expected

    def test_optax_finds_the_parameters_in_the_state(self):
        params = narrow_params()
        optimizer = master_weights(adamax())
        marked = optax.tree.map_params(
            optimizer, lambda _: "like params", optimizer.init(params)
        )
        assert marked.residual["a"] == marked.inner_state[0].m["a"] == "like params"


@pytest.mark.parametrize(
    ("residual_dtype", "error", "message"),
    [
        ("float32", ValueError, "one of int16, int8, got float32"),
        (None, TypeError, "must be one of int16, int8, got None"),
        ("two", TypeError, "got 'two'"),
    ],
)
def test_other_residuals_are_refused(residual_dtype, error, message):
    with pytest.raises(error, match=message):
        master_weights(adamax(), residual_dtype)


def test_errors():
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2)}
    g = params
    optimizer = master_weights(adamax())
    state = optimizer.init(params)
    with pytest.raises(ValueError, match="needs the parameters"):
        optimizer.update(g, state)
    with pytest.raises(TypeError, match="MasterWeightsState"):
        optimizer.update(g, adamax().init(params), params)
    with pytest.raises(
        TypeError, match=r"\['b'\] has dtype bfloat16, .* 32 bits or more"
    ):
        optimizer.update(g, state, params | {"b": jnp.ones(2, jnp.bfloat16)})
    with pytest.raises(
        TypeError, match=r"residual at \['a'\] has dtype int16, .* int8"
    ):
        master_weights(adamax(), "int8").update(g, state, params)
    with pytest.raises(ValueError, match=r"\['a'\] has shape \(3,\), but .* \(4,\)"):
        optimizer.update(g, state, params | {"a": jnp.ones(4, jnp.bfloat16)})
    with pytest.raises(TypeError, match=r"\['a'\] has dtype float8_e4m3fn; .*optax"):
        optimizer.init({"a": jnp.ones(3, jnp.float8_e4m3fn)})
    with pytest.raises(ValueError, match="holds no MasterWeightsState"):
        full_params(params, adamax().init(params))
    with pytest.raises(ValueError, match="holds no MasterWeightsState"):
        set_full_params(params, adamax().init(params), params)
    with pytest.raises(ValueError, match=r"full has shape \(5,\) .* at \['a'\]"):
        set_full_params(params, state, params | {"a": jnp.ones(5)})
    with pytest.raises(ValueError, match=r"dtype complex64 at \['b'\]"):
        set_full_params(params, state, params | {"b": jnp.ones(2, jnp.complex64)})
    for elsewhere in ({"params": params}, {"c": params["a"]}, [params["a"]]):
        with pytest.raises(ValueError, match=r"residual at \['a'\], where there is no"):
            full_params(elsewhere, state)
        with pytest.raises(ValueError, match=r"residual at \['a'\], where there is no"):
            set_full_params(elsewhere, state, elsewhere)
    wider = in_float32(params)
    for function in (full_params, lambda p, s: set_full_params(p, s, p)):
        with pytest.raises(TypeError, match=r"\['a'\] has dtype float32, .*half"):
            function(wider, state)
    with pytest.raises(ValueError, match="parameters have another structure than"):
        optimizer.update(g, state, list(params.values()))
    with pytest.raises(TypeError, match=r"not an array: <function .*eqx\.filter"):
        optimizer.init({"activation": lambda x: x})


@EVERY_RESIDUAL
def test_a_run_that_was_saved_and_resumed_is_the_uninterrupted_one(
    residual_dtype, tmp_path
):
    params = narrow_params()
    gradients = gradients_of(params)
    optimizer = master_weights(adamaxw(1e-3, **STORAGES["two bytes"]), residual_dtype)
    expected = train(optimizer, params, gradients)
    stopped = train(optimizer, params, gradients[:5])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", stopped)
        checkpointer.wait_until_finished()
        # With where to put it, which older versions of Orbax warn of not knowing.
        fresh = jax.tree.map(
            ocp.utils.to_shape_dtype_struct, (params, optimizer.init(params))
        )
        restored = checkpointer.restore(tmp_path / "run", fresh)
    chex.assert_trees_all_equal_dtypes(restored, stopped)
    resumed = train(optimizer, restored[0], gradients[5:], restored[1])
    chex.assert_trees_all_equal(resumed, expected)


def check_a_divided_run():
    """The run of one device, to the bit, with an eighth of the state on each."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    replicated = NamedSharding(mesh, PartitionSpec())
    params = {"w": jnp.full([16, 8], 1.5, jnp.bfloat16), "b": jnp.ones(8, jnp.float16)}
    gradients = gradients_of(params)
    for residual_dtype in ("int16", "int8"):
        optimizer = master_weights(adamax(1e-3), residual_dtype)
        shardings = zero_shardings(optimizer, params, mesh, "data")
        state = jax.jit(optimizer.init, out_shardings=shardings)(params)
        divided = jax.device_put(params, replicated)

        @functools.partial(jax.jit, out_shardings=(replicated, shardings))
        def on_eight(params, state, g, optimizer=optimizer):
            updates, state = optimizer.update(g, state, params)
            return optax.apply_updates(params, updates), state

        update = jax.jit(optimizer.update)
        expected = params, optimizer.init(params)
        for g in gradients:
            updates, new_state = update(g, expected[1], expected[0])
            # Fused with the update, the sum may be rounded otherwise.
            expected = optax.apply_updates(expected[0], updates), new_state
            divided, state = on_eight(divided, state, g)
        chex.assert_trees_all_equal((divided, state), expected)
        # What is set lies where it lay.
        full = jax.tree.map(np.asarray, full_params(divided, state))
        for new, old in zip(
            jax.tree.leaves(set_full_params(divided, state, full)),
            jax.tree.leaves((divided, state)),
            strict=True,
        ):
            np.testing.assert_array_equal(new, old)
            assert new.sharding.is_equivalent_to(old.sharding, old.ndim)
        residual = state.residual["w"]
        assert residual.sharding.spec[0] == "data"
        assert residual.addressable_shards[0].data.nbytes == residual.nbytes / 8


CHECKS = eight_devices.named(check_a_divided_run)


@pytest.mark.parametrize("check", CHECKS)
def test_on_eight_devices(check):
    assert eight_devices.problem(__file__, check, as_users_compile=True) is None


# What a bfloat16 model takes for each parameter, but for the gradient: the parameter,
# what its float32 number needs beside it, and m and u.
BYTES = {
    "master weights and Adam": (optax.adam(1e-3), None, 2 + 4 + 4 + 4),
    "int16, float32 state": (adamax(1e-3), "int16", 2 + 2 + 4 + 4),
    "int16, two bytes": (adamax(1e-3, **STORAGES["two bytes"]), "int16", 2 + 2 + 1 + 1),
    "int8, two bytes": (adamax(1e-3, **STORAGES["two bytes"]), "int8", 2 + 1 + 1 + 1),
    "int8, one byte": (adamax(1e-3, m_dtype="int8", shared_axes=-1), "int8", 2 + 1 + 1),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_per_parameter(name):
    """On the arrays of a transformer; scalars and shared u are less than 1 %."""
    optimizer, residual_dtype, expected = BYTES[name]
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for name, shape in shapes.transformer().items()
    }
    if residual_dtype is None:
        full = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), params
        )
        held = params, full, jax.eval_shape(optimizer.init, full)
    else:
        wrapped = master_weights(optimizer, residual_dtype)
        held = params, jax.eval_shape(wrapped.init, params)
    size = sum(p.size for p in jax.tree.leaves(params))
    nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held))
    assert expected <= nbytes / size < 1.01 * expected


if __name__ == "__main__":
    eight_devices.main(CHECKS)
