"""The figures of the state against what was put into it."""

import functools
import io

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sequences import EVERY_STORAGE, STORAGES, TWO_BYTES, long_but
from versions import AS_USERS_DO, as_users_compile

from adamax_jax import (
    Diagnosis,
    ScaleByAdamaxState,
    adamax,
    convert_state,
    diagnose,
    moments,
)

FIGURES = {"rms", "max", "unseen", "stale", "decades", "saturated"}
# A uint8 u is known to a ninth of itself, and with it m/u. A bfloat16 m stands still
# when what it lacks, times 1 - b1, is less than half an ulp.
OFF_A_STEP = {"own": 1e-5, "bfloat16": 0.02 + 2**-8, "two bytes": 0.13}


# An eager call compiles a program for each operation and shape.
compiled = jax.jit(diagnose, static_argnames=("eps", "depth"))


def state_of(m, u):
    return ScaleByAdamaxState(np.int32(1), m, u, np.float32(1))


def run(optimizer, gradients):
    update, state = jax.jit(optimizer.update), optimizer.init(gradients[0])
    for g in gradients:
        _, state = update(g, state)
    return state


def test_every_figure_of_a_state_written_by_hand():
    """Each from its definition: by the paper's symbols, in NumPy."""
    u = np.array([1e-8, 0.0, 1e-6, 1.0, 10.0, 100.0], np.float32)
    m = np.array([0.0, 0.0, -1e-6, 0.5, 1e-3, 99.0], np.float32)
    figures = diagnose(state_of(m, u)).total
    ratio = np.array([0, 0, 1, 0.5, 1e-4, 0.99])
    assert set(figures) == FIGURES
    assert figures["rms"] == pytest.approx(np.sqrt(np.mean(ratio**2)))
    assert figures["max"] == pytest.approx(1)
    assert figures["unseen"] == pytest.approx(2 / 6)
    assert figures["stale"] == pytest.approx(1 / 4)
    assert figures["decades"] == pytest.approx(8)
    assert figures["saturated"] == 0


def test_the_total_puts_the_parameters_together_by_their_sizes():
    rng = np.random.default_rng(0)
    sizes = {"a": (7,), "b": (50, 3), "c": ()}
    u = {name: np.float32(rng.uniform(0, 2, shape)) for name, shape in sizes.items()}
    m = {name: np.float32(rng.uniform(-1, 1) * u[name]) for name in sizes}
    m["b"][:20] = 0
    u["b"][30:40] = 0
    m["b"][30:40] = 0
    diagnosis = compiled(state_of(m, u))
    flat = [np.concatenate([np.ravel(tree[name]) for name in sizes]) for tree in (m, u)]
    (alone,) = compiled(state_of(*flat)).leaves.values()
    for name in FIGURES:
        assert float(diagnosis.total[name]) == pytest.approx(float(alone[name]))
    assert set(diagnosis.leaves) == {"['a']", "['b']", "['c']"}
    assert diagnosis.leaves["['b']"]["unseen"] == pytest.approx(0.2)
    assert diagnosis.leaves["['b']"]["stale"] == pytest.approx(20 / 40)


@EVERY_STORAGE
@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize("eps_inside", [True, False])
def test_coordinates_without_gradients_are_counted_at_any_age(storage, eps, eps_inside):
    """To the coordinate, also where a narrow u has decayed and been rounded since."""
    optimizer = adamax(0.1, b2=0.95, eps=eps, eps_inside=eps_inside, **storage)
    rng = np.random.default_rng(0)
    g = rng.choice([-1.0, 1.0], [50, 40]).astype(np.float32)
    g[:, :13] = 0

    def step(state, g_t):
        state = optimizer.update(g_t, state)[1]
        return state, diagnose(state, eps).total["unseen"]

    run = jax.jit(lambda g: jax.lax.scan(step, optimizer.init(g[0]), g)[1])
    np.testing.assert_allclose(run(g), 13 / 40, rtol=1e-6)


def test_an_eps_below_the_smallest_number_of_a_dtype_is_no_gradient():
    g = np.float32([0.0, 1.0])
    state = run(adamax(u_dtype="uint8", eps=1e-11), [g] * 30)
    total = compiled(state, eps=1e-11).total
    assert total["unseen"] == 0.5
    assert total["saturated"] == 0


def test_gradients_below_a_dtype_are_saturated_and_not_unseen():
    rng = np.random.default_rng(0)
    g = np.float32(rng.normal(size=[20, 50]) * 1e-12)
    g[:, :10] = 0
    total = compiled(run(adamax(u_dtype="uint8", eps=0.0), list(g)), eps=0.0).total
    assert float(total["unseen"]) == pytest.approx(0.2)
    assert float(total["saturated"]) == pytest.approx(0.8)


def test_an_eps_that_was_rounded_to_float32_is_still_eps(x64):
    optimizer = optax.inject_hyperparams(adamax, hyperparam_dtype=jnp.float32)(
        0.1, eps=1e-7
    )
    state = run(optimizer, [np.array([0.0, 1.0])])
    assert compiled(state, eps=1e-7).total["unseen"] == 0.5


@EVERY_STORAGE
def test_a_spike_is_seen_and_is_gone_when_the_maximum_has_forgotten_it(storage):
    """ln(k) / (1 - b2) steps after a spike k times the usual gradient."""
    rng = np.random.default_rng(0)
    spike, k, b2 = 100, 1e4, 0.99
    g = np.float32(rng.normal(size=[1200, 1000]))
    g[spike, 250:] = k
    optimizer = adamax(b2=b2, **storage)

    def step(state, g_t):
        state = optimizer.update(g_t, state)[1]
        return state, diagnose(state).total["stale"]

    stale = np.asarray(jax.lax.scan(step, optimizer.init(g[0]), g)[1])
    # Under noise alone m is normal with deviation 0.23 and u is about 2.5.
    assert np.mean(stale[50:spike]) < 0.015
    # m has forgotten the spike after ln(k) / (1 - b1) steps, about 90. An int8 m has
    # steps at 7.0e-4 and 1.2e-3, and may be rounded up.
    assert np.all(stale[spike + 130 : spike + 230] > 0.74)
    assert np.mean(stale[spike + int(np.log(k) / (1 - b2)) :]) < 0.015


@pytest.mark.parametrize("name", STORAGES)
def test_the_length_of_steps(name):
    """Constant gradients give steps of 1, from m/u and the bias correction."""
    g = np.float32([3.0, -0.2, 1e-3])
    state = run(adamax(**STORAGES[name]), [g] * 200)
    total = compiled(state).total
    tolerance = OFF_A_STEP[name]
    assert float(total["rms"]) == pytest.approx(1, abs=tolerance)
    assert float(total["max"]) == pytest.approx(1, abs=tolerance)
    assert float(total["decades"]) == pytest.approx(np.log10(3e3), abs=0.1)


@pytest.mark.parametrize(
    ("m_dtype", "u_dtype", "gradient"),
    [
        ("float32", "uint8", 1e12),
        ("int8", "uint8", 1e12),
        ("bfloat16", "uint8", 1e-12),
        ("float32", "uint8", 1e-12),
    ],
)
def test_numbers_beyond_a_dtype_are_saturated(m_dtype, u_dtype, gradient):
    g = np.float32([gradient, -gradient, 1.0, 0.0])
    optimizer = adamax(b1=0.0, eps=0.0, m_dtype=m_dtype, u_dtype=u_dtype)
    total = compiled(run(optimizer, [g]), eps=0.0).total
    assert total["saturated"] == 0.5
    assert total["unseen"] == 0.25


def test_ratios_that_were_cut_off_are_saturated():
    """b1 above b2, which only a traced number can be: |m/u| is not bounded."""

    def figures(b1):
        optimizer = adamax(b1=b1, b2=0.1, m_dtype="int8", u_dtype="float32")
        g = jnp.ones(4)
        state = optimizer.init(g)
        for g_t in (g, *2 * [g * jnp.array([0.0, 0.0, 1.0, 1.0])]):
            _, state = optimizer.update(g_t, state)
        return diagnose(state).total["saturated"]

    assert float(jax.jit(figures)(0.9)) == 0.5


@pytest.mark.parametrize("storage", long_but([TWO_BYTES], STORAGES.values()))
def test_compiled_and_in_a_loop_it_says_the_same(storage):
    params = {"a": np.ones([4, 3], "f"), "b": (np.ones(5, "f"), None)}
    optimizer = optax.chain(optax.clip(1.0), adamax(**storage))
    state = run(optimizer, [params])
    plain, optimized = diagnose(state), as_users_compile(diagnose)(state)
    assert jax.tree.structure(plain) == jax.tree.structure(optimized)
    for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(optimized), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=1e-6)
    assert str(optimized) == str(plain)


def test_complex_and_double_precision(x64):
    g = np.array([3 + 4j, 0, 1e-300])
    state = run(adamax(b1=0.0, eps=0.0), [g])
    total = compiled(state, eps=0.0).total
    assert total["max"] == pytest.approx(1)
    assert total["unseen"] == pytest.approx(1 / 3)
    assert float(total["decades"]) == pytest.approx(np.log10(5e300), rel=1e-6)
    assert total["rms"].dtype == jnp.float32


def test_several_states_are_told_apart():
    params = {"a": np.ones(2, "f"), "b": np.ones(3, "f")}
    optimizer = optax.partition(
        {"fast": adamax(0.1), "slow": adamax(0.01)}, {"a": "fast", "b": "slow"}
    )
    leaves = compiled(run(optimizer, [params])).leaves
    assert len(leaves) == 2
    assert any("fast" in name and name.endswith("['a']") for name in leaves)
    assert any("slow" in name and name.endswith("['b']") for name in leaves)


@pytest.mark.parametrize("params", [{}, {"a": None}, {"a": jnp.ones([0, 3])}])
def test_without_coordinates_all_is_zero(params):
    diagnosis = diagnose(adamax().init(params))
    assert all(np.all(x == 0) for x in jax.tree.leaves(diagnosis))
    assert len(diagnosis.leaves) == len(jax.tree.leaves(params))


def test_not_a_number_is_not_hidden():
    g = np.float32([np.nan, 1.0])
    total = compiled(run(adamax(), [g])).total
    assert np.isnan(total["rms"])
    assert np.isnan(total["max"])
    assert total["unseen"] == 0


def test_it_prints_a_table():
    params = {"kernel": np.ones([2, 2], "f"), "bias": np.zeros(2, "f")}
    diagnosis = diagnose(adamax().init(params))
    header, *rows = str(diagnosis).splitlines()
    assert header.split() == list(diagnosis.total)
    assert [row.split()[0] for row in rows] == ["total", "['bias']", "['kernel']"]
    assert len({len(row) for row in [header, *rows]}) == 1

    @jax.jit
    def shown_while_traced(state):
        seen.append(str(diagnose(state)))
        return state

    seen = []
    shown_while_traced(adamax().init(params))
    assert seen[0].split().count("-") == 3 * len(FIGURES)


def test_conversion_keeps_the_figures():
    rng = np.random.default_rng(0)
    state = run(adamax(), list(np.float32(rng.normal(size=[20, 500]))))

    @jax.jit
    def of_both(state):
        narrow = convert_state(state, m_dtype="int8", u_dtype="uint8")
        return diagnose(state), diagnose(narrow)

    wide, narrow = of_both(state)
    assert isinstance(wide, Diagnosis)
    wide, narrow = wide.total, narrow.total
    for name in ("rms", "max", "decades"):
        assert float(narrow[name]) == pytest.approx(
            float(wide[name]), rel=OFF_A_STEP["two bytes"]
        )
    assert np.all(np.asarray(moments(state)[1]) > 0)


def test_errors():
    with pytest.raises(ValueError, match="holds no ScaleByAdamaxState"):
        diagnose(optax.adam(0.1).init(jnp.ones(2)))
    with pytest.raises(ValueError, match="eps must be finite and at least 0, got -1"):
        diagnose(adamax().init(jnp.ones(2)), eps=-1)


@EVERY_STORAGE
def test_a_healthy_state_has_no_infinities(storage):
    """Nor has one that saw no gradient yet, or that has no parameters."""
    with jax.debug_infs(True), jax.debug_nans(True):
        g = {"a": np.float32([1.0, 0.0]), "b": np.zeros(3, "f")}
        optimizer = adamax(**storage)
        state = optimizer.init(g)
        for figures in (diagnose, jax.jit(diagnose)):
            for healthy in (state, optimizer.update(g, state)[1], optimizer.init({})):
                chex.assert_tree_all_finite(figures(healthy))


def test_infinities_are_reported_where_jax_looks_for_them():
    """Else the test above would say nothing."""
    state = adamax().init(jnp.ones(2))[0]
    infinite = state._replace(u=jnp.array([jnp.inf, 1.0]))
    with jax.debug_infs(True), pytest.raises(FloatingPointError):
        diagnose(infinite)


def test_what_is_compiled_for_many_parameters():
    """One array for each figure, and as much for every further parameter."""

    def kernels(leaves):
        state = adamax().init([jnp.ones(5)] * leaves)
        compiled = jax.jit(diagnose).lower(state).compile(AS_USERS_DO)
        diagnosis = jax.eval_shape(diagnose, state)
        assert len(jax.tree.leaves(diagnosis)) == 2 * len(FIGURES)
        _, entry = compiled.as_text().split("ENTRY")
        return entry.count(" fusion(") + entry.count(" reduce(")

    ten, twenty, thirty = map(kernels, (10, 20, 30))
    # Seven sums and maxima, and what puts them together.
    assert thirty - twenty == twenty - ten <= 10 * 8


def test_a_shared_u_beyond_its_reciprocal():
    g = np.full([2, 2], 2e38, np.float32)
    total = compiled(run(adamax(shared_axes=-1), [g])).total
    assert float(total["max"]) == pytest.approx(0.1)


def test_figures_that_were_put_together_are_printed_as_dashes():
    diagnosis = compiled(adamax().init({"a": np.ones(2, "f"), "b": np.ones(2, "f")}))
    assert "-" in str(jax.tree.map(lambda x: np.mean(x), diagnosis))
    assert str(jax.tree.map(lambda x: x.tolist(), diagnosis)) == str(diagnosis)


def test_those_of_several_runs_are_printed_as_ranges():
    """Of an ensemble, and of one step that has an axis of its own."""
    optimizer = adamax()
    gradients = {"a": np.float32([[1.0, 1.0], [0.0, 1.0]]), "b": np.ones([2, 1], "f")}

    @jax.jit
    @jax.vmap
    def of_a_step(g):
        _, state = optimizer.update(g, optimizer.init(g))
        return diagnose(state)

    diagnosis = of_a_step(gradients)
    header, total, a, b = str(diagnosis).splitlines()
    ones = np.ones(1, np.float32)
    assert header.split() == list(diagnose(state_of(ones, ones)).total)
    assert "0.000 to 0.500" in a
    assert "0.000 to 0.333" in total
    assert "to" not in b
    one = jax.tree.map(lambda x: np.asarray(x)[0], diagnosis)
    assert str(jax.tree.map(lambda x: x[None], one)) == str(one)
    with pytest.raises(ValueError, match=r"of shape \(2,\): take"):
        diagnosis.plot()


@functools.cache
def many(size=100):
    """Of the parameters every tenth is unseen, in part, and one is not a number."""
    gradients = {f"layer{i:03}": {"w": np.ones(4, np.float32)} for i in range(size)}
    for i in range(0, size, 10):
        gradients[f"layer{i:03}"]["w"][: i // 30] = 0
    gradients["layer007"]["w"][0] = np.nan
    return diagnose(run(adamax(), [gradients]))


def test_of_many_parameters_the_worst_are_printed():
    diagnosis = many()
    lines = str(diagnosis).splitlines()
    assert len(lines) == 2 + 40 + 1
    shown = [line.split()[0] for line in lines[2:-1]]
    unseen = ["090", "060", "070", "080", "030", "040", "050"]
    assert shown[:8] == [f"['layer{i}']['w']" for i in ["007", *unseen]]
    # The others as they are in the tree.
    assert shown[8:] == sorted(shown[8:])
    assert lines[-1].startswith("... and 60 parameters that are not worse")
    assert diagnosis.worst(3).names == tuple(shown[:3])
    everything = diagnosis.to_string(limit=None).splitlines()
    assert [line.split()[0] for line in everything[2:]] == sorted(diagnosis.names)
    assert len(diagnosis.to_string(limit=3).splitlines()) == 2 + 3 + 1
    assert str(diagnosis.worst(100).worst(40)) == str(diagnosis.worst(40))


def test_parameters_are_put_together_by_their_paths():
    """As if their arrays were one."""
    rng = np.random.default_rng(0)
    a, b, c, d = [np.float32(rng.normal(size=n) * 10.0**n) for n in (3, 5, 2, 4)]
    for x in (a, b, c, d):
        x[0] = 0
    apart = run(adamax(), [{"x": {"a": a, "b": [b, c]}, "y": (d,)}])
    together = run(adamax(), [{"x": np.concatenate([a, b, c]), "y": d}])
    expected = compiled(together)
    for function in (diagnose, compiled):
        grouped = function(apart, depth=1)
        assert grouped.names == expected.names == ("['x']", "['y']")
        chex.assert_trees_all_close(grouped.table, expected.table, rtol=1e-6)
        chex.assert_trees_all_close(grouped.total, expected.total, rtol=1e-6)
    assert compiled(apart, depth=2).names == (
        "['x']['a']",
        "['x']['b']",
        "['y'][0]",
    )
    assert str(compiled(apart, depth=9)) == str(compiled(apart, depth=3))
    assert diagnose(adamax().init({}), depth=1).names == ()
    for depth in (0, 1.0, True):
        with pytest.raises(ValueError, match="depth must be None or an integer above"):
            diagnose(apart, depth=depth)


def test_not_a_number_is_not_hidden_in_a_group():
    g = {"x": [np.float32([np.nan]), np.ones(2, "f")], "y": np.ones(2, "f")}
    table = compiled(run(adamax(), [g]), depth=1).table
    for name in ("rms", "max"):
        assert np.isnan(table[name]).tolist() == [True, False]


def test_a_plot_shows_the_same_numbers():
    diagnosis = many()
    figure = diagnosis.plot()
    shown = diagnosis.worst()
    panels = dict(
        zip(("rms", "unseen", "stale", "saturated"), figure.axes, strict=True)
    )
    for name, axes in panels.items():
        lengths = [bar.get_width() for bar in axes.patches]
        expected = np.array([diagnosis.total[name], *shown.table[name]])
        np.testing.assert_allclose(lengths, np.nan_to_num(expected, nan=0))
    texts = [text.get_text() for text in panels["rms"].texts]
    assert texts == [" NaN"] * 2
    labels = [text.get_text() for text in panels["rms"].get_yticklabels()]
    assert labels == ["total", *shown.names]


def test_a_plot_of_long_and_odd_names():
    params = {"a" * 300: np.ones(2, "f"), "$a^{$": np.ones(2, "f")}
    figure = diagnose(adamax().init(params)).plot()
    figure.savefig(io.BytesIO())
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert sorted(map(len, labels)) == [5, len(r"['\$a^{\$']"), 40]


def test_of_no_runs_there_are_no_numbers():
    diagnosis = jax.tree.map(
        lambda x: np.asarray(x)[None][:0], compiled(adamax().init(np.ones(2, "f")))
    )
    assert str(diagnosis).split().count("-") == 2 * len(FIGURES)
    with pytest.raises(ValueError, match="limit must be at least 0, got -1"):
        many().worst(-1)
