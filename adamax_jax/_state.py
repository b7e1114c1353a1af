"""Reads a state, converts its dtypes, and inserts it into that of a new optimizer."""

import operator
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from adamax_jax._adamax import ScaleByAdamaxState
from adamax_jax._checks import (
    check_choice,
    check_complex,
    check_dtype,
    check_formats,
    check_is_available,
    check_numbers,
    is_known,
)
from adamax_jax._formats import MEANS, NORMS, formats
from adamax_jax._lp_adam import RATIO_UNIT, ScaleByLpAdamState
from adamax_jax._numerics import (
    arithmetic_dtype,
    by_parts,
    cast,
    dtype_like,
    number,
)
from adamax_jax._shared_axes import can_reshare, reshare
from adamax_jax._trees import is_inside, name_of, path_finder

# The states with m and u: AdaMax's, and that of the L^p family.
OptimizerState = ScaleByAdamaxState | ScaleByLpAdamState
KINDS = (ScaleByAdamaxState, ScaleByLpAdamState)


def moments(state: optax.OptState) -> tuple[Any, Any]:
    """The mean m and the norm u of the gradients, as numbers.

    Args:
      state: A :class:`ScaleByAdamaxState` or :class:`ScaleByLpAdamState`, or an
        optimizer's state that contains exactly one of them.

    Returns:
      The trees m and u, in float32 (float64 and complex if they are stored so), with
      the parameters' shapes; u has size 1 along shared axes. They share no memory with
      the state.

    Raises:
      ValueError: If the state does not contain exactly one of them, or ``jax.vmap`` has
        stacked it (apply this function with ``jax.vmap`` too).
      TypeError: If m or u has a dtype in which it is never stored.

    Examples:
      >>> import jax.numpy as jnp
      >>> from adamax_jax import adamax, moments
      >>> optimizer = adamax(m_dtype="int8", u_dtype="uint8")
      >>> gradient = jnp.array([2.0, -0.5])
      >>> _, state = optimizer.update(gradient, optimizer.init(gradient))
      >>> m, u = moments(state)
      >>> [round(float(x), 3) for x in m], [round(float(x), 3) for x in u]
      ([0.2, -0.05], [1.998, 0.5])
    """
    return copied(read_moments(only_state(state)))


def convert_state(
    state: optax.OptState,
    *,
    m_dtype: DTypeLike | None = None,
    u_dtype: DTypeLike | None = None,
) -> optax.OptState:
    """Stores the state of a running optimizer in other dtypes.

    Continue with an optimizer made with the same ``m_dtype`` and ``u_dtype``. Each
    number is rounded once.

    Args:
      state: A :class:`ScaleByAdamaxState` or :class:`ScaleByLpAdamState`, or an
        optimizer's state that contains one or more; everything else in it stays
        unchanged.
      m_dtype: What to store m in, as for :func:`scale_by_adamax`; None: unchanged.
      u_dtype: What to store u in, as for :func:`scale_by_adamax`; None: unchanged.

    Returns:
      The state, in the same containers. It shares no memory with the argument.

    Raises:
      ValueError: If a dtype is not one that :func:`scale_by_adamax` takes, there is
        none of these states, or ``jax.vmap`` has stacked one (apply this function with
        ``jax.vmap`` too).
      TypeError: If an argument is no dtype, m is complex and ``m_dtype`` has no complex
        counterpart, or m or u has a dtype in which it is never stored.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from adamax_jax import adamax, convert_state
      >>> params = jnp.ones(1000)
      >>> state = adamax().init(params)
      >>> sum(x.nbytes for x in jax.tree.leaves(state))
      8008
      >>> state = convert_state(state, m_dtype="int8", u_dtype="uint8")
      >>> sum(x.nbytes for x in jax.tree.leaves(state))
      2008
    """
    m_dtype = check_dtype("m_dtype", m_dtype, MEANS)
    u_dtype = check_dtype("u_dtype", u_dtype, NORMS)
    check_is_available("m_dtype", m_dtype)
    check_is_available("u_dtype", u_dtype)
    return copied(map_states(lambda s: _convert(s, m_dtype, u_dtype), state))


def insert_state(
    state: optax.OptState,
    adamax_state: optax.OptState,
    *,
    missing: Literal["raise", "keep"] = "raise",
) -> optax.OptState:
    """Puts the m, u and count of an old state into the state of a new optimizer.

    They are stored in the new state's dtypes, shardings and containers. Schedules of
    the learning rate, of the weight decay and of ``optax.inject_hyperparams`` continue
    from the count too. Everything else stays new, also the residuals of
    :func:`master_weights`: :func:`set_full_params` carries them over. Where the new
    optimizer shares u along axes, u becomes its maximum along them; where only the old
    one did, u is repeated.

    With ``missing="keep"``, parameters that the old state lacks keep what ``state``
    has: zeros for new layers. Their first steps differ from those of a new optimizer,
    since the bias correction follows the count: see :doc:`checkpoints`, which has
    examples too.

    Args:
      state: What the new optimizer's ``init`` returned, with one
        :class:`ScaleByAdamaxState` or :class:`ScaleByLpAdamState` in it.
      adamax_state: A state of the same type, or an optimizer's state that contains
        exactly one. It may have parts that the new optimizer leaves out
        (``optax.masked``, ``optax.partition``). A state of the L^p family does not tell
        its p: give one of the same p.
      missing: "raise" a ValueError if the old state has no m and u for a parameter, or
        "keep" those in ``state``, which are rounded once more if the two differ in
        ``u_scale``.

    Returns:
      The state. It shares no memory with either argument.

    Raises:
      ValueError: If one of the two does not contain exactly one such state, they differ
        in type or in the paths or shapes of m or u, ``missing`` is another string, or
        a state that ``jax.vmap`` has stacked would be stored in other dtypes.
      TypeError: If m or u has a dtype in which it is never stored.

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
    check_choice("missing", missing, ("raise", "keep"))
    target = only_state(state)
    given = only_state(adamax_state, "adamax_state")
    if type(given) is not type(target):
        raise ValueError(
            f"The state to insert is a {type(given).__name__}, but the optimizer's is "
            f"a {type(target).__name__}: u is a maximum in AdaMax, and a mean in the "
            "L^p family and Adam."
        )
    count = unwrapped(given.count)
    u_scale = _known_scale(given)
    m = _leaves_like(target.m, given.m, operator.eq, missing)
    u = _leaves_like(target.u, given.u, can_reshare, missing)
    m, u, u_scale = _rewrite(
        *_kept(m, u, u_scale, target),
        u_scale=u_scale,
        unit=ratio_unit(target),
        m_dtypes=[leaf.dtype for leaf in jax.tree.leaves(target.m)],
        like_u=jax.tree.leaves(target.u),
    )
    inserted = target._replace(
        count=_all_put_like([count], target.count),
        m=_all_put_like(m, target.m),
        u=_all_put_like(u, target.u),
    )
    if isinstance(target, ScaleByAdamaxState):
        u_scale = _all_put_like([u_scale], target.u_scale)
        inserted = inserted._replace(u_scale=u_scale)
    return copied(_set_counts(map_states(lambda _: inserted, state), count))


def find_states(
    state: optax.OptState, kind: type | tuple[type, ...] = KINDS
) -> list[tuple[Any, Any]]:
    """The states of given types in an optimizer's state: pairs of path and state."""
    leaves = jax.tree.leaves_with_path(state, is_leaf=lambda x: isinstance(x, kind))
    return [(path, leaf) for path, leaf in leaves if isinstance(leaf, kind)]


def some_states(
    state: optax.OptState,
    kind: type | tuple[type, ...] = KINDS,
    name: str = "state",
) -> list[tuple[Any, Any]]:
    """As :func:`find_states`. Raises ValueError, with ``name``, if there is none."""
    found = find_states(state, kind)
    if not found:
        raise ValueError(f"The {name} holds no {_named(kind)}.{_hint(state, kind)}")
    for _, part in found:
        if isinstance(part, KINDS):
            check_formats(part)
            check_numbers(part, ratio_unit(part))
    return found


def _named(kind):
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(kind.__name__ for kind in kinds)


def only_state(state: optax.OptState, name: str = "state") -> OptimizerState:
    """The only state with m and u in an optimizer's state, or ValueError."""
    found = some_states(state, name=name)
    if len(found) != 1:
        places = ", ".join(name_of(path) for path, _ in found)
        raise ValueError(
            f"The {name} holds {len(found)} {_named(KINDS)}, not one: at {places}. "
            "Give this function one of them."
        )
    return found[0][1]


def map_states(
    function: Callable[[Any], Any],
    state: optax.OptState,
    kind: type | tuple[type, ...] = KINDS,
) -> optax.OptState:
    """Applies a function to the states of given types in an optimizer's state."""
    some_states(state, kind)
    return jax.tree.map(
        lambda leaf: function(leaf) if isinstance(leaf, kind) else leaf,
        state,
        is_leaf=lambda leaf: isinstance(leaf, kind),
    )


def read_moments(state: OptimizerState) -> tuple[optax.Updates, optax.Updates]:
    """Decodes the trees m and u, to at least float32."""
    u_scale, unit = scale_of(state), ratio_unit(state)
    stored_m, m_treedef = jax.tree.flatten(state.m)
    stored_u, u_treedef = jax.tree.flatten(state.u)
    read_all = [
        read(m, u, u_scale, unit) for m, u in zip(stored_m, stored_u, strict=True)
    ]
    return (
        jax.tree.unflatten(m_treedef, [m for m, _ in read_all]),
        jax.tree.unflatten(u_treedef, [u for _, u in read_all]),
    )


def read(
    stored_m: jax.Array, stored_u: jax.Array, u_scale: ArrayLike, unit: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Decodes m and u of one leaf, to at least float32."""
    mean, norm = formats(stored_m.dtype, stored_u.dtype)
    u = norm.read(stored_u, u_scale)
    return mean.read(stored_m, u, norm, unit), u


def stored_as(
    m: jax.Array,
    u: jax.Array,
    m_dtype: Any,
    u_dtype: Any,
    u_scale: ArrayLike = 1.0,
    unit: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Encodes m and u of one leaf in dtypes, rounding each once, to nearest.

    If u exceeds the max of its dtype, m and u are scaled down, so that the step is the
    same.
    """
    mean, norm = formats(m_dtype, u_dtype)
    m, u = cast((m, u), arithmetic_dtype(m.dtype, u.dtype, m_dtype, u_dtype))
    largest = number(min(mean.largest, norm.largest), u.dtype)
    is_beyond = jnp.isfinite(u) & (u > largest)
    factor = jnp.where(is_beyond, largest / jnp.where(is_beyond, u, 1), 1)
    m = by_parts(lambda part: part * factor, m)
    stored_u = norm.write(jnp.where(is_beyond, largest, u), u_scale)
    read_u = norm.read(stored_u, u_scale).astype(u.dtype)
    return mean.write(m, read_u, 0.5, unit), stored_u


def ratio_unit(state: OptimizerState) -> float:
    """The factor c of an m in int8, which is stored as m / (c u)."""
    return RATIO_UNIT if isinstance(state, ScaleByLpAdamState) else 1.0


def _known_scale(state):
    """u_scale, or 1 if ``jax.tree.map(jnp.zeros_like, state)`` has made it 0.

    An update does the same. A concrete u_scale is returned without any arithmetic,
    since it may be in host memory. It is 1 for the L^p family, whose u is not scaled.
    """
    if isinstance(state, ScaleByLpAdamState):
        return np.ones([], np.float32)
    u_scale = unwrapped(state.u_scale)
    is_abstract = isinstance(u_scale, jax.ShapeDtypeStruct)
    if is_abstract or (is_known(u_scale) and np.all(jax.device_get(u_scale))):
        return u_scale
    return jnp.where(u_scale == 0, np.float32(1), u_scale)


def _is_one(u_scale):
    """Whether u_scale is known to be 1; that of a template (abstract) counts as 1."""
    is_abstract = isinstance(u_scale, jax.ShapeDtypeStruct)
    return is_abstract or (
        is_known(u_scale) and bool(np.all(jax.device_get(u_scale) == 1))
    )


def scale_of(state: OptimizerState) -> Any:
    """The u_scale of a state. Raises ValueError if ``jax.vmap`` has stacked it."""
    u_scale = _check_single("u_scale", _known_scale(state))
    _check_single("count", unwrapped(state.count))
    return u_scale


def _check_single(name, scalar):
    """Returns a scalar of a state. Raises ValueError if it has axes."""
    if scalar.ndim > 0:
        raise ValueError(
            f"The state is that of an ensemble: {name} has shape {scalar.shape}. "
            "Apply this function to its members with jax.vmap."
        )
    return scalar


def unwrapped(scalar: Any) -> jax.Array:
    """The array in a scalar, which Flax NNX may have put into a container."""
    (array,) = jax.tree.leaves(scalar)
    return array


def _hint(state, kind):
    """What an error adds if the state is Optax's, this library's, or a dictionary."""
    if kind is optax.ScaleByAdamState and find_states(state):
        return " It is that of this library's optimizer already."
    if kind is KINDS and find_states(state, optax.ScaleByAdamState):
        return (
            " It is Optax's: use from_optax first, with adam_b2 if its optimizer is an "
            "adam."
        )
    if any(map(_is_dictionary, jax.tree.leaves(state, is_leaf=_is_dictionary))):
        return (
            " It has dictionaries in place of states: give optimizer.opt_state in Flax "
            "NNX, not nnx.state(optimizer), and restore a checkpoint into what init "
            "returns."
        )
    return ""


def _is_dictionary(node):
    """Whether a node holds what a state does, by its names."""
    fields = set(node) if isinstance(node, Mapping) else set()
    return fields >= {"count", "m", "u"} or fields >= {"count", "mu", "nu"}


def _convert(state, m_dtype, u_dtype):
    """Converts one state to other dtypes."""
    m = jax.tree.leaves(state.m)
    u = jax.tree.leaves(state.u)
    if m_dtype is not None:
        for path, leaf in jax.tree.leaves_with_path(state.m):
            if jnp.iscomplexobj(leaf):
                check_complex(path, leaf.dtype, m_dtype)
    new_m, new_u, u_scale = _rewrite(
        m,
        u,
        scale_of(state),
        unit=ratio_unit(state),
        m_dtypes=[
            x.dtype if m_dtype is None else jnp.dtype(dtype_like(x, m_dtype)) for x in m
        ],
        like_u=[jax.ShapeDtypeStruct(x.shape, u_dtype or x.dtype) for x in u],
    )
    converted = state._replace(
        m=jax.tree.unflatten(jax.tree.structure(state.m), new_m),
        u=jax.tree.unflatten(jax.tree.structure(state.u), new_u),
    )
    if isinstance(state, ScaleByLpAdamState):
        return converted
    return converted._replace(u_scale=jax.tree.map(lambda _: u_scale, state.u_scale))


def _rewrite(m, u, u_scale, unit, m_dtypes, like_u):
    """Stores lists of m and u in other dtypes, and u in other shapes, with its scale.

    Each number is rounded once, or not at all if nothing changes.
    """
    new_scale = u_scale
    is_scaled = any(NORMS[jnp.dtype(x.dtype).name].is_scaled for x in like_u)
    is_other = [x.dtype for x in u] != [x.dtype for x in like_u] or not is_scaled
    if is_other and not _is_one(u_scale):
        new_scale = jnp.ones_like(u_scale)

    def rewrite(m, u, m_dtype, like_u):
        is_same_u = (u.dtype, u.shape) == (like_u.dtype, like_u.shape)
        is_same_scale = new_scale is u_scale or not NORMS[u.dtype.name].is_scaled
        if is_same_u and m.dtype == m_dtype and is_same_scale:
            return m, u
        m, u = read(m, u, _check_single("u_scale", u_scale), unit)
        dtype = arithmetic_dtype(m.dtype, u.dtype, m_dtype, like_u.dtype)
        u = reshare(u.astype(dtype), like_u.shape)
        return stored_as(m, u, m_dtype, like_u.dtype, new_scale, unit)

    rewritten = [rewrite(*leaf) for leaf in zip(m, u, m_dtypes, like_u, strict=True)]
    return [m for m, _ in rewritten], [u for _, u in rewritten], new_scale


def _kept(m, u, u_scale, target):
    """Replaces None by the leaves of the target, stored with ``u_scale``."""
    if all(leaf is not None for leaf in (*m, *u)):
        return m, u
    _check_single("u_scale", u_scale)
    unit = ratio_unit(target)
    kept_m, kept_u = [], []
    for leaf_m, leaf_u, own_m, own_u in zip(
        m, u, jax.tree.leaves(target.m), jax.tree.leaves(target.u), strict=True
    ):
        if leaf_m is None or leaf_u is None:
            read_m, read_u = read(own_m, own_u, _known_scale(target), unit)
            leaf_m, leaf_u = stored_as(
                read_m, read_u, own_m.dtype, own_u.dtype, u_scale, unit
            )
        kept_m.append(leaf_m)
        kept_u.append(leaf_u)
    return kept_m, kept_u


def _leaves_like(target, given, fits, missing):
    """The given leaves in the order of the target's, found by their paths.

    None if there is none and ``missing`` is "keep".
    """
    leaves = dict(jax.tree.leaves_with_path(given))
    find = path_finder(given, target)
    found = []
    for path, own in jax.tree.leaves_with_path(target):
        key = find(path)
        if key not in leaves:
            if missing == "keep":
                found.append(None)
                continue
            raise ValueError(
                f"The state to insert has no leaf at {name_of(path)}. With "
                "missing='keep' what the optimizer's state has there stays."
            )
        leaf = leaves.pop(key)
        if not fits(leaf.shape, own.shape):
            raise ValueError(
                f"The state to insert has shape {leaf.shape} at {name_of(key)}, where "
                f"the optimizer's has {own.shape}."
            )
        found.append(leaf)
    masked = [
        path
        for path, leaf in jax.tree.leaves_with_path(target, is_leaf=_is_masked)
        if _is_masked(leaf)
    ]
    for path in leaves:
        if not any(is_inside(path, part) for part in masked):
            raise ValueError(
                f"The optimizer's state has no leaf at {name_of(path)}, where the "
                "state to insert has one."
            )
    return found


def _is_masked(leaf):
    return isinstance(leaf, optax.MaskedNode)


def _all_put_like(leaves, like):
    """A tree of copies of ``leaves``, with structure and shardings of ``like``."""
    old, treedef = jax.tree.flatten(like)
    return jax.tree.unflatten(treedef, map(put_like, leaves, old))


def copied(tree: Any) -> Any:
    """Copies the arrays of a tree, so that either may be donated to ``jax.jit``."""
    return jax.tree.map(
        lambda x: x.copy() if isinstance(x, jax.Array | np.ndarray) else x, tree
    )


def put_like(new: Any, old: Any) -> jax.Array:
    """A copy with the sharding of the old array; inside of jax.jit, with any."""
    copy = jnp.array(new)
    # If the old one is a NumPy array, as in a fetched state, JAX chooses the device.
    is_placed = isinstance(old, jax.Array) and not isinstance(old, Tracer)
    return jax.device_put(copy, old.sharding) if is_placed else copy


def _set_counts(tree, count):
    """Sets the count of every schedule in a state."""
    # The type of a wrapped schedule's state has no public name: an instance gives it.
    # Not on import, since that would initialize the devices.
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
        # A separate copy for each, since an array may be donated only once.
        fields["count"] = jax.tree.map(lambda old: put_like(count, old), node.count)
        return node._replace(**fields)

    return jax.tree.map(set_count, tree, is_leaf=lambda x: isinstance(x, types))
