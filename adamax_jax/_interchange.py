"""States of other libraries' AdaMax, and back to Optax."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adamax_jax._checks import name_of
from adamax_jax._convert import decode, map_states, the_state
from adamax_jax._transform import ScaleByAdamaxState


def from_optax(state: optax.OptState) -> optax.OptState:
    """The state of a running ``optax.adamax``, to be continued here.

    Every ``optax.ScaleByAdamState`` in the state becomes a :class:`ScaleByAdamaxState`
    with m = mu and u = nu in their dtypes (u real). Optax's Adam has a state of the
    same type: whether the optimizer was an AdaMax, only the caller knows.

    Args:
      state: An ``optax.ScaleByAdamState``, or an optimizer's state with some in it;
        what else is in it stays as it is.

    Returns:
      The state, in the same containers, which are those of :func:`adamax` and
      :func:`adamaxw`, but for ``optax.adamaxw`` with a mask or a scheduled decay: for
      these, :func:`insert_state` puts the :class:`ScaleByAdamaxState` into a new state.

    Raises:
      ValueError: If there is no ``optax.ScaleByAdamState`` in the state.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from adamax_jax import adamax, from_optax
      >>> gradient = jnp.array([2.0, -0.5])
      >>> state = from_optax(optax.adamax(0.1).init(gradient))
      >>> update, state = adamax(0.1).update(gradient, state)
      >>> state[0].count, state[0].u
      (Array(1, dtype=int32), Array([2. , 0.5], dtype=float32))
    """
    return map_states(_from_scale_by_adam, state, optax.ScaleByAdamState)


def to_optax(state: optax.OptState) -> optax.OptState:
    """A state as ``optax.adamax`` keeps it, for tools that look for mu and nu.

    Every :class:`ScaleByAdamaxState` in the state becomes an ``optax.ScaleByAdamState``
    with mu = m and nu = u as :func:`moments` gives them: in float32 at least.

    Args:
      state: A :class:`ScaleByAdamaxState`, or an optimizer's state with some in it;
        what else is in it stays as it is.

    Returns:
      The state, in the same containers. ``from_optax`` brings back the numbers, and to
      the bit where m and u were stored in 32 bits or more.

    Raises:
      ValueError: If there is no :class:`ScaleByAdamaxState` in the state.

    Examples:
      >>> import jax.numpy as jnp
      >>> from adamax_jax import adamax, to_optax
      >>> state = to_optax(adamax(m_dtype="int8", u_dtype="uint8").init(jnp.ones(2)))
      >>> state[0]  # doctest: +NORMALIZE_WHITESPACE
      ScaleByAdamState(count=Array(0, dtype=int32),
          mu=Array([0., 0.], dtype=float32), nu=Array([0., 0.], dtype=float32))
    """
    return map_states(_to_scale_by_adam, state, ScaleByAdamaxState)


def from_torch(
    state_dict: Mapping[str, Any],
    names: Sequence[str],
    convert: Callable[[dict[str, Any]], optax.Params],
) -> ScaleByAdamaxState:
    """The state of a running ``torch.optim.Adamax``, to be continued here.

    Args:
      state_dict: What the optimizer's ``state_dict()`` returned; this function needs
        no PyTorch.
      names: The names of the parameters in the order in which the optimizer got them:
        ``[name for name, _ in model.named_parameters()]``.
      convert: The function that brings the model's weights here: from a dictionary of
        names and arrays, such as the model's ``state_dict()``, to the tree of
        parameters. It is called with ``exp_avg`` and with ``exp_inf`` in the place of
        the weights, in the types they have in ``state_dict``. It may move numbers
        (transpose, reshape, split, stack) but not compute with them: u is not linear.

    Returns:
      The state, with m and u in the dtypes that ``convert`` returned. Put it into an
      optimizer's with :func:`insert_state`; :func:`convert_state` stores it in other
      dtypes.

    Raises:
      ValueError: If there are not as many names as parameters, a parameter has no state
        or one of another optimizer, or the parameters have taken different numbers of
        steps.
      TypeError: If a number is complex, of which PyTorch treats the two parts apart, or
        would be cast, as float64 without ``jax_enable_x64``.

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
    indices = [i for group in state_dict["param_groups"] for i in group["params"]]
    if len(names) != len(indices):
        raise ValueError(
            f"names has {len(names)} names, but the optimizer has {len(indices)} "
            "parameters."
        )
    states = {
        name: _torch_state(state_dict, name, index)
        for name, index in zip(names, indices, strict=True)
    }
    steps = {name: int(state["step"]) for name, state in states.items()}
    if len(set(steps.values())) > 1:
        raise ValueError(
            f"The parameters have taken different numbers of steps, {steps}, but one "
            "count is kept for all."
        )
    m, u = (
        jax.tree_util.tree_map_with_path(
            _uncast, convert({name: state[key] for name, state in states.items()})
        )
        for key in ("exp_avg", "exp_inf")
    )
    return ScaleByAdamaxState(
        count=jnp.asarray(max(steps.values(), default=0), jnp.int32),
        m=m,
        u=u,
        u_scale=jnp.ones([], jnp.float32),
    )


def insert_state(
    state: optax.OptState, adamax_state: ScaleByAdamaxState
) -> optax.OptState:
    """An optimizer's new state, to go on from where another AdaMax was.

    The :class:`ScaleByAdamaxState` in it is replaced, and every field that is named
    ``count``, such as that of a learning rate schedule, becomes the given count.
    (``optax.tree.set`` would leave m and u as they are inside
    ``optax.inject_hyperparams``, without a word.)

    Args:
      state: An optimizer's state, with one :class:`ScaleByAdamaxState` in it.
      adamax_state: What takes its place.

    Returns:
      The state, in the same containers.

    Raises:
      ValueError: If there is not exactly one :class:`ScaleByAdamaxState` in the state.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from adamax_jax import adamax, insert_state
      >>> params = jnp.ones(2)
      >>> old = adamax().init(params)[0]._replace(count=jnp.int32(7))
      >>> optimizer = adamax(optax.cosine_decay_schedule(1e-2, decay_steps=100))
      >>> state = insert_state(optimizer.init(params), old)
      >>> state[0].count, state[1].count
      (Array(7, dtype=int32), Array(7, dtype=int32))
    """
    the_state(state)

    def replace(path, leaf):
        if isinstance(leaf, ScaleByAdamaxState):
            return adamax_state
        is_count = path and getattr(path[-1], "name", None) == "count"
        return adamax_state.count if is_count else leaf

    return jax.tree_util.tree_map_with_path(
        replace, state, is_leaf=lambda x: isinstance(x, ScaleByAdamaxState)
    )


def _from_scale_by_adam(state):
    return ScaleByAdamaxState(
        count=state.count,
        m=state.mu,
        u=jax.tree.map(jnp.real, state.nu),
        # In the container of the other scalar, which Flax NNX wraps.
        u_scale=jax.tree.map(lambda _: jnp.ones([], jnp.float32), state.count),
    )


def _to_scale_by_adam(state):
    m, u = decode(state)
    return optax.ScaleByAdamState(count=state.count, mu=m, nu=u)


def _torch_state(state_dict, name, index):
    state = state_dict["state"].get(index)
    if state is None:
        raise ValueError(
            f"The parameter {name!r} has no state: it never had a gradient. Put zeros "
            f"of its shape into state_dict['state'][{index}] as 'exp_avg' and "
            "'exp_inf', and the others' 'step'."
        )
    missing = {"step", "exp_avg", "exp_inf"} - set(state)
    if missing:
        raise ValueError(
            f"The state of {name!r} has no {', '.join(sorted(missing))}, but "
            f"{', '.join(sorted(state))}: is it of torch.optim.Adamax?"
        )
    return state


def _uncast(path, x):
    """The array, refusing what JAX would cast or PyTorch means otherwise."""
    given = x.dtype if isinstance(x, jax.Array) else np.asarray(x).dtype
    # A copy: PyTorch goes on writing to the memory that the converter may share.
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
