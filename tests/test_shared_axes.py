"""One u for a row, a column or an array: the maximum of the element-wise one."""

import itertools

import chex
import eight_devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import sequences
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sequences import STORAGES, long_but, trajectory, updates_of
from versions import set_mesh

from adamax_jax import adamax, adamaxw, scale_by_adamax, zero_shardings
from adamax_jax._lab import shapes

P = PartitionSpec
AXES = [-1, 0, (0, 1), (-2, 0, 2), ()]


def all_axes(path, leaf):
    return range(leaf.ndim)


def gradients(steps, shape, **options):
    size = int(np.prod(shape))
    g = sequences.gradients(steps, size, **options).reshape(steps, *shape)
    return jnp.asarray(g, jnp.float32)


def maximum(u, axes):
    """Of numbers or codes, over axes that keep size 1; the first axis is time."""
    u = np.asarray(u if u.dtype == jnp.uint8 else u.astype(jnp.float32))
    axes = axes if isinstance(axes, tuple) else (axes,)
    shifted = tuple(axis + 1 if axis >= 0 else axis for axis in axes)
    return u.max(shifted, keepdims=True) if shifted else u


def assert_the_maximum(gradients, axes, **storage):
    """Of the element-wise u is what each of several axes share, to the bit."""
    _, element_wise = trajectory(scale_by_adamax(**storage), gradients)
    shared_axes = dict(enumerate(axes))
    _, shared = trajectory(
        scale_by_adamax(
            shared_axes=lambda path, leaf: shared_axes[path[0].idx], **storage
        ),
        [gradients] * len(axes),
    )
    np.testing.assert_array_equal(shared.u_scale, element_wise.u_scale)
    for u, one in zip(shared.u, axes, strict=True):
        assert u.dtype == element_wise.u.dtype
        expected = maximum(element_wise.u, one)
        assert u.shape == expected.shape
        np.testing.assert_array_equal(u.astype(jnp.float32), expected)


@pytest.mark.parametrize("storage", list(STORAGES.values()), ids=list(STORAGES))
def test_it_is_the_maximum_of_the_element_wise_u_to_the_bit(storage):
    """Of the stored numbers too, over 1000 steps: rounding commutes with a maximum."""
    assert_the_maximum(gradients(1000, (4, 3, 5)), AXES, **storage)


@pytest.mark.parametrize(
    "shape", [(2, 3), (1, 4), (5, 1), (3, 1, 2), (4, 2, 3), (2, 1, 3, 2)], ids=str
)
def test_it_is_the_maximum_for_any_axes(shape):
    """For each subset of the axes, counted from either end."""
    ndim = len(shape)
    subsets = [
        tuple(axis - ndim if i % 2 else axis for i, axis in enumerate(axes, start))
        for size in range(ndim + 1)
        for axes in itertools.combinations(range(ndim), size)
        for start in (range(2) if axes else range(1))
    ]
    assert_the_maximum(gradients(20, shape), subsets)


@pytest.mark.parametrize("options", [{}, {"eps_inside": False}, {"nesterov": True}])
def test_updates_are_those_of_the_paper_with_this_u(options):
    g = gradients(300, (4, 6))
    updates = np.asarray(updates_of(scale_by_adamax(shared_axes=-1, **options), g))
    # A reference whose gradients have the row's maximum beside each gradient's sign.
    steps = reference.adamax(np.asarray(g, np.float64), **options)
    rows = np.abs(g).max(-1, keepdims=True).astype(np.float64)
    norms = (step.u for step in reference.adamax(rows, **options))
    inside = options.get("eps_inside", True)
    for t, (update, step, u) in enumerate(zip(updates, steps, norms, strict=True), 1):
        m_hat = step.m / (1 - 0.9**t)
        if options.get("nesterov"):
            m_hat = 0.9 * step.m / (1 - 0.9 ** (t + 1)) + 0.1 * np.asarray(
                g[t - 1], np.float64
            ) / (1 - 0.9**t)
        expected = m_hat / (u if inside else u + 1e-8)
        np.testing.assert_allclose(update, expected, rtol=2e-5, atol=1e-6)


def test_no_step_is_longer_than_the_element_wise_one():
    g = gradients(500, (4, 6))
    element_wise = updates_of(scale_by_adamax(), g)
    for axes in (-1, 0, (0, 1)):
        shared = updates_of(scale_by_adamax(shared_axes=axes), g)
        # m may be rounded otherwise where the compiler fuses it into other operations.
        assert np.all(np.abs(shared) <= np.abs(element_wise) + 1e-6)
        assert np.any(np.abs(shared) < np.abs(element_wise))


@pytest.mark.parametrize("m_dtype", ["int8", "bfloat16"])
def test_narrow_m_follows_the_wide_one(m_dtype):
    """A ratio to a shared u has coarser steps for small coordinates: of u, not of m."""
    rng = np.random.default_rng(0)
    scales = 10.0 ** rng.uniform(-2, 0, (300, 4, 6))
    g = jnp.asarray(rng.standard_normal((300, 4, 6)) * scales, jnp.float32)
    wide = updates_of(scale_by_adamax(shared_axes=-1), g)
    narrow = updates_of(scale_by_adamax(shared_axes=-1, m_dtype=m_dtype), g)
    error = np.abs(np.asarray(wide) - np.asarray(narrow))
    assert error.max() < 0.1
    assert error.mean() < 0.01


def test_one_byte_for_each_parameter_of_a_transformer():
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in shapes.transformer().items()
    }
    size = sum(p.size for p in params.values())
    for axes in (-1, -2):
        optimizer = adamax(m_dtype="int8", shared_axes=axes)
        state = jax.eval_shape(optimizer.init, params)
        stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        assert size < stored <= 1.05 * size
    params = {"kernel": jnp.zeros([256, 512]), "bias": jnp.zeros(512)}
    optimizer = adamax(m_dtype="int8", shared_axes=-1)
    _, state = optimizer.update(params, optimizer.init(params))
    nbytes = sum(x.nbytes for x in jax.tree.leaves(state))
    # m; u of the rows and of the bias; the count and u_scale.
    assert nbytes == 256 * 512 + 512 + 4 * (256 + 512) + 8


def test_vectors_and_scalars_stay_element_wise():
    params = {"kernel": jnp.ones([3, 4]), "bias": jnp.ones(4), "scale": jnp.ones([])}
    for axes in (0, (-1,), all_axes):
        state = scale_by_adamax(shared_axes=axes).init(params)
        assert state.u["bias"].shape == (4,)
        assert state.u["scale"].shape == ()
        assert state.u["kernel"].shape != (3, 4)
        assert state.m["kernel"].shape == (3, 4)


def test_a_function_chooses_for_each_parameter():
    calls = []

    def axes(path, leaf):
        calls.append((jax.tree_util.keystr(path), leaf.shape))
        return None if path[0].key == "embedding" else [-1]

    params = {
        "embedding": jnp.ones([5, 2]),
        "kernel": jnp.ones([3, 4]),
        "bias": jnp.ones(4),
    }
    state = adamaxw(shared_axes=axes).init(params)
    assert state[0].u["embedding"].shape == (5, 2)
    assert state[0].u["kernel"].shape == (3, 1)
    assert sorted(calls) == [("['embedding']", (5, 2)), ("['kernel']", (3, 4))]


@pytest.mark.parametrize(
    ("axes", "error", "message"),
    [
        (2, ValueError, r"-2 to 1 for the parameter at \['a'\].*\(3, 4\), got \(2,\)"),
        ((0, -3), ValueError, r"\['a'\].*\(3, 4\), got \(0, -3\)"),
        ((1, -1), ValueError, r"different axes.*\['a'\].*\(3, 4\), got \(1, -1\)"),
        (lambda path, leaf: 5, ValueError, r"\['a'\].*\(3, 4\), got \(5,\)"),
        (lambda path, leaf: "out", TypeError, r"parameter at \['a'\], got 'out'"),
        (True, TypeError, "got True"),
        (1.0, TypeError, "got 1.0"),
        ("rows", TypeError, "got 'rows'"),
        ("", TypeError, "got ''"),
        (b"1", TypeError, "got b'1'"),
        ((0, "rows"), TypeError, "got"),
    ],
)
def test_errors_name_the_parameter_and_its_shape(axes, error, message):
    with pytest.raises(error, match=message):
        adamax(shared_axes=axes).init({"a": jnp.ones([3, 4])})


def test_inject_hyperparams_leaves_static_axes_alone():
    params = jnp.ones([3, 4])
    inject = optax.inject_hyperparams
    for axes in (-1, (-1,), lambda path, leaf: -1):
        optimizer = inject(adamax, static_args="shared_axes")(0.1, shared_axes=axes)
        state = optimizer.init(params)
        assert state.inner_state[0].u.shape == (3, 1)
        updates, _ = jax.jit(optimizer.update)(params, state)
        np.testing.assert_allclose(updates, -0.1 * jnp.ones([3, 4]), rtol=1e-5)
    optimizer = inject(adamax)(0.1, shared_axes=-1)
    with pytest.raises(TypeError, match="static_args"):
        jax.jit(optimizer.update)(params, optimizer.init(params))


# How far a first step may be from the sign of the gradient, relative to itself.
OFF_THE_SIGN = {"own": 1e-6, "bfloat16": 2**-8, "two bytes": 1 / 8}


@pytest.mark.parametrize("name", long_but(["two bytes"], STORAGES))
def test_it_stays_as_it_is_through_jit_scan_vmap_and_without_gradient(name):
    params = {"a": jnp.ones([3, 4]), "b": jnp.ones([2, 0]), "c": jnp.ones([0, 2])}
    optimizer = adamax(0.1, shared_axes=-1, **STORAGES[name])
    state = optimizer.init(params)
    types = jax.tree.map(jax.typeof, state)
    updates, new = optimizer.update(params, state, params)
    assert jax.tree.map(jax.typeof, new) == types
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    _, new = optimizer.update({"a": None, "b": None, "c": None}, state)
    assert jax.tree.map(jax.typeof, new) == types

    @jax.jit
    def run(state):
        return jax.lax.scan(
            lambda state, _: optimizer.update(params, state)[::-1], state, length=3
        )

    new, updates = run(state)
    assert jax.tree.map(jax.typeof, new) == types
    population = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    states = jax.vmap(optimizer.init)(population)
    assert states[0].u["a"].shape == (2, 3, 1)
    updates, states = jax.jit(jax.vmap(optimizer.update))(population, states)
    np.testing.assert_allclose(
        updates["a"], -0.1 * jnp.ones([2, 3, 4]), rtol=OFF_THE_SIGN[name]
    )


def test_complex_parameters_share_the_modulus():
    g = jnp.array([[3 + 4j, 1j], [0, 2]], jnp.complex64)
    transformation = scale_by_adamax(shared_axes=-1, eps=0.0)
    update, state = transformation.update(g, transformation.init(g))
    assert state.u.dtype == jnp.float32
    np.testing.assert_allclose(state.u, [[5], [2]], rtol=1e-6)
    np.testing.assert_allclose(update, np.asarray(g) / np.asarray(state.u), rtol=1e-6)


def test_a_row_without_gradient_does_not_move():
    g = jnp.array([[0.0, 0.0], [1.0, 0.0]])
    transformation = scale_by_adamax(shared_axes=-1, eps=0.0)
    update, state = transformation.update(g, transformation.init(g))
    np.testing.assert_allclose(update, [[0, 0], [1, 0]], rtol=1e-6)
    np.testing.assert_array_equal(state.u, [[0], [1]])


# Of a first one, by the rounding of m and u.
ROUNDING_OF_STEP = {"own": 1e-5, "bfloat16": 0.01, "two bytes": 0.04 + 1 / 8}


def test_nan_stays_in_its_row():
    g = jnp.array([[jnp.nan, 1.0], [1.0, 1.0]])
    for name, storage in STORAGES.items():
        transformation = scale_by_adamax(shared_axes=-1, **storage)
        update, _ = transformation.update(g, transformation.init(jnp.ones([2, 2])))
        assert np.isnan(update[0, 0])
        # A uint8 u becomes its largest number, beside which the others do not move.
        assert update[0, 1] == 0 if name == "two bytes" else np.isnan(update[0, 1])
        np.testing.assert_allclose(update[1], 1, rtol=ROUNDING_OF_STEP[name])


def test_derivatives_through_the_update_are_finite():
    transformation = scale_by_adamax(shared_axes=-1)

    @jax.jit
    @jax.grad
    def derivative(g):
        update, state = transformation.update(g, transformation.init(g))
        update, _ = transformation.update(g, state)
        return jnp.sum(update**2)

    for row in ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, -2.0]):
        assert np.isfinite(derivative(jnp.array([row, row]))).all()


def test_a_state_of_another_shape_is_refused():
    g = jnp.ones([3, 4])
    state = scale_by_adamax().init(g)
    wrong = {
        None: [(2, 4), (3,), (3, 4, 1), (3, 1)],
        -1: [(3, 4)],
        (0, 1): [(3, 4)],
    }
    for shared_axes, others in wrong.items():
        optimizer = scale_by_adamax(shared_axes=shared_axes)
        for shape in others:
            with pytest.raises(
                ValueError, match=r"at the root .*, 4\), but .* insert_state"
            ) as error:
                optimizer.update(g, state._replace(u=jnp.ones(shape)))
            assert f"has shape {shape}" in str(error.value)


def test_a_state_beside_a_function_of_axes():
    """What it said of the parameters is in the shapes; these have to agree."""
    g = jnp.ones([3, 4])
    for shared_axes in (-1, lambda path, leaf: -1):
        optimizer = scale_by_adamax(shared_axes=shared_axes)
        state = optimizer.init(g)
        optimizer.update(g, state)
        for shape in ((2, 4), (3,), (3, 4, 1)):
            with pytest.raises(
                ValueError, match=r"u at .* shape .* beside m of shape \(3, 4\)"
            ):
                optimizer.update(g, state._replace(u=jnp.ones(shape)))


def test_a_state_of_stacked_layers_is_updated_layer_by_layer():
    """Biases of two axes share a u at init; one by one, they have one axis."""
    layers = {"w": jnp.ones([3, 4, 4]), "b": jnp.ones([3, 4])}
    optimizer = scale_by_adamax(shared_axes=-1)
    state = optimizer.init(layers)

    def step(count, layer):
        g, m, u = layer
        update, new = optimizer.update(g, state._replace(count=count, m=m, u=u))
        return count, (update, new.m, new.u)

    _, (updates, m, u) = jax.lax.scan(step, state.count, (layers, state.m, state.u))
    expected, whole = optimizer.update(layers, state)
    chex.assert_trees_all_close((updates, m, u), (expected, whole.m, whole.u))


# With eight devices.

SHARDINGS = [P(), P("data", None), P(None, "data")]


def states_of(mesh, spec):
    """The states of every storage after some steps with parameters divided so."""
    sharding = NamedSharding(mesh, spec)
    optimizers = [adamax(0.1, shared_axes=-1, **s) for s in STORAGES.values()]
    params = jax.device_put(jnp.ones([16, 24]), sharding)
    states = [optimizer.init(params) for optimizer in optimizers]

    @jax.jit
    def step(states, g):
        pairs = zip(optimizers, states, strict=True)
        return [optimizer.update(g, state, params)[1] for optimizer, state in pairs]

    for g in gradients(10, (16, 24)):
        states = step(states, jax.device_put(g, sharding))
    return jax.device_get(states)


def check_no_bit_depends_on_the_layout():
    single = jax.make_mesh(
        (1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1]
    )
    expected = states_of(single, P())
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
        for spec in SHARDINGS:
            with set_mesh(mesh):
                actual = states_of(mesh, spec)
            jax.tree.map(np.testing.assert_array_equal, actual, expected)


def check_only_the_maximum_is_exchanged():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    for storage in STORAGES.values():
        optimizer = adamax(0.1, shared_axes=-1, **storage)
        for spec in SHARDINGS:
            sharding = NamedSharding(mesh, spec)
            params = jax.device_put(jnp.ones([16, 24]), sharding)
            state = jax.jit(optimizer.init)(params)
            compiled = jax.jit(optimizer.update).lower(params, state).compile()
            exchanges = [
                line
                for line in compiled.as_text().splitlines()
                if any(f" {name}(" in line for name in COLLECTIVES)
            ]
            if spec != P(None, "data"):
                assert exchanges == []
                continue
            (exchange,) = exchanges
            # One number for each of 16 rows, and the greater of two is kept.
            assert " = f32[16]" in exchange or " = f32[16,1]" in exchange
            assert " all-reduce(" in exchange
            computation = exchange.split("to_apply=%")[1].split(",")[0]
            body = compiled.as_text().split(f"%{computation} (")[1].split("\n}")[0]
            assert " maximum(" in body


COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "reduce-scatter",
    "collective-permute",
    "all-reduce-start",
)


def check_zero_divides_it_too():
    """As m is, along the axes that are not shared: only the maximum is exchanged."""
    g = gradients(5, (16, 24))
    for axes in (-1, 0, (0, 1)):
        optimizer = adamax(0.1, m_dtype="int8", shared_axes=axes)
        update, state = jax.jit(optimizer.update), optimizer.init(jnp.ones([16, 24]))
        steps = []
        for now in g:
            expected, state = update(now, state)
            steps.append(expected)
        run = g, steps, jax.device_get(state)
        for axis_type in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
            for spec in (P(), P("model", None), P(None, "model")):
                with set_mesh(mesh):
                    check_zero(mesh, spec, optimizer, *run)


def check_zero(mesh, spec, optimizer, gradients, steps, end):
    params = jax.device_put(jnp.ones([16, 24]), NamedSharding(mesh, spec))
    shardings = zero_shardings(optimizer, params, mesh, "data")
    m_spec, u_spec = shardings[0].m.spec, shardings[0].u.spec
    # Together over the whole mesh, or over "data" alone.
    assert "data" in jax.tree.leaves(tuple(m_spec))
    assert tuple(u_spec) == tuple(
        None if size == 1 else entry
        for entry, size in zip(m_spec, end[0].u.shape, strict=True)
    )
    state = jax.jit(optimizer.init, out_shardings=shardings)(params)

    # Gradients as a reduce-scatter leaves them.
    divided = [jax.device_put(g, shardings[0].m) for g in gradients]
    update = jax.jit(optimizer.update, out_shardings=(shardings[0].m, shardings))
    compiled = update.lower(divided[0], state).compile()
    for g, expected in zip(divided, steps, strict=True):
        updates, state = compiled(g, state)
        np.testing.assert_allclose(updates, expected, rtol=1e-6, atol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), end)
    text = compiled.as_text()
    found = {name for name in COLLECTIVES if f" {name}(" in text}
    assert found <= {"all-reduce"}, (found, spec)


CHECKS = eight_devices.named(
    check_no_bit_depends_on_the_layout,
    check_only_the_maximum_is_exchanged,
    check_zero_divides_it_too,
)


@pytest.mark.parametrize("check", CHECKS)
def test_on_eight_devices(check):
    assert eight_devices.problem(__file__, check) is None


if __name__ == "__main__":
    eight_devices.main(CHECKS)
