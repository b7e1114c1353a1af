"""Bad input gets an error that names what is wrong, and where."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sequences import STORAGES

from adamax_jax import adamax, adamaxw, convert_state, scale_by_adamax

FACTORIES = [scale_by_adamax, adamax, adamaxw]
NUMBERS = [float, np.float32, np.float64, np.array]


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", ["b1", "b2"])
@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_decay_rates(factory, number, name, value):
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\), got"):
        factory(**{name: number(value)})


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("value", [-1e-8, float("nan"), float("inf")])
def test_eps(factory, number, value):
    with pytest.raises(ValueError, match="eps must be finite and at least 0, got"):
        factory(eps=number(value))


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_factors(name):
    with pytest.raises(ValueError, match=f"{name} must be finite, got nan"):
        adamaxw(**{name: float("nan")})
    with pytest.raises(TypeError, match=f"{name} must be a number.*got '0.1'"):
        adamaxw(**{name: "0.1"})
    with pytest.raises(ValueError, match=rf"{name} must be a scalar.*\(2,\)"):
        adamaxw(**{name: jnp.ones(2)})


def test_schedules_of_decay_rates_need_inject_hyperparams():
    with pytest.raises(TypeError, match=r"b1 .*optax\.inject_hyperparams"):
        adamax(b1=optax.linear_schedule(0.8, 0.9, 10))


@pytest.mark.parametrize("name", ["b1", "b2", "eps"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_hyperparameters_in_half_precision(name, dtype):
    with pytest.raises(TypeError, match=rf"{name} has dtype.*hyperparam_dtype"):
        adamax(**{name: jnp.array(0.5, dtype)})


@pytest.mark.parametrize("storage", [STORAGES["own"], STORAGES["two bytes"]])
def test_hyperparameters_injected_into_half_precision(storage):
    """In bfloat16 b2=0.999 would be 1: the error says what to pass."""
    params = jnp.ones(2, jnp.bfloat16)
    with pytest.raises(TypeError, match=r"hyperparam_dtype=jnp\.float32"):
        optax.inject_hyperparams(adamax)(0.1, **storage).init(params)
    inject = optax.inject_hyperparams(adamax, hyperparam_dtype=jnp.float32)
    optimizer = inject(0.1, **storage)
    updates, _ = optimizer.update(params, optimizer.init(params))
    assert updates.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["m_dtype", "u_dtype"])
def test_dtypes_without_a_meaning(name):
    for value in ("int16", "uint8" if name == "m_dtype" else "int8", "complex64"):
        with pytest.raises(
            ValueError, match=rf"{name} must be None or one of.*{value}"
        ):
            adamax(**{name: value})
    with pytest.raises(TypeError, match=rf"{name} must be None or one of.*'narrow'"):
        adamax(**{name: "narrow"})


@pytest.mark.parametrize("m_dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_one_byte_for_m_needs_b1_below_b2(m_dtype):
    with pytest.raises(ValueError, match=r"b1 < b2, got b1=0.9 and b2=0.9"):
        scale_by_adamax(0.9, 0.9, m_dtype=m_dtype)
    scale_by_adamax(0.9, 0.9, m_dtype="bfloat16", u_dtype="uint8")


@pytest.mark.parametrize("m_dtype", ["int8", "bfloat16"])
def test_complex_parameters_have_no_narrow_m(m_dtype):
    params = {"a": jnp.ones(2, jnp.complex64)}
    message = r"\['a'\] has dtype complex64, whose m"
    with pytest.raises(TypeError, match=message):
        adamax(m_dtype=m_dtype).init(params)
    with pytest.raises(TypeError, match=message):
        convert_state(adamax().init(params), m_dtype=m_dtype)


def test_values_of_traced_hyperparameters_are_not_looked_at():
    def update(b1, b2, eps, learning_rate):
        optimizer = adamax(learning_rate, b1, b2, eps)
        return optimizer.update(jnp.ones(1), optimizer.init(jnp.ones(1)))[0]

    assert float(jax.jit(update)(0.5, 0.9, 0.0, 0.1)[0]) == pytest.approx(-0.1)


@pytest.mark.parametrize(
    ("leaf", "dtype"),
    [
        (jnp.arange(3), "int32"),
        (np.arange(3, dtype=np.uint8), "uint8"),
        (jnp.array([True]), "bool"),
        (3, "int32"),
        (jax.random.key(0), "key"),
        (jax.ShapeDtypeStruct([2], jnp.int8), "int8"),
    ],
    ids=["int", "numpy", "bool", "python", "key", "abstract"],
)
def test_parameters_that_are_not_floating_point(leaf, dtype):
    message = rf"parameter at \['a'\]\[1\] has dtype {dtype}.*optax\.masked"
    with pytest.raises(TypeError, match=message):
        adamax().init({"a": (jnp.ones(2), leaf)})


def test_parameters_that_are_not_arrays():
    with pytest.raises(TypeError, match=r"\['activation'\] is not an array"):
        adamax().init({"activation": jax.nn.relu, "kernel": jnp.ones(2)})


PARAMS = {"a": jnp.ones(3), "b": {"c": jnp.ones([2, 2]), "d": jnp.ones([])}}
C, D = PARAMS["b"]["c"], PARAMS["b"]["d"]


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ({"a": jnp.ones(3)}, r"no leaf at \['b'\]\['c'\]"),
        ({"a": jnp.ones(3), "b": {"c": C}}, r"no leaf at \['b'\]\['d'\]"),
        (
            {"a": jnp.ones(3), "b": {"c": C, "d": D, "e": D}},
            r"a leaf at \['b'\]\['e'\], where the optimizer state has none",
        ),
        ({"a": jnp.ones(3), "b": [C, D]}, r"no leaf at \['b'\]\['c'\]"),
        ({"a": jnp.ones(3), "b": jnp.ones(3)}, r"\['b'\] has shape \(3,\)"),
        (
            {"a": jnp.ones(3), "b": {"c": jnp.ones([2]), "d": D}},
            r"\['b'\]\['c'\] has shape \(2,\), but .* \(2, 2\)",
        ),
        # Would broadcast without a word.
        (
            {"a": jnp.ones([]), "b": {"c": C, "d": D}},
            r"\['a'\] has shape \(\), but .* \(3,\)",
        ),
        (jnp.ones(3), r"the root of the tree has shape \(3,\)"),
    ],
)
@pytest.mark.parametrize("jit", [False, True])
def test_gradients_of_another_structure_or_shape(gradients, message, jit):
    optimizer = scale_by_adamax()
    update = jax.jit(optimizer.update) if jit else optimizer.update
    with pytest.raises(ValueError, match=message):
        update(gradients, optimizer.init(PARAMS))


def test_gradients_in_other_containers():
    optimizer = scale_by_adamax()
    with pytest.raises(ValueError, match="different containers"):
        optimizer.update((jnp.ones(1),), optimizer.init([jnp.ones(1)]))


def test_gradient_where_the_parameters_had_none():
    optimizer = scale_by_adamax()
    with pytest.raises(ValueError, match=r"\['a'\].* the optimizer state has None"):
        optimizer.update({"a": jnp.ones(1)}, optimizer.init({"a": None}))


@pytest.mark.parametrize(
    ("params", "gradient", "message"),
    [
        (jnp.ones(2), jnp.ones(2, int), "dtype int32, which is neither"),
        (jnp.ones(2), jnp.ones(2, jnp.complex64), "dtype complex64, but .* float32"),
        (jnp.ones(2, jnp.complex64), jnp.ones(2), "dtype float32, but .* complex64"),
    ],
)
def test_gradients_of_another_kind_of_number(params, gradient, message):
    optimizer = adamax()
    with pytest.raises(TypeError, match=rf"gradient at \['a'\] has {message}"):
        optimizer.update({"a": gradient}, optimizer.init({"a": params}))


@pytest.mark.parametrize("leaf", ["float32", jnp.float32])
def test_names_of_dtypes_are_not_parameters(leaf):
    with pytest.raises(TypeError, match=r"\['a'\] is not an array"):
        adamax().init({"a": leaf})


@pytest.mark.parametrize("value", [1j, jnp.array(1j), np.array(1j)])
def test_complex_hyperparameters(value):
    with pytest.raises(TypeError, match="b1 must be a number or a scalar array"):
        adamax(b1=value)


@pytest.mark.parametrize("extra", [None, jnp.ones(2)])
def test_gradients_with_one_more_leaf(extra):
    optimizer = adamax()
    with pytest.raises(ValueError, match=r"a leaf at \['c'\]"):
        optimizer.update(
            {"a": jnp.ones(1), "c": extra}, optimizer.init({"a": jnp.ones(1)})
        )


@pytest.mark.parametrize("shape", [(1,), (3, 3), ()])
def test_weight_decay_of_parameters_of_another_shape(shape):
    optimizer = adamaxw()
    state = optimizer.init({"a": jnp.ones(3)})
    with pytest.raises(
        ValueError, match=r"\['a'\] has shape \(3,\), but the parameter"
    ):
        optimizer.update({"a": jnp.ones(3)}, state, {"a": jnp.ones(shape)})


def test_weight_decay_needs_parameters():
    optimizer = adamaxw()
    with pytest.raises(ValueError, match=r"needs the parameters"):
        optimizer.update(jnp.ones(1), optimizer.init(jnp.ones(1)))
