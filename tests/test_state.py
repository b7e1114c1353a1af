"""What may be done with a state: read it, store it otherwise, put it in."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dying import spacing
from flax import nnx
from sequences import (
    AFTER,
    BEFORE,
    EVERY_STORAGE,
    LONGEST_STEP,
    PARAMS,
    ROUNDING_LEAVES,
    ROUNDING_OF_U,
    SCHEDULE,
    STORAGES,
    TREES,
    gradients,
    train,
)
from versions import as_pure

from adamax_jax import (
    adamax,
    convert_state,
    diagnose,
    from_optax,
    insert_state,
    lp_adam,
    moments,
    scale_by_adamax,
    to_optax,
)

# An eager call compiles a program for each operation and shape.
read = jax.jit(moments)
convert = jax.jit(convert_state, static_argnames=("m_dtype", "u_dtype"))
insert = jax.jit(insert_state)

FULL = {"m_dtype": "float32", "u_dtype": "float32"}
STOP = len(BEFORE)


def test_moments_needs_one_state():
    state = adamax().init(jnp.ones(1))
    with pytest.raises(
        ValueError,
        match=r"holds 2 ScaleByAdamaxState or ScaleByLpAdamState, not one: at "
        r"\[0\]\[0\], \[1\]\[0\]",
    ):
        moments((state, state))


READERS = {
    "moments": moments,
    "convert_state": functools.partial(convert_state, m_dtype="int8"),
    "insert_state": lambda state: insert_state(adamax().init(jnp.ones(1)), state),
    "diagnose": diagnose,
    "to_optax": to_optax,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_states_that_are_not_of_this_library_are_named(read):
    for optimizer, message in (
        (optax.adamax(0.1), r"\. It is Optax's.*from_optax"),
        (optax.sgd(0.1), r"\.$"),
    ):
        with pytest.raises(
            ValueError,
            match="state holds no ScaleByAdamaxState or ScaleByLpAdamState" + message,
        ):
            read(optimizer.init(jnp.ones(1)))


def test_a_mean_is_not_inserted_for_a_maximum():
    mean, maximum = (o.init(jnp.ones(1)) for o in (lp_adam(0.1, p=3.0), adamax()))
    for state, other in ((mean, maximum), (maximum, mean)):
        with pytest.raises(ValueError, match="u is a maximum in AdaMax, and a mean"):
            insert_state(state, other)


def test_an_update_names_the_function_that_converts():
    state = optax.adamax(0.1).init(jnp.ones(1))
    with pytest.raises(TypeError, match=r"of type ScaleByAdamState, .* from_optax"):
        adamax(0.1).update(jnp.ones(1), state)


def test_ensembles_are_converted_member_by_member():
    together = jax.tree.map(lambda g: np.stack([g, 2 * g]), PARAMS)
    states = jax.vmap(optax.adamax(0.1).init)(together)
    states = jax.jit(from_optax)(states)
    assert states[0].u_scale.shape == states[0].count.shape == (2,)
    for function in (moments, to_optax, diagnose):
        with pytest.raises(ValueError, match=r"shape \(2,\).*jax\.vmap"):
            function(states)
    actual = jax.jit(jax.vmap(moments))(states)
    chex.assert_trees_all_equal(actual, (states[0].m, states[0].u))


# The last number of int8, and the ratio m/u that it stands for.


def rounding_of_m(target, ratio):
    """How far it may move m, relative to u, where m/u is a ratio."""
    if target != "two bytes":
        return ROUNDING_OF_U[target]
    # Half a step of the codes at that ratio, which is to u as it will be stored.
    return 1.15 * spacing(1.15 * ratio, "int8") / 2


@functools.cache
def state_in(source):
    """The state of an optimizer in a storage after 300 steps."""
    g = np.float32(gradients(300, size=32, decades=8))
    optimizer = optax.chain(adamax(**STORAGES[source]), optax.scale(1.0))

    @jax.jit
    def run(g):
        state = optimizer.init(g[0])
        return jax.lax.scan(lambda s, g: (optimizer.update(g, s)[1], None), state, g)[0]

    return run(g)


@pytest.mark.parametrize("source", STORAGES)
@pytest.mark.parametrize("target", STORAGES)
def test_conversion_rounds_once(source, target):
    state, storage = state_in(source), FULL | STORAGES[target]
    converted = convert(state, **storage)
    like = jax.eval_shape(adamax(**storage).init, np.ones(32, "f"))
    assert jax.tree.map(jax.typeof, converted[0]) == jax.tree.map(jax.typeof, like)
    if target == "own":
        # Numbers of 32 bits are stored as they are.
        assert converted[0][0].u_scale == 1
    (m, u), (new_m, new_u) = jax.device_get((read(state), read(converted)))
    np.testing.assert_allclose(new_u, u, rtol=ROUNDING_OF_U[target])
    ratio = np.abs(m) / np.maximum(u, 1e-30)
    error = np.abs(new_m - m) / np.maximum(u, 1e-30)
    assert np.all(error <= rounding_of_m(target, ratio))
    # Back in float32, nothing is rounded any more, and training goes on.
    back = convert(converted, **FULL)
    chex.assert_trees_all_equal(read(back), (new_m, new_u))
    adamax(**FULL).update(np.ones(32, "f"), back[0])


def test_conversion_of_one_keeps_the_other():
    optimizer = adamax(m_dtype="bfloat16", u_dtype="uint8")
    _, state = train(optimizer, PARAMS, optimizer.init(PARAMS), BEFORE)
    chex.assert_trees_all_equal(convert_state(state), state)
    converted = convert_state(state, m_dtype="float32")
    chex.assert_trees_all_equal(moments(converted), moments(state))
    chex.assert_trees_all_equal(converted[0].u, state[0].u)
    assert float(converted[0].u_scale) == float(state[0].u_scale) > 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
def test_a_conversion_keeps_the_bound_of_steps(dtype):
    """Where u is too large to be stored, m is cut down with it, as by an update."""
    g = np.full(3, 1e12, dtype)
    optimizer = scale_by_adamax()
    _, state = train(optimizer, g, optimizer.init(g), [g] * 50)
    narrow = convert(state, u_dtype="uint8")
    update, _ = jax.jit(scale_by_adamax(u_dtype="uint8").update)(0 * g, narrow)
    update = np.asarray(update)
    assert np.all(np.abs(update) <= LONGEST_STEP / ROUNDING_LEAVES)
    assert np.all(np.abs(update) > 0.1)


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize(
    "wrap",
    [
        lambda adamax: adamax(SCHEDULE),
        lambda adamax: optax.inject_hyperparams(adamax)(SCHEDULE),
        lambda adamax: optax.inject_hyperparams(adamax)(0.1),
        lambda adamax: optax.apply_if_finite(adamax(SCHEDULE), 3),
        lambda adamax: optax.chain(optax.clip(1.0), adamax(SCHEDULE)),
        lambda adamax: optax.MultiSteps(adamax(SCHEDULE), 1),
    ],
    ids=["schedule", "injected", "injected number", "guarded", "chain", "MultiSteps"],
)
def test_an_inserted_state_goes_on_to_the_bit(wrap):
    optimizer = wrap(adamax)
    params, state = train(optimizer, PARAMS, optimizer.init(PARAMS), BEFORE)
    expected = train(optimizer, params, state, AFTER)
    new = insert(optimizer.init(PARAMS), state)
    actual = train(optimizer, params, new, AFTER)
    chex.assert_trees_all_equal(actual[0], expected[0])
    chex.assert_trees_all_equal(read(actual[1]), read(expected[1]))


@functools.cache
def trained():
    """The state after twenty steps in float32."""
    return train(adamax(), PARAMS, adamax().init(PARAMS), BEFORE)[1][0]


@pytest.mark.usefixtures("lenient")
def test_what_does_not_count_updates_stays_new():
    """Adam's own count, an average's and a plateau's, and a parameter of that name."""

    class Named(NamedTuple):
        a: jax.Array
        count: jax.Array

    params = Named(PARAMS["a"], PARAMS["b"])
    old = jax.tree.map(lambda x: x, trained())
    old = old._replace(m=Named(*old.m.values()), u=Named(*old.u.values()))
    optimizer = optax.chain(
        optax.trace(0.9),
        adamax(SCHEDULE),
        optax.ema(0.99),
        optax.scale_by_adam(),
        optax.contrib.reduce_on_plateau(patience=2, accumulation_size=5),
    )
    before = optimizer.init(params)
    after = insert_state(before, old)
    chex.assert_trees_all_equal(after[1][0], old)
    assert int(after[1][1].count) == STOP
    for i in (0, 2, 3, 4):
        chex.assert_trees_all_equal(after[i], before[i])


@EVERY_STORAGE
def test_an_inserted_state_is_stored_as_the_optimizer_stores(storage):
    optimizer = adamax(**storage)
    new = insert(optimizer.init(PARAMS), trained())
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(
        jax.typeof, optimizer.init(PARAMS)
    )
    if storage:
        expected = convert(trained(), **storage)
        chex.assert_trees_all_equal(new[0], expected)


@pytest.mark.parametrize("wrap", [adamax, optax.inject_hyperparams(adamax)])
def test_an_inserted_state_can_be_donated(wrap):
    """No buffer is in two places of it, nor in the state that it came from."""
    optimizer, old = wrap(SCHEDULE), trained()
    state = insert_state(optimizer.init(PARAMS), old)
    step = jax.jit(optimizer.update, donate_argnums=1)
    _, state = step(TREES[0], state)
    _, state = step(TREES[0], state)
    assert int(optax.tree.get(state, "m")["a"].size) == 32
    assert int(old.count) == STOP and np.all(np.isfinite(old.u["a"]))


def test_an_inserted_state_may_have_parts_that_are_masked():
    mask = {"a": True, "b": False}
    optimizer = optax.masked(adamax(), mask)
    state = insert_state(optimizer.init(PARAMS), trained()).inner_state[0]
    chex.assert_trees_all_equal(state.u["a"], trained().u["a"])
    assert isinstance(state.u["b"], optax.MaskedNode)


def test_an_inserted_state_may_have_more_below_what_is_masked():
    """A mask for a whole subtree stands in its place."""
    ones = np.ones(3, np.float32)
    params = {"a": ones, "b": {"c": ones, "d": [ones]}}
    given = adamax().init(params)[0]
    optimizer = optax.masked(adamax(), {"a": True, "b": False})
    state = insert_state(optimizer.init(params), given).inner_state[0]
    assert isinstance(state.m["b"], optax.MaskedNode)
    assert int(state.count) == 0


def test_a_state_is_inserted_into_an_nnx_optimizer():
    """Its containers stay, its schedule goes on, and so does training."""
    model = nnx.Linear(4, 8, use_bias=False, rngs=nnx.Rngs(0))
    weights = {"kernel": model.kernel[...]}
    gradients = [{"kernel": g["a"]} for g in TREES]
    tx = adamax(SCHEDULE)
    expected, middle = train(tx, weights, tx.init(weights), gradients[:STOP])
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    nnx.update(model, expected)
    before = jax.tree.structure(optimizer.opt_state)
    optimizer.opt_state = insert_state(optimizer.opt_state, middle[0])
    assert jax.tree.structure(optimizer.opt_state) == before
    for g in gradients[STOP:]:
        optimizer.update(model, nnx.State({"kernel": nnx.Param(g["kernel"])}))
    expected, end = train(tx, expected, middle, gradients[STOP:])
    state = as_pure(optimizer.opt_state)
    chex.assert_trees_all_close(dict(state[0].m), end[0].m, rtol=1e-6)
    chex.assert_trees_all_equal(dict(state[0].u), end[0].u)
    assert int(state[1].count) == int(end[1].count) == len(TREES)
    np.testing.assert_allclose(model.kernel[...], expected["kernel"], atol=1e-6)


def test_a_state_of_plain_arrays_and_one_of_nnx_fit_each_other():
    """An nnx.Optimizer keeps each array in a variable, one step further down."""
    model = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
    tx = adamax(0.1)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    weights = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    plain = insert_state(tx.init(weights), optimizer.opt_state)
    assert jax.tree.structure(plain) == jax.tree.structure(tx.init(weights))
    back = insert_state(optimizer.opt_state, plain)
    assert jax.tree.structure(back) == jax.tree.structure(optimizer.opt_state)
    for state in (plain, back):
        assert int(moments_count(state)) == 1
        m, u = moments(state)
        for leaf in jax.tree.leaves(m):
            np.testing.assert_allclose(leaf, 0.1, rtol=1e-6)
        for leaf in jax.tree.leaves(u):
            np.testing.assert_array_equal(leaf, 1)


def moments_count(state):
    return as_pure(state)[0].count


def test_states_that_do_not_fit_are_not_inserted():
    target = adamax().init(PARAMS)
    old = trained()
    with pytest.raises(ValueError, match=r"shape \(3,\) at \['b'\], .* has \(32,\)"):
        insert_state(target, old._replace(m=old.m | {"b": jnp.ones(3)}))
    with pytest.raises(ValueError, match=r"insert has no leaf at \['b'\]"):
        insert_state(target, old._replace(u={"a": old.u["a"]}))
    with pytest.raises(ValueError, match=r"state has no leaf at \['c'\], where"):
        insert_state(target, old._replace(m=old.m | {"c": jnp.ones(3)}))


def test_insert_state_needs_one_state():
    ours, theirs = adamax().init(PARAMS), optax.adam(0.1).init(PARAMS)
    with pytest.raises(ValueError, match=r"The state holds no ScaleByAdamaxState"):
        insert_state(theirs, ours)
    with pytest.raises(ValueError, match=r"The adamax_state holds no ScaleByAdamaxSt"):
        insert_state(ours, theirs)


# A u that is shared along axes.


def test_insert_state_goes_from_rows_to_columns():
    rows, columns = adamax(shared_axes=-1), adamax(shared_axes=0)
    for shape in ((4, 4), (2, 0), (4, 4, 2)):
        params = np.ones(shape, np.float32)
        old, new, plain = (o.init(params) for o in (rows, columns, adamax()))
        for target, given in ((new, old), (plain, new), (new, plain)):
            assert insert(target, given)[0].u.shape == target[0].u.shape


def test_insert_state_of_an_ensemble():
    rows, element_wise = adamax(shared_axes=-1), adamax()

    @jax.jit
    @jax.vmap
    def inserted(g):
        _, old = element_wise.update(g, element_wise.init(g))
        return insert_state(rows.init(g), old)

    new = inserted(np.ones([3, 4, 6], np.float32))
    assert new[0].u.shape == (3, 4, 1)
    np.testing.assert_array_equal(new[0].count, [1, 1, 1])


MATRICES = np.float32(gradients(40, size=24)).reshape(40, 4, 6)


def test_a_run_goes_on_with_a_shared_u_as_if_it_always_had_been():
    """And the other way round with a repeated one."""
    g = MATRICES
    rows, element_wise = adamax(shared_axes=-1), adamax()
    _, shared = train(rows, g[0], rows.init(g[0]), g[:20])
    _, plain = train(element_wise, g[0], element_wise.init(g[0]), g[:20])
    inserted = insert(rows.init(g[0]), plain)
    jax.tree.map(np.testing.assert_array_equal, inserted, shared)
    repeated = insert(element_wise.init(g[0]), shared)
    assert repeated[0].u.shape == (4, 6)
    np.testing.assert_array_equal(
        repeated[0].u, np.broadcast_to(shared[0].u, (4, 6)), strict=True
    )
    for storage in ({"m_dtype": "int8"}, STORAGES["two bytes"]):
        narrow = convert(plain, **storage)
        inserted = insert(adamax(shared_axes=-1, **storage).init(g[0]), narrow)
        m, u = jax.device_get(read(inserted))
        expected, element_wise_u = jax.device_get(read(narrow))
        largest = np.asarray(element_wise_u).max(-1, keepdims=True)
        np.testing.assert_array_equal(u, largest, strict=True)
        # Rounded once more: in int8 at most half of 1.8 % of u.
        assert np.all(np.abs(m - expected) <= 0.01 * np.asarray(u))
    with pytest.raises(ValueError, match=r"shape \(4, 6\)"):
        insert_state(adamax(shared_axes=-1).init(jnp.ones([4, 5])), plain)


def test_a_shared_u_is_read_as_any_other():
    optimizer = adamax(shared_axes=-1)
    init = optimizer.init(MATRICES[0])
    _, state = train(optimizer, MATRICES[0], init, MATRICES[:30])
    m, u = jax.device_get(read(state))
    assert m.shape == (4, 6) and u.shape == (4, 1)
    nu = to_optax(state)[0].nu
    np.testing.assert_array_equal(nu, np.broadcast_to(u, (4, 6)), strict=True)
    assert from_optax(to_optax(state))[0].u.shape == (4, 6)
    total = jax.jit(diagnose)(state).total
    ratio = np.abs(m) / u
    np.testing.assert_allclose(total["rms"], np.sqrt(np.mean(ratio**2)), rtol=1e-5)
    np.testing.assert_allclose(total["max"], ratio.max(), rtol=1e-5)
    # The first coordinate of all, which shares a u that is not eps.
    assert total["unseen"] == 0
    narrow = convert(state, **STORAGES["two bytes"])
    assert narrow[0].u.shape == (4, 1) and narrow[0].u.dtype == jnp.uint8
    np.testing.assert_allclose(read(narrow)[1], u, rtol=ROUNDING_OF_U["two bytes"])


def test_a_state_that_was_fetched_takes_another():
    """NumPy arrays have no sharding."""
    params = {"a": jnp.ones(3)}
    given = adamax(0.1).init(params)[0]._replace(count=jnp.int32(3))
    state = insert_state(jax.device_get(adamax(0.1).init(params)), given)
    assert int(state[0].count) == 3
