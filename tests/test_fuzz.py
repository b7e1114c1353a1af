"""Random trees, storages, hyperparameters and gradients, held to the paper.

The suite draws a few cases for each property, the same in every run.
``python -m pytest tests/test_fuzz.py --hypothesis-profile=fuzz`` draws hundreds for
each, others every time.
"""

import dataclasses
import functools
import pickle
from typing import Any, NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import reference
from hypothesis import assume, given, settings
from versions import enable_x64

from adamax_jax import convert_state, moments, scale_by_adamax

STEPS = 4
# Each case is compiled anew, most of them in one way, and some in several.
MANY = settings(max_examples=settings().max_examples // 3)
FEW = settings(max_examples=settings().max_examples // 6)


class Pair(NamedTuple):
    left: Any
    right: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Checked:
    """Looks at what is put into it."""

    inside: Any

    def __post_init__(self):
        leaves = jax.tree.leaves(self.inside)
        # jax.vmap itself puts bare objects into containers, in JAX 0.6.
        assert all(hasattr(x, "shape") or type(x) is object for x in leaves)


@jax.tree_util.register_pytree_node_class
class Module:
    """Can be called, as the modules of Equinox can."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, x):
        return self.weight * x

    def tree_flatten(self):
        return (self.weight,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


CONTAINERS = (
    lambda a, b: {"a": a, "b": b},
    lambda a, b: [a, (b,)],
    lambda a, b: Pair(a, {"b": b, "none": None}),
    lambda a, b: {"a": a, "masked": optax.MaskedNode(), "c": [b, None]},
    lambda a, b: {"checked": Checked(a), "b": (b, ())},
    lambda a, b: Module(Checked([Module(a), b])),
)
SHAPES = ((), (3,), (2, 3), (0,), (2, 1, 2))


@dataclasses.dataclass
class Storage:
    """What m and u are stored in, and what that rounds in one step at most."""

    dtypes: dict[str, str]
    m: float = 0  # relative to m
    m_near_0: float = 0  # relative to u
    u: float = 0
    largest: float = 1e15
    smallest: float = 1e-15

    @property
    def is_wide(self):
        return not self.m and not self.u


# Relative to m, and to u where m/u is small: the distance of two numbers.
OF_M = {
    "float32": (0, 0),
    "bfloat16": (2**-7, 0),
    "int8": (1 / 16, 4e-4),
}
OF_U = {"float32": 0, "bfloat16": 2**-8, "uint8": 1 / 8}
ENDS = {"uint8": (1e9, 1e-8)}


def storage(m_dtype, u_dtype):
    return Storage(
        {"m_dtype": m_dtype, "u_dtype": u_dtype},
        *OF_M[m_dtype],
        OF_U[u_dtype],
        *ENDS.get(u_dtype, ()),
    )


STORAGES = (
    storage("float32", "float32"),
    storage("float32", "uint8"),
    storage("bfloat16", "bfloat16"),
    storage("bfloat16", "uint8"),
    storage("int8", "uint8"),
    storage("int8", "float32"),
    storage("int8", "bfloat16"),
)
COMPLEX = (
    Storage({}),
    Storage({"u_dtype": "bfloat16"}, u=OF_U["bfloat16"]),
    Storage({"u_dtype": "uint8"}, 0, 0, OF_U["uint8"], *ENDS["uint8"]),
)


@dataclasses.dataclass
class Case:
    params: Any
    gradients: list[Any]
    storage: Storage
    options: dict[str, Any]

    @functools.cached_property
    def optimizer(self):
        return scale_by_adamax(**self.options, **self.storage.dtypes)

    @functools.cached_property
    def compiled(self):
        """One program, where a test is not about what is done eagerly."""
        optimizer = self.optimizer
        return optimizer._replace(update=jax.jit(optimizer.update))

    def __repr__(self):
        """What is needed to see it; the numbers are drawn from a seed."""
        shapes = [f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(self.params)]
        structure = jax.tree.structure(self.params)
        return f"Case({structure}, {shapes}, {self.storage.dtypes}, {self.options})"


@st.composite
def cases(draw, specials=False, has_reference=False):
    """A tree of parameters, gradients for some steps, and an optimizer's options."""
    dtype = draw(st.sampled_from(["float32", "float32", "bfloat16", "complex64"]))
    is_complex = dtype == "complex64"
    container = draw(st.sampled_from(CONTAINERS))
    shapes = draw(st.tuples(st.sampled_from(SHAPES), st.sampled_from(SHAPES)))
    stored = draw(st.sampled_from(COMPLEX if is_complex else STORAGES))
    b1, b2 = draw(st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.5, 0.98)]))
    options = {
        "b1": b1,
        "b2": b2,
        "eps": draw(st.sampled_from([1e-8, 0.0, 1e-3])),
        "nesterov": draw(st.booleans()),
        "eps_inside": draw(st.booleans()),
        "shared_axes": draw(st.sampled_from([None, None, -1, 0])),
    }
    # A narrow u grows by one of its numbers at least, and a shared one as a whole.
    is_plain = stored.is_wide and options["shared_axes"] is None
    if is_plain or not has_reference:
        options["max_growth"] = draw(st.sampled_from([None, 1.25, 3.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    decades = draw(st.sampled_from([1, 6, 30]))

    def numbers(shape):
        size = 10.0 ** rng.uniform(-decades / 2, decades / 2, shape)
        size = np.clip(size, stored.smallest, stored.largest)
        x = np.where(rng.random(shape) < 0.15, 0, rng.choice([-1, 1], shape) * size)
        if specials:
            special = rng.choice([np.nan, np.inf, -np.inf, 1e-42, -3e38], shape)
            x = np.where(rng.random(shape) < 0.1, special, x)
        return x

    def gradient(shape):
        if not is_complex:
            return np.float32(numbers(shape))
        parts = np.stack([numbers(shape), numbers(shape)], axis=-1)
        return parts.astype(np.float32).view(np.complex64)[..., 0]

    params = container(*(np.ones(shape, dtype) for shape in shapes))
    g_dtype = "complex64"
    if not is_complex:
        g_dtype = jnp.dtype(draw(st.sampled_from(["float32", dtype, "bfloat16"])))
    gradients = [
        container(*(gradient(x).astype(g_dtype) for x in shapes)) for _ in range(STEPS)
    ]
    return Case(params, gradients, stored, options)


def in_float64(x):
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def arrays(tree):
    return jax.tree.leaves(tree)


def leaves(tree):
    return [in_float64(x) for x in jax.tree.leaves(tree)]


def steps(update, state, gradients):
    """The updates and the states after each step."""
    for g in gradients:
        updates, state = update(g, state)
        yield updates, state


def references(case):
    """The exact steps of each leaf; a shared u is the largest of its slice."""
    options = {k: v for k, v in case.options.items() if k != "shared_axes"}
    axis = case.options["shared_axes"]
    for sequence in zip(*map(leaves, case.gradients), strict=True):
        run = list(reference.adamax(sequence, **options))
        if axis is not None and sequence[0].ndim > 1:
            largest = [np.max(e.u, axis, keepdims=True, initial=0) for e in run]
            run = [
                e._replace(u=np.broadcast_to(u, e.u.shape))
                for e, u in zip(run, largest, strict=True)
            ]
        yield run


# A float32 computation of some operations, beside the same in float64.
ARITHMETIC = 2e-6


@MANY
@given(cases(has_reference=True))
def test_every_step_is_the_papers(case):
    """u is the exact one rounded once, m the mean of the stored one and the gradient
    rounded once, and the step the paper's formula of both as they are stored."""
    b1, stored = case.options["b1"], case.storage
    is_exact = stored.is_wide and case.options["shared_axes"] is None
    exact = zip(*references(case), strict=True)
    optimizer = case.compiled
    state = optimizer.init(case.params)
    read = jax.jit(moments)
    before = leaves(read(state)[0])
    run = steps(optimizer.update, state, case.gradients)
    for t, ((updates, state), g, exact_t) in enumerate(
        zip(run, case.gradients, exact, strict=True), 1
    ):
        assert int(state.count) == t
        of_step = ARITHMETIC + float(
            max(jnp.finfo(x.dtype).eps for x in arrays(updates))
        )
        after, u_after = map(leaves, read(state))
        for step, m, u, old_m, g_t, e in zip(
            leaves(updates), after, u_after, before, leaves(g), exact_t, strict=True
        ):
            u = np.broadcast_to(u, m.shape)
            held = (e.u == 0) | (e.u >= stored.smallest / 16)
            np.testing.assert_allclose(u[held], e.u[held], rtol=stored.u + ARITHMETIC)
            assert np.all(u[~held] < stored.smallest)
            if is_exact:
                np.testing.assert_allclose(step, e.update, rtol=of_step, atol=of_step)
                assert np.all(np.abs(m - e.m) <= ARITHMETIC * e.u)
                continue
            mean = b1 * old_m + (1 - b1) * g_t
            room = stored.m * np.abs(mean) + (stored.m_near_0 + ARITHMETIC) * u
            assert np.all(np.abs(m - mean) <= room)
            by_hand = step_from(m, u, g_t, t, **case.options)
            np.testing.assert_allclose(step, by_hand, rtol=of_step, atol=of_step)
        before = after


def step_from(m, u, g, t, *, b1, eps, nesterov, eps_inside, **_):
    m_hat = m / (1 - b1**t)
    if nesterov:
        m_hat = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
    bottom = u if eps_inside else u + eps
    # 0/0 is 0.
    return np.divide(m_hat, bottom, out=np.zeros_like(m_hat), where=bottom > 0)


def assert_equal(actual, expected):
    """To the bit; any NaN is any other."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(arrays(actual), arrays(expected), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_array_equal(in_float64(x), in_float64(y))


def assert_close(actual, expected):
    """As close as compilers leave it, which fuse a product and a sum as they like.

    Wide numbers differ in their last bits. Of the narrow ones of an array at most one
    was so near to the middle of two that it was rounded the other way.
    """
    (updates, state), (other_updates, other_state) = actual, expected
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert [x.dtype for x in arrays(actual)] == [x.dtype for x in arrays(expected)]
    np.testing.assert_array_equal(state.count, other_state.count)
    np.testing.assert_allclose(state.u_scale, other_state.u_scale, rtol=1e-5)
    of_step = 1e-4 + float(max(jnp.finfo(x.dtype).eps for x in arrays(updates)))
    for step, other_step, m, other_m, u, other_u, exact_u in zip(
        *map(leaves, (updates, other_updates)),
        *map(arrays, (state.m, other_state.m, state.u, other_state.u)),
        leaves(jax.jit(moments)(other_state)[1]),
        strict=True,
    ):
        same_u = is_same(u, other_u, 0)
        # Beside another u everything is another.
        beside = np.broadcast_to(same_u, m.shape)
        same_m = is_same(m, other_m, np.broadcast_to(exact_u, m.shape))
        assert np.sum(~same_u) <= 1
        assert np.sum(~same_m & beside) <= 1
        same = beside & same_m
        for x, y in zip(parts(step), parts(other_step), strict=True):
            np.testing.assert_allclose(x[same], y[same], rtol=of_step, atol=1e-4)


def is_same(x, y, unit):
    """Where stored numbers are the same, of 32 bits and more up to rounding."""
    is_narrow = x.dtype.itemsize < 4
    x, y = in_float64(x), in_float64(y)
    if is_narrow:
        return (x == y) | (np.isnan(x) & np.isnan(y))
    size = np.where(np.isfinite(unit), unit, 0)
    pairs = zip(parts(x), parts(y), strict=True)
    with np.errstate(invalid="ignore"):
        close = [
            (np.abs(a - b) <= 1e-5 * (np.abs(b) + size))
            | (a == b)
            | (np.isnan(a) & np.isnan(b))
            for a, b in pairs
        ]
    return np.all(close, axis=0)


def parts(x):
    """An undefined part says nothing of the other one."""
    return (x.real, x.imag) if np.iscomplexobj(x) else (x,)


def last_of(run):
    *_, last = run
    return last


def last_of_loop(optimizer, case):
    """The last update and state."""
    state = optimizer.init(case.params)
    return last_of(steps(optimizer.update, state, case.gradients))


def plainly(case):
    """Those of a loop that is not compiled."""
    return last_of_loop(case.optimizer, case)


def stacked(trees):
    return jax.tree.map(lambda *x: np.stack(x), *trees)


def in_a_scan(optimizer, params, gradients):
    """The last update and state."""

    def step(state, g):
        updates, state = optimizer.update(g, state)
        return state, updates

    state, updates = jax.lax.scan(step, optimizer.init(params), gradients)
    return jax.tree.map(lambda x: x[-1], updates), state


@FEW
@given(cases(specials=True))
def test_a_compiled_scan_is_the_loop(case):
    scan = jax.jit(lambda *args: in_a_scan(case.optimizer, *args))
    assert_close(scan(case.params, stacked(case.gradients)), plainly(case))


@FEW
@given(cases(specials=True), st.booleans())
def test_vmap_is_a_loop(case, is_compiled):
    """Over runs whose gradients come in another order each."""
    orders = [case.gradients, case.gradients[::-1]]
    batch = jax.vmap(case.optimizer.update)
    state = jax.vmap(case.optimizer.init)(stacked([case.params, case.params]))
    update = jax.jit(batch) if is_compiled else batch
    last = last_of(steps(update, state, map(stacked, zip(*orders, strict=True))))
    last = jax.device_get(last)
    for i, order in enumerate(orders):
        one = jax.tree.map(lambda x, i=i: x[i], last)
        alone = plainly(dataclasses.replace(case, gradients=order))
        assert_close(one, alone)


@MANY
@given(cases(specials=True), st.integers(1, STEPS - 1))
def test_a_resumed_run_is_the_uninterrupted_one(case, at):
    """Pickled and put together again, to the bit."""
    update = case.compiled.update
    first, rest = case.gradients[:at], case.gradients[at:]
    _, state = last_of(steps(update, case.optimizer.init(case.params), first))
    structure = jax.tree.structure(state)
    saved = pickle.dumps([np.asarray(x) for x in arrays(state)])
    state = jax.tree.unflatten(structure, map(jnp.asarray, pickle.loads(saved)))
    expected = last_of_loop(case.compiled, case)
    assert_equal(last_of(steps(update, state, rest)), expected)


WRAPPERS = {
    "chain": optax.chain,
    "masked": lambda optimizer: optax.masked(optimizer, True),
    "partition": lambda optimizer: optax.partition({"all": optimizer}, "all"),
    "apply_if_finite": lambda optimizer: optax.apply_if_finite(optimizer, 3),
    "with_extra_args": optax.with_extra_args_support,
    "MultiSteps": lambda optimizer: optax.MultiSteps(
        optimizer, 1
    ).gradient_transformation(),
}


@FEW
@given(cases(), st.sampled_from(sorted(WRAPPERS)))
def test_wrappers_change_nothing(case, name):
    """Operation by operation, so that nothing is fused: to the bit."""
    # It casts to real dtypes.
    assume(name != "MultiSteps" or not any(map(jnp.iscomplexobj, arrays(case.params))))
    wrapped = WRAPPERS[name](case.optimizer)
    standard = jax.numpy_dtype_promotion("standard")
    gradients = case.gradients[:2]
    with jax.disable_jit(), standard:
        expected = steps(
            case.optimizer.update, case.optimizer.init(case.params), gradients
        )
        actual = steps(wrapped.update, wrapped.init(case.params), gradients)
        for (updates, _), (other, _) in zip(actual, expected, strict=True):
            assert_equal(updates, other)


@FEW
@given(cases(), st.booleans())
def test_traced_hyperparameters_are_the_numbers(case, in_64_bits):
    """Handed to a compiled function, in either precision."""
    traced = {k: v for k, v in case.options.items() if type(v) is float}
    static = {k: v for k, v in case.options.items() if k not in traced}
    static |= case.storage.dtypes

    @jax.jit
    def run(traced):
        optimizer = scale_by_adamax(**static, **traced)
        return in_a_scan(optimizer, case.params, stacked(case.gradients))

    with enable_x64(in_64_bits):
        dtype = jnp.float64 if in_64_bits else jnp.float32
        actual = run({k: jnp.asarray(v, dtype) for k, v in traced.items()})
    assert_close(actual, plainly(case))


@MANY
@given(cases(specials=True))
def test_a_bad_gradient_harms_its_own_u_alone(case):
    """All else is as with a zero in its place; what it harms is not hidden."""
    clean = [
        jax.tree.map(lambda g: np.where(np.isfinite(g), g, 0).astype(g.dtype), gradient)
        for gradient in case.gradients
    ]
    updates, state = last_of_loop(case.compiled, case)
    other, _ = last_of_loop(case.compiled, dataclasses.replace(case, gradients=clean))
    for x, y, u, *sequence in zip(
        *map(leaves, [updates, other]),
        arrays(state.u),
        *map(leaves, case.gradients),
        strict=True,
    ):
        assert np.all(np.isnan(x)[np.any(np.isnan(sequence), axis=0)])
        bad = ~np.all(np.isfinite(sequence), axis=0)
        axes = tuple(i for i in range(bad.ndim) if u.shape[i] != bad.shape[i])
        harmed = np.broadcast_to(np.any(bad, axes, keepdims=True), bad.shape)
        np.testing.assert_array_equal(x[~harmed], y[~harmed])


@MANY
@given(cases(), st.sampled_from(STORAGES))
def test_a_conversion_keeps_what_both_storages_hold(case, to):
    if any(np.iscomplexobj(p) for p in arrays(case.params)):
        to = COMPLEX[0]
    _, state = last_of_loop(case.compiled, case)

    @jax.jit
    def converted_and_moments(state):
        converted = convert_state(state, **to.dtypes)
        return converted, moments(state), moments(converted)

    converted, before, after = converted_and_moments(state)
    assert int(converted.count) == STEPS
    for m, u, new_m, new_u in zip(
        *map(leaves, before), *map(leaves, after), strict=True
    ):
        inside = (u <= to.largest) & ((u >= to.smallest) | (u == 0))
        np.testing.assert_allclose(new_u[inside], u[inside], rtol=to.u + ARITHMETIC)
        room = to.m * np.abs(m) + (to.m_near_0 + ARITHMETIC) * np.maximum(u, new_u)
        assert np.all((np.abs(m - new_m) <= room) | ~inside)
