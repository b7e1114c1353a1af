"""States of other libraries' AdaMax, and back to Optax."""

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from adamax_jax._checks import name_of
from adamax_jax._convert import (
    array_in,
    decode,
    map_states,
    store_like,
    the_state,
)
from adamax_jax._transform import ScaleByAdamaxState


def from_optax(state: optax.OptState) -> optax.OptState:
    """The state of a running ``optax.adamax``, to be continued here.

    Every ``optax.ScaleByAdamState`` in the state becomes a :class:`ScaleByAdamaxState`
    with m = mu and u = nu in their dtypes (u real) and shapes: for an optimizer with
    ``shared_axes`` or another storage, put it in with :func:`insert_state`. Optax's
    Adam has a state of the same type: whether the optimizer was an AdaMax, only the
    caller knows.

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
    with mu = m and nu = u as :func:`moments` gives them: in float32 at least. A shared
    u is repeated along its axes.

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
    names: Iterable[str],
    convert: Callable[[dict[str, Any]], optax.Params],
) -> ScaleByAdamaxState:
    """The state of a running ``torch.optim.Adamax``, to be continued here.

    Args:
      state_dict: What the optimizer's ``state_dict()`` returned; this function needs
        no PyTorch.
      names: The names of the parameters in the order in which the optimizer has them:
        ``[name for name, _ in model.named_parameters()]`` if it was made with
        ``model.parameters()``, else group by group. An optimizer that was made with
        ``model.named_parameters()`` knows them, and they are compared.
      convert: The function that brings the model's weights here: from a dictionary of
        names and arrays to the tree of parameters. It is called with ``exp_avg`` and
        with ``exp_inf`` in the place of the weights, in the types they have in
        ``state_dict``, and for the names given alone: without buffers and second names
        of tied weights. It may move numbers (transpose, reshape, split, stack) but not
        compute with them: u is not linear. It decides on dtypes, as for weights; of
        bfloat16 tensors ``jnp.from_dlpack`` makes arrays.

    Returns:
      The state, with m and u in the dtypes that ``convert`` returned. Put it into an
      optimizer's with :func:`insert_state`.

    Raises:
      ValueError: If names are repeated, not as many as the parameters or other than the
        optimizer's, a parameter has no state or one of another optimizer, the
        parameters have taken different numbers of steps, or ``convert`` asks for a name
        that is not there or returns a negative number for ``exp_inf``.
      TypeError: If ``state_dict`` is none, or ``convert`` returns complex numbers, of
        which PyTorch treats the two parts apart, or float64 without
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
    if not isinstance(state_dict, Mapping) or "param_groups" not in state_dict:
        raise TypeError(
            "state_dict must be what the optimizer's state_dict() returned, got "
            f"{type(state_dict).__name__}."
        )
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
    return ScaleByAdamaxState(
        count=jnp.asarray(max(steps.values(), default=0), jnp.int32),
        m=m,
        u=u,
        u_scale=jnp.ones([], jnp.float32),
    )


def insert_state(state: optax.OptState, adamax_state: optax.OptState) -> optax.OptState:
    """An optimizer's new state, to go on from where another AdaMax was.

    Of the :class:`ScaleByAdamaxState` in it, count, m and u become those given, stored
    in the dtypes, the sharding and the containers (Flax NNX) of the new state.
    Schedules of the learning rate, of the weight decay and of
    ``optax.inject_hyperparams`` go on from the count, too. All else stays new.

    Where the new optimizer shares u along axes and the old one did not, u becomes its
    maximum along them, which is what it would have been. Along axes that only the old
    one shared it is repeated.

    (``optax.tree.set`` would leave m and u as they are inside
    ``optax.inject_hyperparams``, without a word.)

    Args:
      state: What the optimizer's ``init`` returned, with one
        :class:`ScaleByAdamaxState` in it.
      adamax_state: What to go on from: a :class:`ScaleByAdamaxState`, or an optimizer's
        state with one in it. It may have parts that the optimizer leaves out
        (``optax.masked``, ``optax.partition``).

    Returns:
      The state; it shares no memory with ``adamax_state``.

    Raises:
      ValueError: If there is not exactly one :class:`ScaleByAdamaxState` in one of the
        two, or they differ in the paths or shapes of m or u.

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
    target, given = the_state(state), the_state(adamax_state)
    given = ScaleByAdamaxState(
        count=jax.tree.map(lambda _: array_in(given.count), target.count),
        m=_leaves_for(target.m, given.m),
        u=_leaves_for(target.u, given.u, fits=_is_u_of),
        u_scale=jax.tree.map(lambda _: array_in(given.u_scale), target.u_scale),
    )
    given = jax.tree.map(_place, store_like(given, target), target)
    state = map_states(lambda _: given, state)
    return _set_counts(state, array_in(given.count))


def _from_scale_by_adam(state):
    return ScaleByAdamaxState(
        count=state.count,
        m=state.mu,
        u=jax.tree.map(jnp.real, state.nu),
        # Like the other scalar, which Flax NNX wraps and vmap gives an axis.
        u_scale=jax.tree.map(lambda c: jnp.ones_like(c, jnp.float32), state.count),
    )


def _is_u_of(shape, other):
    """Whether u of one shape becomes u of another by sharing or by repeating it."""
    return len(shape) == len(other) and all(
        size == kept or 1 in (size, kept)
        for size, kept in zip(shape, other, strict=True)
    )


def _leaves_for(target, given, fits=operator.eq):
    """The given leaves in the target's containers, found by their paths."""
    leaves = dict(jax.tree.leaves_with_path(given))

    def find(path, old):
        # A container around a single array adds an entry: Flax NNX's variables.
        found = path if path in leaves else path[:-1]
        if found not in leaves:
            raise ValueError(f"The state to insert has no leaf at {name_of(path)}.")
        new = leaves.pop(found)
        if not fits(new.shape, old.shape):
            raise ValueError(
                f"The state to insert has shape {new.shape} at {name_of(found)}, where "
                f"the optimizer's has {old.shape}."
            )
        return new

    result = jax.tree_util.tree_map_with_path(find, target)
    masked = [
        path
        for path, leaf in jax.tree.leaves_with_path(target, is_leaf=_is_masked)
        if _is_masked(leaf)
    ]
    for path in leaves:
        if not any(path[: len(prefix)] == prefix for prefix in masked):
            raise ValueError(
                f"The optimizer's state has no leaf at {name_of(path)}, where the "
                "state to insert has one."
            )
    return result


def _is_masked(leaf):
    return isinstance(leaf, optax.MaskedNode)


def _place(new, old):
    """A copy that lies where the old array lies; inside of jax.jit, anywhere."""
    copy = jnp.array(new)
    return copy if isinstance(old, Tracer) else jax.device_put(copy, old.sharding)


def _set_counts(tree, count):
    """Sets the count of every schedule in a state."""
    # The last is not public. It is not made on import, which would start the devices.
    types = (
        optax.ScaleByScheduleState,
        optax.InjectHyperparamsState,
        optax.InjectStatefulHyperparamsState,
        type(optax.schedules.WrappedSchedule(lambda count: count).init()),
    )

    def set_count(node):
        if not isinstance(node, types):
            return node
        fields = {
            name: _set_counts(value, count) for name, value in node._asdict().items()
        }
        # Each its own copy: an array may be donated only once.
        fields["count"] = jax.tree.map(lambda old: _place(count, old), node.count)
        return node._replace(**fields)

    return jax.tree.map(set_count, tree, is_leaf=lambda x: isinstance(x, types))


def _to_scale_by_adam(state):
    m, u = decode(state)
    nu = jax.tree.map(lambda m, u: jnp.broadcast_to(u, m.shape), m, u)
    return optax.ScaleByAdamState(count=state.count, mu=m, nu=nu)


def _checked_names(names, groups):
    """The names as a list, as many as the parameters of all groups together."""
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
    return jax.tree_util.tree_map_with_path(_uncast, tree)


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
