"""Nothing is reported where nothing is wrong: by JAX's debugging modes, or warnings."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sequences import STORAGES, long_but

from adamax_jax import (
    adamax,
    adamaxw,
    convert_state,
    diagnose,
    from_optax,
    full_params,
    insert_state,
    lp_adam,
    master_weights,
    moments,
    set_full_params,
    to_optax,
)

SHORT = (
    "own {}",
    "two bytes {'max_growth': 1.1}",
    "L^2.0",
    "two bytes int8",
    "two bytes",
)
# Of one shape, since each operation is compiled for each shape.
PARAMS = {
    "matrix": np.ones([3, 4], np.float32),
    "half": np.ones([3, 4], jnp.bfloat16),
    "float16": np.ones([3, 4], np.float16),
}
OPTIONS = [
    {},
    {"nesterov": True},
    {"max_growth": 1.1},
    {"shared_axes": -1},
    {"eps": 0.0},
    {"eps_inside": False},
]
OPTIMIZERS = {
    f"{storage} {options}": adamax(1e-3, **STORAGES[storage], **options)
    for storage, options in itertools.product(STORAGES, OPTIONS)
}
OPTIMIZERS |= {f"L^{p}": lp_adam(1e-3, p) for p in (1.0, 2.0, 3.5, jnp.inf)}
OPTIMIZERS |= {"L^p, traced": lp_adam(1e-3, jnp.float32(3))}
OPTIMIZERS |= {
    f"{storage} {residual}": master_weights(adamax(1e-3, **STORAGES[storage]), residual)
    for storage, residual in itertools.product(STORAGES, ("int8", "int16"))
}


pytestmark = pytest.mark.usefixtures("lenient")


@pytest.fixture(params=["jit", "disable_jit"], autouse=True)
def debug_nans(request):
    with jax.debug_nans(True):
        if request.param == "jit":
            with jax.debug_infs(True):
                yield
        else:
            # JAX's own maxima begin at an infinity, which debug_infs would report.
            with jax.disable_jit():
                yield


def steps(optimizer, params=PARAMS, count=3):
    state = optimizer.init(params)
    for _ in range(count):
        updates, state = optimizer.update(params, state, params)
    for update in jax.tree.leaves(updates):
        assert np.isfinite(update).all()
    return state


@pytest.mark.parametrize("name", long_but(SHORT, OPTIMIZERS))
def test_updates(name):
    steps(OPTIMIZERS[name])


def test_complex_updates():
    steps(adamax(1e-3), {"a": np.ones([3, 4], np.complex64)})
    steps(lp_adam(1e-3, 3.0), {"a": np.ones([3, 4], np.complex64)})


@pytest.mark.parametrize(
    ("debug_nans", "name"),
    long_but(
        [*(("jit", name) for name in SHORT), ("disable_jit", SHORT[1])],
        itertools.product(["jit", "disable_jit"], OPTIMIZERS),
    ),
    indirect=["debug_nans"],
)
def test_parameters_without_coordinates(name):
    """Whose sums and means are 0; they double the shapes to compile for."""
    params = {"matrix": np.ones([3, 4], np.float32), "empty": np.zeros([0, 3], "f")}

    @jax.jit
    def run(params):
        state = OPTIMIZERS[name].init(params)
        updates, state = OPTIMIZERS[name].update(params, state, params)
        wide = convert_state(state, m_dtype="float32", u_dtype="float32")
        return updates, state, moments(state), diagnose(state), moments(wide)

    for x in jax.tree.leaves(run(params)):
        assert np.isfinite(x).all()


@pytest.mark.parametrize("name", long_but(["two bytes"], STORAGES))
def test_tools(name):
    state = steps(adamax(1e-3, **STORAGES[name]))
    moments(state)
    str(diagnose(state))
    from_optax(to_optax(state))
    insert_state(adamax(m_dtype="int8", shared_axes=-1).init(PARAMS), state)
    for m_dtype, u_dtype in (
        (None, "float32"),
        ("float32", None),
        ("bfloat16", "bfloat16"),
        ("float32", "uint8"),
        ("int8", "uint8"),
        ("int8", "float32"),
    ):
        converted = convert_state(state, m_dtype=m_dtype, u_dtype=u_dtype)
        for x in jax.tree.leaves(moments(converted)):
            assert np.isfinite(x).all()


@pytest.mark.parametrize(
    ("dtype", "residual_dtype"),
    long_but(
        [("bfloat16", "int16"), ("float16", "int8")],
        itertools.product(["bfloat16", "float16"], ["int16", "int8"]),
    ),
)
def test_weights_in_full(dtype, residual_dtype):
    params = {"w": np.ones([3, 4], dtype)}
    state = steps(master_weights(adamax(1e-3), residual_dtype), params)
    assert np.isfinite(full_params(params, state)["w"]).all()
    both = set_full_params(params, state, {"w": np.full([3, 4], 0.1, "f")})
    np.testing.assert_allclose(full_params(*both)["w"], 0.1, rtol=1e-3)


@pytest.mark.parametrize("debug_nans", ["jit"], indirect=True)
@pytest.mark.parametrize("name", long_but(SHORT, OPTIMIZERS))
def test_float64_of_numpy_makes_no_warnings(name):
    """JAX takes it for float32, and so do we."""
    params = {"matrix": np.ones([3, 4]), "bias": np.zeros([3, 4])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = OPTIMIZERS[name]
        updates, _ = optimizer.update(params, optimizer.init(params), params)
        assert updates["matrix"].dtype == jnp.float32
        decayed = adamaxw(1e-3)
        decayed.update(params, decayed.init(params), params)
        optax.apply_updates(params, updates)
