"""What the state says about training: figures for each parameter and for all."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike

from adamax_jax._checks import check_eps
from adamax_jax._complex import cast, number
from adamax_jax._paths import name_of
from adamax_jax._quotient import quotient
from adamax_jax._state import find_states, scale_of
from adamax_jax._storage import arithmetic_dtype, as_stored, is_saturated, read

# |m| below this share of u: recent gradients are far below those that u remembers.
_STALE = 1e-3


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["total", "table"],
    meta_fields=["names"],
)
@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Figures of an optimizer's state; printed, a table.

    Attributes:
      total: The figures over all parameters: a dictionary of float32 scalars.
      table: The same for each parameter: a dictionary of float32 arrays [parameters].
        One array of them compiles in a fraction of the time that as many scalars take.
      names: The paths of the parameters in the tree, in the order of ``table``.
    """

    total: dict[str, jax.Array]
    table: dict[str, jax.Array]
    names: tuple[str, ...]

    @property
    def leaves(self) -> dict[str, dict[str, jax.Array]]:
        """The figures of each parameter, as ``total``, under its path."""
        return {
            name: {figure: column[..., i] for figure, column in self.table.items()}
            for i, name in enumerate(self.names)
        }

    def __str__(self) -> str:
        names = ["", "total", *self.names]
        width = max(map(len, names))
        columns = [
            [f"{cell:>{_width(name)}}" for cell in (name, *self._cells(name))]
            for name in _FORMATS
        ]
        rows = zip(*columns, strict=True)
        return "\n".join(
            name.ljust(width) + "".join(row)
            for name, row in zip(names, rows, strict=True)
        )

    def _cells(self, name):
        total, column = self.total[name], self.table[name]
        # What is traced, abstract or of many steps is no number.
        is_abstract = isinstance(total, Tracer | jax.ShapeDtypeStruct)
        if is_abstract or (np.ndim(total), np.ndim(column)) != (0, 1):
            return ["-"] * (1 + len(self.names))
        numbers = [total, *np.asarray(column)]
        return [format(float(number), _FORMATS[name]) for number in numbers]


def diagnose(state: optax.OptState, eps: ArrayLike = 1e-8) -> Diagnosis:
    """Figures of the state, to be logged during training.

    For each parameter, and for all of them together:

    ``rms``, ``max``
      Root mean square and maximum of ``|m/u|``, which lies between 0 and 1.0091 (at
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
      The fraction of the other coordinates with ``|m| < u/1000``: u remembers
      gradients far above the recent ones, and the coordinate nearly stands still. A
      spike k times the usual gradient is forgotten after
      ``ln(k) / (1 - b2)`` steps. Set ``b2=0.99, max_growth=1.1``, with which
      a single spike holds nothing back. Under noise alone it is about 0.01. Where it is
      1, gradients have stopped altogether.
    ``decades``
      The decimal logarithm of the largest u by the smallest, unseen coordinates aside:
      how badly the problem is scaled, and what ``u_dtype`` must span. uint8 spans 18
      decades, float16 11, float8_e5m2 9, float8_e4m3fn 5.
    ``saturated``
      The fraction of coordinates whose stored m or u is at an end of the range of its
      dtype (of u: its smallest number, or its largest, where gradients are cut off),
      unseen ones aside. Should be 0: else take a wider ``u_dtype``, or scale the
      loss.

    Where a u is shared along axes, it is that of the slice's largest gradients: a
    coordinate far below them has a small ``rms`` and counts as ``stale``, and as unseen
    only if all of its slice is.

    NaN in m makes ``rms`` and ``max`` NaN, in u ``decades`` as well; a uint8 u has
    none, but its largest number.

    Args:
      state: A :class:`ScaleByAdamaxState`, or an optimizer's state with some in it.
      eps: The optimizer's ``eps``; with another one ``unseen`` is wrong.

    Returns:
      A :class:`Diagnosis`. Its paths are those of errors, of ``jax.tree_util.keystr``;
      where the state holds several :class:`ScaleByAdamaxState`, as from
      ``optax.partition``, each begins with the path to its own. In ``jax.jit`` it is a
      tree of arrays as any other; printed outside, it is a table.

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
    names, rows = [], []
    for state_path, adamax_state in found:
        prefix = jax.tree_util.keystr(state_path) if len(found) > 1 else ""
        u_scale = scale_of(adamax_state)
        leaves = jax.tree.leaves_with_path(adamax_state.m)
        for (path, m), u in zip(leaves, jax.tree.leaves(adamax_state.u), strict=True):
            names.append(prefix + jax.tree_util.keystr(path) or name_of(path))
            rows.append(_row(m, u, u_scale, eps))
    dtypes = [x.dtype for x in jax.tree.leaves(rows)]
    rows = cast(rows, arithmetic_dtype(jnp.result_type(float), *dtypes))
    table = jnp.asarray(rows).reshape([len(rows), len(_Sums._fields)])
    columns = _Sums(*table.T)
    return Diagnosis(
        total=_figures(_over_all(columns)),
        table=_figures(columns),
        names=tuple(names),
    )


class _Sums(NamedTuple):
    """What can be put together over parameters: a number, or a column of them."""

    size: jax.Array
    squares: jax.Array
    seen: jax.Array
    stale: jax.Array
    saturated: jax.Array
    largest: jax.Array
    largest_u: jax.Array
    # Where none was seen, the largest number.
    smallest_u: jax.Array


@jax.jit
def _row(stored_m, stored_u, u_scale, eps):
    """The sums of one parameter: an array of eight numbers.

    What is computed of them is computed of a table of all: XLA takes far longer to
    compile many operations on scalars.
    """
    m, u = read(stored_m, stored_u, u_scale)
    m = jnp.abs(m).astype(u.dtype)
    ratio = quotient(m, u)
    # The optimizer's eps may have been rounded to float32.
    floor = number(eps, u.dtype) * (1 + 2**-20)
    floor = as_stored(floor, u_scale, stored_u.dtype)
    # Without m, gradients below the smallest number of a dtype would be none at all.
    # NaN counts as seen.
    seen = ~((u <= floor) & (stored_m == 0))
    saturated = is_saturated(stored_m, stored_u, u_scale)

    def count(where):
        return jnp.sum(where, dtype=jnp.float32)

    sums = _Sums(
        size=jnp.full([], m.size, jnp.float32),
        squares=jnp.sum(jnp.square(ratio), dtype=jnp.float32),
        seen=count(seen),
        stale=count(seen & (m < _STALE * u)),
        saturated=count(seen & saturated),
        largest=jnp.max(ratio, initial=0),
        largest_u=jnp.max(jnp.where(seen, u, 0), initial=0),
        smallest_u=jnp.min(jnp.where(seen, u, _largest(u)), initial=_largest(u)),
    )
    return jnp.stack(cast(sums, u.dtype))


def _largest(x):
    """The largest number of a dtype: not infinity, which jax.debug_infs reports."""
    return number(float(jnp.finfo(x.dtype).max), x.dtype)


def _over_all(columns):
    return _Sums(
        size=jnp.sum(columns.size),
        squares=jnp.sum(columns.squares),
        seen=jnp.sum(columns.seen),
        stale=jnp.sum(columns.stale),
        saturated=jnp.sum(columns.saturated),
        largest=jnp.max(columns.largest, initial=0),
        largest_u=jnp.max(columns.largest_u, initial=0),
        smallest_u=jnp.min(columns.smallest_u, initial=_largest(columns.smallest_u)),
    )


def _figures(sums):
    size = jnp.maximum(sums.size, 1)
    any_seen = sums.seen > 0
    # Not log10, which divides by a float32 where x64 is off.
    decade = number(math.log(10), sums.largest_u.dtype)
    log_of_largest = jnp.log(jnp.where(any_seen, sums.largest_u, 1)) / decade
    log_of_smallest = jnp.log(jnp.where(any_seen, sums.smallest_u, 1)) / decade
    # Equal numbers may differ in the last bit of their logarithms.
    decades = jnp.maximum(log_of_largest - log_of_smallest, 0)
    figures = {
        "rms": jnp.sqrt(sums.squares / size),
        "max": sums.largest,
        "unseen": (sums.size - sums.seen) / size,
        "stale": sums.stale / jnp.maximum(sums.seen, 1),
        "decades": decades,
        "saturated": sums.saturated / size,
    }
    return {name: figure.astype(jnp.float32) for name, figure in figures.items()}


_FORMATS = {
    "rms": ".3f",
    "max": ".3f",
    "unseen": ".3f",
    "stale": ".3f",
    "decades": ".2f",
    "saturated": ".3f",
}


def _width(name):
    return 2 + max(len(name), 6)
