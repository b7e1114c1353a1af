"""Bad input gets an error that names what is wrong, and where."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sequences import STORAGES

from adamax_jax import (
    adam,
    adamax,
    adamaxw,
    convert_state,
    diagnose,
    from_optax,
    insert_state,
    lp_adam,
    lp_adamw,
    master_weights,
    moments,
    scale_by_adamax,
    scale_by_lp_adam,
    to_optax,
    zero_shardings,
)

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


@pytest.mark.parametrize("factory", [adamax, adamaxw, lp_adam])
def test_parameters_in_the_place_of_a_learning_rate(factory):
    """They are not printed."""
    params = {"a": jnp.arange(1000.0), "b": {"c": jnp.ones(3)}}
    arguments = (params, 2.0) if factory is lp_adam else (params, 1e-3)
    with pytest.raises(TypeError) as error:
        factory(*arguments)
    assert str(error.value) == (
        "learning_rate must be a number, a scalar array or a schedule, got a dict of 2 "
        "leaves. If these are the parameters: init and update take them."
    )


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


def test_one_byte_for_m_needs_b1_below_b2():
    with pytest.raises(ValueError, match=r"b1 < b2, got b1=0.9 and b2=0.9"):
        scale_by_adamax(0.9, 0.9, m_dtype="int8")
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
def test_parameters_without_gradients_have_no_state(leaf, dtype):
    """As ``eqx.filter(model, eqx.is_array)`` leaves them; a gradient is refused."""
    for optimizer in (adamaxw(), adamax(shared_axes=-1), lp_adam(0.1, p=3.0)):
        params = {"a": (jnp.ones([2, 2]), leaf)}
        state = optimizer.init(params)
        for tree in state[0][1:3]:
            assert tree["a"][1] is None
        gradients = {"a": (jnp.ones([2, 2]), None)}
        if hasattr(leaf, "devices") or not hasattr(leaf, "dtype"):
            updates, state = optimizer.update(gradients, state, params)
            assert updates["a"][1] is None
        for g in (jnp.ones(3), np.zeros(3, jax.dtypes.float0)):
            wrong = {"a": (jnp.ones([2, 2]), g)}
            with pytest.raises(ValueError, match=r"\['a'\]\[1\].*no array of floating"):
                optimizer.update(wrong, state, params)


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


# A state must be the one that the optimizer's own settings make.
CASES_OF_CASTS = [
    # What a policy or a restore does to all floats.
    ({}, lambda s: cast_floats(s, jnp.bfloat16), "u_scale has dtype bfloat16"),
    ({}, lambda s: cast_floats(s, jnp.float16), "u_scale has dtype float16"),
    # What lax.pmean does to codes.
    (
        STORAGES["two bytes"],
        lambda s: s._replace(m=s.m.astype(jnp.float32), u=s.u.astype(jnp.float32)),
        "m at .* has dtype float32, but this optimizer stores int8",
    ),
    (
        STORAGES["two bytes"],
        lambda s: s._replace(u=s.u.astype(jnp.float32)),
        "u at .* has dtype float32, but this optimizer stores uint8",
    ),
    # A state of another optimizer.
    (
        STORAGES["two bytes"],
        lambda s: scale_by_adamax().init(jnp.ones(3)),
        "m at .* has dtype float32, but this optimizer stores int8",
    ),
    (
        STORAGES["bfloat16"],
        lambda s: s._replace(u=s.u.astype(jnp.float32)),
        "u at .* has dtype float32, but this optimizer stores bfloat16",
    ),
    (
        {},
        lambda s: scale_by_adamax(**STORAGES["two bytes"]).init(jnp.ones(3)),
        "m at .* has dtype int8, but this optimizer stores float32",
    ),
]


def cast_floats(tree, dtype):
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(("storage", "change", "message"), CASES_OF_CASTS)
def test_states_that_were_cast(storage, change, message, jit):
    """The error says what the state has, what is wanted, and what does it."""
    optimizer = scale_by_adamax(**storage)
    state = change(optimizer.init(jnp.ones(3)))
    update = jax.jit(optimizer.update) if jit else optimizer.update
    with pytest.raises(TypeError, match=message) as error:
        update(jnp.ones(3), state)
    assert "convert_state" in str(error.value)
    assert "insert_state" in str(error.value)


def test_a_bfloat16_state_cast_leaf_by_leaf():
    """Its u is divided by u_scale: widened, it would be off by that."""
    wide = scale_by_adamax(m_dtype="float32", u_dtype="float32")
    narrow = scale_by_adamax(**STORAGES["bfloat16"])
    _, state = narrow.update(jnp.ones(3), narrow.init(jnp.ones(3)))
    with pytest.raises(TypeError, match=r"m at .* bfloat16, but .* stores float32"):
        wide.update(jnp.ones(3), state)
    wide.update(jnp.ones(3), convert_state(state, m_dtype="float32", u_dtype="float32"))


@pytest.mark.parametrize("storage", [{}, STORAGES["two bytes"]])
def test_states_of_the_other_family(storage):
    ours, theirs = scale_by_adamax(**storage), scale_by_lp_adam(p=3)
    g = jnp.ones(3)
    with pytest.raises(
        TypeError, match=r"of type ScaleByAdamaxState, but .* ScaleByLpAdamState.*init"
    ):
        theirs.update(g, ours.init(g))
    with pytest.raises(
        TypeError, match=r"ScaleByLpAdamState, but .* AdaMax begins with a new state"
    ):
        ours.update(g, theirs.init(g))
    with pytest.raises(TypeError, match="ScaleByAdamaxState"):
        ours.update(g, optax.scale_by_adam().init(g))


@pytest.mark.parametrize(
    "factory", [scale_by_adamax, lambda **k: scale_by_lp_adam(2, **k)]
)
@pytest.mark.parametrize("rate", [0.99999999, np.nextafter(1.0, 0.0)])
@pytest.mark.parametrize("name", ["b1", "b2"])
def test_decay_rates_that_are_1_in_float32(x64, factory, name, rate):
    """Nothing would ever be forgotten; in float64 it is."""
    optimizer = factory(**{name: rate})
    with pytest.raises(ValueError, match=rf"{name}=0.99.* is 1 in float32.*float64"):
        optimizer.init(jnp.ones(2, jnp.float32))
    with pytest.raises(ValueError, match=f"{name}=0.99.* is 1 in float32"):
        optimizer.init([jnp.ones(2, jnp.float64), jnp.ones(2, jnp.bfloat16)])
    optimizer.init(jnp.ones(2, jnp.float64))
    factory(**{name: 0.99999994}).init(jnp.ones(2, jnp.float32))
    if factory is scale_by_adamax:
        factory(**{name: rate}, u_dtype="float64").init(jnp.ones(2, jnp.float64))


@pytest.mark.parametrize("factory", [adamax, functools.partial(lp_adam, p=2.0)])
def test_hyperparameters_injected_into_complex_parameters(factory):
    params = jnp.ones(2, jnp.complex64)
    with pytest.raises(TypeError, match=r"complex.*hyperparam_dtype=jnp\.float32"):
        optax.inject_hyperparams(factory)(1e-2).init(params)
    inject = optax.inject_hyperparams(factory, hyperparam_dtype=jnp.float32)
    update, _ = inject(1e-2).update(params, inject(1e-2).init(params))
    np.testing.assert_allclose(update, [-1e-2, -1e-2], rtol=1e-6)


DECAYED = [adamaxw, functools.partial(lp_adamw, p=2.0)]


@pytest.mark.parametrize("factory", DECAYED)
def test_mask_functions_under_inject_hyperparams(factory):
    """They are taken for a schedule of the mask, which is refused with the cure."""
    params = {"w": jnp.ones([2, 2]), "b": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)

    def mask(tree):
        return jax.tree.map(lambda p: jnp.ndim(p) > 1, tree)

    options = {"learning_rate": 1.0, "weight_decay": 0.5, "mask": mask}
    with pytest.raises((TypeError, ValueError), match='static_args="mask"'):
        optimizer = optax.inject_hyperparams(factory)(**options)
        optimizer.update(zeros, optimizer.init(params), params)
    optimizer = optax.inject_hyperparams(factory, static_args="mask")(**options)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.5)
    np.testing.assert_array_equal(updates["b"], 0)


@pytest.mark.parametrize("factory", DECAYED)
@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (lambda params: None, TypeError, "returned None: .* tree of booleans"),
        ({"a": 1.0, "b": True}, TypeError, r"tree of booleans, got 1.0 at \['a'\]"),
        (jnp.ones(2, bool), TypeError, "tree of booleans, got .*root"),
        ({"a": True}, ValueError, "mask must have the structure of the parameters"),
        (False, ValueError, "mask is False: no parameter would decay"),
        (np.False_, ValueError, "mask is False: no parameter would decay"),
    ],
)
def test_masks_that_are_no_booleans(factory, mask, error, message):
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    optimizer = factory(learning_rate=1.0, mask=mask)
    with pytest.raises(error, match=message):
        optimizer.update(params, optimizer.init(params), params)


@pytest.mark.parametrize("yes", [True, np.True_, np.array(True), jnp.array(True), 1])
@pytest.mark.parametrize("factory", DECAYED)
def test_masks_of_whatever_has_a_truth(factory, yes):
    """As in Optax."""
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    mask = {"a": yes, "b": not yes}
    optimizer = factory(learning_rate=1.0, weight_decay=0.5, mask=mask)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["a"], -0.5)
    np.testing.assert_array_equal(updates["b"], 0)


@pytest.mark.parametrize("factory", DECAYED)
def test_a_mask_that_is_traced(factory):
    """Which parameters decay is known before compiling."""
    params = {"a": jnp.ones(2)}

    @jax.jit
    def update(flag):
        optimizer = factory(learning_rate=1.0, mask={"a": flag})
        return optimizer.update(params, optimizer.init(params), params)[0]

    with pytest.raises(TypeError, match=r"tree of booleans, got .*\['a'\]"):
        update(True)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32])
def test_a_norm_of_the_family_that_was_cast(dtype):
    optimizer = lp_adam(0.1, p=3)
    params = {"a": jnp.ones(2)}
    state = optimizer.init(params)
    cast = state[0]._replace(u=jax.tree.map(lambda u: u.astype(dtype), state[0].u))
    with pytest.raises(TypeError, match=r"u at \['a'\] has dtype .*float32"):
        optimizer.update(params, (cast, state[1]), params)


def test_a_state_that_lacks_a_norm():
    optimizer = adamax(0.1)
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    state = optimizer.init(params)
    broken = state[0]._replace(u={"a": state[0].u["a"]})
    with pytest.raises(ValueError, match="2 arrays in m but 1 in u"):
        optimizer.update(params, (broken, state[1]), params)
    renamed = state[0]._replace(u={"a": state[0].u["a"], "c": state[0].u["b"]})
    with pytest.raises(ValueError, match=r"m has \['a'\], \['b'\], u has .*\['c'\]"):
        optimizer.update(params, (renamed, state[1]), params)


@pytest.mark.parametrize("factory", DECAYED)
def test_a_mask_whose_container_can_be_called(factory):
    """Its leaves are booleans: it is no function."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Module:
        w: Any
        b: Any

        def __call__(self, x):
            raise AssertionError("the mask was called")

    params = Module(jnp.ones(2), jnp.ones(2))
    optimizer = factory(learning_rate=1.0, weight_decay=0.5, mask=Module(True, False))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates.w, -0.5)
    np.testing.assert_array_equal(updates.b, 0)


@pytest.mark.parametrize("factory", DECAYED)
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_schedules_that_return_several_numbers(factory, name):
    """They would broadcast the update."""
    options = {"learning_rate": 1.0} | {name: lambda count: jnp.ones(2)}
    optimizer = factory(**options)
    params = jnp.ones([1])
    with pytest.raises(ValueError, match=rf"{name} must be a scalar.*shape \(2,\)"):
        optimizer.update(params, optimizer.init(params), params)


def test_containers_that_look_at_their_fields():
    """Nothing but arrays is put into them."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Layer:
        w: Any

        def __post_init__(self):
            assert self.w.ndim == 2

    params = Layer(jnp.ones([2, 2]))
    for optimizer in (
        adamax(0.1),
        adamaxw(0.1, mask=True),
        adamax(0.1, **STORAGES["two bytes"], shared_axes=-1),
        lp_adam(0.1, p=3),
        lp_adamw(0.1, p=3),
    ):
        updates, _ = optimizer.update(params, optimizer.init(params), params)
        np.testing.assert_allclose(updates.w, -0.1, rtol=1e-2)


@pytest.mark.parametrize("optimizer", [adamax(0.1), lp_adam(0.1, p=2)])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (jnp.float16, jnp.float32),
        (jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.bfloat16),
        (jnp.float64, jnp.float32),
    ],
)
def test_a_mean_that_was_cast(x64, optimizer, before, after):
    """Beside the parameter that can be seen."""
    params = jnp.ones(2, before)
    state = optimizer.init(params)
    cast = (state[0]._replace(m=state[0].m.astype(after)), *state[1:])
    with pytest.raises(TypeError, match=r"m at .* has dtype .* parameter in b?float"):
        optimizer.update(params, cast, params)


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("name", ["m_dtype", "u_dtype"])
def test_dtypes_that_are_storages_no_more(name, dtype):
    """The error names those that are."""
    byte = "int8" if name == "m_dtype" else "uint8"
    message = rf"{name} must be .*, bfloat16, {byte}, got {dtype}.*hold more in fewer"
    with pytest.raises(ValueError, match=message):
        adamax(**{name: dtype})
    with pytest.raises(ValueError, match=message):
        convert_state(adamax().init(jnp.ones(2)), **{name: dtype})


@pytest.mark.parametrize("field", ["m", "u"])
def test_a_state_that_version_0_1_stored_in_float16(field):
    """Of float16 parameters it did by default."""
    params = jnp.ones(2, jnp.float16)
    optimizer = adamax(0.1)
    new = optimizer.init(params)
    leaf = jnp.ones(2, jnp.float16)
    old = (new[0]._replace(**{field: leaf}), *new[1:])
    with pytest.raises(TypeError, match=f"{field} at .* float16.*version 0.1"):
        optimizer.update(params, old, params)
    for function in (
        moments,
        functools.partial(convert_state, m_dtype="int8", u_dtype="uint8"),
        functools.partial(insert_state, new),
        diagnose,
        to_optax,
    ):
        with pytest.raises(TypeError, match=f"{field} at .* float16.*version 0.1"):
            function(old)


def test_a_bfloat16_state_cast_beside_its_parameters():
    optimizer = adamax(0.1)
    params = jnp.ones(2, jnp.bfloat16)
    state = cast_floats(optimizer.init(params), jnp.float32)
    with pytest.raises(TypeError, match=r"m at .* float32, .* parameter in bfloat16"):
        optimizer.update(params, state, params)


def test_the_scale_of_a_narrow_u_decays_in_float32(x64):
    params = jnp.ones(2, jnp.float64)
    optimizer = scale_by_adamax(b2=0.99999999, m_dtype="float64", u_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"b2=0\.99999999 is 1 in float32"):
        optimizer.init(params)
    scale_by_adamax(b2=0.99999999).init(params)


@pytest.mark.parametrize("factory", DECAYED)
def test_functions_in_a_container_are_no_mask(factory):
    params = {"a": jnp.ones(2)}
    optimizer = factory(learning_rate=0.1, mask={"a": lambda p: True})
    with pytest.raises(TypeError, match=r"tree of booleans, got <function .*\['a'\]"):
        optimizer.update(params, optimizer.init(params), params)


@pytest.mark.parametrize("value", [1j, None, "0.1", jnp.ones([], jnp.complex64)])
def test_schedules_that_return_no_real_number(value):
    optimizer = adamax(lambda count: value)
    with pytest.raises(TypeError, match="learning_rate must be a real number, but its"):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)))


DENSE = {
    "dense": {"bias": jnp.ones(2), "kernel": jnp.ones([2, 3])},
    "scale": jnp.ones(1),
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("factory", [scale_by_adamax, adamax, adamaxw])
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (
            lambda g: {"params": g},
            r"no leaf at \['dense'\]\['bias'\], .* of shape \(2,\), but have one at "
            r"\['params'\]\['dense'\]\['bias'\] \(are .* wrapped once too often\?\)\.",
        ),
        (
            lambda g: (jnp.float32(0), g),
            r"but have one at \[1\]\['dense'\]\['bias'\] \(are .* wrapped once too",
        ),
        (
            lambda g: g["dense"],
            r"but have one at \['bias'\] \(were the parameters wrapped once more",
        ),
        (
            lambda g: {"dense": {"bias": 1.0, "w": g["dense"]["kernel"]}, "scale": 1.0},
            r"no leaf at \['dense'\]\['kernel'\], .*, but have one at "
            r"\['dense'\]\['w'\]\.(\n|$)",
        ),
        (lambda g: {"dense": g["dense"]}, r"\['scale'\], .* shape \(1,\)\.(\n|$)"),
    ],
)
def test_gradients_of_another_structure_say_what_they_have(wrap, message, factory, jit):
    optimizer = factory()
    update = jax.jit(optimizer.update) if jit else optimizer.update
    params = wrap(DENSE) if factory is adamaxw else None
    with pytest.raises(ValueError, match=message):
        update(wrap(DENSE), optimizer.init(DENSE), params)


@pytest.mark.parametrize("factory", [adamax, adamaxw, lambda: lp_adam(0.1, 3.0)])
def test_arguments_of_update_in_another_order(factory):
    """The users of adamax wrote no chain, whose errors would say nothing to them."""
    optimizer = factory()
    state = optimizer.init(DENSE)
    for arguments in [
        (DENSE, DENSE),
        (DENSE, DENSE, state),
        (state, DENSE),
        (DENSE, state[0]),
        (DENSE, None),
        (DENSE, (*state, optax.EmptyState())),
    ]:
        with pytest.raises(TypeError, match=r"update takes the gradients, the state "):
            optimizer.update(*arguments)
    with pytest.raises(TypeError, match=r"got a dict of 3 leaves\."):
        optimizer.update(DENSE, DENSE)
    other = state[:2] if len(state) == 3 else (*state, optax.EmptyState())
    with pytest.raises(TypeError, match=r"got a tuple of \d\. The state of adamw and"):
        optimizer.update(DENSE, other)
    with pytest.raises(TypeError, match=r"got a ScaleBy\w+State .* insert_state puts"):
        optimizer.update(DENSE, state[0])
    for other in ((), (*state, *state), optax.EmptyState(), optax.MaskedState(state)):
        with pytest.raises(TypeError, match=r"a tuple of \d states, got [^.]*\.$"):
            optimizer.update(DENSE, other)


def test_the_state_of_an_adam_needs_its_b2():
    """Without it, from_optax takes it for the state of an AdaMax."""
    state = from_optax(optax.adam(1e-3).init(DENSE))
    with pytest.raises(TypeError, match=r"give from_optax its b2 as adam_b2"):
        adam(1e-3).update(DENSE, state)


def test_dictionaries_in_the_place_of_states():
    """As of nnx.state, or of a checkpoint that was restored without a target."""
    for state in (optax.adam(1e-3).init(DENSE), adam(1e-3).init(DENSE)):
        restored = [part._asdict() for part in state]
        for function in (moments, convert_state, from_optax):
            with pytest.raises(
                ValueError, match=r"dictionaries in place of states: give"
            ):
                function(restored)
    # A parameter may be called count.
    trace = optax.trace(0.9).init({"count": jnp.ones(2)})
    for function in (moments, convert_state, from_optax):
        with pytest.raises(ValueError, match=r"^The state holds no [\w ]+\.$"):
            function(trace)


@pytest.mark.parametrize("value", [1e-3, adamax, {"a": jnp.ones(3)}, None])
def test_what_is_no_optimizer(value):
    mesh = jax.make_mesh((1,), ("data",))
    for function in (master_weights, lambda x: zero_shardings(x, DENSE, mesh, "data")):
        with pytest.raises(
            TypeError, match=r"optimizer must be .*, such as adamax\(1e-"
        ):
            function(value)
    with pytest.raises(
        TypeError, match=r"got <function adamax .*>\. Call adamax first"
    ):
        master_weights(adamax)


@pytest.mark.parametrize("name", ["m_dtype", "u_dtype"])
def test_float64_without_x64(name):
    message = f"{name} is float64, of which JAX makes float32, unless jax_enable_x64"
    with pytest.raises(ValueError, match=message):
        convert_state(adamax().init(jnp.ones(2)), **{name: "float64"})
    with pytest.raises(ValueError, match=message):
        adamax(**{name: "float64"}).init(jnp.ones(2))


class TestStatesThatWereCast:
    """As Orbax does it, given a template in other dtypes, without a word."""

    g = jnp.asarray(np.random.default_rng(0).normal(size=[2, 200]), jnp.float32)

    def cast(self, saved, template):
        state = adamax(**saved).init(self.g[0])
        for g in self.g:
            _, state = adamax(**saved).update(g, state)
        like = adamax(**template).init(self.g[0])
        return jax.tree.map(lambda x, y: x.astype(y.dtype), state, like)

    @pytest.mark.parametrize("saved", ["bfloat16", "two bytes"])
    def test_to_floats_of_32_bits(self, saved):
        """u is stored divided by u_scale there, and not here."""
        state = self.cast(STORAGES[saved], {})
        message = r"u_scale is 1\.99.*, but no u is stored below 32 bits"
        for params in (None, self.g[0]):
            with pytest.raises(ValueError, match=message):
                adamax().update(self.g[0], state, params)
        for function in (moments, diagnose, to_optax, convert_state):
            with pytest.raises(ValueError, match=message):
                function(state)
        with pytest.raises(ValueError, match=message):
            insert_state(adamax().init(self.g[0]), state)

    def test_what_stays_what_it_is_is_not_refused(self):
        """Nor new states, and those that were set to 0."""
        for optimizer, g in [
            (adamax(), self.g[0]),
            (adamax(**STORAGES["bfloat16"]), self.g[0]),
            (adamax(**STORAGES["two bytes"]), self.g[0]),
        ]:
            state = optimizer.init(g)
            moments(state)
            _, state = optimizer.update(g, state)
            moments(state)
            zeros = jax.tree.map(jnp.zeros_like, state)
            moments(zeros)
            update, _ = optimizer.update(g, zeros)
            assert np.all(np.isfinite(update))

    @pytest.mark.parametrize("u_dtype", [None, "bfloat16"])
    @pytest.mark.parametrize("m_dtype", ["float32", "bfloat16"])
    def test_codes_of_m_beside_its_u(self, m_dtype, u_dtype):
        """They are up to 127, and no mean is above the maximum by much."""
        g = jnp.array([1.0, -0.01, 3.0])
        optimizer = adamax(m_dtype="int8", u_dtype=u_dtype)
        _, (state, rest) = optimizer.update(g, optimizer.init(g))
        cast = state._replace(m=state.m.astype(m_dtype)), rest
        for function in (moments, diagnose, to_optax, convert_state):
            with pytest.raises(
                ValueError, match="m is whole numbers, as its u or above it"
            ):
                function(cast)
        # Whole numbers that are none: all gradients were.
        for numbers in (jnp.ones(3), jnp.array([100.0, -3.0, 0.0])):
            optimizer = adamax(b1=0.0, m_dtype=m_dtype, u_dtype=u_dtype)
            moments(optimizer.update(numbers, optimizer.init(numbers))[1])
        numbers = jnp.array([[20.0, 30.0], [40.0, 50.0]])
        optimizer = adamax(m_dtype=m_dtype, u_dtype=u_dtype, shared_axes=-1)
        update, state = jax.jit(optimizer.update), optimizer.init(numbers)
        for _ in range(100):
            _, state = update(numbers, state)
        moments(state)

    @pytest.mark.parametrize("value", [2.0, 0.5, -1.5, float("nan")])
    @pytest.mark.parametrize("storage", ["bfloat16", "two bytes"])
    def test_a_scale_that_is_none(self, storage, value):
        """As the sum of those of several workers."""
        state = adamax(**STORAGES[storage]).init(self.g[0])[0]
        state = state._replace(u_scale=jnp.float32(value))
        for function in (moments, diagnose, to_optax, convert_state):
            with pytest.raises(ValueError, match="at least 1 and below 2"):
                function(state)


def test_a_gradient_in_the_place_of_a_tree():
    optimizer = adamax()
    state = optimizer.init(DENSE)
    message = r"root of the tree has shape \(\), .* a tree there, with a leaf at \['d"
    with pytest.raises(ValueError, match=message):
        optimizer.update(jnp.float32(1), state)
    message = r"\['dense'\] has shape \(2,\), .* with a leaf at \['bias'\] of it\."
    with pytest.raises(ValueError, match=message):
        optimizer.update({"dense": jnp.ones(2), "scale": jnp.ones(1)}, state)


def test_other_things_in_the_place_of_hyperparameters():
    with pytest.raises(
        TypeError, match=r"m_dtype must be .*, got a dict of 3 leaves\."
    ):
        adamax(1e-3, m_dtype=DENSE)
    with pytest.raises(
        TypeError, match=r"residual_dtype must be .* a dict of 3 leaves"
    ):
        master_weights(adamax(1e-3), DENSE)
    with pytest.raises(TypeError, match=r"or a schedule, got None\.$"):
        adamax(None)
    with pytest.raises(TypeError, match=r"or a schedule, got a list of 2 leaves\.$"):
        adamax([1e-3, 1e-4])
    with pytest.raises(
        TypeError, match=r"in this order.* a ScaleByLpAdamState, .*not a maximum\.$"
    ):
        lp_adam(0.1, 2.0).update(DENSE, adamax().init(DENSE))
