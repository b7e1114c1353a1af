"""States of Optax's and PyTorch's AdaMax, continued here and brought back."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
import pytest
import sequences
from sequences import (
    AFTER,
    BEFORE,
    PARAMS,
    ROUNDING_OF_U,
    SCHEDULE,
    STORAGES,
    TREES,
    long_but,
    pairs,
)
from versions import as_users_compile, needs_new_optax

from adamax_jax import (
    ScaleByAdamaxState,
    adamax,
    adamaxw,
    convert_state,
    from_optax,
    from_torch,
    insert_state,
    moments,
    scale_by_adamax,
    to_optax,
)

# An eager call compiles a program for each operation and shape.
read = jax.jit(moments)

pytestmark = pytest.mark.usefixtures("lenient")
# Optax's compiled steps have the bits of ours.
train = functools.partial(sequences.train, jit=as_users_compile)


PAIRS = pairs(optax.adamax, adamax)
PAIRS |= {"adamaxw": (optax.adamaxw(0.1), adamaxw(0.1))}


@pytest.mark.parametrize(
    "name", long_but(["alone", "a schedule", "adamw", "adamaxw"], PAIRS)
)
def test_optax_continued_here_is_optax_uninterrupted(name):
    """The state to the last bit, and with the containers that init makes."""
    theirs, ours = PAIRS[name]
    params, state = train(theirs, PARAMS, theirs.init(PARAMS), BEFORE)
    expected, end = train(theirs, params, state, AFTER)
    state = from_optax(state)
    assert jax.tree.structure(state) == jax.tree.structure(ours.init(PARAMS))
    actual, state = train(ours, params, state, AFTER)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(to_optax(state), end)


@pytest.mark.parametrize("name", long_but(["a schedule"], PAIRS))
def test_from_here_on_in_optax(name):
    theirs, ours = PAIRS[name]
    params, state = train(ours, PARAMS, ours.init(PARAMS), BEFORE)
    expected, end = train(ours, params, state, AFTER)
    actual, state = train(theirs, params, to_optax(state), AFTER)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(from_optax(state), end)


@pytest.mark.parametrize("name", long_but(["two bytes"], STORAGES))
def test_there_and_back_the_numbers_are_the_same(name):
    storage = STORAGES[name]
    optimizer = adamax(**storage)
    _, state = train(optimizer, PARAMS, optimizer.init(PARAMS), TREES)
    theirs = jax.jit(to_optax)(state)
    chex.assert_trees_all_equal((theirs[0].mu, theirs[0].nu), read(state))
    back = jax.jit(from_optax)(theirs)
    chex.assert_trees_all_equal(read(back), read(state))
    if name == "own":
        chex.assert_trees_all_equal(back, state)
    else:
        # u is rounded once more, by at most half a step of the storage.
        _, u = jax.jit(lambda back: moments(convert_state(back, **storage)))(back)
        chex.assert_trees_all_close(u, read(state)[1], rtol=ROUNDING_OF_U[name])


@needs_new_optax
def test_parts_that_optax_arranges_otherwise_are_inserted_into_a_new_state():
    """A mask of the decay has a state of its own in Optax, and a schedule another."""
    options = {"weight_decay": SCHEDULE, "mask": {"a": True, "b": False}}
    theirs, ours = optax.adamaxw(SCHEDULE, **options), adamaxw(SCHEDULE, **options)
    params, state = train(theirs, PARAMS, theirs.init(PARAMS), BEFORE)
    expected, _ = train(theirs, params, state, AFTER)
    new = insert_state(ours.init(PARAMS), from_optax(state[0]))
    actual, _ = train(ours, params, new, AFTER)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_complex_states_of_optax_get_a_real_u():
    g = np.complex64([3 + 4j, -1j])
    theirs = optax.adamax(0.1)
    _, state = theirs.update(g, theirs.init(g))
    state = from_optax(state)
    chex.assert_type(state[0].u, jnp.float32)
    np.testing.assert_allclose(state[0].u, [5, 1])
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, adamax().init(g))


def test_optax_in_half_precision():
    """u, which Optax never lets decay in bfloat16, decays from here on."""
    g = np.ones(2, jnp.bfloat16)
    theirs = optax.adamax(0.1)

    @jax.jit
    def u_after_2000_steps():
        _, state = theirs.update(g, theirs.init(g))
        state = from_optax(state)
        state = jax.lax.fori_loop(
            0, 2000, lambda _, state: adamax().update(0 * g, state)[1], state
        )
        return moments(state)[1]

    np.testing.assert_allclose(u_after_2000_steps(), 0.999**2000, rtol=4e-3)


def test_states_that_are_not_there():
    with pytest.raises(ValueError, match=r"holds no ScaleByAdamState\.$"):
        from_optax(optax.sgd(0.1).init(PARAMS))
    with pytest.raises(ValueError, match=r"no ScaleByAdamState\. It is .* already"):
        from_optax(adamax(0.1).init(PARAMS))
    with pytest.raises(ValueError, match="holds no ScaleByAdamaxState"):
        to_optax(optax.adam(0.1).init(PARAMS))


def torch_state(steps=(3, 3), keys=("exp_avg", "exp_inf"), **arrays):
    shapes = {"weight": (3, 2), "bias": (3,)}
    state = {}
    for index, (name, shape) in enumerate(shapes.items()):
        values = arrays.get(name, np.arange(1, 1 + np.prod(shape), dtype=np.float32))
        state[index] = {"step": np.float32(steps[index])}
        state[index] |= {key: values.reshape(shape) for key in keys}
    return {"state": state, "param_groups": [{"params": [0]}, {"params": [1]}]}


def convert(weights):
    return {
        "kernel": jnp.asarray(weights["weight"]).T,
        "bias": jnp.asarray(weights["bias"]),
    }


NAMES = ["weight", "bias"]


def test_from_torch_brings_state_where_the_converter_brings_weights():
    state = from_torch(torch_state(), NAMES, convert)
    assert isinstance(state, ScaleByAdamaxState)
    assert int(state.count) == 3
    np.testing.assert_array_equal(state.u["kernel"], [[1, 3, 5], [2, 4, 6]])
    params = {"kernel": jnp.ones([2, 3]), "bias": jnp.ones(3)}
    optimizer = adamaxw(SCHEDULE)
    new = insert_state(optimizer.init(params), state)
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(
        jax.typeof, optimizer.init(params)
    )
    assert [int(x) for x in jax.tree.leaves(new) if x.dtype == jnp.int32] == [3, 3]


def torch_model(params):
    """The parameters of the recorded torch.nn.Sequential as those of two kernels."""
    return [
        {
            "kernel": np.asarray(params[f"{layer}.weight"]).T,
            "bias": np.asarray(params[f"{layer}.bias"]),
        }
        for layer in (0, 2)
    ]


def torch_loss(params, x, y):
    hidden, output = params
    x = jnp.tanh(x @ hidden["kernel"] + hidden["bias"][None])
    return jnp.mean((x @ output["kernel"] + output["bias"][None] - y) ** 2)


@pytest.mark.parametrize("carried", [True, False], ids=["carried", "a new state"])
def test_a_training_run_begun_in_torch_continues_here(carried):
    """Twenty steps in PyTorch, then PyTorch's further twenty steps by ours.

    The same arithmetic in another order: each step of at most 1e-2 is off by some
    1e-7 of itself, and what the gradients make of that. With a state of its own in the
    place of the carried one, the run is another.
    """
    run = peers.torch_model()
    params = torch_model({name: steps[0] for name, steps in run.params.items()})
    (group,) = run.state_dict["param_groups"]
    optimizer = adamax(group["lr"], *group["betas"], group["eps"])
    state = optimizer.init(params)
    if carried:
        state = from_torch(run.state_dict, run.names, torch_model)
        state = insert_state(optimizer.init(params), state)

    @jax.jit
    def step(params, state):
        loss, gradients = jax.value_and_grad(torch_loss)(params, run.x, run.y)
        updates, state = optimizer.update(gradients, state, params)
        return loss, optax.apply_updates(params, updates), state

    deviation = 0
    for i in range(20):
        loss, params, state = step(params, state)
        expected = torch_model(
            {name: steps[i + 1] for name, steps in run.params.items()}
        )
        differences = jax.tree.map(
            lambda x, y: np.max(np.abs(np.asarray(x) - y)), params, expected
        )
        deviation = max(deviation, *map(float, jax.tree.leaves(differences)))
        if carried:
            np.testing.assert_allclose(loss, run.losses[i], rtol=1e-6)
    assert deviation < 5e-7 if carried else deviation > 0.1


def test_groups_that_differ_in_their_learning_rate_need_one_state():
    """The recipe of the page: as optimizers of their own, with the same m and u."""
    params = {"a": np.float32([1, -2]), "b": np.float32([3, 0.5])}
    rates, labels = {"a": 1e-3, "b": 1e-2}, {"a": "a", "b": "b"}
    one = adamax(1e-3)
    _, old = train(one, params, one.init(params), [params] * 3)
    together = optax.chain(
        scale_by_adamax(),
        optax.partition({k: optax.scale(-rate) for k, rate in rates.items()}, labels),
    )
    groups = optax.partition({k: adamax(rate) for k, rate in rates.items()}, labels)
    new = groups.init(params)
    parts = {name: insert_state(part, old) for name, part in new.inner_states.items()}
    found, _ = together.update(params, insert_state(together.init(params), old))
    expected, _ = groups.update(params, new._replace(inner_states=parts))
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


def test_from_torch_copies_the_memory():
    given = torch_state()
    state = from_torch(given, NAMES, lambda weights: dict(weights))
    given["state"][0]["exp_inf"][:] = 0
    assert np.all(np.asarray(state.u["weight"]) > 0)


@pytest.mark.parametrize(
    ("state", "names", "error", "message"),
    [
        (torch_state(), ["weight"], ValueError, "1 names, but .* 2 parameters"),
        (torch_state(steps=(3, 4)), NAMES, ValueError, "different .*'bias': 4"),
        (
            torch_state(keys=("exp_avg", "exp_avg_sq")),
            NAMES,
            ValueError,
            "'weight' has no exp_inf, but exp_avg, exp_avg_sq, step",
        ),
        (
            torch_state() | {"state": {}},
            NAMES,
            ValueError,
            r"'weight' has no state,.*none at state_dict\['state'\]\[0\], only at \[\]",
        ),
        (
            torch_state(weight=np.ones(6, np.complex64)),
            NAMES,
            TypeError,
            r"\['kernel'\] is complex",
        ),
    ],
    ids=["names", "steps", "adam", "frozen", "complex"],
)
def test_from_torch_errors(state, names, error, message):
    with pytest.raises(error, match=message):
        from_torch(state, names, convert)


def test_from_torch_names_are_checked():
    generated = from_torch(torch_state(), (name for name in NAMES), convert)
    chex.assert_trees_all_equal(generated, from_torch(torch_state(), NAMES, convert))
    with pytest.raises(ValueError, match="'weight' more than once"):
        from_torch(torch_state(), ["weight", "weight"], convert)
    known = torch_state()
    for group, name in zip(known["param_groups"], reversed(NAMES), strict=True):
        group["param_names"] = [name]
    with pytest.raises(ValueError, match=r"'weight' at 0, where .* has 'bias'"):
        from_torch(known, NAMES, convert)
    for group, name in zip(known["param_groups"], NAMES, strict=True):
        group["param_names"] = [name]
    chex.assert_trees_all_equal(
        from_torch(known, NAMES, convert), from_torch(torch_state(), NAMES, convert)
    )


def test_from_torch_names_the_keys_that_are_missing():
    with pytest.raises(TypeError, match=r"state_dict\(\) returned, got list"):
        from_torch([], NAMES, convert)
    whole = torch_state()
    for part, message in [
        (whole["state"], "no 'state' and no 'param_groups', but 0, 1"),
        ({"state": whole["state"]}, "this has no 'param_groups', but 'state'"),
        ({"model": {}, "optimizer": whole}, "no 'state' .*, but 'model', 'optimizer'"),
        ({}, "no 'state' and no 'param_groups', but nothing"),
        (whole | {"param_groups": [{"lr": 1e-3}]}, "a group without 'params'"),
        (whole | {"param_groups": {}}, "and a list under .*, got dict and dict"),
        (whole | {"state": []}, "a dict under 'state' and .*, got list and list"),
    ]:
        with pytest.raises(TypeError, match=message):
            from_torch(part, NAMES, convert)


def test_from_torch_says_what_a_converter_did_wrong():
    with pytest.raises(ValueError, match="asked for 'mean', which is not among names"):
        from_torch(torch_state(), NAMES, lambda weights: weights["mean"])
    with pytest.raises(ValueError, match=r"exp_inf negative at \['weight'\]"):
        from_torch(torch_state(), NAMES, lambda w: {"weight": -jnp.array(w["weight"])})


def test_from_torch_does_not_cast_in_silence():
    state = torch_state(weight=np.ones(6))
    with pytest.raises(TypeError, match=r"\['weight'\] has dtype float64 .* float32"):
        from_torch(state, NAMES, lambda weights: dict(weights))


def test_from_torch_in_double_precision(x64):
    state = from_torch(torch_state(weight=np.ones(6), bias=np.ones(3)), NAMES, convert)
    chex.assert_type(state.u["kernel"], jnp.float64)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn])
def test_half_precision_states_are_stored_as_ours(dtype):
    """In bfloat16: the numbers are the same but for its rounding."""
    m, u = np.array([3.0, -0.5, 0.0], dtype), np.array([4.0, 0.5, 0.0], dtype)
    optax_state = optax.ScaleByAdamState(np.int32(5), m, u)
    state = from_optax(optax_state)
    chex.assert_type([state.m, state.u], jnp.bfloat16)
    torch_state = {
        "state": {0: {"step": 5, "exp_avg": m, "exp_inf": u}},
        "param_groups": [{"params": [0]}],
    }
    for imported in (state, from_torch(torch_state, ["w"], lambda w: w["w"])):
        for actual, expected in zip(read(imported), (m, u), strict=True):
            np.testing.assert_allclose(actual, np.float32(expected), rtol=2**-8)
        update = jax.jit(adamax(1.0, b1=0.5).update)
        step, _ = update(np.zeros(3, "f"), (imported, optax.EmptyState()))
        correction = 1 - 0.5**6
        expected = -0.5 * np.float32([3 / 4, -1, 0]) / 0.999 / correction
        np.testing.assert_allclose(step, expected, rtol=2**-4)
