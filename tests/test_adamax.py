"""What a training loop may do with the state and the updates."""

import collections
import functools
import itertools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from sequences import EVERY_STORAGE, STORAGES, TWO_BYTES, gradients, long_but

import adamax_jax
from adamax_jax import (
    ScaleByAdamaxState,
    adamax,
    adamaxw,
    lp_adam,
    lp_adamw,
    moments,
    scale_by_adamax,
    scale_by_lp_adam,
)

DTYPES = [
    jnp.float8_e4m3fn,
    jnp.float16,
    jnp.bfloat16,
    jnp.float32,
    jnp.float64,
    jnp.complex64,
    jnp.complex128,
]
FACTORIES = [scale_by_adamax, adamax, adamaxw]


def tree(dtype=jnp.float32):
    """Leaves of every kind: a matrix, a scalar, nothing, an empty array."""
    return {
        "matrix": np.ones([2, 3], dtype),
        "inner": (np.ones([], dtype), None),
        "empty": np.ones([0, 4], dtype),
    }


def types(tree):
    return jax.tree.map(jax.typeof, tree)


def without_narrow_complex(storage, dtype):
    """The storage, less an m_dtype that has no complex counterpart."""
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    return {k: v for k, v in storage.items() if k == "u_dtype" or not is_complex}


def abstractly(function, *args):
    """The types of what a function returns, and of what it would if compiled."""
    return types(jax.eval_shape(function, *args))


@EVERY_STORAGE
@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_types_are_fixed_from_init_on(x64, factory, dtype, storage):
    params = tree(dtype)
    optimizer = factory(**without_narrow_complex(storage, dtype))
    state = optimizer.init(params)
    updates, new_state = abstractly(optimizer.update, params, state, params)
    assert new_state == types(state)
    assert updates == types(params)


DTYPE_AND_STORAGE = list(itertools.product(DTYPES, STORAGES))
# Every dtype in its own storage, and every storage of the usual ones.
SOME_OF_BOTH = [
    (dtype, name)
    for dtype, name in DTYPE_AND_STORAGE
    if name == "own" or dtype in (jnp.bfloat16, jnp.float32)
]


@pytest.mark.parametrize(
    ("dtype", "storage"), long_but(SOME_OF_BOTH, DTYPE_AND_STORAGE)
)
def test_loops_and_branches_keep_the_state(x64, dtype, storage):
    params = tree(dtype)
    optimizer = adamaxw(**without_narrow_complex(STORAGES[storage], dtype))

    def step(state):
        return optimizer.update(params, state, params)[1]

    @jax.jit
    def branch_and_loop():
        state = optimizer.init(params)
        state = jax.lax.cond(state[0].count < 1, step, lambda state: state, state)
        state = jax.lax.scan(lambda s, _: (step(s), None), state, length=3)[0]
        return state, moments(state)

    state, m_and_u = branch_and_loop()
    assert types(state) == types(jax.eval_shape(optimizer.init, params))
    assert int(state[0].count) == 4
    chex.assert_tree_all_finite(m_and_u)


@EVERY_STORAGE
@pytest.mark.parametrize("params", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("grads", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("factory", FACTORIES)
def test_gradients_and_parameters_may_differ_in_dtype(factory, params, grads, storage):
    is_wider = (params, grads) == (jnp.float32, jnp.bfloat16)
    params, grads = tree(params), tree(grads)
    optimizer = factory(**storage)
    state = optimizer.init(params)
    updates, new_state = abstractly(optimizer.update, grads, state, params)
    assert new_state == types(state)
    # Half-precision gradients of float32 parameters do not make their steps coarse.
    assert updates == types(params if is_wider else grads)


@EVERY_STORAGE
def test_types_are_those_of_what_is_computed(storage):
    """What the tests above ask of abstract values holds for arrays."""
    params, grads = tree(jnp.bfloat16), tree(jnp.float32)
    optimizer = adamaxw(**storage)
    state = optimizer.init(params)
    expected = abstractly(optimizer.update, grads, state, params)
    for update in (optimizer.update, jax.jit(optimizer.update)):
        assert types(update(grads, state, params)) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_dtypes_are_the_parameters(x64, dtype):
    """bfloat16 where these have fewer than 32 bits."""
    state = scale_by_adamax().init(jnp.ones(2, dtype))
    is_wide = jnp.finfo(dtype).bits >= 32
    chex.assert_type(state.m, dtype if is_wide else jnp.bfloat16)
    chex.assert_type(state.u, jnp.finfo(dtype).dtype if is_wide else jnp.bfloat16)
    chex.assert_type(state.count, jnp.int32)
    chex.assert_type(state.u_scale, jnp.float32)
    assert not state.m.weak_type
    assert not state.u.weak_type


@pytest.mark.parametrize("m_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("u_dtype", ["float32", "bfloat16", "uint8"])
def test_state_dtypes_as_asked_for(m_dtype, u_dtype):
    state = adamax(m_dtype=m_dtype, u_dtype=u_dtype).init(tree(jnp.bfloat16))[0]
    for leaf in jax.tree.leaves(state.m):
        chex.assert_type(leaf, jnp.dtype(m_dtype))
    for leaf in jax.tree.leaves(state.u):
        chex.assert_type(leaf, jnp.dtype(u_dtype))


def test_state_fields():
    assert ScaleByAdamaxState._fields == ("count", "m", "u", "u_scale")
    state = scale_by_adamax().init(jnp.ones(2))
    assert optax.tree.get(state, "u") is state.u


def test_numpy_and_python_numbers_are_parameters():
    state = scale_by_adamax().init([np.ones(2, np.float32), 1.0])
    _, state = scale_by_adamax().update([np.ones(2, np.float32), -2.0], state)
    chex.assert_trees_all_close(state.u, [jnp.ones(2), jnp.float32(2.0)])


@EVERY_STORAGE
def test_abstract_parameters(storage):
    params = tree(jnp.bfloat16)
    abstract = jax.eval_shape(lambda: params)
    init = adamax(**storage).init
    assert types(init(abstract)) == types(init(params))
    assert types(jax.eval_shape(init, abstract)) == types(init(params))


@pytest.mark.parametrize("empty", [{}, (), [], {"a": {}, "b": None}])
@pytest.mark.parametrize("factory", FACTORIES)
def test_empty_trees(factory, empty):
    optimizer = factory()
    updates, state = optimizer.update(empty, optimizer.init(empty), empty)
    assert updates == empty
    assert int(optax.tree.get(state, "count")) == 1


def test_masked_leaves():
    params = {"a": jnp.ones(2), "index": jnp.arange(3)}
    optimizer = optax.masked(adamaxw(), {"a": True, "index": False})
    state = optimizer.init(params)
    inner = state.inner_state[0]
    assert isinstance(inner.m["index"], optax.MaskedNode)
    gradients = {"a": jnp.ones(2), "index": jnp.zeros(3, int)}
    updates, new_state = jax.jit(optimizer.update)(gradients, state, params)
    assert types(new_state) == types(state)
    alone, _ = adamaxw().update(
        {"a": jnp.ones(2)}, adamaxw().init({"a": jnp.ones(2)}), {"a": jnp.ones(2)}
    )
    chex.assert_trees_all_close(updates["a"], alone["a"])
    chex.assert_trees_all_equal(updates["index"], gradients["index"])


@pytest.mark.parametrize("factory", FACTORIES)
def test_extra_arguments_are_accepted(factory):
    optimizer = factory()
    assert isinstance(optimizer, optax.GradientTransformationExtraArgs)
    params = jnp.ones(2)
    state = optimizer.init(params)
    expected = optimizer.update(params, state, params)
    extra = optimizer.update(params, state, params=params, value=1.0, key="any")
    chex.assert_trees_all_equal(extra, expected)


@EVERY_STORAGE
def test_one_trace_for_all_steps(storage):
    chex.clear_trace_counter()
    optimizer = adamaxw(optax.linear_schedule(0.1, 0.0, 10), **storage)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state):
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    params = tree()
    state = optimizer.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert int(state[0].count) == 3


@EVERY_STORAGE
def test_jitted_equals_unjitted(storage):
    g = np.float32(gradients(steps=20))
    optimizer = adamax(**storage)
    compiled = jax.jit(optimizer.update)
    plain = jitted = optimizer.init(g[0])
    for g_t in g:
        update, plain = optimizer.update(g_t, plain)
        jitted_update, jitted = compiled(g_t, jitted)
        chex.assert_trees_all_close(jitted_update, update, rtol=1e-6)
    chex.assert_trees_all_equal(jitted, plain)


@pytest.mark.parametrize("storage", long_but([TWO_BYTES], STORAGES.values()))
def test_vmap_over_a_population(storage):
    """Each member trains as if alone, each at its own decay rates."""
    g = np.float32(gradients(steps=8, size=6)).reshape(4, 2, 6)
    b1 = np.float32([0.0, 0.5, 0.9, 0.99])

    def run(b1, g):
        optimizer = scale_by_adamax(b1, b2=1 - (1 - b1) / 4, **storage)
        state = optimizer.init(g[0])
        _, state = optimizer.update(g[0], state)
        update, state = optimizer.update(g[1], state)
        return update, moments(state)

    together = jax.device_get(jax.jit(jax.vmap(run))(b1, g))
    compiled = jax.jit(run)
    for i in range(4):
        update, m_and_u = jax.tree.map(lambda x, i=i: x[i], together)
        update_alone, alone = compiled(b1[i], g[i])
        chex.assert_trees_all_close(update, update_alone, rtol=1e-6)
        chex.assert_trees_all_close(m_and_u, alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("eps_inside", [True, False])
@pytest.mark.parametrize(
    ("dtype", "storage"),
    [
        *((jnp.float32, storage) for storage in STORAGES.values()),
        (jnp.complex64, STORAGES["own"]),
    ],
    ids=[*STORAGES, "complex"],
)
def test_meta_gradients_are_finite_at_zero_gradients(dtype, storage, eps_inside):
    def loss(g, b1, b2, eps):
        optimizer = adamax(0.1, b1, b2, eps, eps_inside=eps_inside, **storage)
        state = optimizer.init(g)
        update, state = optimizer.update(g, state)
        update, _ = optimizer.update(2 * g, state)
        return jnp.sum(jnp.real(update))

    g = np.array([0.0, 1.0, -2.0], dtype)
    derivatives = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    for eps in (0.0, 1e-8):
        chex.assert_tree_all_finite(derivatives(g, 0.9, 0.999, eps))


def test_meta_gradient_at_b1_zero():
    def loss(b1):
        optimizer = scale_by_adamax(b1, 0.9, eps=0.0)
        _, state = optimizer.update(jnp.ones(1), optimizer.init(jnp.ones(1)))
        return optimizer.update(jnp.full(1, 2.0), state)[0].sum()

    # m_2 / (1 - b1^2) is (b1 + 2) / (1 + b1) and u_2 is 2: the slope at 0 is -1/2.
    assert float(jax.jit(jax.grad(loss))(0.0)) == pytest.approx(-0.5)


def test_meta_gradient_through_a_step_is_right():
    @jax.jit
    def loss(b1):
        optimizer = adamax(0.1, b1, 0.99)
        state = optimizer.init(jnp.zeros(3))
        x = jnp.array([1.0, -2.0, 0.5])
        for _ in range(3):
            update, state = optimizer.update(2 * x, state)
            x = x + update
        return jnp.sum(x**2)

    slope = (loss(0.9 + 1e-2) - loss(0.9 - 1e-2)) / 2e-2
    assert float(jax.jit(jax.grad(loss))(0.9)) == pytest.approx(float(slope), rel=1e-2)


@EVERY_STORAGE
def test_donation(storage):
    """m and u are different buffers, also where init is compiled."""
    params = tree()
    optimizer = adamax(**storage)
    step = jax.jit(optimizer.update, donate_argnums=1)
    for init in (optimizer.init, jax.jit(optimizer.init)):
        state = init(params)
        _, state = step(params, state)
        _, state = step(params, state)
        assert int(state[0].count) == 2


@EVERY_STORAGE
def test_state_can_be_pickled(storage):
    optimizer = adamaxw(optax.linear_schedule(0.1, 0.0, 10), **storage)
    params = tree()
    _, state = optimizer.update(params, optimizer.init(params), params)
    restored = pickle.loads(pickle.dumps(state))
    chex.assert_trees_all_equal(restored, state)
    continued = optimizer.update(params, state, params)
    chex.assert_trees_all_equal(optimizer.update(params, restored, params), continued)


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [
        (scale_by_adamax(), "ScaleByAdamaxState"),
        (scale_by_lp_adam(p=3), "ScaleByLpAdamState"),
    ],
)
def test_pickles_name_the_package(optimizer, name):
    """Not the file of the class, so that they load after it has moved."""
    state = optimizer.init(tree())
    pickled = pickle.dumps(state, protocol=0)
    assert f"cadamax_jax\n{name}\n".encode() in pickled
    restored = pickle.loads(pickled)
    assert type(restored) is type(state)
    chex.assert_trees_all_equal(restored, state)


def test_map_params_finds_m_and_u():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    optimizer = adamax()
    state = optimizer.init(params)
    marked = optax.tree.map_params(
        optimizer,
        lambda leaf: "m or u",
        state,
        transform_non_params=lambda leaf: "other",
    )
    both = {"a": "m or u", "b": "m or u"}
    assert marked[0] == ScaleByAdamaxState("other", both, both, "other")


@pytest.mark.parametrize("factory", FACTORIES)
def test_injected_hyperparameters(factory):
    """Traced hyperparameters are those given, to the rounding of float32."""
    params = tree()
    plain = factory()
    injected = optax.inject_hyperparams(factory)()
    plain_state, injected_state = plain.init(params), injected.init(params)
    plain_update, injected_update = map(jax.jit, (plain.update, injected.update))
    for _ in range(20):
        updates, plain_state = plain_update(params, plain_state, params)
        injected_updates, injected_state = injected_update(
            params, injected_state, params
        )
        chex.assert_trees_all_close(injected_updates, updates, rtol=3e-6)
    chex.assert_trees_all_close(injected_state.inner_state, plain_state, rtol=3e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_injected_schedules_keep_the_gradients_dtype(dtype):
    optimizer = optax.inject_hyperparams(adamaxw, hyperparam_dtype=jnp.float32)(
        learning_rate=optax.linear_schedule(0.1, 0.0, 10),
        b1=optax.linear_schedule(0.8, 0.95, 10),
        weight_decay=optax.linear_schedule(0.1, 0.0, 10),
    )
    params = tree(dtype)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(3):
        updates, new_state = update(params, state, params)
        assert types(updates) == types(params)
        assert types(new_state) == types(state)
        state = new_state


def test_double_precision_keeps_float32_leaves(x64):
    params = {"single": np.ones(2, np.float32), "double": np.ones(2)}
    optimizer = adamaxw(jnp.float32(0.1), weight_decay=np.float64(0.1))
    state = optimizer.init(params)
    updates, new_state = optimizer.update(params, state, params)
    assert types(updates) == types(params)
    assert types(new_state) == types(state)


@pytest.mark.parametrize("factory", [adamax, adamaxw])
def test_the_default_learning_rate_is_that_of_the_paper(factory):
    params = jnp.array([1.0, -2.0])
    steps = [
        optimizer.update(params, optimizer.init(params), params)[0]
        for optimizer in (factory(), factory(0.002))
    ]
    chex.assert_trees_all_equal(*steps)


def test_version():
    assert adamax_jax.__version__.count(".") == 2


EVERY_OPTIMIZER = pytest.mark.parametrize(
    "factory",
    [
        adamax,
        adamaxw,
        functools.partial(lp_adam, p=2),
        functools.partial(lp_adamw, p=2),
    ],
)


@EVERY_OPTIMIZER
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_a_float32_parameter_keeps_steps_of_float32(factory, dtype):
    """At a learning rate that is 0 in float16, and a step that float16 would round."""
    params, g = jnp.zeros(3), jnp.array([1.0, -2.0, 0.0], dtype)
    for rate in (2e-8, 1.2345e-3):
        optimizer = factory(rate, eps=0.0)
        updates, state = optimizer.update(g, optimizer.init(params), params)
        chex.assert_type(updates, jnp.float32)
        np.testing.assert_allclose(updates, [-rate, rate, 0], rtol=1e-6)
        if factory in (adamax, EVERY_OPTIMIZER.args[1][2]):
            # Not known, the parameters cannot tell.
            updates, _ = optimizer.update(g, optimizer.init(params))
            chex.assert_type(updates, dtype)
        chex.assert_type(state[0].m, jnp.float32)


@EVERY_OPTIMIZER
def test_the_dtype_of_a_step_is_found_for_each_leaf(factory):
    """Also where parameters or gradients are None, as in an Equinox model's halves."""
    params = {
        "a": [jnp.ones(2), None, jnp.ones(2, jnp.bfloat16)],
        "b": {"c": jnp.ones(2), "d": jnp.ones([])},
        "e": jnp.ones(2, jnp.float16),
    }
    half = jnp.ones(2, jnp.float16)
    g = {
        "a": [half, None, half.astype(jnp.bfloat16)],
        "b": None,
        "e": jnp.ones(2, jnp.float32),
    }
    optimizer = factory(0.1)
    for update in (optimizer.update, jax.jit(optimizer.update)):
        updates, state = update(g, optimizer.init(params), params)
        dtypes = jax.tree.map(lambda x: x.dtype.name, updates)
        expected = {"a": ["float32", None, "bfloat16"], "b": None, "e": "float32"}
        assert dtypes == expected
        assert types(state) == types(optimizer.init(params))


def test_functions_in_the_parameters_are_passed_over():
    """As in a whole Equinox model, whose arrays alone init was given."""
    params = {"w": jnp.ones(2), "activation": jax.nn.relu}
    arrays = params | {"activation": None}
    g = {"w": jnp.ones(2, jnp.float16), "activation": None}
    optimizer = adamax(0.1)
    updates, _ = optimizer.update(g, optimizer.init(arrays), params)
    assert updates["activation"] is None
    np.testing.assert_allclose(updates["w"], [-0.1, -0.1], rtol=1e-6)


class TestEndsOfTheRange:
    """What is finite gives a finite step of the right size, and a finite state."""

    LARGEST = float(jnp.finfo(jnp.float32).max)
    EVERY = (
        {},
        {"shared_axes": -1},
        {"m_dtype": "bfloat16", "u_dtype": "bfloat16"},
        {"m_dtype": "bfloat16", "u_dtype": "uint8"},
        {"m_dtype": "int8", "u_dtype": "uint8"},
        {"m_dtype": "int8", "u_dtype": "float32", "shared_axes": -1},
    )

    def assert_first_steps(self, optimizer, g, expected):
        """Constant gradients: each step is the sign, whatever the size."""
        state = optimizer.init(np.zeros_like(g, dtype_of_state(g)))
        # How far apart two numbers of m are where m/u is 0.1.
        rtol = {"int8": 0.04}.get(state.m.dtype.name, 0.01)
        for jit in (False, True):
            update = jax.jit(optimizer.update) if jit else optimizer.update
            state = optimizer.init(np.zeros_like(g, dtype_of_state(g)))
            for _ in range(3):
                step, state = update(g, state)
                np.testing.assert_allclose(step, expected, rtol=rtol)
                floats = [np.complex128(x) for x in jax.tree.leaves(state)]
                chex.assert_tree_all_finite(floats)

    @pytest.mark.parametrize("nesterov", [False, True])
    @pytest.mark.parametrize("options", EVERY)
    def test_the_largest_gradients(self, options, nesterov):
        sizes = np.float32([self.LARGEST, 3.3e38, 2.0**126, 2.0**126.5])
        g = np.stack([sizes, -sizes], axis=1)
        optimizer = scale_by_adamax(nesterov=nesterov, **options)
        if not nesterov:
            self.assert_first_steps(optimizer, g, np.sign(g))
        update = jax.jit(optimizer.update)
        step, state = update(g, optimizer.init(g))
        assert np.all(np.isfinite(step)) and np.all(np.sign(step) == np.sign(g))
        # Without any gradient no step grows.
        for _ in range(3):
            later, state = update(0 * g, state)
            assert np.all(np.abs(later) < np.abs(step))

    @pytest.mark.parametrize("p", [1.0, 2.0, 3.5, 64.0, np.inf])
    def test_the_largest_gradients_of_the_family(self, p):
        g = np.float32([self.LARGEST, -self.LARGEST, 3.3e38, 1.0])
        for eps_inside in (False, True):
            optimizer = scale_by_lp_adam(p, eps_inside=eps_inside)
            self.assert_first_steps(optimizer, g, np.sign(g))

    @pytest.mark.parametrize(
        "optimizer",
        [scale_by_adamax(), scale_by_adamax(u_dtype="uint8"), scale_by_lp_adam(3.0)],
    )
    def test_a_modulus_that_overflows(self, optimizer):
        """Both parts are finite; the direction is kept."""
        g = np.complex64([3.3e38 + 3.3e38j, 1e38 - 3e38j, 3e38j])
        wide = np.asarray(g, np.complex128)
        self.assert_first_steps(optimizer, g, wide / np.abs(wide))

    def test_a_shared_u_beyond_its_reciprocal(self):
        """A division by a broadcast u becomes a product: 1 / 2^127 is flushed to 0."""
        g = np.float32([[2.0**127, 2.0**120], [2.0**126, -(2.0**125)]])
        optimizer = scale_by_adamax(shared_axes=-1)
        expected = [[1, 2.0**-7], [1, -0.5]]
        self.assert_first_steps(optimizer, g, expected)

    def test_bfloat16_u_is_not_halved_without_its_mean(self):
        """Its last step was twice the right one."""
        g = np.float64([3.3e38, -3.3e38])
        # Close to the largest number, and divided by a scale that is close to a half.
        sequence = [0 * g] * 682 + [g] * 10 + [0 * g] * 3
        optimizer = scale_by_adamax(u_dtype="bfloat16", m_dtype="float32")
        update, state = jax.jit(optimizer.update), optimizer.init(np.zeros(2, "f"))
        for g_t, expected in zip(sequence, reference.adamax(sequence), strict=True):
            step, state = update(np.float32(g_t), state)
            np.testing.assert_allclose(step, expected.update, rtol=0.01)

    @pytest.mark.parametrize("options", EVERY)
    def test_float64_gradients_beyond_float32(self, x64, options):
        """What is outside counts as the end: the step is 1."""
        g = np.array([[1e39, 1e300], [-1e39, -1e308]])
        self.assert_first_steps(scale_by_adamax(**options), g, np.sign(g))

    @pytest.mark.parametrize("p", [1.0, 2.0, np.inf])
    def test_float64_gradients_of_the_family(self, x64, p):
        g = np.array([1e39, -1e300])
        self.assert_first_steps(scale_by_lp_adam(p), g, np.sign(g))

    @pytest.mark.parametrize(
        "optimizer",
        [scale_by_adamax(), scale_by_adamax(u_dtype="uint8"), scale_by_lp_adam(2.0)],
    )
    def test_complex128_gradients_beyond_complex64(self, x64, optimizer):
        g = np.array([1e39 + 1e39j, -1e300j, 1e308 - 1e308j])
        expected = np.array([1 + 1j, -np.sqrt(2) * 1j, 1 - 1j]) / np.sqrt(2)
        self.assert_first_steps(optimizer, g, expected)


def dtype_of_state(g):
    """The state of parameters in single precision, whatever the gradients."""
    return jnp.complex64 if np.iscomplexobj(g) else jnp.float32


@pytest.fixture
def explicit_x64():
    """float64 where it is asked for by name, in spite of x64 being off."""
    if not hasattr(jax.config, "jax_explicit_x64_dtypes"):
        pytest.skip("this JAX casts float64 to float32 wherever x64 is off")
    before = jax.config.jax_explicit_x64_dtypes
    jax.config.update("jax_explicit_x64_dtypes", "allow")
    yield
    jax.config.update("jax_explicit_x64_dtypes", before)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "optimizer",
    [scale_by_adamax(), scale_by_lp_adam(jnp.inf, eps_inside=True)],
    ids=["adamax", "family"],
)
def test_float64_where_x64_is_off(explicit_x64, optimizer, jit):
    """Arithmetic is in float64, that of the scalars included, from the first step."""
    sequence = gradients(steps=30, size=8)
    update = jax.jit(optimizer.update) if jit else optimizer.update
    state = optimizer.init(jnp.zeros(8, jnp.float64))
    for g, expected in zip(sequence, reference.adamax(sequence), strict=True):
        step, state = update(jnp.asarray(g, jnp.float64), state)
        chex.assert_type([step, state.m, state.u], jnp.float64)
        np.testing.assert_allclose(step, expected.update, rtol=1e-12)
        np.testing.assert_allclose(state.u, expected.u, rtol=1e-14)


@pytest.mark.parametrize("m_dtype", ["float32", "bfloat16", "int8"])
def test_constant_gradients_beyond_what_u_holds(m_dtype):
    """Count as the end of its range, for m as for u: steps of 1 at every age."""
    g = np.float32([1e11, -40_000.0, 3e38])
    optimizer = scale_by_adamax(m_dtype=m_dtype, u_dtype="uint8")

    def step(state, _):
        updates, state = optimizer.update(g, state)
        return state, updates

    _, steps = jax.lax.scan(step, optimizer.init(g), length=2000)
    expected = np.broadcast_to(np.sign(g), steps.shape)
    # The rounding of u, and that of m.
    of_m = 0.1 if m_dtype == "int8" else 0.05
    np.testing.assert_allclose(steps, expected, rtol=1 / 8 + of_m)


def test_gradients_that_are_just_finite_are_not_cut_off_in_float32():
    """The second step of a real or a complex leaf, whose modulus is finite."""
    sequence = [np.float64([3e38]), np.float64([8e37])]
    *_, expected = reference.adamax(sequence)
    for dtype in (jnp.float32, jnp.complex64):
        for optimizer in (scale_by_adamax(), scale_by_lp_adam(jnp.inf)):
            state = optimizer.init(np.zeros(1, dtype))
            update = jax.jit(optimizer.update)
            for g in sequence:
                step, state = update(np.asarray(g, dtype), state)
            np.testing.assert_allclose(np.real(step), expected.update, rtol=1e-5)


@EVERY_OPTIMIZER
def test_a_float64_parameter_keeps_steps_of_float64(x64, factory):
    params, g = jnp.zeros(3), jnp.ones(3, jnp.float32)
    optimizer = factory(1e-3)
    updates, _ = optimizer.update(g, optimizer.init(params), params)
    chex.assert_type(updates, jnp.float64)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_parameters_in_other_containers_are_not_looked_at(dtype):
    """The arithmetic of AdaMax needs none."""
    params = collections.OrderedDict(b=jnp.ones(2))
    g = {"b": jnp.ones(2, dtype)}
    optimizer = adamax(0.1)
    updates, _ = optimizer.update(g, optimizer.init({"b": jnp.ones(2)}), params)
    chex.assert_type(updates["b"], dtype)


@pytest.mark.parametrize("rate", [0.1, lambda count: 0.1])
def test_the_learning_rate_where_x64_is_off(explicit_x64, rate):
    params = jnp.zeros(2, jnp.float64)
    optimizer = adamaxw(rate, eps=0.0, weight_decay=0.0)
    updates, _ = optimizer.update(params + 1, optimizer.init(params), params)
    exact = 1e-15 if not callable(rate) else 1e-8
    np.testing.assert_allclose(updates, -0.1, rtol=exact)


def test_diagnosis_where_x64_is_off(explicit_x64):
    g = jnp.asarray(np.array([1e-300, 1.0]), jnp.float64)
    optimizer = scale_by_adamax(eps=0.0)
    _, state = optimizer.update(g, optimizer.init(g))
    total = jax.jit(lambda state: adamax_jax.diagnose(state, eps=0.0))(state).total
    np.testing.assert_allclose(total["decades"], 300, rtol=1e-6)
