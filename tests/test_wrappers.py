"""AdaMax inside of Optax's wrappers, each against a run composed by hand."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sequences import STORAGES, gradients, long
from versions import needs_new_optax

from adamax_jax import ScaleByAdamaxState, adamax, adamaxw, scale_by_adamax

RATE = 0.1
STEPS = 6
# The storage of all that follows: its state has numbers of four dtypes.
TWO_BYTES = STORAGES["two bytes"]
BIAS_ALONE = {"bias": True, "kernel": False}


SHAPE = (2, 3)


def tree(flat):
    """Of one shape, since each operation is compiled for each shape."""
    bias, kernel = np.float32(flat).reshape(2, *SHAPE)
    return {"bias": jnp.asarray(bias), "kernel": jnp.asarray(kernel)}


PARAMS = tree(np.linspace(-1.0, 1.0, 12))
GRADIENTS = [tree(g) for g in gradients(steps=STEPS, size=12)]
ADAMAX, ADAMAXW = adamax(RATE, **TWO_BYTES), adamaxw(RATE, **TWO_BYTES)


@functools.cache
def by_itself(optimizer):
    """The same as :func:`run` gives, computed once."""
    return run(optimizer)


def run(optimizer, gradients=GRADIENTS, params=PARAMS, **extra):
    """The updates and the states after each step, operation by operation.

    Nothing is compiled as a whole, so no fusion can round the same arithmetic another
    way, and runs that are equal are equal to the bit.
    """
    updates, states = [], [optimizer.init(params)]
    with jax.disable_jit():
        for g in gradients:
            update, state = optimizer.update(g, states[-1], params, **extra)
            updates.append(update)
            states.append(state)
    return updates, states[1:]


def pick(trees, name):
    return [tree[name] for tree in trees]


def zeros(trees):
    return jax.tree.map(np.zeros_like, trees)


def types(tree):
    return jax.tree.map(jax.typeof, tree)


def multi_steps(optimizer, k):
    return optax.MultiSteps(optimizer, k).gradient_transformation()


def plateau(optimizer):
    return optax.chain(
        optimizer, optax.contrib.reduce_on_plateau(factor=0.5, patience=2)
    )


def largest(updates):
    return jnp.max(jnp.abs(updates["kernel"]))


WRAPPED = {
    "chain": lambda **kw: optax.chain(optax.clip(1.0), adamaxw(RATE, **kw)),
    "named_chain": lambda **kw: optax.named_chain(("adamax", adamax(RATE, **kw))),
    "partition": lambda **kw: optax.partition(
        {True: adamax(RATE, **kw), False: adamaxw(RATE / 2, **kw)}, BIAS_ALONE
    ),
    "masked": lambda **kw: optax.masked(adamaxw(RATE, **kw), BIAS_ALONE),
    "MultiSteps": lambda **kw: multi_steps(adamax(RATE, **kw), 2),
    "apply_if_finite": lambda **kw: optax.apply_if_finite(adamax(RATE, **kw), 3),
    "conditionally_transform": lambda **kw: optax.conditionally_transform(
        adamax(RATE, **kw), lambda step: step < 4
    ),
    "conditionally_mask": lambda **kw: optax.conditionally_mask(
        adamax(RATE, **kw), lambda step: step < 4
    ),
    "inject_hyperparams": lambda **kw: optax.inject_hyperparams(adamaxw)(
        optax.linear_schedule(RATE, 0.0, 10), **kw
    ),
    "lookahead": lambda **kw: optax.lookahead(
        adamax(RATE, **kw), sync_period=2, slow_step_size=0.5, reset_state=True
    ),
    "schedule_free": lambda **kw: optax.contrib.schedule_free(
        adamax(RATE, b1=0.0, **kw), RATE
    ),
    "flatten": lambda **kw: optax.flatten(adamaxw(RATE, **kw)),
    "freeze": lambda **kw: optax.chain(adamax(RATE, **kw), optax.freeze(BIAS_ALONE)),
    "selective_transform": lambda **kw: optax.selective_transform(
        adamax(RATE, **kw), freeze_mask=BIAS_ALONE
    ),
    "apply_every": lambda **kw: optax.chain(adamax(RATE, **kw), optax.apply_every(2)),
    "split_real_and_imaginary": lambda **kw: optax.contrib.split_real_and_imaginary(
        adamaxw(RATE, **kw)
    ),
    "reduce_on_plateau": lambda **kw: plateau(adamax(RATE, **kw)),
    "snapshot": lambda **kw: optax.chain(
        adamax(RATE, **kw), optax.snapshot("largest", largest)
    ),
}
# These mix dtypes in arithmetic of their own, which strict promotion refuses.
MIXES_DTYPES = {"MultiSteps", "apply_every", "lookahead", "reduce_on_plateau"}


def wrapped(name, **storage):
    """A wrapped optimizer, its parameters, and the arguments that it needs besides."""
    params, extra = PARAMS, {}
    if name == "lookahead":
        params = optax.LookaheadParams.init_synced(PARAMS)
    if name == "reduce_on_plateau":
        extra = {"value": jnp.float32(1.0)}
    return WRAPPED[name](**storage), params, extra


def promotion_of(name):
    return jax.numpy_dtype_promotion("standard" if name in MIXES_DTYPES else "strict")


# How far an update may be from that of single operations. Some ten operations round
# numbers below 2, by 1.2e-7 each. Fused another way, m may also fall to the int8 code
# beside: that is 3 % of a step at most, since codes lie closer where m/u is bounded by
# 1 - b1**t; and two steps are summed at most.
FUSED_ANOTHER_WAY = {"own": 1.2e-6, "two bytes": 2 * RATE * 0.03}


FIXED_TYPES = [
    # Its state is not of one type in older versions.
    pytest.param(name, marks=needs_new_optax if name == "reduce_on_plateau" else ())
    for name in WRAPPED
]


@pytest.mark.parametrize(
    "storage", ["own", pytest.param("two bytes", marks=pytest.mark.long)]
)
@pytest.mark.parametrize("name", FIXED_TYPES)
def test_one_trace_and_the_same_numbers_compiled(name, storage):
    optimizer, params, extra = wrapped(name, **STORAGES[storage])
    traces = []

    @jax.jit
    def step(g, state):
        traces.append(g)
        return optimizer.update(g, state, params, **extra)

    with promotion_of(name):
        updates, _ = run(optimizer, params=params, **extra)
        state = optimizer.init(params)
        fixed = types(state)
        for g, expected in zip(GRADIENTS, updates, strict=True):
            update, state = step(g, state)
            assert types(state) == fixed
            assert types(update) == types(expected)
            chex.assert_trees_all_close(
                update, expected, rtol=0, atol=FUSED_ANOTHER_WAY[storage]
            )
    assert len(traces) == 1


@pytest.mark.parametrize("name", FIXED_TYPES)
def test_types_are_fixed_where_m_and_u_have_others_than_the_gradients(name):
    """So that a compiled step of two bytes is traced once, too."""
    optimizer, params, extra = wrapped(name, **TWO_BYTES)
    with promotion_of(name):
        state = optimizer.init(params)
        update, after = jax.eval_shape(
            lambda g, state: optimizer.update(g, state, params, **extra),
            GRADIENTS[0],
            state,
        )
    assert types(after) == types(state)
    assert types(update) == types(params)


def test_chain_applies_one_after_the_other():
    chained, states = run(optax.chain(optax.clip(1.0), adamax(RATE, **TWO_BYTES)))
    clipped = [jax.tree.map(lambda g: np.clip(g, -1.0, 1.0), g) for g in GRADIENTS]
    steps, alone = run(scale_by_adamax(**TWO_BYTES), clipped)
    chex.assert_trees_all_equal(
        chained, jax.tree.map(lambda step: -np.float32(RATE) * np.asarray(step), steps)
    )
    chex.assert_trees_all_equal([state[1][0] for state in states], alone)


def test_named_chain_is_a_chain_with_names():
    clip, optimizer = optax.clip(1.0), ADAMAXW
    chained, states = run(optax.chain(clip, optimizer))
    named, named_states = run(optax.named_chain(("clip", clip), ("adamaxw", optimizer)))
    chex.assert_trees_all_equal(named, chained)
    for named_state, state in zip(named_states, states, strict=True):
        assert list(named_state) == ["clip", "adamaxw"]
        chex.assert_trees_all_equal(named_state["adamaxw"], state[1])


def test_partition_trains_each_part_as_if_alone():
    fast, slow = adamax(RATE, **TWO_BYTES), adamaxw(RATE / 10, **TWO_BYTES)
    optimizer = optax.partition(
        {"fast": fast, "slow": slow, "frozen": optax.set_to_zero()},
        {"bias": "fast", "kernel": "slow", "input": "frozen"},
    )
    params, *grads = ({**x, "input": jnp.ones(SHAPE)} for x in (PARAMS, *GRADIENTS))
    together, _ = run(optimizer, grads, params)
    bias, _ = run(fast, pick(GRADIENTS, "bias"), PARAMS["bias"])
    kernel, _ = run(slow, pick(GRADIENTS, "kernel"), PARAMS["kernel"])
    chex.assert_trees_all_equal(pick(together, "bias"), bias)
    chex.assert_trees_all_equal(pick(together, "kernel"), kernel)
    chex.assert_trees_all_equal(pick(together, "input"), [np.zeros(SHAPE)] * STEPS)


@pytest.mark.parametrize(
    "mask",
    [BIAS_ALONE, lambda params: {name: name == "bias" for name in params}],
    ids=["tree", "function"],
)
def test_masked_gradients_pass_and_the_others_train_as_if_alone(mask):
    optimizer = ADAMAXW
    masked, _ = run(optax.masked(optimizer, mask))
    whole, _ = by_itself(optimizer)
    chex.assert_trees_all_equal(pick(masked, "bias"), pick(whole, "bias"))
    chex.assert_trees_all_equal(pick(masked, "kernel"), pick(GRADIENTS, "kernel"))


def test_masks_nest_and_may_be_prefixes():
    optimizer = ADAMAXW
    inner_alone = {"inner": True, "outer": False}
    masked, states = run(
        optax.masked(optax.masked(optimizer, inner_alone), inner_alone),
        [{"inner": g, "outer": jnp.ones(SHAPE)} for g in GRADIENTS],
        {"inner": PARAMS, "outer": jnp.ones(SHAPE)},
    )
    whole, alone = by_itself(optimizer)
    chex.assert_trees_all_equal(pick(masked, "inner"), whole)
    chex.assert_trees_all_equal(pick(masked, "outer"), [np.ones(SHAPE)] * STEPS)
    for state, expected in zip(states, alone, strict=True):
        inner = state.inner_state.inner_state[0]
        for field in ("m", "u"):
            leaves = getattr(inner, field)
            assert leaves["outer"] == optax.MaskedNode()
            chex.assert_trees_all_equal(leaves["inner"], getattr(expected[0], field))


def test_multi_steps_of_one_are_none(lenient):
    optimizer = ADAMAXW
    every, states = run(multi_steps(optimizer, 1))
    plain, alone = by_itself(optimizer)
    chex.assert_trees_all_equal(every, plain)
    chex.assert_trees_all_equal([s.inner_opt_state for s in states], alone)


def test_multi_steps_of_three_step_along_the_mean(lenient):
    # Multiples of 6 have whole means of 2 and 3, so the running mean is exact.
    rng = np.random.default_rng(0)
    minis = 6.0 * rng.integers(-50, 50, [9, 12])
    means = minis.reshape(3, 3, 12).mean(1)
    optimizer = ADAMAXW
    every, states = run(multi_steps(optimizer, 3), [tree(g) for g in minis])
    plain, alone = run(optimizer, [tree(g) for g in means])
    chex.assert_trees_all_equal(every[2::3], plain)
    chex.assert_trees_all_equal([s.inner_opt_state for s in states[2::3]], alone)
    for waiting in (every[0::3], every[1::3]):
        chex.assert_trees_all_equal(waiting, zeros(waiting))


def test_apply_if_finite_goes_on_as_if_nothing_had_happened():
    optimizer = ADAMAXW
    bad = {**GRADIENTS[0], "bias": jnp.array([[1.0, jnp.nan, jnp.inf]] * 2)}
    guarded, states = run(
        optax.apply_if_finite(optimizer, max_consecutive_errors=2),
        [*GRADIENTS[:2], bad, bad, *GRADIENTS[2:], bad, bad, bad],
    )
    plain, alone = by_itself(optimizer)
    chex.assert_trees_all_equal(guarded[:2] + guarded[4:-3], plain)
    chex.assert_trees_all_equal(guarded[2:4], zeros(guarded[2:4]))
    for i in (2, 3):
        chex.assert_trees_all_equal(states[i].inner_state, alone[1])
    for i in (-3, -2):
        chex.assert_trees_all_equal(states[i].inner_state, alone[-1])
    # The third in a row is let through: its leaf is NaN, the others train on.
    np.testing.assert_array_equal(
        np.isfinite(guarded[-1]["bias"]), [[True, False, False]] * 2
    )
    assert np.isfinite(guarded[-1]["kernel"]).all()


@pytest.mark.parametrize(
    ("wrap", "otherwise"),
    [
        (optax.conditionally_transform, lambda gradients: gradients),
        (optax.conditionally_mask, zeros),
    ],
)
def test_a_condition_that_fails_keeps_the_state(wrap, otherwise):
    optimizer = ADAMAXW
    updates, states = run(wrap(optimizer, lambda step: step < 4))
    plain, alone = by_itself(optimizer)
    chex.assert_trees_all_equal(updates, plain[:4] + otherwise(GRADIENTS[4:]))
    for state in states[4:]:
        chex.assert_trees_all_equal(state.inner_state, alone[3])


def rebuilt_every_step(factory, hyperparameters, gradients, params):
    """The updates where each step has an optimizer of its own, of float32 scalars."""
    state = factory(**TWO_BYTES).init(params)
    updates = []
    for g, values in zip(gradients, hyperparameters, strict=True):
        values = {name: jnp.float32(value) for name, value in values.items()}
        with jax.disable_jit():
            update, state = factory(**values, **TWO_BYTES).update(g, state, params)
        updates.append(update)
    return updates, state


def inject_stateful_hyperparams(*args, **kwargs):
    with pytest.warns(DeprecationWarning, match="use inject_hyperparams"):
        return optax.inject_stateful_hyperparams(*args, **kwargs)


@pytest.mark.parametrize(
    ("inject", "dtype"),
    [
        long((optax.inject_hyperparams, jnp.float32)),
        (optax.inject_hyperparams, jnp.bfloat16),
        long((inject_stateful_hyperparams, jnp.bfloat16)),
    ],
)
def test_injected_schedules_are_an_optimizer_for_each_step(inject, dtype):
    schedules = {
        "learning_rate": optax.linear_schedule(0.5, 0.0, 8),
        "b1": optax.linear_schedule(0.5, 0.875, 3),
        "weight_decay": optax.linear_schedule(0.0, 0.25, 4),
    }
    numbers = {"b2": 0.999, "eps": 1e-8}
    values = [
        numbers | {name: schedule(i) for name, schedule in schedules.items()}
        for i in range(STEPS)
    ]
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    grads = [jax.tree.map(lambda g: g.astype(dtype), g) for g in GRADIENTS]
    optimizer = inject(adamaxw, hyperparam_dtype=jnp.float32)(**schedules, **TWO_BYTES)
    injected, states = run(optimizer, grads, params)
    by_hand, state = rebuilt_every_step(adamaxw, values, grads, params)
    chex.assert_trees_all_equal(injected, by_hand)
    chex.assert_trees_all_equal(states[-1].inner_state, state)


def test_an_injected_number_can_be_overwritten():
    optimizer = optax.inject_hyperparams(adamax)(RATE, **TWO_BYTES)
    rates = [RATE, RATE, 0.25, 0.25, 0.5, 0.5]
    values = [
        {"learning_rate": rate, "b1": 0.9, "b2": 0.999, "eps": 1e-8} for rate in rates
    ]
    by_hand, _ = rebuilt_every_step(adamax, values, GRADIENTS, PARAMS)
    state = optimizer.init(PARAMS)
    with jax.disable_jit():
        for g, rate, expected in zip(GRADIENTS, rates, by_hand, strict=True):
            state.hyperparams["learning_rate"] = jnp.float32(rate)
            update, state = optimizer.update(g, state, PARAMS)
            chex.assert_trees_all_equal(update, expected)


class HalvedByCaller(optax.schedules.StatefulSchedule):
    """A learning rate that is halved at each step that says so."""

    def init(self):
        return jnp.float32(1.0)

    def update(self, state, *, halve, **extra_args):
        return jnp.where(halve, state / 2, state)

    def __call__(self, state, **extra_args):
        return state


def test_a_stateful_schedule_sees_the_extra_arguments():
    injected, states = run(
        optax.inject_hyperparams(adamax)(HalvedByCaller(), **TWO_BYTES), halve=True
    )
    values = [
        {"learning_rate": 0.5**i, "b1": 0.9, "b2": 0.999, "eps": 1e-8}
        for i in range(STEPS)
    ]
    by_hand, _ = rebuilt_every_step(adamax, values, GRADIENTS, PARAMS)
    chex.assert_trees_all_equal(injected, by_hand)
    assert float(states[-1].hyperparams_states["learning_rate"]) == 0.5**STEPS


@pytest.mark.parametrize("reset", [False, True])
def test_lookahead_meets_half_way(lenient, reset):
    optimizer = ADAMAX
    ahead = optax.lookahead(
        optimizer, sync_period=3, slow_step_size=0.5, reset_state=reset
    )
    params = optax.LookaheadParams.init_synced(PARAMS)
    state = ahead.init(params)
    fast_state = optimizer.init(PARAMS)
    fast = slow = PARAMS
    with jax.disable_jit():
        for i, g in enumerate(GRADIENTS):
            update, state = ahead.update(g, state, params)
            params = optax.apply_updates(params, update)
            update, fast_state = optimizer.update(g, fast_state)
            fast = optax.apply_updates(fast, update)
            if i % 3 == 2:
                fast = slow = jax.tree.map(lambda f, s: (f + s) / 2, fast, slow)
                if reset:
                    fast_state = optimizer.init(PARAMS)
            # Sums in another order, of some ten numbers below 2.
            chex.assert_trees_all_close(params.fast, fast, rtol=0, atol=2e-6)
            chex.assert_trees_all_close(params.slow, slow, rtol=0, atol=2e-6)
            chex.assert_trees_all_equal(state.fast_state, fast_state)
            assert types(state.fast_state) == types(fast_state)


def test_schedule_free_averages_the_iterates():
    """Evaluated is the mean of what plain steps from the start reach."""
    optimizer = adamax(RATE, b1=0.0, **TWO_BYTES)
    free = optax.contrib.schedule_free(optimizer, RATE, b1=0.5)
    params, state = PARAMS, free.init(PARAMS)
    iterates = []
    z = jax.tree.map(np.float64, PARAMS)
    with jax.disable_jit():
        for g, update in zip(GRADIENTS, by_itself(optimizer)[0], strict=True):
            updates, state = free.update(g, state, params)
            params = optax.apply_updates(params, updates)
            z = jax.tree.map(lambda z, u: z + np.float64(u), z, update)
            iterates.append(z)
            mean = jax.tree.map(lambda *zs: np.mean(zs, axis=0), *iterates)
            evaluated = optax.contrib.schedule_free_eval_params(state, params)
            # A step rounds some ten numbers below 4, by 1.2e-7 each; six steps.
            chex.assert_trees_all_close(evaluated, mean, rtol=0, atol=1e-5)
            between = jax.tree.map(lambda x, z: (x + z) / 2, mean, z)
            chex.assert_trees_all_close(params, between, rtol=0, atol=1e-5)


def test_flattened_is_the_same_in_one_vector():
    optimizer = ADAMAXW
    flattened, states = run(optax.flatten(optimizer))
    plain, alone = by_itself(optimizer)
    chex.assert_trees_all_equal(flattened, plain)
    for flat, state in zip(states, alone, strict=True):
        assert flat[0].m.shape == flat[0].u.shape == (12,)
        for field in ("m", "u"):
            leaves = jax.tree.leaves(getattr(state[0], field))
            np.testing.assert_array_equal(
                getattr(flat[0], field), np.concatenate([np.ravel(x) for x in leaves])
            )


def test_frozen_parameters_stay():
    optimizer = ADAMAXW
    plain, alone = by_itself(optimizer)
    after, states = run(optax.chain(optimizer, optax.freeze(BIAS_ALONE)))
    instead, partial = run(optax.selective_transform(optimizer, freeze_mask=BIAS_ALONE))
    for updates in (after, instead):
        chex.assert_trees_all_equal(pick(updates, "kernel"), pick(plain, "kernel"))
        chex.assert_trees_all_equal(pick(updates, "bias"), [np.zeros(SHAPE)] * STEPS)
    # Frozen after the optimizer, they have a state; frozen instead of it, none.
    chex.assert_trees_all_equal([state[0] for state in states], alone)
    trained = partial[-1].inner_states["train"].inner_state[0]
    assert trained.m["bias"] == trained.u["bias"] == optax.MaskedNode()
    chex.assert_trees_all_equal(trained.m["kernel"], alone[-1][0].m["kernel"])


def test_apply_every_sums_the_steps(lenient):
    optimizer = ADAMAX
    every, _ = run(optax.chain(optimizer, optax.apply_every(3)))
    plain, _ = by_itself(optimizer)
    nothing = zeros(plain[0])
    by_hand = [
        update
        for i in (0, 3)
        for update in (
            nothing,
            nothing,
            jax.tree.map(
                lambda a, b, c: (a + b) + c, *jax.device_get(plain[i : i + 3])
            ),
        )
    ]
    chex.assert_trees_all_equal(every, by_hand)


def test_split_complex_parameters_are_two_real_ones(lenient):
    """In this way an int8 m serves complex parameters too."""
    optimizer = ADAMAXW
    imaginary = GRADIENTS[::-1]

    def compose(real, imaginary):
        parts = jax.device_get((real, imaginary))
        return jax.tree.map(
            lambda re, im: jnp.asarray(re + np.complex64(1j) * im), *parts
        )

    split, states = run(
        optax.contrib.split_real_and_imaginary(optimizer),
        [compose(re, im) for re, im in zip(GRADIENTS, imaginary, strict=True)],
        compose(PARAMS, PARAMS),
    )
    real_part, real_states = by_itself(optimizer)
    imaginary_part, _ = run(optimizer, imaginary)
    chex.assert_trees_all_equal(jax.tree.map(np.real, split), real_part)
    chex.assert_trees_all_equal(jax.tree.map(np.imag, split), imaginary_part)
    chex.assert_trees_all_equal(
        np.real(states[-1].inner_state[0].u["kernel"]), real_states[-1][0].u["kernel"]
    )


def test_a_plateau_halves_the_steps(lenient):
    """The first value is the best; after two that are no better comes a half."""
    optimizer = ADAMAX
    scaled, states = run(plateau(optimizer), value=jnp.float32(1.0))
    plain, alone = by_itself(optimizer)
    by_hand = [
        jax.tree.map(lambda u, scale=scale: np.float32(scale) * np.asarray(u), update)
        for scale, update in zip([1, 1, 0.5, 0.5, 0.25, 0.25], plain, strict=True)
    ]
    chex.assert_trees_all_equal(scaled, by_hand)
    chex.assert_trees_all_equal([state[0] for state in states], alone)


@needs_new_optax
def test_snapshot_and_monitor_measure_the_steps():
    optimizer = ADAMAX
    plain, _ = by_itself(optimizer)
    expected = [np.max(np.abs(update["kernel"])) for update in plain]
    updates, states = run(optax.chain(optimizer, optax.snapshot("largest", largest)))
    chex.assert_trees_all_equal(updates, plain)
    assert [optax.tree.get(state, "largest") for state in states] == expected

    ema = optax.measure_with_ema(largest, decay=0.5, debias=False)
    measures = {"largest": largest, "ema": ema}
    updates, states = run(optax.chain(optimizer, optax.monitor(measures)))
    chex.assert_trees_all_equal(updates, plain)
    assert [optax.tree.get(state, "largest") for state in states] == expected
    # Halves are exact, and the one sum of a step is rounded here as there.
    average = np.float32(0)
    for state, value in zip(states, expected, strict=True):
        average = np.float32(0.5) * average + np.float32(0.5) * value
        assert state[1].measurements["ema"] == average
    assert all(types(state) == types(states[0]) for state in states)


@pytest.mark.parametrize(
    "name",
    ["chain", "masked", "MultiSteps", "inject_hyperparams", "apply_if_finite"],
)
def test_map_params_finds_m_and_u_inside_of_wrappers(name):
    """And gives each the parameter that it belongs to."""
    optimizer = WRAPPED[name](**TWO_BYTES)

    def is_masked(node):
        return isinstance(node, optax.MaskedNode)

    marked = optax.tree.map_params(
        optimizer,
        lambda leaf, name: leaf if is_masked(leaf) else name,
        optimizer.init(PARAMS),
        {"bias": "of bias", "kernel": "of kernel"},
        transform_non_params=lambda leaf: "other",
        is_leaf=is_masked,
    )
    kernel = optax.MaskedNode() if name == "masked" else "of kernel"
    both = {"bias": "of bias", "kernel": kernel}
    adamax_state = optax.tree.get(marked, "ScaleByAdamaxState")
    assert adamax_state == ScaleByAdamaxState("other", both, both, "other")


def of_adamax(path, value):
    """Which count is meant, where a schedule counts too."""
    return getattr(path[-1], "tuple_name", None) == "ScaleByAdamaxState"


def test_the_state_is_found_and_set_by_name():
    schedule = optax.linear_schedule(RATE, 0.0, 10)
    optimizer = optax.apply_if_finite(adamaxw(schedule, **TWO_BYTES), 3)
    _, states = run(optimizer)
    inner, _, of_schedule = states[-1].inner_state
    assert optax.tree.get(states[-1], "ScaleByAdamaxState") is inner
    for name in ("m", "u", "u_scale"):
        assert optax.tree.get(states[-1], name) is getattr(inner, name)
    with pytest.raises(KeyError, match="Found multiple values for 'count'"):
        optax.tree.get(states[-1], "count")
    assert optax.tree.get(states[-1], "count", filtering=of_adamax) is inner.count

    fresh = optimizer.init(PARAMS)
    restored = optax.tree.set(fresh, of_adamax, **inner._asdict())
    chex.assert_trees_all_equal(restored.inner_state[0], inner)
    assert int(of_schedule.count) == STEPS
    assert int(restored.inner_state[2].count) == 0
