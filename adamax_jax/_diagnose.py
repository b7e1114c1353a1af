"""What the state says about training: figures for each parameter and for all."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.typing import ArrayLike

from adamax_jax._checks import check_eps
from adamax_jax._paths import name_of
from adamax_jax._state import find_states, scale_of
from adamax_jax._storage import as_stored, is_saturated, read

# |m| below this share of u: recent gradients are far below those that u remembers.
_STALE = 1e-3


class Diagnosis(NamedTuple):
    """Figures of an optimizer's state; printed, a table.

    Attributes:
      total: The figures over all parameters: a dictionary of float32 scalars.
      leaves: The same for each parameter, under its path in the tree.
    """

    total: dict[str, jax.Array]
    leaves: dict[str, dict[str, jax.Array]]

    def __str__(self) -> str:
        rows = {"total": self.total, **self.leaves}
        width = max(map(len, rows))
        header = "".join(f"{name:>{_width(name)}}" for name in _COLUMNS)
        lines = [
            "".join(
                f"{_cell(figures[name], form):>{_width(name)}}"
                for name, form in _COLUMNS.items()
            )
            for figures in rows.values()
        ]
        names = [" " * width, *(name.ljust(width) for name in rows)]
        return "\n".join(
            name + line for name, line in zip(names, [header, *lines], strict=True)
        )


def diagnose(state: optax.OptState, eps: ArrayLike = 1e-8) -> Diagnosis:
    r"""Figures of the state, to be logged during training.

    For each parameter, and for all of them together:

    ``rms``, ``max``
      Root mean square and maximum of :math:`|m/u|`, which lies between 0 and 1.0091 (at
      the default decay rates): the length of a step as a share of the learning rate,
      but for the bias correction of the first steps. An ``rms`` near 1 says that
      gradients keep their sign: the learning rate may be larger. Gradients that are
      mere noise have about 0.1. If it is much smaller, look at ``stale``.
    ``unseen``
      The fraction of coordinates where m is 0 and u not above ``eps``: they never saw a
      gradient, or not for so long that u has decayed to that. Dead units, parameters
      that the loss does not depend on, rows of an embedding that never came up: mend or
      freeze them. A gradient of exactly 0 cannot be told from one that underflowed: in
      half precision, scale the loss.
    ``stale``
      The fraction of the other coordinates with :math:`|m| < u/1000`: u remembers
      gradients far above the recent ones, and the coordinate all but stands still. A
      spike k times the usual gradient is forgotten after
      :math:`\ln k / (1 - \beta_2)` steps. Clip gradients, keep spikes out with
      ``optax.conditionally_mask``, or lower ``b2``. Under noise alone it is about 0.01.
      Where it is 1, gradients have stopped altogether.
    ``decades``
      :math:`\log_{10}` of the largest u by the smallest, unseen coordinates aside: how
      badly the problem is scaled, and what ``u_dtype`` must span. uint8 spans 18
      decades, float16 11, float8_e5m2 9, float8_e4m3fn 5.
    ``saturated``
      The fraction of coordinates whose stored m or u is the first or the last number of
      its dtype, unseen ones aside. Should be 0: else take a wider ``u_dtype``, or scale
      the loss.

    Where a u is shared along axes, it is that of the slice's largest gradients: a
    coordinate far below them has a small ``rms`` and counts as ``stale``, and as unseen
    only if all of its slice is.

    NaN in a state of floats makes ``rms``, ``max`` and ``decades`` NaN; int8 and uint8
    have none.

    Args:
      state: A :class:`ScaleByAdamaxState`, or an optimizer's state with some in it.
      eps: The optimizer's ``eps``; with another one ``unseen`` is wrong.

    Returns:
      A :class:`Diagnosis`. Its paths are those of errors, of ``jax.tree_util.keystr``;
      where the state holds several :class:`ScaleByAdamaxState`, as from
      ``optax.partition``, each begins with the path to its own. In ``jax.jit`` it is a
      tree of scalars as any other; printed outside, it is a table.

    Raises:
      ValueError: If there is no :class:`ScaleByAdamaxState` in the state, it is that of
        an ensemble (``jax.vmap``), or ``eps`` is negative or not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> from adamax_jax import adamax, diagnose
      >>> params = {"alive": jnp.ones(4), "dead": jnp.ones(2)}
      >>> gradients = {"alive": jnp.array([1.0, -1.0, 1e-3, 0.0]), "dead": jnp.zeros(2)}
      >>> optimizer = adamax()
      >>> _, state = optimizer.update(gradients, optimizer.init(params))
      >>> print(diagnose(state))
                    rms     max  unseen   stale  decades  saturated
      total       0.071   0.100   0.500   0.000     3.00      0.000
      ['alive']   0.087   0.100   0.250   0.000     3.00      0.000
      ['dead']    0.000   0.000   1.000   0.000     0.00      0.000
    """
    eps = check_eps("eps", eps)
    found = find_states(state)
    if not found:
        raise ValueError("The state holds no ScaleByAdamaxState.")
    sums = {}
    for state_path, adamax_state in found:
        prefix = jax.tree_util.keystr(state_path) if len(found) > 1 else ""
        u_scale = scale_of(adamax_state)
        leaves = jax.tree.leaves_with_path(adamax_state.m)
        for (path, m), u in zip(leaves, jax.tree.leaves(adamax_state.u), strict=True):
            name = prefix + jax.tree_util.keystr(path) or name_of(path)
            sums[name] = _sums(m, u, u_scale, eps)
    return Diagnosis(
        total=_figures(_over_all(sums.values())),
        leaves={name: _figures(leaf) for name, leaf in sums.items()},
    )


class _Sums(NamedTuple):
    """What can be put together over parameters: float32 scalars; these of none."""

    size: ArrayLike = 0.0
    squares: ArrayLike = 0.0
    seen: ArrayLike = 0.0
    stale: ArrayLike = 0.0
    saturated: ArrayLike = 0.0
    largest: ArrayLike = 0.0
    log_u_max: ArrayLike = -math.inf
    log_u_min: ArrayLike = math.inf


@jax.jit
def _sums(stored_m, stored_u, u_scale, eps):
    m, u = read(stored_m, stored_u, u_scale)
    m = jnp.abs(m).astype(u.dtype)
    ratio = jnp.where(u == 0, 0, m / jnp.where(u == 0, 1, u))
    # The optimizer's eps may have been rounded to float32.
    floor = jnp.asarray(eps, u.dtype) * (1 + 2**-20)
    floor = as_stored(floor, u_scale, stored_u.dtype)
    # Without m, gradients below the smallest number of a dtype would be none at all.
    # NaN counts as seen.
    seen = ~((u <= floor) & (stored_m == 0))
    saturated = is_saturated(stored_m, stored_u)

    def count(where):
        return jnp.sum(where, dtype=jnp.float32)

    def log10(x):
        return jnp.log10(x).astype(jnp.float32)

    return _Sums(
        size=jnp.asarray(m.size, jnp.float32),
        squares=jnp.sum(jnp.square(ratio), dtype=jnp.float32),
        seen=count(seen),
        stale=count(seen & (m < _STALE * u)),
        saturated=count(seen & saturated),
        largest=jnp.max(ratio, initial=0).astype(jnp.float32),
        log_u_max=log10(jnp.max(jnp.where(seen, u, 0), initial=0)),
        log_u_min=log10(jnp.min(jnp.where(seen, u, jnp.inf), initial=jnp.inf)),
    )


def _over_all(sums):
    columns = _Sums(*(jnp.asarray(c) for c in zip(_Sums(), *sums, strict=True)))
    return _Sums(
        *(jnp.sum(column) for column in columns[:-3]),
        largest=jnp.max(columns.largest),
        log_u_max=jnp.max(columns.log_u_max),
        log_u_min=jnp.min(columns.log_u_min),
    )


def _figures(sums):
    size = jnp.maximum(sums.size, 1)
    # Equal numbers may differ in the last bit of their logarithms.
    decades = jnp.maximum(sums.log_u_max - sums.log_u_min, 0)
    return {
        "rms": jnp.sqrt(sums.squares / size),
        "max": sums.largest,
        "unseen": (sums.size - sums.seen) / size,
        "stale": sums.stale / jnp.maximum(sums.seen, 1),
        "decades": jnp.where(sums.seen == 0, 0, decades),
        "saturated": sums.saturated / size,
    }


_COLUMNS = {
    "rms": ".3f",
    "max": ".3f",
    "unseen": ".3f",
    "stale": ".3f",
    "decades": ".2f",
    "saturated": ".3f",
}


def _width(name):
    return 2 + max(len(name), 6)


def _cell(figure, form):
    is_number = not isinstance(figure, Tracer | jax.ShapeDtypeStruct)
    # What is traced, abstract or of many members is no number.
    return format(float(figure), form) if is_number and figure.ndim == 0 else "-"
