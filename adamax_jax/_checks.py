"""Errors for invalid arguments, raised before any arithmetic is done.

Only static facts are checked (Python and NumPy numbers, tree structures, shapes,
dtypes): a hyperparameter may be a traced array, whose value is not known yet.
"""

import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FunctionType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from adamax_jax._formats import COMPLEX_MEANS, MEANS, NORMS
from adamax_jax._numerics import arithmetic_dtype
from adamax_jax._trees import is_inside, is_trained, name_of

_COMPLEX_PARTS = (None, jnp.dtype(jnp.float32), jnp.dtype(jnp.float64))


def check_decay(name: str, value: Any) -> Any:
    """Returns a decay rate. Raises ValueError for a number outside [0, 1)."""
    _check_precision(name, value)
    return _check_scalar(name, value, "in [0, 1)", lambda x: 0 <= x < 1)


def check_order(name: str, value: Any) -> Any:
    """Returns the order of a norm. Raises ValueError for a number below 1."""
    _check_precision(name, value)
    return _check_scalar(name, value, "at least 1, or infinity", lambda x: x >= 1)


def check_eps(name: str, value: Any) -> Any:
    """Returns an eps. Raises ValueError for a negative or infinite number."""
    _check_precision(name, value)
    return _check_scalar(
        name, value, "finite and at least 0", lambda x: 0 <= x < math.inf
    )


def check_growth(name: str, value: Any) -> Any:
    """Returns ``max_growth``. Raises ValueError for a number not above 1."""
    if value is None:
        return None
    _check_precision(name, value)

    def is_growth(x):
        with np.errstate(over="ignore"):
            return 1 < np.float32(x) < math.inf

    return _check_scalar(
        name, value, "None, or above 1 and finite in float32", is_growth
    )


def check_factor(name: str, value: Any) -> Any:
    """Returns a constant factor. Raises ValueError for infinity and NaN."""
    kinds = "a number, a scalar array or a schedule"
    return _check_scalar(name, value, "finite", math.isfinite, kinds)


def check_scalar(name: str, value: Any) -> Any:
    """Returns what a schedule returned. Raises an error if it is no real scalar."""
    is_number = hasattr(value, "dtype") or isinstance(value, int | float | complex)
    if not is_number or jnp.iscomplexobj(value):
        raise TypeError(
            f"{name} must be a real number, but its schedule returned {value!r}."
        )
    if jnp.shape(value) != ():
        raise ValueError(
            f"{name} must be a scalar, but its schedule returned an array of shape "
            f"{jnp.shape(value)}."
        )
    return value


def check_dtype(
    name: str, value: Any, allowed: Iterable[str], *, optional: bool = True
) -> Any:
    """Returns a dtype. Raises an error if it is none, or none of the allowed ones."""
    if value is None and optional:
        return None
    choice = f"{'None or ' if optional else ''}one of {', '.join(allowed)}"
    try:
        # ``np.dtype(None)`` is float64.
        dtype = jnp.dtype("None" if value is None else value)
    except (TypeError, ValueError) as error:
        # NumPy takes a dictionary for a record, and raises ValueError.
        raise TypeError(f"{name} must be {choice}, got {_shown(value)}.") from error
    if dtype.name not in allowed:
        is_dropped = "bfloat16" in allowed and dtype.name.startswith(_DROPPED)
        hint = f" {_INSTEAD_OF_DROPPED}" if is_dropped else ""
        raise ValueError(f"{name} must be {choice}, got {dtype.name}.{hint}")
    return dtype


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raises ValueError if the value is none of the allowed strings."""
    if value not in allowed:
        choice = " or ".join(map(repr, allowed))
        raise ValueError(f"{name} must be {choice}, got {value!r}.")


def check_is_available(name: str, dtype: Any) -> None:
    """Raises ValueError for float64 if JAX would make it float32."""
    if dtype != jnp.float64:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = jnp.zeros([], dtype).dtype
    if made != dtype:
        raise ValueError(
            f"{name} is float64, of which JAX makes {made}, unless jax_enable_x64 is "
            f"set: set it, or use {name}='float32'."
        )


_DROPPED = ("float16", "float8")
_INSTEAD_OF_DROPPED = (
    "Version 0.1 stored m and u in float16 and float8; int8 for m and uint8 for u hold "
    "more in fewer bytes, bfloat16 has a wider range."
)


def check_formats(state: Any) -> None:
    """Raises TypeError if m or u has a dtype that is no format, such as float16."""
    for name, tree, known in (
        ("m", state.m, MEANS | COMPLEX_MEANS),
        ("u", state.u, NORMS),
    ):
        for path, leaf in jax.tree.leaves_with_path(tree):
            if leaf.dtype.name not in known:
                raise TypeError(
                    f"The state's {name} at {name_of(path)} has dtype {leaf.dtype}, "
                    f"but {name} is stored in one of {', '.join(known)}. A state that "
                    "version 0.1 stored in float16 or float8 is converted there, with "
                    "its convert_state; one that was cast has to be cast back."
                )
    _check_scale(state)


def _check_scale(state):
    """Raises ValueError if u_scale, unless it is traced, shows that u was cast."""
    (u_scale,) = jax.tree.leaves(getattr(state, "u_scale", 1.0))
    norms = jax.tree.leaves(state.u, is_leaf=_is_none)
    # u_scale may differ from 1 if a u was replaced by None.
    if not is_known(u_scale) or any(
        u is None or NORMS[u.dtype.name].is_scaled for u in norms
    ):
        return
    # 0 is what jax.tree.map(jnp.zeros_like, state) leaves.
    values = jax.device_get(u_scale)
    if norms and not np.all((values == 1) | (values == 0)):
        raise ValueError(
            f"The state's u_scale is {values}, but no u is stored below 32 bits, where "
            f"it is 1: this state was cast. {_NO_CASTS}"
        )


def check_numbers(state: Any, unit: float) -> None:
    """Raises ValueError for values that m and u_scale never have, unless traced.

    |m| is at most about u times ``unit``, and m has integer values only if all
    gradients have. So if all of m is integers, and a large one exceeds that bound, m is
    int8 codes that were cast. In the L^p family it is too if u is integers as well and
    differs from m after some steps: only constant gradients leave that mean an integer,
    and then m becomes the same. (AdaMax's u has integers of gradients that differ, and
    if it was cast, its u_scale shows it.)
    """
    (u_scale,) = jax.tree.leaves(getattr(state, "u_scale", 1.0))
    if is_known(u_scale):
        values = jax.device_get(u_scale)
        if not np.all((values == 0) | ((values >= 1) & (values < 2))):
            raise ValueError(
                f"The state's u_scale is {values}, but it is at least 1 and below 2. "
                f"{_NO_CASTS}"
            )
    is_above, is_other, is_whole = False, False, True
    norms = jax.tree.leaves(state.u)
    for m, u in zip(jax.tree.leaves(state.m), norms, strict=True):
        is_float = jnp.issubdtype(m.dtype, jnp.floating)
        if not (is_float and is_known(m) and is_known(u) and jnp.ndim(u_scale) == 0):
            return
        is_code = (jnp.abs(m) <= 128) & (jnp.round(m) == m)
        if not jnp.all(is_code):
            return
        norm = NORMS[u.dtype.name]
        u = norm.read(u, u_scale)
        size = jnp.abs(m).astype(u.dtype)
        is_large = size >= 16
        is_above = is_above or bool(jnp.any(is_large & (size > 1.31 * unit * u)))
        is_other = is_other or bool(jnp.any(is_large & (size != u)))
        is_whole = is_whole and not norm.is_scaled and bool(jnp.all(jnp.round(u) == u))
    (count,) = jax.tree.leaves(state.count)
    is_late = is_known(count) and bool(np.all(jax.device_get(count) >= 10))
    is_mean = not hasattr(state, "u_scale")
    if is_above or (is_mean and is_other and is_whole and is_late):
        raise ValueError(
            "The state's m is whole numbers, as its u or above it: codes of int8 that "
            f"were cast. {_NO_CASTS}"
        )


def is_known(x: Any) -> bool:
    """Whether this process has the values of an array: not if it is traced."""
    if not isinstance(x, jax.Array):
        return isinstance(x, np.ndarray | np.generic | float)
    return not isinstance(x, Tracer) and (
        x.is_fully_addressable or x.is_fully_replicated
    )


def check_ratio(b1: Any, b2: Any, m_dtype: Any) -> None:
    """Raises ValueError for an int8 m, stored as m/u, if m/u is not bounded."""
    if m_dtype is None or not MEANS[m_dtype.name].is_ratio:
        return
    if isinstance(b1, float) and isinstance(b2, float) and b1 >= b2:
        raise ValueError(
            f"m_dtype={jnp.dtype(m_dtype).name} stores m/u, which is bounded only for "
            f"b1 < b2, got b1={b1} and b2={b2}. Use bfloat16 or float32 for m."
        )


def check_bound(bound: float, limit: float, unit: float, rates: str) -> None:
    """Raises ValueError if an int8 m, a ratio to ``unit`` u, may be clipped."""
    if bound > limit:
        raise ValueError(
            f"m_dtype=int8 stores m / ({unit:g} u), for m/u up to {limit:.2f}, but "
            f"with {rates} it may reach {bound:.3g}. Use bfloat16 or float32 for m."
        )


def _check_precision(name, value):
    """Raises TypeError for a hyperparameter that was cast to half precision."""
    dtype = getattr(value, "dtype", None)
    if isinstance(value, numbers.Real) or dtype is None:
        return
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
        raise TypeError(
            f"{name} has dtype {dtype}, in which 0.999 is 1 and 1e-8 may be 0. If it "
            "comes from optax.inject_hyperparams, which casts to the parameters' "
            "dtype, pass that hyperparam_dtype=jnp.float32."
        )


def _check_scalar(name, value, allowed, is_allowed, kinds="a number or a scalar array"):
    if callable(value):
        raise TypeError(
            f"{name} must be {kinds}, got the function {value!r}. "
            "To schedule it, wrap the optimizer in optax.inject_hyperparams."
        )
    if isinstance(value, np.generic | np.ndarray) and value.ndim == 0:
        # NumPy scalars have a dtype, which would take part in promotion.
        value = value.item()
    if isinstance(value, numbers.Real):
        if not is_allowed(value):
            raise ValueError(f"{name} must be {allowed}, got {value!r}.")
        return float(value)
    if not hasattr(value, "dtype"):
        leaves = jax.tree.leaves(value)
        is_tree = leaves and all(hasattr(leaf, "dtype") for leaf in leaves)
        hint = _IF_PARAMETERS if is_tree else ""
        raise TypeError(f"{name} must be {kinds}, got {_shown(value)}.{hint}")
    if jnp.iscomplexobj(value):
        raise TypeError(
            f"{name} must be {kinds}, got {value!r}, which is "
            "complex. If it comes from optax.inject_hyperparams, which casts to the "
            "parameters' dtype, pass that hyperparam_dtype=jnp.float32."
        )
    if jnp.shape(value) != ():
        raise ValueError(f"{name} must be a scalar, got shape {jnp.shape(value)}.")
    return value


_IF_PARAMETERS = " If these are the parameters: init and update take them."


def _shown(value):
    """A value as an error shows it; of a tree, the type alone."""
    if value is None or jax.tree_util.all_leaves([value]):
        return repr(value)
    return f"a {type(value).__name__} of {len(jax.tree.leaves(value))} leaves"


def check_optimizer(value: Any) -> None:
    """Raises TypeError if the value has no init and update."""
    if not (hasattr(value, "init") and hasattr(value, "update")):
        hint = (
            f" Call {value.__name__} first." if isinstance(value, FunctionType) else ""
        )
        raise TypeError(
            "optimizer must be an optax.GradientTransformation, such as adamax(1e-3), "
            f"got {_shown(value)}.{hint}"
        )


def check_params(params: Any, m_dtype: Any = None) -> None:
    """Raises TypeError if a parameter cannot have an m, or not in this dtype."""
    for path, leaf in jax.tree.leaves_with_path(params):
        check_array(path, leaf)
        if not is_trained(leaf):
            continue
        dtype = jnp.result_type(leaf)
        where = f"The parameter at {name_of(path)} has dtype {dtype}"
        if float(jnp.finfo(dtype).min) >= 0:
            raise TypeError(
                f"{where}, which has no negative numbers. Keep it in bfloat16, say, "
                "and cast it where the model uses it."
            )
        if jnp.issubdtype(dtype, jnp.complexfloating):
            check_complex(path, dtype, m_dtype)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array or a number: not a function, for example."""
    is_number = hasattr(leaf, "dtype") or isinstance(leaf, numbers.Number)
    return is_number and not isinstance(leaf, type)


def check_array(path: Any, leaf: Any) -> None:
    """Raises TypeError if a parameter is not an array."""
    if not is_array(leaf):
        raise TypeError(
            f"The parameter at {name_of(path)} is not an array: {leaf!r}. "
            "Give init the arrays alone (with Equinox: "
            "eqx.filter(model, eqx.is_inexact_array))."
        )


def check_rounding(
    rates: Mapping[str, Any], params: Any, m_dtype: Any = None, u_dtype: Any = None
) -> None:
    """Raises ValueError if a decay rate rounds to 1 in the arithmetic of a leaf."""
    arithmetic = {
        arithmetic_dtype(jnp.result_type(p), *filter(None, (m_dtype, u_dtype)))
        for p in filter(is_trained, jax.tree.leaves(params))
    }
    if u_dtype is not None and NORMS[u_dtype.name].is_scaled:
        # A u below 32 bits decays by its scale, a float32.
        arithmetic.add(jnp.float32)
    for name, rate in rates.items():
        if isinstance(rate, float) and any(
            jnp.dtype(d).type(rate) == 1 for d in arithmetic
        ):
            raise ValueError(
                f"{name}={rate!r} is 1 in float32, in which the optimizer computes "
                "here, so that nothing would ever be forgotten: at most "
                "0.99999994, or float64 parameters and state."
            )


def check_state(state: Any, kind: type) -> None:
    """Raises TypeError if the state has another type than the optimizer's."""
    if isinstance(state, kind):
        return
    given = type(state).__name__
    raise TypeError(
        "update takes the gradients, the state and the parameters, in this order. "
        f"The state is of type {given}, but this optimizer's is a {kind.__name__}, "
        "which its init returns. Restore a checkpoint into such a state."
        f"{_INSTEAD.get((kind.__name__, given), '')}"
    )


# What to do with a state of another type, by the names of the right and the given one.
_INSTEAD = {
    ("ScaleByAdamaxState", "ScaleByAdamState"): (
        " from_optax converts that of optax.adamax."
    ),
    ("ScaleByAdamaxState", "ScaleByLpAdamState"): (
        " AdaMax begins with a new state: u is a maximum, not a mean."
    ),
    ("ScaleByLpAdamState", "ScaleByAdamState"): (
        " from_optax converts that of optax.adam, if given its b2 as adam_b2."
    ),
    ("ScaleByLpAdamState", "ScaleByAdamaxState"): (
        " If from_optax made it of optax.adam's, give from_optax its b2 as adam_b2. "
        "After AdaMax, Adam begins with a new state: u is a mean, not a maximum."
    ),
}


def check_chained(state: Any, size: int) -> None:
    """Raises TypeError if the state is not that of a chain of ``size`` parts."""
    fields = getattr(state, "_fields", None)
    is_plain = isinstance(state, tuple | list) and fields is None
    if is_plain and len(state) == size:
        return
    shown, hint = _shown(state), ""
    if is_plain and state:
        shown = f"a {type(state).__name__} of {len(state)}"
    if is_plain and {len(state), size} == {2, 3}:
        hint = (
            " The state of adamw and adamaxw has one more than that of adam and adamax,"
            " for the weight decay."
        )
    elif fields and "count" in fields and "m" in fields:
        hint = " insert_state puts a part of a state into what init returns."
    raise TypeError(
        "update takes the gradients, the state and the parameters, in this order. "
        "The state must be what init or the last update returned, a tuple of "
        f"{size} states, got {shown}.{hint}"
    )


def check_stored(
    state: Any, as_at_init: Callable[..., Any], param_dtypes: Sequence[Any]
) -> None:
    """Raises TypeError or ValueError if m or u is not as ``init`` would make it.

    Args:
      state: The state.
      as_at_init: A function of path, m, u and the parameter's dtype that returns the
        dtypes of m and u and the shape of u that ``init`` would make.
      param_dtypes: The dtype of each parameter, None if it is not known.
    """
    scale_dtype = jnp.result_type(getattr(state, "u_scale", np.float32(1)))
    if scale_dtype != jnp.float32:
        raise TypeError(
            f"The state's u_scale has dtype {scale_dtype}, but this optimizer stores "
            f"float32. {_NO_CASTS}"
        )
    m_leaves, u_leaves = map(jax.tree.leaves_with_path, (state.m, state.u))
    if [path for path, _ in m_leaves] != [path for path, _ in u_leaves]:
        raise ValueError(
            f"The state has {len(m_leaves)} arrays in m but {len(u_leaves)} in u, or "
            f"at other places: m has {_named(m_leaves)}, u has {_named(u_leaves)}. "
            "Give update the state that init or the last update returned."
        )
    check_formats(state)
    checked = set()
    for (path, m), (_, u), p_dtype in zip(
        m_leaves, u_leaves, param_dtypes, strict=True
    ):
        kind = m.dtype, u.dtype, m.shape, u.shape, p_dtype
        if kind in checked:
            continue
        checked.add(kind)
        m_dtype, u_dtype, u_shape = as_at_init(path, m, u, p_dtype)
        for name, leaf, dtype in (("m", m, m_dtype), ("u", u, u_dtype)):
            if leaf.dtype != dtype:
                beside = f", for a parameter in {p_dtype}" if p_dtype else ""
                allowed = MEANS if name == "m" else NORMS
                other = (
                    f"Use {name}_dtype={leaf.dtype.name!r} for this state, or convert "
                    "it. "
                    if leaf.dtype.name in allowed
                    else ""
                )
                raise TypeError(
                    f"The state's {name} at {name_of(path)} has dtype {leaf.dtype}, "
                    f"but this optimizer stores {dtype.name} ({name}_dtype){beside}. "
                    f"{other}{_NO_CASTS}"
                )
        if u.shape != u_shape:
            raise ValueError(
                f"The state's u at {name_of(path)} has shape {u.shape} beside m of "
                f"shape {m.shape}, but with this optimizer's shared_axes it has "
                f"{u_shape}. insert_state brings the state of an optimizer with other "
                "shared_axes into what init returns."
            )


def _named(leaves, limit=3):
    names = [name_of(path) for path, _ in leaves]
    return ", ".join(names[:limit] + ["..."] * (len(names) > limit)) or "none"


_NO_CASTS = (
    "A stored number is not what it stands for, so that a cast changes it. Restore a "
    "checkpoint in the dtypes that it was saved in; then use adamax_jax.convert_state, "
    "or insert_state into what init returns."
)


def check_complex(path: Any, dtype: Any, m_dtype: Any) -> None:
    """Raises TypeError if a complex leaf has no m in this dtype."""
    if m_dtype not in _COMPLEX_PARTS:
        raise TypeError(
            f"The parameter at {name_of(path)} has dtype {dtype}, whose m cannot be "
            f"stored in {m_dtype.name}: use None, float32 or float64, or wrap the "
            "optimizer in optax.contrib.split_real_and_imaginary, for which the real "
            "and the imaginary part are two parameters."
        )


def check_mask(mask: Any, params: Any) -> None:
    """Raises an error if the mask is no tree of booleans, or no prefix of params."""
    hint = (
        " Inside optax.inject_hyperparams, which takes a function for a schedule, pass "
        'that static_args="mask".'
    )
    if mask is None:
        raise TypeError(
            "The mask function returned None: it must return a tree of booleans."
        )
    if isinstance(mask, bool | np.bool_) and not mask:
        raise ValueError(
            f"mask is False: no parameter would decay. Give a tree of booleans.{hint}"
        )
    for path, flag in jax.tree.leaves_with_path(mask):
        is_array = hasattr(flag, "dtype") and not isinstance(flag, Tracer)
        if not (isinstance(flag, int) or is_array) or jnp.shape(flag) != ():
            raise TypeError(
                f"mask must be a tree of booleans, got {flag!r} at {name_of(path)}."
                f"{hint}"
            )
    try:
        jax.tree.structure(mask).flatten_up_to(params)
    except ValueError as error:
        raise ValueError(
            f"mask must have the structure of the parameters or a prefix of it: {error}"
        ) from error


def check_gradients(updates: Any, m: Any) -> None:
    """Raises an error if gradients and m differ in tree, shape or kind of number."""
    if updates is None and m is not None and not jax.tree_util.all_leaves([m]):
        raise TypeError(
            "The gradients are None. Parameters that get no gradient in this step have "
            "None in the tree of gradients."
        )
    gradients, treedef = jax.tree.flatten(updates, is_leaf=_is_none)
    try:
        moments = treedef.flatten_up_to(m)
    except ValueError as error:
        raise ValueError(_structure_message(updates, m)) from error
    checked = set()
    for index, (g, moment) in enumerate(zip(gradients, moments, strict=True)):
        kind = _kind(g), _kind(moment)
        if g is None or kind in checked:
            continue
        checked.add(kind)
        problem = _leaf_problem(g, moment)
        if problem:
            path, _ = jax.tree.leaves_with_path(updates, is_leaf=_is_none)[index]
            raise problem[0](f"The gradient at {name_of(path)} has {problem[1]}")


def check_shapes(updates: Any, params: Any) -> None:
    """Raises ValueError if gradients and parameters differ in shape."""
    gradients = jax.tree.leaves_with_path(updates, is_leaf=_is_none)
    treedef = jax.tree.structure(updates, is_leaf=_is_none)
    for (path, g), p in zip(gradients, treedef.flatten_up_to(params), strict=True):
        if g is not None and jnp.shape(g) != jnp.shape(p):
            raise ValueError(
                f"The gradient at {name_of(path)} has shape {jnp.shape(g)}, but the "
                f"parameter has shape {jnp.shape(p)}."
            )


def _kind(leaf):
    """What the check of a leaf depends on, so that each kind is checked once."""
    return getattr(leaf, "shape", None), getattr(leaf, "dtype", type(leaf))


def _leaf_problem(g, moment):
    if not hasattr(moment, "shape") and jax.tree.leaves(moment):
        (path, _), *_ = jax.tree.leaves_with_path(moment)
        return ValueError, (
            f"shape {jnp.shape(g)}, but the optimizer state has a tree there, with a "
            f"leaf at {name_of(path)} of it."
        )
    if not hasattr(moment, "shape"):
        return ValueError, (
            f"shape {jnp.shape(g)}, but the optimizer state has {moment!r} there: at "
            "init, the parameter was no array of floating-point or complex numbers. "
            "Its gradient must be None, also where jax.grad(allow_int=True) has float0."
        )
    if jnp.shape(g) != moment.shape:
        return ValueError, (
            f"shape {jnp.shape(g)}, but the optimizer state has shape {moment.shape} "
            "there. Was init called with other parameters?"
        )
    dtype = jnp.result_type(g)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return TypeError, f"dtype {dtype}, which is neither floating-point nor complex."
    if jnp.iscomplexobj(g) != jnp.iscomplexobj(moment):
        return TypeError, (
            f"dtype {dtype}, but the optimizer state has dtype {moment.dtype} there: "
            "real parameters take real gradients, complex parameters complex ones."
        )
    return None


def _structure_message(updates, m):
    """Names the first path at which the two trees differ."""
    given = dict(jax.tree.leaves_with_path(updates, is_leaf=_is_none))
    expected = dict(jax.tree.leaves_with_path(m, is_leaf=_is_none))
    without_gradient = [path for path, g in given.items() if g is None]
    for path, moment in expected.items():
        covered = any(is_inside(path, none) for none in without_gradient)
        if path not in given and not covered:
            shape = "None" if moment is None else f"one of shape {moment.shape}"
            return (
                f"The gradients have no leaf at {name_of(path)}, where the optimizer "
                f"state has {shape}{_instead_of(path, given, expected)}."
            )
    for path in given:
        if not any(is_inside(state_path, path) for state_path in expected):
            return (
                f"The gradients have a leaf at {name_of(path)}, where the optimizer "
                "state has none."
            )
    return (
        "The gradients and the optimizer state have the same leaves in different "
        f"containers: {jax.tree.structure(updates)} against {jax.tree.structure(m)}."
    )


def _instead_of(path, given, expected):
    """Names the leaf that gradients have instead of one at ``path``, if any."""
    others = [other for other in given if other not in expected]
    deeper = [other for other in others if other[len(other) - len(path) :] == path]
    higher = [other for other in others if path[len(path) - len(other) :] == other]
    for found, hint in (
        (deeper, " (are the gradients wrapped once too often?)"),
        (higher, " (were the parameters wrapped once more at init?)"),
        (others, ""),
    ):
        if found:
            return f", but have one at {name_of(found[0])}{hint}"
    return ""


def _is_none(leaf):
    return leaf is None
