"""ZeRO-1: shardings of the state, the bytes they save and what they cost."""

import collections
import functools
import re
import warnings
from typing import NamedTuple

import eight_devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_readme
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sequences import STORAGES
from versions import as_pure, reshard, set_mesh

from adamax_jax import (
    adamax,
    adamaxw,
    diagnose,
    insert_state,
    lp_adam,
    zero_shardings,
)

P = PartitionSpec
AUTO = AxisType.Auto


def data_mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AUTO,))


def abstract(*shape, dtype=jnp.float32, sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def specs(shardings):
    """The specs without the None at their ends, which say nothing."""

    def strip(sharding):
        entries = list(sharding.spec)
        while entries and entries[-1] is None:
            entries.pop()
        return P(*entries)

    return jax.tree.map(strip, shardings)


def check_which_dimension_is_divided():
    mesh = data_mesh()
    params = {
        "first": abstract(16, 8),
        "second": abstract(3, 24),
        "convolution": abstract(3, 3, 5, 64),
        "vector": abstract(8),
        "scalar": abstract(),
        "single": abstract(1),
        "empty": abstract(0, 8),
        "complex": abstract(8, dtype=jnp.complex64),
        "none": None,
    }
    expected = {
        "first": P("data"),
        "second": P(None, "data"),
        "convolution": P(None, None, None, "data"),
        "vector": P("data"),
        "scalar": P(),
        "single": P(),
        "empty": P(None, "data"),
        "complex": P("data"),
        "none": None,
    }
    state = specs(zero_shardings(adamax(), params, mesh, "data"))[0]
    assert state.m == state.u == expected
    assert state.count == state.u_scale == P()


def check_the_parameters_own_sharding_is_kept():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AUTO, AUTO))

    def spec(shape, *own):
        params = abstract(*shape, sharding=NamedSharding(mesh, P(*own)))
        return specs(zero_shardings(adamax(), params, mesh, "data"))[0].m

    assert spec([8, 16], "model") == P("model", "data")
    assert spec([16, 8], None, "model") == P("data", "model")
    # No free dimension: one gets both axes.
    assert spec([16], "model") == P(("model", "data"))
    assert spec([6, 16], None, "model") == P(None, ("model", "data"))
    # Divided over the axis already, as in FSDP.
    assert spec([16, 8], "data") == P("data")
    assert spec([16, 8], ("model", "data")) == P(("model", "data"))
    concrete = jax.device_put(jnp.ones([8, 16]), NamedSharding(mesh, P("model")))
    shardings = zero_shardings(adamax(), {"a": concrete}, mesh, "data")
    assert specs(shardings)[0].u["a"] == P("model", "data")


def check_specs_that_are_found_in_other_ways():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AUTO, AUTO))
    params = {"w": abstract(8, 16, sharding=NamedSharding(mesh, P(None, "model")))}
    # The parameters twice, and the state once.
    twice = optax.LookaheadParams(params, params)
    lookahead = optax.lookahead(adamax(), sync_period=2, slow_step_size=0.5)
    shardings = zero_shardings(lookahead, twice, mesh, "data")
    assert specs(shardings).fast_state[0].m["w"] == P("data", "model")
    # Of several parameters with the end of a path, that of the same shape.
    both = {
        "a": {"w": abstract(8, 16, sharding=NamedSharding(mesh, P(None, "model")))},
        "b": {"w": abstract(1, 16)},
    }
    for name, expected in (("a", P("data", "model")), ("b", P(None, "data"))):
        other = optax.GradientTransformation(
            lambda params, name=name: {"other": params[name]}, optax.identity().update
        )
        assert specs(zero_shardings(other, both, mesh, "data")) == {
            "other": {"w": expected}
        }
    # An abstract mesh, as of jax.eval_shape under an explicit one.
    sharding = NamedSharding(mesh.abstract_mesh, P(None, "model"))
    shardings = zero_shardings(
        adamax(), abstract(8, 16, sharding=sharding), mesh, "data"
    )
    assert specs(shardings)[0].m == P("data", "model")
    sharding = NamedSharding(mesh, P(P.UNCONSTRAINED, "model"))
    shardings = zero_shardings(
        adamax(), abstract(8, 16, sharding=sharding), mesh, "data"
    )
    assert specs(shardings)[0].m == P("data", "model")


def check_the_longest_end_of_a_path_decides():
    """Whatever the order of the parameters, and for every part of the state."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AUTO, AUTO))

    def parameter(*spec):
        return abstract(16, 16, sharding=NamedSharding(mesh, P(*spec)))

    def states(params, **options):
        """The specs of the state, for either order of the parameters."""
        chained = optax.chain(optax.trace(0.9), adamax(**options))
        for names in (list(params), list(params)[::-1]):
            ordered = {name: params[name] for name in names}
            # A container that keeps its order: JAX sorts a dict.
            for kind in (dict, collections.OrderedDict):
                shardings = zero_shardings(chained, kind(ordered), mesh, "data")
                trace, (state, *_) = specs(shardings)
                yield dict(trace.trace), dict(state.m), dict(state.u)

    kernels = {
        "a": {"kernel": parameter(None, "model")},
        "b": {"kernel": parameter("model", None)},
    }
    whole = {
        "a": {"kernel": P("data", "model")},
        "b": {"kernel": P("model", "data")},
    }
    for trace, m, u in states(kernels, shared_axes=-1):
        assert trace == m == whole
        # u has size 1 along the last axis.
        assert u == {"a": {"kernel": P("data")}, "b": {"kernel": P("model")}}
    for trace, m, u in states(kernels, shared_axes=0):
        assert trace == m == whole
        assert u == {
            "a": {"kernel": P(None, "model")},
            "b": {"kernel": P(None, "data")},
        }
    nested = {
        "a": {"w": parameter("model", None)},
        "w": parameter(None, "model"),
    }
    for trace, m, u in states(nested):
        assert trace == m == u
        assert m == {"a": {"w": P("model", "data")}, "w": P("data", "model")}
    # An array of another shape than its own parameter is not like any other one.
    params = {
        "a": {"w": abstract(16, 32, sharding=NamedSharding(mesh, P()))},
        "w": parameter("model", None),
    }

    def init(params):
        return {"L": jax.tree.map(lambda p: jnp.zeros([p.shape[0]] * 2), params)}

    preconditioner = optax.GradientTransformation(init, None)
    shardings = zero_shardings(preconditioner, params, mesh, "data")
    assert specs(shardings)["L"] == {
        "a": {"w": P("data")},
        "w": P("model", "data"),
    }


def check_a_state_that_exists():
    """An nnx.Optimizer's: the leaves of the shardings in its containers."""
    mesh = data_mesh()
    model = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
    tx = adamax(0.1, m_dtype="int8", u_dtype="uint8")
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    shardings = zero_shardings(tx, nnx.state(model, nnx.Param), mesh, "data")
    optimizer.opt_state = jax.device_put(
        optimizer.opt_state,
        jax.tree.unflatten(
            jax.tree.structure(optimizer.opt_state), jax.tree.leaves(shardings)
        ),
    )
    (kernel,) = jax.tree.leaves(optimizer.opt_state[0].u["kernel"])
    assert kernel.addressable_shards[0].data.shape == (1, 16)
    # Another run's state, inserted, lies where this one lay.
    pure = as_pure(nnx.state(model, nnx.Param))
    _, other = tx.update(pure, tx.init(pure))
    optimizer.opt_state = insert_state(optimizer.opt_state, other)
    (inserted,) = jax.tree.leaves(optimizer.opt_state[0].u["kernel"])
    assert inserted.sharding == kernel.sharding
    assert np.array_equal(inserted, other[0].u["kernel"])


OPTIMIZERS = {
    "adamaxw": adamaxw(optax.linear_schedule(0.1, 0.0, 10)),
    "two bytes": adamax(m_dtype="int8", u_dtype="uint8"),
    "MultiSteps": optax.MultiSteps(adamax(), 2),
    "injected": optax.inject_hyperparams(adamax)(0.1),
    "masked": optax.masked(adamax(), {"kernel": True, "bias": False}),
    "partition": optax.partition(
        {"a": adamax(0.1), "b": optax.sgd(0.1, momentum=0.9)},
        {"kernel": "a", "bias": "b"},
    ),
    "flatten": optax.flatten(adamax()),
    "optax.adamw": optax.adamw(0.1),
    "optax.contrib.muon": optax.contrib.muon(0.1),
    "optax.lbfgs": optax.lbfgs(0.1, linesearch=None),
    "schedule_free": optax.contrib.schedule_free(adamax(b1=0.0), 0.1),
}


def check_any_optax_state():
    """All arrays of the parameters' sizes are divided, all scalars replicated."""
    mesh = data_mesh()
    params = {"kernel": jnp.ones([24, 16]), "bias": jnp.ones(8)}
    for name, optimizer in OPTIMIZERS.items():
        with warnings.catch_warnings():
            # The few coefficients that Muon and L-BFGS keep.
            warnings.filterwarnings("ignore", ".*(ns_coeffs|weights_memory).*")
            shardings = zero_shardings(optimizer, params, mesh, "data")
        init = jax.jit(optimizer.init, out_shardings=shardings)
        state = init(params)
        assert jax.tree.structure(state) == jax.tree.structure(optimizer.init(params))
        arrays = [x for x in jax.tree.leaves(state) if x.size >= 8 and x.ndim]
        assert arrays, name
        for array in arrays:
            shape = array.addressable_shards[0].data.shape
            whole = name == "optax.lbfgs" and array.shape == (10,)
            assert whole or np.prod(shape) == array.size / 8, (name, array.shape)
        for array in jax.tree.leaves(state):
            assert array.ndim or array.sharding.is_fully_replicated
        assert all(
            np.array_equal(x, y)
            for x, y in zip(
                jax.tree.leaves(state),
                jax.tree.leaves(optimizer.init(params)),
                strict=True,
            )
        )


def explicit_mesh():
    types = (AxisType.Explicit,) * 2
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=types)


def check_explicit_axes_take_free_dimensions_alone():
    """Where one has two axes, neither Optax's Adam nor AdaMax could use it.

    And an array of another shape than a parameter's stays whole, since nobody knows how
    an optimizer combines it with others.
    """
    mesh = explicit_mesh()

    def parameter(*shape, spec=()):
        return abstract(*shape, sharding=NamedSharding(mesh, P(*spec)))

    params = {
        "kernel": parameter(16, 8, spec=[None, "model"]),
        "bias": parameter(8, spec=["model"]),
        "scale": parameter(16),
        "divided": parameter(16, spec=["data"]),
    }
    expected = {
        "kernel": P("data", "model"),
        "bias": P("model"),
        "scale": P("data"),
        "divided": P("data"),
    }
    with pytest.warns(UserWarning) as caught:
        shardings = zero_shardings(adamax(), params, mesh, "data")
    assert specs(shardings)[0].m == specs(shardings)[0].u == expected
    assert str(caught[0].message) == (
        "64 of the optimizer state's 1,352 bytes stay replicated over axis 'data', "
        "since 4 divides no dimension, of those that are not sharded already, of "
        "[0].m['bias'] (8,), [0].u['bias'] (8,)."
    )
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=8)
    kernel = {"kernel": params["kernel"]}
    state = specs(zero_shardings(factored, kernel, mesh, "data"))
    assert state.v_row == state.v_col == {"kernel": P()}


# On explicit axes: those that take gradients that are not sharded as their state is,
# those that need them resharded, and those whose state cannot be sharded.
EXPLICIT = {
    "adamax": adamax(0.1),
    "two bytes": adamax(0.1, m_dtype="int8", u_dtype="uint8", max_growth=2.0),
    "shared": adamax(0.1, m_dtype="int8", shared_axes=-1),
    "lp_adam": lp_adam(0.1, 3.0),
    "optax.adamw": optax.adamw(0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=8),
    "sm3": optax.sm3(0.1),
}
RESHARDED = {
    "novograd": optax.novograd(0.1),
    "rprop": optax.rprop(0.1),
    "adan": optax.adan(0.1),
    "apply_if_finite": optax.apply_if_finite(adamax(0.1), 3),
}
NOT_SHARDED = {
    "muon": optax.contrib.muon(0.1),
    "lbfgs": optax.lbfgs(0.1, linesearch=None),
}


def check_explicit_axes():
    """ZeRO-1 beside tensor parallelism, for two steps: as on one device."""
    mesh = explicit_mesh()
    layout = {"kernel": P(None, "model"), "bias": P("model"), "scale": P()}
    rng = np.random.default_rng(0)
    on_one = {
        "kernel": jnp.asarray(rng.normal(size=[16, 8]), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=8), jnp.float32),
        "scale": jnp.asarray(rng.normal(size=16), jnp.float32),
    }

    def run(optimizer, needs_resharding):
        params = {
            name: jax.device_put(p, NamedSharding(mesh, layout[name]))
            for name, p in on_one.items()
        }
        shardings = zero_shardings(optimizer, params, mesh, "data")
        like = zero_shardings(optax.trace(0.9), params, mesh, "data").trace
        state = jax.jit(optimizer.init, out_shardings=shardings)(params)

        def step(params, state):
            def like_the_state(tree):
                return jax.tree.map(reshard, tree, like)

            g, beside = jax.tree.map(jnp.cos, params), params
            if needs_resharding:
                g, beside = like_the_state(g), like_the_state(params)
            updates, state = optimizer.update(g, state, beside)
            updates = jax.tree.map(
                lambda u, p: reshard(u, jax.typeof(p).sharding),
                updates,
                params,
            )
            return optax.apply_updates(params, updates), state

        own = jax.tree.map(lambda p: p.sharding, params)
        step = jax.jit(step, out_shardings=(own, shardings))
        for _ in range(2):
            params, state = step(params, state)
        return params

    def alone(optimizer):
        @jax.jit
        def step(params, state):
            g = jax.tree.map(jnp.cos, params)
            updates, state = optimizer.update(g, state, params)
            return optax.apply_updates(params, updates), state

        params, state = on_one, optimizer.init(on_one)
        for _ in range(2):
            params, state = step(params, state)
        return params

    cases = [
        (name, optimizer, resharded)
        for resharded, some in (
            (False, EXPLICIT),
            (True, {"adamax": adamax(0.1)} | RESHARDED),
        )
        for name, optimizer in some.items()
    ]
    with warnings.catch_warnings(), set_mesh(mesh):
        warnings.filterwarnings("ignore", ".*stay replicated.*")
        for name, optimizer, resharded in cases:
            for p, expected in zip(
                jax.tree.leaves(run(optimizer, resharded)),
                jax.tree.leaves(alone(optimizer)),
                strict=True,
            ):
                np.testing.assert_allclose(
                    p, expected, rtol=1e-5, atol=1e-6, err_msg=name
                )
        # JAX before 0.10 lets some of them pass.
        for some, resharded in ((RESHARDED, False), (NOT_SHARDED, True)):
            for optimizer in some.values() if jax.__version_info__ >= (0, 10) else ():
                with pytest.raises(Exception, match=r"shard|branches"):
                    run(optimizer, resharded)


def check_what_cannot_be_divided_is_reported():
    mesh = data_mesh()
    params = {"odd": abstract(7, 3), "even": abstract(8), "single": abstract(1)}
    with pytest.warns(UserWarning) as caught:
        shardings = zero_shardings(adamax(), params, mesh, "data")
    (warning,) = caught
    assert warning.filename == __file__
    assert str(warning.message) == (
        "168 of the optimizer state's 248 bytes stay replicated over axis 'data', "
        "since 8 divides no dimension of [0].m['odd'] (7, 3), [0].u['odd'] (7, 3)."
    )
    assert specs(shardings)[0].m == {"odd": P(), "even": P("data"), "single": P()}
    many = [abstract(3) for _ in range(20)]
    with pytest.warns(UserWarning, match=r"\[0\]\.m\[9\] \(3,\) and 30 more\.$"):
        zero_shardings(adamax(), many, mesh, "data")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zero_shardings(adamax(), {"even": abstract(8)}, mesh, "data")


def check_errors():
    mesh = data_mesh()
    with pytest.raises(
        ValueError, match=r"axis must be the name .*\('data',\), got 'batch'"
    ):
        zero_shardings(adamax(), abstract(8), mesh, "batch")
    other = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AUTO, AUTO))
    params = {"w": abstract(8, sharding=NamedSharding(other, P("b")))}
    with pytest.raises(
        ValueError, match=r"\['w'\] is sharded .* not over the given Mesh"
    ):
        zero_shardings(adamax(), params, mesh, "data")
    for devices in (jax.devices()[4:], jax.devices()[3::-1]):
        params = abstract(
            8,
            sharding=NamedSharding(
                jax.make_mesh((4,), ("data",), axis_types=(AUTO,), devices=devices),
                P("data"),
            ),
        )
        given = jax.make_mesh(
            (4,), ("data",), axis_types=(AUTO,), devices=jax.devices()[:4]
        )
        with pytest.raises(ValueError, match="not over the given Mesh"):
            zero_shardings(adamax(), params, given, "data")
    with pytest.raises(ValueError, match="axis must be the name of one"):
        zero_shardings(adamax(), abstract(8), mesh, ("data",))


WIDTH, BATCH, STEPS = 64, 32, 10


def mlp():
    keys = jax.random.split(jax.random.key(0), 3)
    return [
        {"kernel": jax.random.normal(key, [WIDTH, WIDTH]) / 8, "bias": jnp.zeros(WIDTH)}
        for key in keys
    ]


def mlp_loss(params, x):
    y = x
    for layer in params:
        y = jnp.tanh(y @ layer["kernel"] + layer["bias"])
    return jnp.mean((y - x) ** 2)


def data():
    return jax.random.normal(jax.random.key(1), [STEPS, BATCH, WIDTH])


def gathered_bytes(compiled):
    """The bytes of the results of all all-gathers, by dtype."""
    bytes_of = {}
    for line in compiled.splitlines():
        match = re.search(r" = (.*) all-gather(-start)?\(", line)
        if not match:
            continue
        result = match[1].rsplit(", ", 1)[-1] if match[2] else match[1]
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
            size = np.prod([int(n) for n in shape.split(",")])
            bytes_of[dtype] = bytes_of.get(dtype, 0) + size * (int(dtype[1:]) // 8)
    return bytes_of


class Run(NamedTuple):
    params: list
    state: optax.OptState
    losses: list
    compiled: str


def train(mesh, optimizer, shardings):
    """Parameters replicated, the batch divided; the run and its compiled step."""
    replicated = NamedSharding(mesh, P())

    def step(params, state, x):
        loss, gradients = jax.value_and_grad(mlp_loss)(params, x)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = jax.device_put(mlp(), replicated)
    state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    step = jax.jit(
        step,
        donate_argnums=(0, 1),
        out_shardings=(replicated, shardings, replicated),
    )
    batches = jax.device_put(data(), NamedSharding(mesh, P(None, "data")))
    compiled = step.lower(params, state, batches[0]).compile()
    losses = []
    for x in batches:
        params, state, loss = compiled(params, state, x)
        losses.append(float(loss))
    return Run(params, state, losses, compiled.as_text())


@functools.cache
def divided_run(name):
    """With the state of a storage spread over the devices."""
    mesh, optimizer = data_mesh(), adamax(0.01, **STORAGES[name])
    shardings = zero_shardings(optimizer, mlp(), mesh, "data")
    return train(mesh, optimizer, shardings)


# The largest change of a step, as a share of it, where a number of the state is rounded
# to the other side.
ROUNDING = {"own": 1e-5, "bfloat16": 2**-8, "two bytes": 0.018}


def check_training():
    """An eighth of the bytes, the same run, and one exchange: that of the updates."""
    mesh = data_mesh()
    parameter_bytes = sum(x.nbytes for x in jax.tree.leaves(mlp()))
    for name, storage in STORAGES.items():
        optimizer = adamax(0.01, **storage)
        divided = divided_run(name)
        replicated = jax.tree.map(lambda _: NamedSharding(mesh, P()), divided.state)
        whole = train(mesh, optimizer, replicated)

        state = divided.state[0]
        on_one_device = sum(
            x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state)
        )
        scalars = state.count.nbytes + state.u_scale.nbytes
        total = sum(x.nbytes for x in jax.tree.leaves(whole.state))
        assert on_one_device == (total - scalars) / 8 + scalars
        assert state.m[0]["kernel"].sharding.spec[0] == "data"

        # The whole batch is summed in another order: rounding, and what it grows to.
        np.testing.assert_allclose(divided.losses, whole.losses, rtol=1e-5)
        assert divided.losses[-1] < 0.9 * divided.losses[0]
        for p, q in zip(
            jax.tree.leaves(divided.params), jax.tree.leaves(whole.params), strict=True
        ):
            np.testing.assert_allclose(p, q, rtol=0, atol=0.01 * ROUNDING[name] * STEPS)

        # The parameters' bytes once, in float32, as their updates or as themselves:
        # nothing of the state. Narrow states have other dtypes, so that even a part
        # of one would be seen.
        assert gathered_bytes(divided.compiled) == {"f32": parameter_bytes}


def check_a_divided_state_is_diagnosed_as_a_whole():
    for name in ("own", "two bytes"):
        state = divided_run(name).state
        whole = jax.tree.leaves(diagnose(jax.device_get(state)))
        for figures in (diagnose(state), jax.jit(diagnose)(state)):
            for x, y in zip(jax.tree.leaves(figures), whole, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-5)


def check_the_update_alone_exchanges_nothing():
    mesh = data_mesh()
    for storage in STORAGES.values():
        optimizer = adamax(0.01, **storage)
        shardings = zero_shardings(optimizer, mlp(), mesh, "data")
        divided = shardings[0].m
        gradients = jax.device_put(mlp(), divided)
        state = jax.jit(optimizer.init, out_shardings=shardings)(mlp())
        update = jax.jit(optimizer.update, out_shardings=(divided, shardings))
        compiled = update.lower(gradients, state).compile().as_text()
        assert "fusion" in compiled
        for collective in ("all-", "reduce-scatter", "collective"):
            assert collective not in compiled


def check_the_example_of_the_readme():
    """Three more steps keep all shardings, so that the step is compiled once."""
    heading = "bfloat16 parameters and FSDP"
    code = test_readme.example(test_readme.README.read_text(), heading)
    names = test_readme.run(code)
    params, state, step = (names[name] for name in ("params", "state", "step"))
    before = jax.tree.map(lambda x: x.sharding, (params, state))
    for _ in range(3):
        params, state = step(params, state, jax.tree.map(jnp.ones_like, params))
    assert jax.tree.map(lambda x: x.sharding, (params, state)) == before
    assert step._cache_size() == 1
    for x in (params["kernel"], *jax.tree.leaves(state)):
        if x.ndim == 2:
            assert x.addressable_shards[0].data.shape == (8, 8)
    assert params["bias"].sharding.is_fully_replicated


CHECKS = eight_devices.named(
    check_which_dimension_is_divided,
    check_the_parameters_own_sharding_is_kept,
    check_specs_that_are_found_in_other_ways,
    check_the_longest_end_of_a_path_decides,
    check_a_state_that_exists,
    check_any_optax_state,
    check_explicit_axes_take_free_dimensions_alone,
    check_explicit_axes,
    check_what_cannot_be_divided_is_reported,
    check_errors,
    check_training,
    check_a_divided_state_is_diagnosed_as_a_whole,
    check_the_update_alone_exchanges_nothing,
    check_the_example_of_the_readme,
)


@pytest.mark.parametrize("check", CHECKS)
def test_on_eight_devices(check):
    assert eight_devices.problem(__file__, check) is None


if __name__ == "__main__":
    eight_devices.main(CHECKS)
