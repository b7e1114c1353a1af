"""The trainers that people use, driving the optimizer as they drive Optax's.

Each trains a perceptron on the digits of scikit-learn, or a problem of its own kind,
with the state in float32 and in two bytes; where a trainer has been seen with both, its
other ways of training in two bytes. Most are held to the same training written by hand,
in plain JAX and Optax: the losses, parameters and state are those, to the bit.
"""

import functools
import itertools
import math
import warnings
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, PartitionSpec
from sklearn.datasets import load_digits
from test_readme import example, page, run
from versions import as_pure, installed, set_mesh

from adamax_jax import adamax, adamaxw, convert_state, moments

FULL = {"m_dtype": "float32", "u_dtype": "float32"}
TWO_BYTES = {"m_dtype": "int8", "u_dtype": "uint8"}
EVERY_STORAGE = pytest.mark.parametrize(
    "storage", [FULL, TWO_BYTES], ids=["float32", "two bytes"]
)
STEPS = 60
# Guessing costs log(10) = 2.3 nats: what is left if the optimizer does nothing.
ENOUGH = 0.3


@pytest.fixture(scope="module")
def digits():
    """A third of them, which is enough to tell training from none."""
    images, labels = load_digits(return_X_y=True)
    return jnp.asarray(images[::3] / 16, jnp.float32), jnp.asarray(labels[::3])


@pytest.fixture
def flax():
    """Flax broadcasts biases."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def as_it_comes():
    """For software that mixes dtypes and ranks in arithmetic of its own."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def equinox():
    return installed("equinox")


@pytest.fixture
def haiku():
    return installed("haiku")


@pytest.fixture
def optimistix():
    return installed("optimistix")


@pytest.fixture
def numpyro():
    return installed("numpyro")


@pytest.fixture
def keras(monkeypatch, tmp_path):
    """Keras on JAX, without the settings in the user's home directory."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    keras = installed("keras")
    assert keras.backend.backend() == "jax"
    # It broadcasts biases.
    with jax.numpy_rank_promotion("allow"):
        yield keras


@pytest.fixture(scope="module")
def flowjax():
    """With what it imports of other libraries' deprecated names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        installed("flowjax")
        from flowjax import distributions, flows, train
    return SimpleNamespace(distributions=distributions, flows=flows, train=train)


@pytest.fixture(scope="module")
def netket():
    """It switches double precision on for the whole process, which is taken back."""
    before = jax.config.jax_enable_x64
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = installed("netket")
    jax.config.update("jax_enable_x64", before)
    return package


@pytest.fixture(scope="module")
def haliax():
    """A release that runs with this JAX."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return installed("haliax")


@pytest.fixture(scope="module")
def tunix():
    """Not in the extra, since it brings more than a gigabyte of other packages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        installed("tunix", "pip install google-tunix")
        from tunix.sft import peft_trainer
    return peft_trainer


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def types(tree):
    return jax.tree.map(jax.typeof, tree)


def counted(function):
    """The function, counting its calls: where it is jitted, its traces."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        call.traces += 1
        return function(*args, **kwargs)

    call.traces = 0
    return call


def train(step, state, steps=STEPS):
    """The loss of each step, and the last state."""
    losses = []
    for _ in range(steps):
        state, loss = step(state)
        losses.append(float(loss))
    return losses, state


def by_hand(cost, params, optimizer, *fixed, steps=STEPS):
    """Training in plain JAX and Optax: the losses, the parameters and the state."""

    @jax.jit
    def step(carry, *fixed):
        params, state = carry
        loss, gradients = jax.value_and_grad(cost)(params, *fixed)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), loss

    losses, (params, state) = train(
        lambda carry: step(carry, *fixed), (params, optimizer.init(params)), steps
    )
    return losses, params, state


class LinenMLP(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(10)(linen.relu(linen.Dense(32)(x)))


@EVERY_STORAGE
def test_flax_linen_train_state(flax, digits, storage):
    x, y = digits
    model = LinenMLP()
    params = model.init(jax.random.key(0), x)["params"]
    optimizer = adamax(0.01, **storage)

    def cost(params):
        return cross_entropy(model.apply({"params": params}, x), y)

    @counted
    def step(state):
        loss, gradients = jax.value_and_grad(cost)(state.params)
        return state.apply_gradients(grads=gradients), loss

    state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)
    before = types(state.opt_state)
    losses, state = train(jax.jit(step), state)
    assert losses[-1] < ENOUGH
    assert step.traces == 1
    assert types(state.opt_state) == before
    assert int(state.opt_state[0].count) == int(state.step) == STEPS
    chex.assert_trees_all_equal(
        (losses, state.params, state.opt_state), by_hand(cost, params, optimizer)
    )


class LinenBatchNorm(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(32)(x))
        return linen.Dense(10)(linen.relu(x))


class TrainStateWithBatchStats(TrainState):
    batch_stats: dict


def test_flax_linen_train_state_with_batch_stats(flax, digits):
    x, y = digits
    model = LinenBatchNorm()
    variables = model.init(jax.random.key(0), x, train=False)

    @counted
    def step(state):
        def cost(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, changed = state.apply_fn(
                variables, x, train=True, mutable=["batch_stats"]
            )
            return cross_entropy(logits, y), changed["batch_stats"]

        gradient = jax.value_and_grad(cost, has_aux=True)
        (loss, batch_stats), gradients = gradient(state.params)
        return state.apply_gradients(grads=gradients, batch_stats=batch_stats), loss

    state = TrainStateWithBatchStats.create(
        apply_fn=model.apply, tx=adamax(0.01, **TWO_BYTES), **variables
    )
    before = types(state.opt_state)
    losses, state = train(jax.jit(step), state)
    assert losses[-1] < ENOUGH
    assert step.traces == 1
    assert types(state.opt_state) == before
    # The running averages start at mean 0 and variance 1 and have gone half of the way,
    # 1 - 0.99^60: without them the loss is higher, but far from that of guessing.
    trained = {"params": state.params, "batch_stats": state.batch_stats}
    assert cross_entropy(model.apply(trained, x, train=False), y) < 1.0


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 32, rngs=rngs)
        self.output = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.output(nnx.relu(self.hidden(x)))


def nnx_step(digits, wrt=nnx.Param):
    """A step that counts its traces."""
    x, y = digits

    def cost(model):
        return cross_entropy(model(x), y)

    @counted
    def step(model, optimizer):
        gradient = nnx.value_and_grad(cost, argnums=nnx.DiffState(0, wrt))
        loss, gradients = gradient(model)
        optimizer.update(model, gradients)
        return loss

    return step


@EVERY_STORAGE
def test_flax_nnx_optimizer(flax, digits, storage):
    x, y = digits
    model = MLP(nnx.Rngs(0))
    graph, params = nnx.split(nnx.clone(model))
    tx = adamax(0.01, **storage)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = types(as_pure(optimizer.opt_state))
    step = nnx_step(digits)
    compiled = nnx.jit(step)
    losses = [float(compiled(model, optimizer)) for _ in range(STEPS)]
    assert losses[-1] < ENOUGH
    assert step.traces == 1
    after = as_pure(optimizer.opt_state)
    assert types(after) == before
    assert int(after[0].count) == int(optimizer.step[...]) == STEPS

    def cost(params):
        return cross_entropy(nnx.merge(graph, params)(x), y)

    chex.assert_trees_all_equal(
        (losses, as_pure(nnx.state(model)), after),
        by_hand(cost, as_pure(params), tx),
    )
    # moments reads through the variables in which NNX wraps the state.
    m, u = as_pure(moments(optimizer.opt_state))
    chex.assert_trees_all_equal((m, u), moments(after))
    assert all(jnp.all(x > 0) for x in jax.tree.leaves(u))


def test_flax_nnx_optimizer_as_plain_trees(flax, digits):
    """Split and merged at every step, under jax.jit: no trace more."""
    model = MLP(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, adamax(0.01, **TWO_BYTES), wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))
    step = nnx_step(digits)

    @jax.jit
    def compiled(state):
        model, optimizer = nnx.merge(graph, state)
        loss = step(model, optimizer)
        return nnx.state((model, optimizer)), loss

    losses, after = train(compiled, state)
    assert losses[-1] < ENOUGH
    assert step.traces == 1
    chex.assert_trees_all_equal_structs(after, state)
    assert jax.tree.leaves(types(after)) == jax.tree.leaves(types(state))


def test_flax_nnx_model_and_optimizer(flax, digits):
    x, y = digits
    both = nnx.ModelAndOptimizer(MLP(nnx.Rngs(0)), adamax(0.01, **TWO_BYTES))
    before = types(as_pure(both.opt_state))

    def cost(model):
        return cross_entropy(model(x), y)

    @counted
    def step(both):
        loss, gradients = nnx.value_and_grad(cost)(both.model)
        both.update(gradients)
        return loss

    compiled = nnx.jit(step)
    losses = [float(compiled(both)) for _ in range(STEPS)]
    assert losses[-1] < ENOUGH
    assert step.traces == 1
    assert types(as_pure(both.opt_state)) == before


class Adapted(nnx.Module):
    """A layer with an adapter of low rank, and a layer without."""

    def __init__(self, rngs):
        hidden = nnx.Linear(64, 32, rngs=rngs)
        self.hidden = nnx.LoRA(64, 8, 32, base_module=hidden, rngs=rngs)
        self.output = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.output(nnx.relu(self.hidden(x)))


@pytest.mark.parametrize(
    ("wrt", "enough"),
    [
        (nnx.LoRAParam, 0.6),
        ((nnx.Param, nnx.LoRAParam), ENOUGH),
        (nnx.PathContains("output"), 1.6),
    ],
    ids=["adapter", "all", "one layer"],
)
def test_flax_nnx_optimizer_trains_what_wrt_says(flax, digits, wrt, enough):
    x, y = digits
    model = Adapted(nnx.Rngs(0))
    tx = adamax(0.03, **TWO_BYTES)
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)
    graph, *parts = nnx.split(nnx.clone(model), wrt, ...)
    chosen, rest = as_pure(parts)
    before = types(as_pure(optimizer.opt_state))
    step = nnx_step(digits, wrt)
    compiled = nnx.jit(step)
    losses = [float(compiled(model, optimizer)) for _ in range(STEPS)]
    assert losses[-1] < enough
    assert step.traces == 1
    after = as_pure(optimizer.opt_state)
    assert types(after) == before

    def cost(chosen, rest):
        return cross_entropy(nnx.merge(graph, chosen, rest)(x), y)

    trained, untouched = as_pure(nnx.state(model, wrt, ...))
    chex.assert_trees_all_equal(
        (losses, trained, after), by_hand(cost, chosen, tx, rest)
    )
    chex.assert_trees_all_equal(untouched, rest)


@pytest.mark.skipif(
    not hasattr(nnx, "List"), reason="Flax before 0.12 has other names for it"
)
def test_flax_nnx_state_has_the_parameters_sharding(flax):
    names = ("a", "b")
    mesh = jax.make_mesh((1, 1), names, axis_types=(AxisType.Auto,) * 2)
    with set_mesh(mesh):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), sharding=names)
        model = nnx.Linear(2, 3, rngs=nnx.Rngs(0), kernel_init=init, use_bias=False)
        optimizer = nnx.Optimizer(model, adamax(0.1, **TWO_BYTES), wrt=nnx.Param)
        for _ in range(2):
            state = nnx.state(optimizer)["opt_state"][0]
            specs = nnx.get_partition_spec(state)
            for key in ("m", "u"):
                assert specs[key]["kernel"].get_value() == PartitionSpec(*names)
            for key in ("count", "u_scale"):
                assert specs[key].get_value() == PartitionSpec()
            optimizer.update(model, nnx.state(model))


@pytest.mark.long
def test_flax_nnx_training_continues_through_conversions(flax, digits):
    """There and back again: the losses stay those of float32."""
    x, y = digits
    full, two_bytes = (adamax(0.01, **storage) for storage in (FULL, TWO_BYTES))
    step = nnx_step(digits)
    compiled = nnx.jit(step)

    def run(model, optimizer, steps):
        return [float(compiled(model, optimizer)) for _ in range(steps)]

    model = MLP(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, full, wrt=nnx.Param)
    converted = run(model, optimizer, STEPS)
    for tx, storage in ((two_bytes, TWO_BYTES), (full, FULL)):
        state = convert_state(optimizer.opt_state, **storage)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        optimizer.opt_state = state
        converted += run(model, optimizer, STEPS)

    graph, params = nnx.split(MLP(nnx.Rngs(0)))
    straight, _, _ = by_hand(
        lambda params: cross_entropy(nnx.merge(graph, params)(x), y),
        as_pure(params),
        full,
        steps=3 * STEPS,
    )
    # One for each storage: the state that comes back has its old types.
    assert step.traces == 2
    # The first loss after the conversion is still that of unconverted steps.
    assert converted[: STEPS + 1] == straight[: STEPS + 1]
    # Each step is then rounded, by a ninth at worst, in 2410 weights independently.
    # Of that, 1.8 % was seen in the losses.
    np.testing.assert_allclose(converted, straight, rtol=0.05)
    assert converted[-1] < 0.05 * converted[0]


@EVERY_STORAGE
@pytest.mark.parametrize("passed", ["filtered", "whole"])
def test_equinox(equinox, digits, passed, storage):
    """Leaves of None where the model has no array, and a model with functions in it."""
    x, y = digits
    model = equinox.nn.MLP(64, 10, 32, depth=1, key=jax.random.key(0))
    optimizer = adamaxw(0.01, **storage)
    params, static = equinox.partition(model, equinox.is_inexact_array)

    def cost(model):
        return cross_entropy(jax.vmap(model)(x), y)

    @counted
    def step(carry):
        model, state = carry
        loss, gradients = equinox.filter_value_and_grad(cost)(model)
        whole = passed == "whole"
        given = model if whole else equinox.filter(model, equinox.is_inexact_array)
        updates, state = optimizer.update(gradients, state, given)
        return (equinox.apply_updates(model, updates), state), loss

    with pytest.raises(TypeError, match=r"eqx\.filter"):
        optimizer.init(model)
    before = optimizer.init(params)
    losses, (model, after) = train(equinox.filter_jit(step), (model, before))
    assert losses[-1] < ENOUGH
    assert step.traces == 1
    assert types(after) == types(before)
    chex.assert_trees_all_equal(
        (losses, equinox.filter(model, equinox.is_inexact_array), after),
        by_hand(lambda p: cost(equinox.combine(p, static)), params, optimizer),
    )


@EVERY_STORAGE
def test_equinox_with_all_arrays_of_a_model(equinox, storage):
    """``eqx.is_array`` lets integers, booleans and keys through, as GPJax does."""

    class Model(equinox.Module):
        weight: jax.Array
        index: jax.Array
        mask: jax.Array
        key: jax.Array

        def __call__(self):
            return jnp.sum(jnp.where(self.mask, self.weight[self.index] - 3, 0) ** 2)

    model = Model(
        jnp.zeros(4),
        jnp.array([3, 0]),
        jnp.array([True, False]),
        jax.random.key(0),
    )
    optimizer = adamaxw(0.1, weight_decay=0.0, **storage)
    state = optimizer.init(equinox.filter(model, equinox.is_array))

    @equinox.filter_jit
    def step(model, state):
        gradients = equinox.filter_grad(lambda model: model())(model)
        updates, state = optimizer.update(
            gradients, state, equinox.filter(model, equinox.is_array)
        )
        return equinox.apply_updates(model, updates), state

    for _ in range(60):
        model, state = step(model, state)
    np.testing.assert_allclose(model.weight, [0, 0, 0, 3], atol=0.3)
    assert model.index.tolist() == [3, 0]


def perceptron(weights, x):
    w1, b1, w2, b2 = weights
    return jnp.maximum(x @ w1 + b1, 0) @ w2 + b2


@EVERY_STORAGE
def test_haiku(haiku, digits, storage):
    x, y = digits

    @haiku.transform
    def cost(x, y):
        return cross_entropy(haiku.nets.MLP([32, 10])(x), y)

    optimizer = adamax(0.01, **storage)
    params = jax.jit(cost.init)(jax.random.key(0), x, y)

    @counted
    def step(carry):
        params, state = carry
        loss, gradients = jax.value_and_grad(cost.apply)(params, None, x, y)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(params, updates), state), loss

    before = optimizer.init(params)
    losses, (_, after) = train(jax.jit(step), (params, before))
    assert losses[-1] < ENOUGH
    assert step.traces == 1
    assert types(after) == types(before)
    weights = [layer[name] for layer in params.values() for name in ("w", "b")]
    with jax.numpy_rank_promotion("allow"):
        expected, _, _ = by_hand(
            lambda weights: cross_entropy(perceptron(weights, x), y), weights, optimizer
        )
    assert losses == expected


@EVERY_STORAGE
def test_optimistix(optimistix, storage):
    """It passes value, grad and value_fn, and loops until nothing moves."""
    start, target = jnp.array([-1.0, 1.0]), jnp.array([2.0, -1.0])
    scale = jnp.array([1.0, 10.0])

    def cost(y, scale):
        return jnp.sum(scale * (y - target) ** 2)

    optimizer = adamax(0.1, **storage)
    solver = optimistix.OptaxMinimiser(optimizer, rtol=1e-6, atol=1e-6)
    solution = optimistix.minimise(cost, solver, start, scale, max_steps=10_000)
    assert solution.result == optimistix.RESULTS.successful
    # u is about the first gradient, so that a step is 1/30 of the distance left, and
    # steps of 3e-6, where it stops, are taken 1e-4 from the target. Ten times that; in
    # one byte the first code of m is 7e-4 from it, and a step between is often 0.
    atol = 2e-3 if storage.get("m_dtype") == "int8" else 1e-3
    np.testing.assert_allclose(solution.value, target, rtol=0, atol=atol)
    state = solution.state.opt_state
    assert types(state) == types(optimizer.init(start))
    steps = int(solution.stats["num_steps"])
    _, expected, end = by_hand(cost, start, optimizer, scale, steps=steps)
    assert int(state[0].count) == int(end[0].count)
    # Its loop may be fused in another way, and the last steps are of 3e-6.
    np.testing.assert_allclose(solution.value, expected, rtol=0, atol=1e-5)


@EVERY_STORAGE
@pytest.mark.parametrize("factory", [adamax, adamaxw])
def test_optimistix_compiles_once_for_all_learning_rates(optimistix, factory, storage):
    """It takes our functions apart, to find the arrays that they close over."""
    start, steps, traces = jnp.array(1.0), 100, []

    @counted
    def cost(y, _):
        return y**2

    for learning_rate in (1e-3, 1e-2):
        optimizer = optax.chain(
            factory(jnp.array(learning_rate), **storage),
            optax.scale_by_schedule(optax.piecewise_constant_schedule(1.0, {50: 0.1})),
        )
        solver = optimistix.OptaxMinimiser(optimizer, rtol=1e-8, atol=1e-8)
        # Optax's schedule takes the maximum of a Python number and an integer array.
        with jax.numpy_dtype_promotion("standard"):
            solution = optimistix.minimise(
                cost, solver, start, max_steps=steps, throw=False
            )
            _, expected, _ = by_hand(lambda y: y**2, start, optimizer, steps=steps)
        traces.append(cost.traces)
        np.testing.assert_allclose(solution.value, expected, rtol=1e-5)
    assert 0 < traces[0] == traces[1]


@EVERY_STORAGE
@pytest.mark.parametrize("method", ["update", "stable_update"])
def test_numpyro(numpyro, method, storage):
    """Normal data with a normal prior: the posterior and the evidence are known.

    The stable update chooses between the old and the new state with lax.cond.
    """
    n, prior, steps = 50, 10.0, 2000
    x = np.random.default_rng(0).normal(3, 1, n).astype(np.float32)

    def model(x):
        mean = numpyro.sample("mean", numpyro.distributions.Normal(0.0, prior))
        with numpyro.plate("data", n):
            numpyro.sample("x", numpyro.distributions.Normal(mean, 1.0), obs=x)

    def guide(x):
        loc = numpyro.param("loc", jnp.zeros([]))
        scale = jnp.exp(numpyro.param("log_scale", jnp.zeros([])))
        numpyro.sample("mean", numpyro.distributions.Normal(loc, scale))

    # The first gradients are hundreds of times the last: u must forget them.
    optimizer = adamax(optax.linear_schedule(0.1, 0.0, steps), b2=0.99, **storage)
    svi = numpyro.infer.SVI(model, guide, optimizer, numpyro.infer.Trace_ELBO())
    initial = svi.init(jax.random.key(0), x)
    update = counted(getattr(svi, method))
    compiled = jax.jit(update)
    losses, state = train(lambda state: compiled(state, x), initial, steps)
    assert update.traces == 1
    _, (_, before) = initial.optim_state
    _, (_, after) = state.optim_state
    assert types(after) == types(before)

    scale = (n + prior**-2) ** -0.5
    params = svi.get_params(state)
    z = (params["loc"] - x.sum() * scale**2) / scale
    log_ratio = params["log_scale"] - math.log(scale)
    divergence = (z**2 + jnp.expm1(2 * log_ratio)) / 2 - log_ratio
    # In nats, from 267 at the start: the mean to within a third of its deviation.
    assert divergence < 0.05
    covariance = np.eye(n) + prior**2
    exponent = x @ np.linalg.solve(covariance, x)
    log_determinant = np.linalg.slogdet(covariance)[1]
    evidence = (n * math.log(2 * math.pi) + log_determinant + exponent) / -2
    # The divergence, and four standard errors of this mean, of 0.011 each.
    assert np.mean(losses[-100:]) == pytest.approx(-evidence, abs=0.1)


@EVERY_STORAGE
def test_numpyro_compiles_once(numpyro, storage):
    optimizer = numpyro.optim.optax_to_numpyro(adamax(0.01, **storage))

    @counted
    def step(state, g):
        return optimizer.update(g, state, value=0.01)

    state = optimizer.init(jnp.zeros(10))
    compiled = jax.jit(step)
    for g in (1.0, 2.0, 3.0):
        state = compiled(state, jnp.full(10, g))
    assert step.traces == 1


@EVERY_STORAGE
def test_keras(keras, digits, storage):
    x, y = digits
    glorot = keras.initializers.GlorotUniform
    model = keras.Sequential(
        [
            keras.layers.Input([64]),
            keras.layers.Dense(32, "relu", kernel_initializer=glorot(seed=0)),
            keras.layers.Dense(10, kernel_initializer=glorot(seed=1)),
        ]
    )

    def cost(trainable, fixed):
        logits, fixed = model.stateless_call(trainable, fixed, x)
        return cross_entropy(logits, y), fixed

    optimizer = adamax(0.01, **storage)

    @counted
    def step(carry):
        trainable, fixed, state = carry
        gradient = jax.value_and_grad(cost, has_aux=True)
        (loss, fixed), gradients = gradient(trainable, fixed)
        updates, state = optimizer.update(gradients, state, trainable)
        return (optax.apply_updates(trainable, updates), fixed, state), loss

    trainable = [v.value for v in model.trainable_variables]
    fixed = [v.value for v in model.non_trainable_variables]
    before = optimizer.init(trainable)
    losses, (trained, _, after) = train(jax.jit(step), (trainable, fixed, before))
    assert losses[-1] < ENOUGH
    assert step.traces == 1
    assert types(after) == types(before)
    chex.assert_trees_all_equal(
        (losses, trained, after),
        by_hand(
            lambda weights: cross_entropy(perceptron(weights, x), y),
            trainable,
            optimizer,
        ),
    )


@pytest.mark.parametrize(
    "storage", [{}, TWO_BYTES, {"m_dtype": "int8", "shared_axes": -2}]
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("as_it_comes")
def test_flowjax(flowjax, storage):
    """Its own loop, over Equinox modules with wrappers and integers in them."""
    data = 1 + jax.random.normal(jax.random.key(0), [400, 2]) * jnp.array([2.0, 0.5])
    flow = flowjax.flows.masked_autoregressive_flow(
        jax.random.key(1),
        base_dist=flowjax.distributions.Normal(jnp.zeros(2)),
        flow_layers=1,
        nn_width=16,
    )
    before = -flow.log_prob(data).mean()
    flow, _ = flowjax.train.fit_to_data(
        jax.random.key(2),
        flow,
        data,
        optimizer=adamax(5e-3, **storage),
        max_epochs=8,
        batch_size=50,
        show_progress=False,
    )
    assert -flow.log_prob(data).mean() < before - 1


@pytest.mark.parametrize("storage", ["own", "uint8", "two bytes"])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("as_it_comes")
def test_netket(netket, x64, storage):
    """The ground state of a chain of spins: complex parameters, in double precision."""
    optimizer = {
        "own": adamax(2e-2),
        "uint8": adamax(2e-2, u_dtype="uint8"),
        "two bytes": optax.contrib.split_real_and_imaginary(adamax(2e-2, **TWO_BYTES)),
    }[storage]
    space, chain = netket.hilbert.Spin(0.5, 6), netket.graph.Chain(6)
    energy = netket.operator.Ising(space, chain, h=1.0)
    model = netket.models.RBM(alpha=1, param_dtype=complex)
    state = netket.vqs.FullSumState(space, model, seed=0)
    driver = netket.driver.VMC(energy, optimizer, variational_state=state)
    driver.run(60, out=netket.logging.RuntimeLog(), show_progress=False)
    # By diagonalization.
    assert float(state.expect(energy).mean.real) == pytest.approx(-7.72741, rel=0.02)


@pytest.mark.parametrize("sharded", ["in", "hidden", "out"])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("as_it_comes")
def test_haliax_shares_along_an_axis_that_is_not_sharded(haliax, sharded):
    """By the recipe of the page on choosing: u can be sharded as its parameter is."""
    names = run(example(page("choosing"), "Named axes"))
    sizes = haliax.make_axes(**{"in": 8, "hidden": 16, "out": 4})
    params = [
        haliax.nn.Linear.init(*axes, key=jax.random.key(i))
        for i, axes in enumerate(itertools.pairwise(sizes))
    ]
    x = haliax.random.normal(jax.random.key(2), (haliax.Axis("batch", 32), sizes[0]))
    y = haliax.sum(x, sizes[0])
    optimizer = adamax(
        0.03,
        m_dtype="int8",
        shared_axes=names["along_unsharded"](params, {sharded}),
    )

    def cost(params):
        first, last = params
        output = last(haliax.nn.relu(first(x)))
        return haliax.mean((output - y) ** 2).scalar()

    losses, _, state = by_hand(cost, params, optimizer)
    assert losses[-1] < 0.2 * losses[0]
    u = state[0].u
    for layer, of_layer in zip(params, u, strict=True):
        assert of_layer.weight.axes == layer.weight.axes
        whole, kept = layer.weight.array.shape, of_layer.weight.array.shape
        assert math.prod(kept) < math.prod(whole)
        for axis, size, kept_size in zip(layer.weight.axes, whole, kept, strict=True):
            assert axis.name != sharded or kept_size == size


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("as_it_comes")
def test_haliax_shares_nothing_along_stacked_layers(haliax):
    """Nor of vectors, nor of arrays without names."""
    choose = run(example(page("choosing"), "Named axes"))["along_unsharded"]
    layers, inputs, outputs = haliax.make_axes(layers=3, inputs=8, outputs=4)
    params = {
        "bias": haliax.zeros((layers, outputs)),
        "kernel": haliax.zeros((layers, outputs, inputs)),
        "plain": jnp.zeros([2, 3]),
    }
    axes = choose(params, sharded={"outputs"}, stacked={"layers"})
    u = adamax(0.1, shared_axes=axes).init(params)[0].u
    assert u["bias"].array.shape == (3, 4)
    assert u["kernel"].array.shape == (3, 4, 1)
    assert u["plain"].shape == (2, 3)


@pytest.mark.parametrize(
    "storage", [{}, TWO_BYTES, {"m_dtype": "int8", "shared_axes": -1}]
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("as_it_comes")
def test_tunix(tunix, storage):
    """Its trainer, which accumulates the gradients of two batches."""
    tokens = (jnp.arange(16) + jnp.arange(8)[:, None]) % 32
    batch = tunix.TrainingInput(input_tokens=tokens, input_mask=jnp.ones_like(tokens))

    def cost(model, input_tokens, input_mask):
        logits = model(input_tokens[:, :-1])
        return cross_entropy(logits, input_tokens[:, 1:])

    def trained(optimizer):
        rngs = nnx.Rngs(0)
        model = nnx.Sequential(
            nnx.Embed(32, 16, rngs=rngs), nnx.Linear(16, 32, rngs=rngs)
        )
        config = tunix.TrainingConfig(
            eval_every_n_steps=1000, max_steps=STEPS, gradient_accumulation_steps=2
        )
        trainer = tunix.PeftTrainer(model, optimizer, config).with_loss_fn(cost)
        trainer = trainer.with_gen_model_input_fn(
            lambda x: {"input_tokens": x.input_tokens, "input_mask": x.input_mask}
        )
        trainer.train([batch] * 2 * STEPS)
        return float(cost(model, tokens, None))

    loss = trained(adamax(0.1, **storage))
    # Guessing one of 32 costs 3.5 nats.
    assert loss < 0.5
    if not storage:
        assert loss == pytest.approx(trained(optax.adamax(0.1)), rel=1e-3)
