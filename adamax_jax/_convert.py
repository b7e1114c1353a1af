"""Reading the state as numbers, and storing it in other dtypes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from adamax_jax import _storage
from adamax_jax._axes import maximum
from adamax_jax._checks import check_complex, check_dtype
from adamax_jax._transform import ScaleByAdamaxState


def moments(state: optax.OptState) -> tuple[optax.Updates, optax.Updates]:
    """The mean and the infinity norm of the gradients, however they are stored.

    Args:
      state: A :class:`ScaleByAdamaxState`, or an optimizer's state with one in it.

    Returns:
      The trees m and u, in float32 (float64 and complex where they are stored so),
      shaped as the parameters; u has size 1 along axes that share it.

    Raises:
      ValueError: If there is not exactly one :class:`ScaleByAdamaxState` in the state.

    Examples:
      >>> import jax.numpy as jnp
      >>> from adamax_jax import adamax, moments
      >>> optimizer = adamax(m_dtype="int8", u_dtype="uint8")
      >>> gradient = jnp.array([2.0, -0.5])
      >>> _, state = optimizer.update(gradient, optimizer.init(gradient))
      >>> m, u = moments(state)
      >>> [round(float(x), 3) for x in m], [round(float(x), 3) for x in u]
      ([0.201, -0.05], [1.998, 0.5])
    """
    return decode(the_state(state))


def convert_state(
    state: optax.OptState,
    *,
    m_dtype: DTypeLike | None = None,
    u_dtype: DTypeLike | None = None,
) -> optax.OptState:
    """The state of a running optimizer, stored in other dtypes.

    Training continues with an optimizer made with the same ``m_dtype`` and ``u_dtype``.
    Each number is rounded once.

    Args:
      state: A :class:`ScaleByAdamaxState`, or an optimizer's state with some in it;
        what else is in it stays as it is.
      m_dtype: What to store m in, as for :func:`scale_by_adamax`; None: as it is.
      u_dtype: What to store u in; None: as it is.

    Returns:
      The state, in the same containers.

    Raises:
      TypeError, ValueError: If a dtype is not one that :func:`scale_by_adamax` takes,
        or m is complex and ``m_dtype`` has no complex counterpart; ValueError also if
        there is no :class:`ScaleByAdamaxState` in the state.

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
    m_dtype = check_dtype("m_dtype", m_dtype, integer="int8")
    u_dtype = check_dtype("u_dtype", u_dtype, integer="uint8")
    return map_states(lambda s: _convert(s, m_dtype, u_dtype), state)


def find_states(
    state: optax.OptState, kind: type = ScaleByAdamaxState
) -> list[tuple[Any, Any]]:
    """The paths of the states of a type in an optimizer's state, with these states."""
    leaves = jax.tree.leaves_with_path(state, is_leaf=lambda x: isinstance(x, kind))
    return [(path, leaf) for path, leaf in leaves if isinstance(leaf, kind)]


def the_state(state: optax.OptState) -> ScaleByAdamaxState:
    """The one AdaMax in an optimizer's state."""
    found = find_states(state)
    if len(found) != 1:
        raise ValueError(f"The state holds {len(found)} ScaleByAdamaxState, not one.")
    return found[0][1]


def map_states(
    function: Callable[[Any], Any],
    state: optax.OptState,
    kind: type = ScaleByAdamaxState,
) -> optax.OptState:
    """An optimizer's state with a function applied to the states of a type in it."""
    if not find_states(state, kind):
        raise ValueError(f"The state holds no {kind.__name__}.")
    return jax.tree.map(
        lambda leaf: function(leaf) if isinstance(leaf, kind) else leaf,
        state,
        is_leaf=lambda leaf: isinstance(leaf, kind),
    )


def decode(state: ScaleByAdamaxState) -> tuple[optax.Updates, optax.Updates]:
    """m and u as numbers, in float32 at least."""
    u_scale = scale_of(state)
    u = jax.tree.map(lambda u: _storage.decode_u(u, u_scale), state.u)
    m = jax.tree.map(_storage.decode_m, state.m, u)
    return jax.tree.map(_at_least_float32, m), u


def scale_of(state: ScaleByAdamaxState) -> jax.Array:
    """The scalar u_scale of a state."""
    u_scale = array_in(state.u_scale)
    if u_scale.ndim > 0:
        raise ValueError(
            f"The state is that of an ensemble: u_scale has shape {u_scale.shape}. "
            "Apply this function to its members with jax.vmap."
        )
    return u_scale


def array_in(scalar: Any) -> jax.Array:
    """The array in a scalar that may be wrapped, as Flax NNX does."""
    (array,) = jax.tree.leaves(scalar)
    return array


def _at_least_float32(x):
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def store_like(
    state: ScaleByAdamaxState, like: ScaleByAdamaxState
) -> ScaleByAdamaxState:
    """A state with m and u stored in the dtypes of another's, and u shared as there.

    Each number is rounded once, or not at all where nothing changes.
    """
    u_scale = state.u_scale
    m, u = decode(state)
    # Stored numbers are in the order of what they stand for.
    u, stored_u = (jax.tree.map(_share_like, tree, like.u) for tree in (u, state.u))
    if dtypes(state.u) != dtypes(like.u):
        u_scale = jax.tree.map(jnp.ones_like, u_scale)
        one = array_in(u_scale)
        stored_u = jax.tree.map(
            lambda u, like: _storage.encode_u(u, one, like.dtype), u, like.u
        )
    elif dtypes(state.m) == dtypes(like.m) and _shapes(state.u) == _shapes(like.u):
        return state
    next_u = jax.tree.map(
        lambda stored: _storage.decode_u(stored, array_in(u_scale)), stored_u
    )

    def encode_m(m, u, next_u, like):
        if not _storage.is_ratio(like.dtype):
            # As in an update: m shrinks with a u that is too large to be stored.
            m = m * _storage.kept_share(u, next_u).astype(m.real.dtype).astype(m.dtype)
        if jnp.iscomplexobj(m):
            return m.astype(like.dtype)
        wide = max((m.dtype, u.dtype, next_u.dtype), key=lambda dtype: dtype.itemsize)
        m, u, next_u = (x.astype(wide) for x in (m, u, next_u))
        # The nearer of the two neighbours.
        half = jnp.asarray(0.5, u.dtype)
        return _storage.encode_m(m, u, next_u, like.dtype, half)

    stored_m = jax.tree.map(encode_m, m, u, next_u, like.m)
    return state._replace(m=stored_m, u=stored_u, u_scale=u_scale)


def _share_like(u, like):
    """The maximum along axes that only another u shares, repeated along its own."""
    pairs = enumerate(zip(u.shape, like.shape, strict=True))
    axes = tuple(axis for axis, (size, kept) in pairs if size != 1 == kept)
    return jnp.broadcast_to(maximum(u, axes), like.shape)


def _shapes(tree):
    return [leaf.shape for leaf in jax.tree.leaves(tree)]


def dtypes(tree: Any) -> list[Any]:
    """The dtypes of a tree's leaves."""
    return [leaf.dtype for leaf in jax.tree.leaves(tree)]


def _convert(state, m_dtype, u_dtype):
    def like_m(path, m):
        if m_dtype is None:
            return m
        dtype = m_dtype
        if jnp.iscomplexobj(m):
            check_complex(path, m.dtype, m_dtype)
            dtype = _storage.complex_dtype(m_dtype)
        return jax.ShapeDtypeStruct(m.shape, dtype)

    like = state._replace(
        m=jax.tree_util.tree_map_with_path(like_m, state.m),
        u=jax.tree.map(
            lambda u: jax.ShapeDtypeStruct(u.shape, u_dtype or u.dtype), state.u
        ),
    )
    return store_like(state, like)
