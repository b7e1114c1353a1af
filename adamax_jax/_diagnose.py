"""Diagnostics of a state: figures for each parameter and for all."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike

from adamax_jax._checks import check_eps
from adamax_jax._formats import formats
from adamax_jax._numerics import arithmetic_dtype, cast, number, quotient
from adamax_jax._state import ratio_unit, read, scale_of, some_states
from adamax_jax._trees import name_of

# Stale: |m| below this fraction of u, which remembers far larger gradients.
_STALE = 1e-3


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["total", "table"],
    meta_fields=["names"],
)
@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Figures of an optimizer's state. Printed, it is a table.

    Attributes:
      total: The figures over all parameters: a dictionary of float32 scalars.
      table: The figures of each parameter: a dictionary of float32 arrays [parameters],
        which compile in a fraction of the time of as many scalars.
      names: The paths of the parameters in the tree, in the order of ``table``.
    """

    total: dict[str, jax.Array]
    table: dict[str, jax.Array]
    names: tuple[str, ...]

    @property
    def leaves(self) -> dict[str, dict[str, jax.Array]]:
        """A dictionary from the path of each parameter to its figures."""
        return {
            name: {figure: column[..., i] for figure, column in self.table.items()}
            for i, name in enumerate(self.names)
        }

    def worst(self, limit: int = 40) -> "Diagnosis":
        """The worst parameters: those with NaN, then those with the largest fractions.

        Fractions are ``unseen``, ``stale`` and ``saturated``.

        Args:
          limit: The max number of parameters.

        Returns:
          A :class:`Diagnosis` with the same ``total``.

        Raises:
          ValueError: If ``limit`` is negative.
        """
        if limit < 0:
            raise ValueError(f"limit must be at least 0, got {limit}.")
        columns = [np.asarray(self.table[name]) for name in ("rms", *_FRACTIONS)]
        rms, *fractions = (np.max(x, axis=tuple(range(x.ndim - 1))) for x in columns)
        score = np.where(np.isnan(rms), np.inf, np.max(fractions, axis=0))
        order = np.argsort(-score, kind="stable")[:limit]
        return Diagnosis(
            total=self.total,
            table={name: column[..., order] for name, column in self.table.items()},
            names=tuple(self.names[i] for i in order),
        )

    def plot(self) -> Any:
        """Plots ``rms`` and the three fractions of the worst 40 parameters as bars.

        Returns:
          A ``matplotlib.figure.Figure``, which notebooks show.

        Raises:
          ImportError: If Matplotlib is not installed.
          ValueError: If the figures are those of several steps or runs.
        """
        from matplotlib.figure import Figure

        if np.ndim(self.total["rms"]):
            shape = np.shape(self.total["rms"])
            raise ValueError(
                f"There are figures of several steps or runs, of shape {shape}: take "
                "those of one with jax.tree.map(lambda x: x[0], diagnosis)."
            )
        shown = self.worst()
        # Matplotlib typesets text between two dollar signs as mathematics.
        names = [_short(name).replace("$", r"\$") for name in ("total", *shown.names)]
        figure = Figure(figsize=(10, 1 + 0.22 * len(names)), layout="constrained")
        panels = figure.subplots(1, 1 + len(_FRACTIONS), sharey=True)
        for axes, name in zip(panels, ("rms", *_FRACTIONS), strict=True):
            column = [float(self.total[name]), *np.asarray(shown.table[name])]
            axes.barh(range(len(names)), np.nan_to_num(column, nan=0), color="#0072b2")
            for row in np.flatnonzero(np.isnan(column)):
                axes.text(0, row, " NaN", va="center", color="#d55e00")
            axes.set(title=name, xlim=(0, 1.05), yticks=range(len(names)))
            axes.set_yticklabels(names)
            axes.margins(y=0.01)
        panels[0].invert_yaxis()
        return figure

    def __str__(self) -> str:
        return self.to_string()

    def to_string(self, limit: int | None = 40) -> str:
        """The table as text.

        Args:
          limit: The max number of parameters: if there are more, the :meth:`worst` are
            shown. None for all, in the order of the tree.

        Returns:
          A string of one line for each parameter, without a trailing newline.
        """
        if limit is None or len(self.names) <= limit or self._is_abstract():
            return self._printed()
        return (
            f"{self.worst(limit)._printed()}\n"
            f"... and {len(self.names) - limit} parameters that are not worse: "
            "to_string(limit=None) has them, diagnose(state, depth=...) groups them."
        )

    def _printed(self):
        names = ["", "total", *self.names]
        columns = [[name.ljust(max(map(len, names))) for name in names]]
        for figure in _FORMATS:
            cells = [figure, *self._cells(figure)]
            width = 2 + max(6, *map(len, cells))
            columns.append([cell.rjust(width) for cell in cells])
        return "\n".join(map("".join, zip(*columns, strict=True)))

    def _cells(self, figure):
        if self._is_abstract():
            return ["-"] * (1 + len(self.names))
        column = np.asarray(self.table[figure])
        numbers = [np.asarray(self.total[figure]), *np.moveaxis(column, -1, 0)]
        return [_printed_range(number, _FORMATS[figure]) for number in numbers]

    def _is_abstract(self):
        kinds = Tracer, jax.ShapeDtypeStruct
        figures = [*self.total.values(), *self.table.values()]
        return any(isinstance(x, kinds) for x in figures) or any(
            np.ndim(x) != 1 + np.ndim(self.total[name])
            for name, x in self.table.items()
        )


def _short(name, length=40):
    """The end of a path, which is more specific than its beginning."""
    return name if len(name) <= length else f"...{name[3 - length :]}"


def _printed_range(numbers, number_format):
    """A number; of several steps or runs, the min and the max."""
    if not numbers.size:
        return "-"
    ends = (
        format(np.min(numbers), number_format),
        format(np.max(numbers), number_format),
    )
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def diagnose(
    state: optax.OptState, eps: ArrayLike = 1e-8, *, depth: int | None = None
) -> Diagnosis:
    """Figures of the state, to be logged during training.

    For each parameter, and for all of them together:

    ``rms``, ``max``
      Root mean square and maximum of ``|m/u|``: the length of a step as a fraction of
      the learning rate, without the bias correction. At most 1.0091 at the default
      decay rates (7.27 for :func:`adam`). Gradients that are noise give an ``rms`` of
      about 0.1 (Adam: 0.23). If it is near 1, gradients keep their sign: try a larger
      learning rate. If it is much smaller than 0.1, look at ``stale``.
    ``unseen``
      The fraction of coordinates with m = 0 and u at most ``eps``, whose gradients have
      always been 0, or for so long that u has decayed. Dead units, unused parameters,
      rare rows of an embedding: repair or freeze them. In half precision gradients may
      have underflowed: scale the loss.
    ``stale``
      The fraction of the other coordinates with ``|m| < u/1000``, which hardly move: u
      remembers gradients far above the recent ones. A spike of k times the usual
      gradient is forgotten after ``ln(k) / (1 - b2)`` steps; with ``max_growth`` it
      raises u by that factor at most. About 0.01 under noise, and 1 if gradients have
      stopped (:doc:`diagnosing`).
    ``decades``
      log10 of the largest u over the smallest, without unseen coordinates: how badly
      the problem is scaled. uint8 spans 18 decades, all floats 76 or more.
    ``saturated``
      The fraction of coordinates whose stored m or u is the min or max of its dtype,
      without unseen ones. Should be 0: else take a wider ``u_dtype``, or scale the
      loss.

    A u that is shared along axes is the largest of its slice. So a coordinate far below
    it has a small ``rms`` and counts as stale, and as unseen only if the whole slice
    is. NaN in m makes ``rms`` and ``max`` NaN, NaN in u ``decades`` too (a uint8 u has
    its max instead).

    Args:
      state: A :class:`ScaleByAdamaxState` or :class:`ScaleByLpAdamState`, or an
        optimizer's state that contains one or more.
      eps: The optimizer's ``eps``; with another one ``unseen`` is wrong.
      depth: Groups parameters whose paths have the same first ``depth`` parts (keys,
        indices or attributes); None for no groups.

    Returns:
      A :class:`Diagnosis`, a pytree of float32 arrays in ``jax.jit``. Printed, it shows
      the worst 40 parameters by their ``jax.tree_util.keystr``, preceded by the path of
      the state if there are several, and ranges if figures are those of several steps
      or runs.

    Raises:
      ValueError: If there is no such state, ``jax.vmap`` has stacked one (apply this
        function with ``jax.vmap`` too), ``eps`` is negative or not finite, or ``depth``
        is below 1.
      TypeError: If ``eps`` is not a number or a scalar array of at least 32 bits, or m
        or u has a dtype in which it is never stored.

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
    if depth is not None and (type(depth) is not int or depth < 1):
        raise ValueError(f"depth must be None or an integer above 0, got {depth!r}.")
    found = some_states(state)
    names, rows = [], []
    for state_path, part in found:
        prefix = jax.tree_util.keystr(state_path) if len(found) > 1 else ""
        u_scale, unit = scale_of(part), ratio_unit(part)
        leaves = jax.tree.leaves_with_path(part.m)
        for (path, m), u in zip(leaves, jax.tree.leaves(part.u), strict=True):
            path = path[:depth]
            names.append(prefix + jax.tree_util.keystr(path) or name_of(path))
            rows.append(_row(m, u, u_scale, unit, eps))
    dtypes = [x.dtype for x in jax.tree.leaves(rows)]
    rows = cast(rows, arithmetic_dtype(jnp.result_type(float), *dtypes))
    table = jnp.asarray(rows).reshape([len(rows), len(_Sums._fields)])
    columns = _Sums(*table.T)
    total = _over_all(columns)
    if depth is not None:
        groups = list(dict.fromkeys(names))
        columns = _over_groups(columns, [groups.index(name) for name in names])
        names = groups
    return Diagnosis(total=_figures(total), table=_figures(columns), names=tuple(names))


class _Sums(NamedTuple):
    """Statistics that can be combined over parameters: numbers, or columns of them."""

    size: jax.Array
    squares: jax.Array
    seen: jax.Array
    stale: jax.Array
    saturated: jax.Array
    largest: jax.Array
    largest_u: jax.Array
    # The max of the dtype if no coordinate was seen.
    smallest_u: jax.Array


@jax.jit
def _row(stored_m, stored_u, u_scale, unit, eps):
    """The sums of one parameter: an array of eight numbers.

    Figures are computed from a table of all rows: XLA takes far longer to compile many
    operations on scalars.
    """
    m, u = read(stored_m, stored_u, u_scale, unit)
    m = jnp.abs(m).astype(u.dtype)
    ratio = quotient(m, u)
    # The optimizer's eps may have been rounded to float32.
    floor = number(eps, u.dtype) * (1 + 2**-20)
    _, norm = formats(stored_m.dtype, stored_u.dtype)
    floor = norm.read(norm.write(floor, u_scale), u_scale)
    # m tells gradients below the smallest number of u's dtype from none. NaN counts as
    # seen.
    seen = ~((u <= floor) & (stored_m == 0))
    saturated = _is_saturated(stored_m, stored_u, u_scale)

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


def _is_saturated(stored_m, stored_u, u_scale):
    """Where a stored m or u is the min or max of its dtype."""
    mean, norm = formats(stored_m.dtype, stored_u.dtype)
    is_end = jnp.zeros(jnp.broadcast_shapes(stored_m.shape, stored_u.shape), bool)
    if mean.is_ratio:
        is_end |= jnp.abs(stored_m) == mean.LAST
    if norm.is_scaled:
        is_end |= norm.codes_of(stored_u) <= norm.encode(norm.smallest, 1.0)
        # Rounding leaves at least 8/9 of a clipped gradient.
        is_end |= norm.read(stored_u, u_scale) >= 0.88 * norm.largest
    return is_end


def _largest(x):
    """The max of a dtype: not infinity, which jax.debug_infs reports."""
    return number(float(jnp.finfo(x.dtype).max), x.dtype)


def _over_all(columns):
    return _combined(
        columns,
        jnp.sum,
        functools.partial(jnp.max, initial=0),
        functools.partial(jnp.min, initial=_largest(columns.smallest_u)),
    )


def _over_groups(columns, groups):
    """Combines the rows of each group; ``groups`` has the group of each row."""
    if not groups:
        return columns
    ids, size = jnp.array(groups), 1 + max(groups)
    return _combined(
        columns,
        functools.partial(jax.ops.segment_sum, segment_ids=ids, num_segments=size),
        functools.partial(jax.ops.segment_max, segment_ids=ids, num_segments=size),
        functools.partial(jax.ops.segment_min, segment_ids=ids, num_segments=size),
    )


def _combined(columns, add, largest, smallest):
    return _Sums(
        size=add(columns.size),
        squares=add(columns.squares),
        seen=add(columns.seen),
        stale=add(columns.stale),
        saturated=add(columns.saturated),
        largest=largest(columns.largest),
        largest_u=largest(columns.largest_u),
        smallest_u=smallest(columns.smallest_u),
    )


def _figures(sums):
    size = jnp.maximum(sums.size, 1)
    any_seen = sums.seen > 0
    # Not log10, which divides by a float32 without jax_enable_x64.
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

# Fractions that should be small.
_FRACTIONS = ("unseen", "stale", "saturated")
