"""Converts states of other libraries' Adam and AdaMax, and back to Optax's."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from adamax_jax._adamax import ScaleByAdamaxState
from adamax_jax._checks import check_decay
from adamax_jax._formats import default_dtype
from adamax_jax._lp_adam import ScaleByLpAdamState
from adamax_jax._numerics import arithmetic_dtype, quotient
from adamax_jax._shared_axes import reshare
from adamax_jax._state import (
    copied,
    find_states,
    map_states,
    read_moments,
    stored_as,
    unwrapped,
)
from adamax_jax._trees import is_trained, name_of
from adamax_jax._update import one_minus_power


def from_optax(
    state: optax.OptState, *, adam_b2: ArrayLike | None = None
) -> optax.OptState:
    """Converts the state of a running Optax Adam or AdaMax, to be continued here.

    In Optax the two have a state of the same type: only the caller knows which one ran.
    Every ``optax.ScaleByAdamState`` in the state becomes

    - without ``adam_b2``, a :class:`ScaleByAdamaxState` with m = mu and u = nu, for
      ``optax.adamax``;
    - with it, a :class:`ScaleByLpAdamState` with m = mu and u = sqrt(nu / (1 -
      adam_b2^count)), for ``optax.adam``, ``adamw`` and others made of
      ``optax.scale_by_adam``.

    :doc:`coming_from` converts a state with both. m has the dtype of mu, or bfloat16 if
    that has fewer than 32 bits. u is real and has the dtype of nu by the same rule, but
    at least float32 for :func:`adam`. Next, use :func:`insert_state` if the optimizer
    has ``shared_axes``, and :func:`convert_state` for other dtypes.

    Args:
      state: An ``optax.ScaleByAdamState``, or an optimizer's state that contains one or
        more; everything else in it stays unchanged.
      adam_b2: The ``b2`` of the Adam that ran, 0.999 by default in Optax; None for
        AdaMax.

    Returns:
      The state, in the same containers, which are those of :func:`adam`, :func:`adamw`,
      :func:`adamax` and :func:`adamaxw`, except for ``optax.adamw`` and
      ``optax.adamaxw`` with a mask or a scheduled decay: then put it into a new state
      with :func:`insert_state`. It shares no memory with the argument.

    Raises:
      ValueError: If there is no ``optax.ScaleByAdamState`` in the state, or ``adam_b2``
        is outside [0, 1).
      TypeError: If ``adam_b2`` is not a number or a scalar array of at least 32 bits.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from adamax_jax import adam, adamax, convert_state, from_optax
      >>> gradient = jnp.array([2.0, -0.5])
      >>> state = from_optax(optax.adamax(0.1).init(gradient))
      >>> update, state = adamax(0.1).update(gradient, state)
      >>> state[0].count, state[0].u
      (Array(1, dtype=int32), Array([2. , 0.5], dtype=float32))

      An Adam that goes on in two bytes:

      >>> state = from_optax(optax.adam(0.1).init(gradient), adam_b2=0.999)
      >>> state = convert_state(state, m_dtype="int8", u_dtype="uint8")
      >>> optimizer = adam(0.1, m_dtype="int8", u_dtype="uint8")
      >>> update, state = optimizer.update(gradient, state)
    """
    kind = optax.ScaleByAdamState
    if adam_b2 is None:
        return copied(map_states(_adamax_of_optax, state, kind))
    b2 = check_decay("adam_b2", adam_b2)
    return copied(map_states(lambda part: _adam_of_optax(part, b2), state, kind))


def to_optax(
    state: optax.OptState, *, adam_b2: ArrayLike | None = None
) -> optax.OptState:
    """Converts a state to that of Optax's Adam or AdaMax, with mu and nu.

    Every :class:`ScaleByAdamaxState` in the state becomes an ``optax.ScaleByAdamState``
    with mu = m and nu = u as :func:`moments` gives them, in at least float32. A shared
    u is repeated along its axes. Every :class:`ScaleByLpAdamState`, of :func:`adam` or
    another optimizer with p = 2, becomes one with nu = u^2 (1 - adam_b2^count).

    Args:
      state: A :class:`ScaleByAdamaxState` or :class:`ScaleByLpAdamState`, or an
        optimizer's state that contains one or more; everything else in it stays
        unchanged.
      adam_b2: The ``b2`` of :func:`adam`, with which Optax continues; None for AdaMax.

    Returns:
      The state, in the same containers. It shares no memory with the argument.
      :func:`from_optax` gives the same numbers again, to the bit where m and the u of
      an AdaMax were stored in 32 bits or more. (The square of an Adam's u below 1e-19
      or above 1e19 is 0 or infinity in float32.)

    Raises:
      ValueError: If there is none of these states, there is a
        :class:`ScaleByLpAdamState` but no ``adam_b2``, or ``adam_b2`` is outside
        [0, 1).
      TypeError: If ``adam_b2`` is not a number or a scalar array of at least 32 bits.

    Examples:
      >>> import jax.numpy as jnp
      >>> from adamax_jax import adamax, to_optax
      >>> state = to_optax(adamax(m_dtype="int8", u_dtype="uint8").init(jnp.ones(2)))
      >>> state[0]  # doctest: +NORMALIZE_WHITESPACE
      ScaleByAdamState(count=Array(0, dtype=int32),
          mu=Array([0., 0.], dtype=float32), nu=Array([0., 0.], dtype=float32))
    """
    b2 = None if adam_b2 is None else check_decay("adam_b2", adam_b2)
    if b2 is None and find_states(state, ScaleByLpAdamState):
        raise ValueError(
            "The state holds a ScaleByLpAdamState, whose u^2 is divided by "
            "1 - b2^count, as nu in Optax is not: give the optimizer's b2 as adam_b2, "
            "such as to_optax(state, adam_b2=0.999). (Of lp_adam with another p than 2 "
            "there is no state in Optax.)"
        )
    return copied(map_states(lambda part: _to_scale_by_adam(part, b2), state))


def from_torch(
    state_dict: Mapping[str, Any],
    names: Iterable[str],
    convert: Callable[[dict[str, Any]], optax.Params],
) -> ScaleByAdamaxState:
    """Converts the state of a running ``torch.optim.Adamax``, to be continued here.

    Args:
      state_dict: What the optimizer's ``state_dict()`` returned; PyTorch is not needed.
      names: The names of the parameters in the optimizer's order: ``[name for name, _
        in model.named_parameters()]`` if it was made with ``model.parameters()``, else
        group by group. They are compared with those of the optimizer if it was made
        with ``model.named_parameters()``.
      convert: Your function that converts the model's weights, from a dictionary of
        names and arrays to the tree of parameters. It is called with ``exp_avg`` and
        ``exp_inf`` in place of the weights, of the types in ``state_dict``, for these
        names alone (no buffers, no second names of tied weights). It may transpose,
        reshape, split and stack, but not compute: u is not linear. It chooses the
        dtypes; ``jnp.from_dlpack`` converts bfloat16 tensors.

    Returns:
      The state, with m and u in the dtypes that ``convert`` returned, or bfloat16 where
      these have fewer than 32 bits. Put it into an optimizer's with
      :func:`insert_state`.

    Raises:
      ValueError: If names are repeated, not as many as the parameters or other than the
        optimizer's, a parameter has no state or one of another optimizer, the
        parameters have taken different numbers of steps, or ``convert`` asks for
        another name or returns a negative number for ``exp_inf``.
      TypeError: If ``state_dict`` is not one, or ``convert`` returns complex numbers
        (PyTorch has one u for each of the two parts), or float64 without
        ``jax_enable_x64``.

    Examples:
      >>> import numpy as np, jax.numpy as jnp
      >>> from adamax_jax import adamax, from_torch, insert_state
      >>> exp = np.ones([3, 2], np.float32)  # of a torch.nn.Linear(2, 3)
      >>> state_dict = {
      ...     "state": {0: {"step": 7, "exp_avg": 0.1 * exp, "exp_inf": exp}},
      ...     "param_groups": [{"params": [0]}],
      ... }
      >>> def convert(weights):
      ...     return {"kernel": jnp.asarray(weights["weight"]).T}
      >>> state = from_torch(state_dict, ["weight"], convert)
      >>> optimizer = adamax(2e-3)
      >>> params = {"kernel": jnp.zeros([2, 3])}
      >>> state = insert_state(optimizer.init(params), state)
      >>> state[0].count, state[0].m["kernel"].shape
      (Array(7, dtype=int32), (2, 3))
    """
    _check_state_dict(state_dict)
    names = _checked_names(names, state_dict["param_groups"])
    indices = [i for group in state_dict["param_groups"] for i in group["params"]]
    states = {
        name: _torch_state(state_dict["state"], name, index)
        for name, index in zip(names, indices, strict=True)
    }
    steps = {name: int(state["step"]) for name, state in states.items()}
    if len(set(steps.values())) > 1:
        raise ValueError(
            f"The parameters have taken different numbers of steps, {steps}, but one "
            "count is kept for all."
        )
    m, u = (_converted(convert, states, key) for key in ("exp_avg", "exp_inf"))
    for path, leaf in jax.tree.leaves_with_path(u):
        if jnp.any(leaf < 0):
            raise ValueError(
                f"convert made exp_inf negative at {name_of(path)}: it may move "
                "numbers but not compute with them."
            )
    m, u = _stored(m, u)
    return ScaleByAdamaxState(
        count=jnp.asarray(max(steps.values(), default=0), jnp.int32),
        m=m,
        u=u,
        u_scale=jnp.ones([], jnp.float32),
    )


def _stored(m, u):
    """Stores trees of numbers in their default dtypes."""
    m_leaves, m_treedef = jax.tree.flatten(m)
    u_leaves, u_treedef = jax.tree.flatten(u)
    stored = []
    for m, u in zip(m_leaves, u_leaves, strict=True):
        m_dtype, u_dtype = default_dtype(m.dtype), default_dtype(u.dtype)
        stored.append(stored_as(m, u, m_dtype, u_dtype))
    return (
        jax.tree.unflatten(m_treedef, [m for m, _ in stored]),
        jax.tree.unflatten(u_treedef, [u for _, u in stored]),
    )


def _adamax_of_optax(state):
    m, u = _stored(*_trained(state))
    return ScaleByAdamaxState(
        count=state.count,
        m=m,
        u=u,
        # With the container and shape of count: Flax NNX wraps scalars, and jax.vmap
        # adds an axis.
        u_scale=jax.tree.map(lambda c: jnp.ones_like(c, jnp.float32), state.count),
    )


def _adam_of_optax(state, b2):
    m, nu = _trained(state)
    m = jax.tree.map(lambda m: m.astype(default_dtype(m.dtype)), m)

    def root(nu):
        nu = nu.astype(arithmetic_dtype(nu.dtype))
        # At count 0 the correction is 0, but nu is too.
        return jnp.sqrt(quotient(nu, _bias_correction(state, b2, nu)))

    return ScaleByLpAdamState(count=state.count, m=m, u=jax.tree.map(root, nu))


def _trained(state):
    """mu and real nu, None for parameters without gradients, which Optax gives 0."""
    mu = jax.tree.map(lambda m: m if is_trained(m) else None, state.mu)
    nu = jax.tree.map(lambda u: jnp.real(u) if is_trained(u) else None, state.nu)
    return mu, nu


def _bias_correction(state, b2, u):
    """1 - b2^count, with u's shape. A stacked state has a count for each member."""
    count = unwrapped(state.count)
    t = jnp.asarray(count, u.dtype)
    correction = one_minus_power(b2, t).reshape(t.shape + (1,) * (u.ndim - t.ndim))
    return jnp.broadcast_to(correction, u.shape)


def _to_scale_by_adam(state, b2):
    m, u = read_moments(state)
    if isinstance(state, ScaleByLpAdamState):
        nu = jax.tree.map(lambda u: u**2 * _bias_correction(state, b2, u), u)
    else:
        nu = jax.tree.map(lambda m, u: reshare(u, m.shape), m, u)
    return optax.ScaleByAdamState(count=state.count, mu=m, nu=nu)


def _check_state_dict(state_dict):
    """Raises TypeError for what is not an optimizer's state_dict()."""
    must_be = "state_dict must be what the optimizer's state_dict() returned, "
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"{must_be}got {type(state_dict).__name__}.")
    missing = [key for key in ("state", "param_groups") if key not in state_dict]
    if missing:
        keys = [repr(key) for key in state_dict]
        raise TypeError(
            f"{must_be}with the keys 'state' and 'param_groups': this has no "
            f"{' and no '.join(map(repr, missing))}, but "
            f"{', '.join(keys[:3] + ['...'] * (len(keys) > 3)) or 'nothing'}."
        )
    states, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(states, Mapping) or isinstance(groups, Mapping):
        raise TypeError(
            f"{must_be}a dict under 'state' and a list under 'param_groups', got "
            f"{type(states).__name__} and {type(groups).__name__}."
        )
    for group in groups:
        if not isinstance(group, Mapping) or "params" not in group:
            raise TypeError(
                f"{must_be}but its param_groups have a group without 'params'."
            )


def _checked_names(names, groups):
    """The names as a list. Raises ValueError if they do not fit the optimizer."""
    names = list(names)
    size = sum(len(group["params"]) for group in groups)
    if len(names) != size:
        raise ValueError(
            f"names has {len(names)} names, but the optimizer has {size} parameters."
        )
    repeated = [name for name, n in Counter(names).items() if n > 1]
    if repeated:
        raise ValueError(f"names has {repeated[0]!r} more than once.")
    known = [name for group in groups for name in group.get("param_names", [])]
    for i, (name, expected) in enumerate(zip(names, known, strict=False)):
        if name != expected:
            raise ValueError(
                f"names has {name!r} at {i}, where the optimizer has {expected!r}."
            )
    return names


def _torch_state(states, name, index):
    state = states.get(index)
    if state is None:
        raise ValueError(
            f"The parameter {name!r} has no state, as one that never had a gradient: "
            f"there is none at state_dict['state'][{index!r}], only at {list(states)}. "
            "To begin with zeros, put 'exp_avg' and 'exp_inf' of its shape there, and "
            "the others' 'step'."
        )
    missing = {"step", "exp_avg", "exp_inf"} - set(state)
    if missing:
        raise ValueError(
            f"The state of {name!r} has no {', '.join(sorted(missing))}, but "
            f"{', '.join(sorted(state))}: is it of torch.optim.Adamax?"
        )
    return state


def _converted(convert, states, key):
    try:
        tree = convert({name: state[key] for name, state in states.items()})
    except KeyError as error:
        raise ValueError(
            f"convert asked for {error}, which is not among names: an optimizer keeps "
            "nothing for buffers, and tied weights under one name."
        ) from error
    return jax.tree_util.tree_map_with_path(_same_numbers, tree)


def _same_numbers(path, x):
    """Converts to a JAX array. Raises TypeError if that changes numbers."""
    given = x.dtype if isinstance(x, jax.Array) else np.asarray(x).dtype
    # A copy, since PyTorch may later write to memory that ``convert`` shares.
    array = jnp.array(x)
    if jnp.iscomplexobj(array):
        raise TypeError(
            f"The state at {name_of(path)} is complex: PyTorch keeps an infinity norm "
            "for each of the two parts, AdaMax here one for the modulus."
        )
    if array.dtype != given:
        raise TypeError(
            f"The state at {name_of(path)} has dtype {given} and would become "
            f"{array.dtype}: cast it in convert, or enable jax_enable_x64."
        )
    return array
