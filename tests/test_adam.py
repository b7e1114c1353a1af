"""Adam in the place of Optax's: the same numbers, the same arguments, fewer bytes."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sequences
from sequences import (
    AFTER,
    BEFORE,
    PARAMS,
    SCHEDULE,
    TREES,
    gradients,
    long_but,
    train,
    trajectory,
)
from versions import needs_new_optax

import adamax_jax
from adamax_jax import (
    ScaleByAdamaxState,
    ScaleByLpAdamState,
    adam,
    adamax,
    adamw,
    convert_state,
    diagnose,
    from_optax,
    full_params,
    insert_state,
    lp_adam,
    master_weights,
    moments,
    scale_by_adam,
    scale_by_lp_adam,
    to_optax,
)

TWO_BYTES = sequences.STORAGES["two bytes"]
STORAGES = {
    "8 bytes": {},
    "4 bytes": sequences.STORAGES["bfloat16"],
    "3 bytes": {"m_dtype": "int8", "u_dtype": "bfloat16"},
    "2 bytes": TWO_BYTES,
}
EVERY_STORAGE = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
# Half the distance of two stored numbers of u, relative to them.
HALF_A_STEP = {"float32": 0, "bfloat16": 2**-8, "uint8": 1 / 8}

# An eager call compiles a program for each operation and shape.
compiled_from_optax = jax.jit(from_optax, static_argnames="adam_b2")
compiled_to_optax = jax.jit(to_optax, static_argnames="adam_b2")
convert = jax.jit(convert_state, static_argnames=["m_dtype", "u_dtype"])
insert = jax.jit(insert_state, static_argnames="missing")
read = jax.jit(moments)

pytestmark = pytest.mark.usefixtures("lenient")


def exact_updates(g, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0):
    """Algorithm 1 of the paper in float64, with Optax's eps_root."""
    m = v = np.zeros(g.shape[1:])
    updates = []
    for t, now in enumerate(np.asarray(g, np.float64), 1):
        m = b1 * m + (1 - b1) * now
        v = b2 * v + (1 - b2) * now**2
        v_hat = v / (1 - b2**t)
        updates.append(m / (1 - b1**t) / (np.sqrt(v_hat + eps_root) + eps))
    return np.array(updates)


OPTIONS = [
    {},
    {"b1": 0.8, "b2": 0.95, "eps": 1e-3},
    {"eps_root": 1e-4},
    {"b1": 0.0, "b2": 0.0},
]


@pytest.mark.parametrize("traced", [False, True], ids=["numbers", "traced"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_adam_is_adam(options, traced):
    """Against float64, and no further from it than Optax in float32."""
    g = np.float32(gradients(1000))
    exact = exact_updates(g, **options)

    def run(numbers, g):
        return trajectory(scale_by_adam(**numbers), g)[0]

    if traced:
        # In float32 0.999 is another number, by a hundred-thousandth of 1 - 0.999.
        numbers = jax.tree.map(np.float32, options)
        exact = exact_updates(g, **jax.tree.map(float, numbers))
        updates = jax.jit(run)(numbers, g)
    else:
        updates = run(options, g)
    optaxs, _ = trajectory(optax.scale_by_adam(**options), g)
    error = np.max(np.abs(updates - exact) / (1 + np.abs(exact)))
    optaxs_error = np.max(np.abs(optaxs - exact) / (1 + np.abs(exact)))
    assert error < 1e-5
    assert error < 2 * optaxs_error or error < 1e-6


@pytest.mark.parametrize("options", [*OPTIONS, {"nesterov": True}], ids=str)
def test_in_float64_it_is_optax(options, x64):
    g = gradients(300)
    ours, state = trajectory(scale_by_adam(**options), g)
    theirs, other = trajectory(optax.scale_by_adam(**options), g)
    np.testing.assert_allclose(ours, theirs, rtol=1e-7, atol=1e-12)
    t = np.arange(1, 301)[:, None]
    nu = other.nu / (1 - options.get("b2", 0.999) ** t)
    np.testing.assert_allclose(state.u**2, nu, rtol=1e-10)


@pytest.mark.parametrize("name", ["adam", "adamw", "scale_by_adam"])
def test_the_import_is_all_that_changes(name):
    """Optax's arguments, in their order, with their defaults."""

    def arguments(module):
        parameters = inspect.signature(getattr(module, name)).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    theirs = arguments(optax)
    assert arguments(adamax_jax)[: len(theirs)] == theirs


@needs_new_optax
def test_all_positional_arguments():
    mask = {"a": True, "b": False}
    options = (SCHEDULE, 0.8, 0.99, 1e-6, 1e-5, jnp.float32, 0.1, mask)
    ours, theirs = adamw(*options), optax.adamw(*options)
    actual, _ = train(ours, PARAMS, ours.init(PARAMS), TREES)
    expected, _ = train(theirs, PARAMS, theirs.init(PARAMS), TREES)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_mu_dtype_is_m_dtype():
    params = jnp.ones(3)
    for optimizer in (adam(0.1, mu_dtype="int8"), adam(0.1, m_dtype="int8")):
        assert optimizer.init(params)[0].m.dtype == jnp.int8
    assert adam(0.1, mu_dtype=jnp.bfloat16).init(params)[0].m.dtype == jnp.bfloat16


@pytest.mark.parametrize("size", [1e-25, 1e-15, 1.0, 1e15, 1e25])
def test_squares_neither_overflow_nor_vanish(size):
    """Where Optax's do: a step of 1e-25 or 1e25 is 0 or infinite there."""
    g = np.float32(size * gradients(200, decades=2))
    updates, _ = trajectory(scale_by_adam(eps=0.0), g)
    exact = exact_updates(g / np.float32(size), eps=1e-300)
    np.testing.assert_allclose(updates, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eps_root", [0.0, 1e-6])
def test_derivatives_through_a_step(eps_root):
    """Also of a gradient of 0, for which Optax needs an eps_root."""
    optimizer = scale_by_adam(eps=1e-3, eps_root=eps_root)

    def last(g):
        state = optimizer.init(g)
        for scale in (1.0, 0.5):
            update, state = optimizer.update(scale * g, state)
        return jnp.sum(update)

    g = np.float32([0.5, -2.0, 0.0])
    h = 1e-2
    value = jax.jit(last)
    numeric = [
        (value(g + step) - value(g - step)) / (2 * h)
        for step in h * np.eye(3, dtype=np.float32)[:2]
    ]
    backwards, forwards = jax.grad(last), jax.jacfwd(last)
    for derivative in (backwards, jax.jit(backwards), jax.jit(forwards)):
        actual = derivative(g)
        assert np.all(np.isfinite(actual))
        np.testing.assert_allclose(actual[:2], numeric, rtol=0.02, atol=1e-5)


def test_the_derivative_by_an_eps_root_of_zero():
    """As optax.inject_hyperparams traces it where nothing is said."""

    def travel(eps_root, library, size):
        optimizer = library.adam(0.1, eps_root=eps_root)
        state = optimizer.init(jnp.zeros(size))
        total = 0.0
        for g in ([1.0, 2.0, 0.0], [2.0, -1.0, 0.0]):
            update, state = optimizer.update(jnp.array(g[:size]), state)
            total += update
        return total[0] + 2 * total[1]

    # Where a gradient is 0, that of Optax is NaN.
    expected = jax.jit(jax.grad(travel), static_argnums=(1, 2))(0.0, optax, 2)
    ours = functools.partial(travel, library=adamax_jax, size=3)
    for derivative in (jax.grad, jax.jacfwd):
        actual = jax.jit(derivative(ours))(0.0)
        np.testing.assert_allclose(actual, expected, rtol=1e-3)


def test_u_remains_a_mean_where_b2_changes():
    """That of a constant gradient is this gradient, which Optax's is not."""

    def last(library):
        optimizer = optax.inject_hyperparams(library.adam)(
            1.0, b2=lambda count: 1 - (count + 1.0) ** -0.8
        )
        g = np.ones(1, np.float32)
        state = optimizer.init(g)
        step = jax.jit(optimizer.update)
        for _ in range(3):
            update, state = step(g, state)
        return float(update[0])

    assert last(adamax_jax) == pytest.approx(-1, rel=1e-5)
    assert last(optax) == pytest.approx(-0.894, abs=1e-3)


# States, from Optax and back.


PAIRS = sequences.pairs(optax.adam, adam) | {
    "adamw": (optax.adamw(0.1), adamw(0.1)),
    "mu_dtype": (optax.adam(0.1, mu_dtype="bfloat16"), adam(0.1, mu_dtype="bfloat16")),
}


@pytest.mark.parametrize(
    "name", long_but(["alone", "a schedule", "adamw", "adamaxw"], PAIRS)
)
def test_optax_continued_here_is_optax_uninterrupted(name):
    theirs, ours = PAIRS[name]
    params, state = train(theirs, PARAMS, theirs.init(PARAMS), BEFORE)
    expected, end = train(theirs, params, state, AFTER)
    state = compiled_from_optax(state, adam_b2=0.999)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, ours.init(PARAMS))
    actual, state = train(ours, params, state, AFTER)
    back = compiled_to_optax(state, adam_b2=0.999)
    if name == "mu_dtype":
        # Means are rounded up or down here, to nearest in Optax.
        chex.assert_trees_all_close(actual, expected, rtol=0.05, atol=0.05)
        chex.assert_trees_all_close(back[0].nu, end[0].nu, rtol=1e-4)
        return
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(back, end, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", long_but(["a schedule"], list(PAIRS)[:-1]))
def test_from_here_on_in_optax(name):
    theirs, ours = PAIRS[name]
    params, state = train(ours, PARAMS, ours.init(PARAMS), BEFORE)
    expected, end = train(ours, params, state, AFTER)
    actual, state = train(
        theirs, params, compiled_to_optax(state, adam_b2=0.999), AFTER
    )
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(
        compiled_from_optax(state, adam_b2=0.999), end, rtol=1e-4, atol=1e-5
    )


def test_a_state_before_the_first_step_and_one_of_complex_numbers():
    new = from_optax(optax.adam(0.1).init(PARAMS), adam_b2=0.999)
    chex.assert_trees_all_equal(new, adam(0.1).init(PARAMS))
    g = jnp.array([3 + 4j, -1j], jnp.complex64)
    theirs = optax.adam(0.1)
    _, state = theirs.update(g, theirs.init(g))
    (state, _) = from_optax(state, adam_b2=0.999)
    chex.assert_type(state.u, jnp.float32)
    np.testing.assert_allclose(state.u, [5, 1], rtol=1e-6)


def test_each_member_of_an_ensemble_has_its_own_count():
    together = jax.tree.map(lambda g: np.stack([g, 2 * g]), TREES[0])

    def after_a_step(optimizer):
        def state(g):
            return optimizer.update(g, optimizer.init(g))[1]

        return jax.jit(jax.vmap(state))(together)

    states = compiled_from_optax(after_a_step(optax.adam(0.1)), adam_b2=0.999)
    expected = after_a_step(adam(0.1))
    chex.assert_trees_all_close(states, expected, rtol=1e-5)
    for function in (
        moments,
        diagnose,
        functools.partial(convert_state, m_dtype="int8"),
    ):
        with pytest.raises(ValueError, match=r"shape \(2,\).*jax\.vmap"):
            function(states)
        jax.jit(jax.vmap(function))(states)


@EVERY_STORAGE
def test_a_running_adam_goes_on_in_few_bytes(storage):
    theirs, ours = optax.adam(0.01), adam(0.01, **storage)
    params, state = train(theirs, PARAMS, theirs.init(PARAMS), BEFORE)
    wide = compiled_from_optax(state, adam_b2=0.999)
    converted = convert(wide, **storage)
    chex.assert_trees_all_equal_shapes_and_dtypes(converted, ours.init(PARAMS))
    (m, u), (exact_m, exact_u) = jax.device_get((read(converted), read(wide)))
    for key in PARAMS:
        rounding = HALF_A_STEP[storage.get("u_dtype", "float32")]
        np.testing.assert_allclose(u[key], exact_u[key], rtol=rounding + 1e-6)
        # Half a code of m / (8 u): a sixteenth of it, or half of 2^-12 near 0.
        np.testing.assert_allclose(
            m[key],
            exact_m[key],
            rtol=0.2,
            atol=1e-8 + 8 * 2**-12 * np.max(exact_u[key]),
        )
    actual, _ = train(ours, params, converted, AFTER)
    expected, _ = train(theirs, params, state, AFTER)
    actual, expected, params = jax.device_get((actual, expected, params))
    for key in PARAMS:
        difference, travel = actual[key] - expected[key], expected[key] - params[key]
        assert np.std(difference) < 0.15 * np.std(travel)


@EVERY_STORAGE
@pytest.mark.parametrize("target", long_but(["2 bytes"], STORAGES))
def test_states_are_inserted_and_converted_alike(storage, target):
    target = STORAGES[target]
    _, state = train(
        adam(0.1, **storage), PARAMS, adam(0.1, **storage).init(PARAMS), BEFORE
    )
    new = adam(SCHEDULE, **target)
    inserted = insert(new.init(PARAMS), state)
    converted = convert(
        state, **({"m_dtype": "float32", "u_dtype": "float32"} | target)
    )
    chex.assert_trees_all_equal(inserted[0], converted[0])
    assert inserted[1].count == 20
    if storage is target:
        chex.assert_trees_all_equal(inserted[0], state[0])
    train(new, PARAMS, inserted, AFTER)


def test_what_is_missing_is_kept():
    """A new layer begins at 0, in a byte as well."""
    old = adam(0.1, **TWO_BYTES)
    _, state = train(
        old,
        {"a": PARAMS["a"]},
        old.init({"a": PARAMS["a"]}),
        [{"a": g["a"]} for g in BEFORE],
    )
    new = adam(0.1, **TWO_BYTES)
    kept = insert(new.init(PARAMS), state, missing="keep")
    chex.assert_trees_all_equal(kept[0].m["a"], state[0].m["a"])
    assert not np.any(kept[0].u["b"])


@EVERY_STORAGE
def test_figures_are_those_of_the_moments(storage):
    """In the last storage m is a ratio to 8 u, up to 10.4."""
    rare = [jax.tree.map(lambda g: np.float32(1e-4) * g, g) for g in BEFORE]
    rare += [jax.tree.map(np.ones_like, PARAMS)] * 3
    optimizer = adam(0.1, **storage)
    _, state = train(optimizer, PARAMS, optimizer.init(PARAMS), rare)
    (m, u), figures = jax.jit(lambda state: (moments(state), diagnose(state)))(state)
    for key in PARAMS:
        ratio = np.abs(np.asarray(m[key])) / np.maximum(np.asarray(u[key]), 1e-30)
        expected = np.sqrt(np.mean(ratio**2))
        np.testing.assert_allclose(
            figures.leaves[f"['{key}']"]["rms"], expected, rtol=1e-5
        )
    assert figures.total["saturated"] == 0
    assert str(figures)


def test_a_wide_u_beside_narrow_parameters(x64):
    """b2 is 1 in float32, but not in what is computed with."""
    adam(1e-3, b2=1 - 1e-9, u_dtype="float64").init(jnp.ones(2, jnp.float32))
    with pytest.raises(ValueError, match="is 1 in float32"):
        adam(1e-3, b2=1 - 1e-9).init(jnp.ones(2, jnp.float32))


def test_codes_that_were_cast_are_refused():
    state = adam(0.1, **TWO_BYTES).init(PARAMS)
    _, state = train(adam(0.1, **TWO_BYTES), PARAMS, state, BEFORE)
    cast = jax.tree.map(lambda x: x.astype(jnp.float32) if x.ndim else x, state)
    with pytest.raises(ValueError, match="codes of int8 that were cast"):
        moments(cast)


@pytest.mark.parametrize("make", [adam, adamax])
@pytest.mark.parametrize("steps", [1, 2, pytest.param(20, marks=pytest.mark.long)])
@pytest.mark.parametrize("b1", [0.0, 0.5, 0.9])
def test_whole_numbers_are_not_taken_for_codes(b1, steps, make):
    """Gradients that are multiples of 128 and 10, whose m and u are whole at first."""
    optimizer = make(1e-3, b1=b1)
    for sizes in ([200.0, 0.0, -10.0], [128.0, 64.0, 0.0], [1000.0, 500.0, 160.0]):
        state = optimizer.init(np.zeros(3, np.float32))
        for step in range(steps):
            g = np.float32(sizes) * np.float32(1 if step % 3 else -1)
            _, state = optimizer.update(g, state)
        chex.assert_trees_all_equal(moments(state), (state[0].m, state[0].u))
        for _ in range(steps):
            _, state = optimizer.update(np.float32(sizes), state)
            chex.assert_trees_all_equal(moments(state), (state[0].m, state[0].u))


# Adam for some parameters, AdaMax for others.


def test_adam_for_embeddings_and_adamax_for_the_rest():
    """As the README has it: rows that are rare train better with p = 2."""
    params = {"embedding": np.ones([64, 8], "f"), "kernel": np.ones([8, 8], "f")}
    optimizer = optax.partition(
        {
            "rare": adamw(1e-2, **TWO_BYTES),
            "dense": adamax(1e-2, b2=0.99, max_growth=2, **TWO_BYTES),
        },
        lambda params: {"embedding": "rare", "kernel": "dense"},
    )
    state = optimizer.init(params)
    sizes = [x.nbytes for x in jax.tree.leaves(state) if x.ndim]
    assert sum(sizes) == 2 * (64 * 8 + 8 * 8)

    @jax.jit
    def step(params, state, rows):
        def loss(params):
            return jnp.mean((params["embedding"][rows] @ params["kernel"]) ** 2)

        value, g = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(g, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for rows in np.random.default_rng(0).integers(0, 64, [200, 4]):
        params, state, value = step(params, state, rows)
        losses.append(float(value))
    assert losses[-1] < 0.01 * losses[0]

    figures = jax.jit(diagnose)(state)
    assert len(figures.names) == 2 and figures.total["unseen"] < 0.2
    wide = convert(state, m_dtype="float32", u_dtype="float32")
    kinds = [
        part.u
        for part in jax.tree.leaves(wide, is_leaf=lambda x: hasattr(x, "u"))
        if hasattr(part, "u")
    ]
    assert len(kinds) == 2
    assert {x.dtype for x in jax.tree.leaves(wide) if x.ndim} == {jnp.dtype("float32")}
    with pytest.raises(ValueError, match=r"holds 2 ScaleByAdamaxState or Scale"):
        moments(state)
    chex.assert_trees_all_equal_structs(
        state, jax.tree.map(jnp.asarray, jax.device_get(state))
    )


def test_a_model_in_bfloat16_with_two_bytes_each():
    """2 bytes of parameter, 2 of residual, 2 of state; and it trains."""
    params = {"w": np.full([32], 4.0, jnp.bfloat16)}
    exact = {"w": np.full([32], 4.0, np.float32)}
    optimizer = master_weights(adamw(1e-3, **TWO_BYTES))
    state = optimizer.init(params)
    assert sum(x.nbytes for x in jax.tree.leaves((params, state)) if x.ndim) == 6 * 32
    ones = [jax.tree.map(np.ones_like, params)] * 300
    full = full_params(*train(optimizer, params, state, ones))
    optimizer, ones = optax.adamw(1e-3), [jax.tree.map(np.ones_like, exact)] * 300
    exact, _ = train(optimizer, exact, optimizer.init(exact), ones)
    # Steps of 1e-3 on a weight of 4 are below half a unit of bfloat16.
    np.testing.assert_allclose(4 - np.mean(full["w"]), 4 - exact["w"], rtol=0.05)


# Errors.


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"mu_dtype is Optax's name of m_dtype"):
        adam(0.1, mu_dtype="bfloat16", m_dtype="int8")
    with pytest.raises(ValueError, match=r"mu_dtype must be None or one of .* float16"):
        adam(0.1, mu_dtype="float16")
    for rates, bound in (
        ({"b2": 0.8}, "inf"),
        ({"b1": 0.5}, "18.3"),
        ({"b2": 0.9999}, "22.9"),
    ):
        with pytest.raises(ValueError, match=rf"m / \(8 u\), .* it may reach {bound}"):
            adam(0.1, **rates, m_dtype="int8")
    adam(0.1, b2=0.95, m_dtype="int8")
    with pytest.raises(ValueError, match="eps_root must be finite and at least 0"):
        adam(0.1, eps_root=-1.0)
    with pytest.raises(ValueError, match=r"b2 must be in \[0, 1\)"):
        adamw(0.1, b2=1.0)


def test_errors_of_states():
    ours, maximum = adam(0.1).init(PARAMS), adamax(0.1).init(PARAMS)
    theirs = optax.adam(0.1).init(PARAMS)
    with pytest.raises(ValueError, match=r"give the optimizer's b2 as adam_b2"):
        to_optax(ours)
    with pytest.raises(ValueError, match=r"adam_b2 must be in \[0, 1\), got 1.0"):
        from_optax(theirs, adam_b2=1.0)
    with pytest.raises(
        ValueError, match="is a ScaleByAdamaxState, but the optimizer's"
    ):
        insert_state(ours, maximum)
    with pytest.raises(TypeError, match=r"from_optax converts .* b2 as adam_b2"):
        adam(0.1).update(PARAMS, theirs)
    with pytest.raises(TypeError, match="ScaleByLpAdamState, but this optimizer's"):
        adamax(0.1).update(PARAMS, ours)
    with pytest.raises(ValueError, match=r"with adam_b2 if its optimizer is an adam"):
        convert_state(theirs, m_dtype="int8")
    assert isinstance(from_optax(theirs)[0], ScaleByAdamaxState)
    assert isinstance(from_optax(theirs, adam_b2=0.9)[0], ScaleByLpAdamState)


def test_it_is_the_family_at_2():
    g = np.float32(gradients(300))
    for storage in STORAGES.values():
        ours, _ = trajectory(scale_by_adam(**storage), g)
        family, _ = trajectory(scale_by_lp_adam(2.0, b2=0.999**0.5, **storage), g)
        # The scalars are rounded otherwise, and so may be a code.
        assert np.mean(np.abs(ours - family) > 1e-4) < 0.01
    same = lp_adam(0.1, 2).init(PARAMS)
    chex.assert_trees_all_equal(insert_state(adam(0.1).init(PARAMS), same)[0], same[0])
