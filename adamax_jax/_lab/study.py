"""Which optimizer, and which storage of its state, trains best.

Small models learn real data, each with several methods. For one seed all methods start
from the same weights and see the same data and noise, so that they are compared in
pairs. By default that is AdaMax with its state stored in several ways, at the learning
rates of the tasks, which were chosen on float32; optax.adamax differs from AdaMax in
rounding alone, and tells how far that goes.

With --rates search each method is trained at its own best learning rate: for every
task and method, rates a factor of 2 apart are tried with seeds 0 and 1 until the best
lies between two others; then other seeds are trained at the best. Seeds 0 and 1, which
chose the rate, are in no mean and no difference then.

"--methods memory" asks how long AdaMax should remember, and by which factor u may grow
in a step: Adam at five b2, and AdaMax on a grid of both. Of each task and each method
this is reported, whichever way it falls: the difference to Adam at b2 = 0.999 and to
the best of Adam's b2 (by the mean of all seeds). "memory, further" trains some of
these settings in few bytes, with one u for each row of an embedding, and with a bound
of m apart from that of u.

Time and memory: a training takes 2 to 60 seconds, by its task, and 1 GB; the default
80 take some 20 minutes on two cores. A search tries three to six rates for each method.
"""

import argparse
import functools
import math
import shlex
import statistics
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adamax_jax import adam, adamax, lp_adam, master_weights
from adamax_jax._lab.command import (
    FLAX,
    SKLEARN,
    WIDTH,
    Command,
    add_names,
    environment,
    plural,
    positive_int,
    table,
    versions,
)
from adamax_jax._lab.contenders import BFLOAT16, TWO_BYTES, with_float32_copy
from adamax_jax._lab.tasks import FURTHER, TASKS
from adamax_jax._lab.train import InHalf, Method, Run, Trainer
from adamax_jax._lab.varied import VARIED

ALL_TASKS = TASKS | FURTHER | VARIED
# The methods that others are compared to, where they are trained.
REFERENCES = ("Adam", "AdaMax", "bfloat16, master weights")
# The Adam whose mean over seeds is best, where several b2 were trained.
BEST_ADAM = "Adam at its best b2"
# The seeds that choose a learning rate, and are not counted.
SEARCH_SEEDS = (0, 1)
# A search that goes further than this finds no best.
MOST_RATES = 12


def _all_but_last(path, leaf):
    return range(leaf.ndim - 1)


def _all(path, leaf):
    return range(leaf.ndim)


def _of_embeddings(axis):
    """The axis of embedding tables alone."""
    return lambda path, leaf: axis if "embed" in jax.tree_util.keystr(path) else None


# How long u remembers. Adam may choose among the same memories.
MEMORIES = (0.95, 0.98, 0.99, 0.995)
Methods = dict[str, Method]
# The parameters are float32 in all methods but those of HALF, and so is the state where
# nothing is said.
ADAM: Methods = {
    "Adam": functools.partial(optax.adam, b2=0.999),
    **{f"Adam, b2 = {b2}": functools.partial(optax.adam, b2=b2) for b2 in MEMORIES},
}
ADAM_BYTES: Methods = {
    "Adam, 8 bytes": adam,
    "Adam, 4 bytes": functools.partial(adam, **BFLOAT16),
    "Adam, 3 bytes": functools.partial(adam, m_dtype="int8", u_dtype="bfloat16"),
    "Adam, 2 bytes": functools.partial(adam, **TWO_BYTES),
}
STORAGES: Methods = {
    "optax.adamax": optax.adamax,
    "AdaMax": adamax,
    "AdaMax, bfloat16": functools.partial(adamax, **BFLOAT16),
    "AdaMax, int8 and uint8": functools.partial(adamax, **TWO_BYTES),
}
SHARED: Methods = {
    name + suffix: functools.partial(adamax, shared_axes=axes, **storage)
    for name, axes in (
        ("AdaMax", None),
        ("u per input", -1),
        ("u per output", _all_but_last),
        ("u per array", _all),
        ("embeddings: u per symbol", _of_embeddings(-1)),
        ("embeddings: u per feature", _of_embeddings(0)),
    )
    for suffix, storage in (("", {}), (", int8", {"m_dtype": "int8"}))
}
# From Adam to AdaMax, which is p = infinity: with AdaMax's b2, and with Adam's memory.
ORDERS: Methods = {
    **{f"p = {p}": functools.partial(lp_adam, p=p) for p in (1, 2, 3, 4, 6, 8, 16)},
    **{
        f"p = {p}, b2^p = 0.999": functools.partial(lp_adam, p=p, b2=0.999 ** (1 / p))
        for p in (3, 6)
    },
}
# A model in bfloat16: without any cure, with float32 weights kept by the optimizer as
# usual, and with residuals of two bytes and of one.
HALF: Methods = {
    "bfloat16": InHalf(functools.partial(adamax, m_dtype="float32", u_dtype="float32")),
    "bfloat16, master weights": InHalf(lambda rate: with_float32_copy(adamax(rate))),
} | {
    f"bfloat16, {residual}{suffix}": InHalf(
        lambda rate, make=make, residual=residual: master_weights(make(rate), residual)
    )
    for residual in ("int16", "int8")
    for suffix, make in (
        ("", adamax),
        (", two bytes", functools.partial(adamax, **TWO_BYTES)),
    )
}
# How long AdaMax remembers, and by which factor u may grow in a step: the grid from
# which a setting is recommended. Floats are traced, so that one compilation serves the
# grid; integers are not (`split_traced`).
GRID: Methods = {
    f"AdaMax, b2 = {b2}" + (f", growth {k}" if k else ""): functools.partial(
        adamax, b2=b2, **({"max_growth": float(k)} if k else {})
    )
    for b2 in (0.98, 0.99, 0.995, 0.999)
    for k in (None, 1.1, 1.5, 2, 4)
}
# Three settings of the grid in few bytes, and with one u for each row of an embedding.
NARROW: Methods = {
    f"{setting}, {name}": functools.partial(GRID[setting], **storage)
    for setting in (
        "AdaMax, b2 = 0.98",
        "AdaMax, b2 = 0.98, growth 2",
        "AdaMax, b2 = 0.99, growth 2",
    )
    for name, storage in (
        ("two bytes", TWO_BYTES),
        ("one byte", {"m_dtype": "int8", "shared_axes": -1}),
        ("u per symbol", {"shared_axes": _of_embeddings(-1)}),
    )
}


def _cut_apart(learning_rate, b2, max_growth, cut):
    """AdaMax with a bounded growth, where m sees gradients up to ``cut`` times u."""

    def init_fn(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return jnp.zeros([], jnp.int32), zeros, zeros

    def next_u(g, u):
        size = jnp.abs(g) + 1e-8
        # The first gradient is taken whole.
        bound = jnp.where(u > 2e-8, max_growth * u, jnp.inf)
        return jnp.maximum(b2 * u, jnp.minimum(size, bound))

    def next_m(g, m, u):
        return 0.9 * m + 0.1 * jnp.clip(g, -cut * u, cut * u)

    def update_fn(updates, state, params=None):
        del params
        count, m, u = state
        count += 1
        u = jax.tree.map(next_u, updates, u)
        m = jax.tree.map(next_m, updates, m, u)
        left = 1 - 0.9 ** count.astype(jnp.float32)
        return jax.tree.map(lambda m, u: m / u / left, m, u), (count, m, u)

    return optax.chain(
        optax.GradientTransformation(init_fn, update_fn),
        optax.scale_by_learning_rate(learning_rate),
    )


# The bound of u and that of m apart.
CUT: Methods = {
    f"AdaMax, b2 = {b2}, growth 1.1, m cut at 4 u": functools.partial(
        _cut_apart, b2=b2, max_growth=1.1, cut=4.0
    )
    for b2 in (0.98, 0.99)
}
# Names that stand for several methods.
GROUPS: dict[str, Methods] = {
    "storages": STORAGES,
    "shared": SHARED,
    "orders": ORDERS,
    "half precision": HALF,
    "Adam at several b2": ADAM,
    "Adam in few bytes": {"Adam": ADAM["Adam"]} | ADAM_BYTES,
    "memory": ADAM | GRID,
    "memory, further": ADAM_BYTES | NARROW | CUT,
}
METHODS: Methods = {
    n: method for group in GROUPS.values() for n, method in group.items()
}


def study(
    tasks: Iterable[str],
    methods: Iterable[str],
    seeds: int,
    steps: int | None = None,
    rates: str = "task",
) -> Iterator[Run]:
    """Yields each run as soon as it is done; ``steps`` are the task's if None."""
    for name in tasks:
        task = ALL_TASKS[name]
        problem = task.make()
        exponent = 0
        trainers: dict[Any, Trainer] = {}
        for method in methods:
            kind, numbers = split_traced(METHODS[method])
            if kind not in trainers:
                make, others = kind
                # Not a partial of InHalf: Trainer would take it for a float32 method.
                if others:
                    make = functools.partial(make, **dict(others))
                trainers[kind] = Trainer(problem, task, make, steps or task.steps)
            train = functools.partial(trainers[kind].run, name, method, **numbers)
            first_seed = 0
            if rates == "search":
                # It begins where that of the method before ended.
                exponent = yield from _search(train, task.learning_rate, exponent)
                first_seed = len(SEARCH_SEEDS)
            for seed in range(first_seed, first_seed + seeds):
                yield train(task.learning_rate * 2.0**exponent, seed)


def split_traced(method: Method) -> tuple[Any, dict[str, float]]:
    """Splits a method into what is compiled once and the floats that are traced."""
    if not isinstance(method, functools.partial):
        return (method, ()), {}
    numbers = {k: v for k, v in method.keywords.items() if isinstance(v, float)}
    others = {k: v for k, v in method.keywords.items() if k not in numbers}
    return (method.func, tuple(sorted(others.items()))), numbers


def _search(train, learning_rate, exponent):
    """Yields runs at multiples of a learning rate; returns the best's power of 2."""
    costs: dict[int, float] = {}
    while (exponent := next_exponent(costs, exponent)) not in costs:
        runs = [train(learning_rate * 2.0**exponent, seed) for seed in SEARCH_SEEDS]
        costs[exponent] = mean_cost(runs)
        yield from runs
    return exponent


def next_exponent(costs: dict[int, float], first: int) -> int:
    """The power of 2 to try next; one that was tried once the search has ended.

    It ends at the best, which has been compared to half and twice of it.
    """
    if not costs:
        return first
    best = min(costs, key=lambda exponent: costs[exponent])
    if math.isinf(costs[best]):
        # Nothing was learned so far: only less can help.
        lowest = min(costs)
        return lowest - 1 if len(costs) < MOST_RATES else lowest
    untried = [e for e in (best + 1, best - 1) if e not in costs]
    return untried[0] if untried and len(costs) < MOST_RATES else best


def cost(run: Run) -> float:
    """What the search minimizes; of a training that diverged, infinity."""
    metric, losses = run.metrics[0], run.losses
    # The training loss may end finite, but above where it began.
    has_learned = np.mean(losses[-math.ceil(len(losses) / 10) :]) <= losses[0]
    return metric if math.isfinite(metric) and has_learned else math.inf


def mean_cost(runs: Iterable[Run]) -> float:
    """Infinite if one of the trainings diverged."""
    return float(np.mean([cost(run) for run in runs]))


@dataclass
class Estimate:
    """A mean, the standard deviation, and half the 95 % interval of the mean."""

    mean: float
    deviation: float
    margin: float


def estimate(values: Sequence[float]) -> Estimate:
    """Student's t; one value has no deviation and no interval (NaN)."""
    from scipy import stats

    n = len(values)
    if n < 2:
        return Estimate(float(np.mean(values)), math.nan, math.nan)
    deviation = float(np.std(values, ddof=1))
    margin = float(stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return Estimate(float(np.mean(values)), deviation, margin)


@dataclass
class Row:
    """A line of a table: one metric of one task with one method."""

    task: str
    metric: str
    method: str
    bytes_per_parameter: float
    learning_rate: float
    # The metric, a mean of SEARCH_SEEDS, for each learning rate that was tried.
    search: dict[float, float]
    seeds: int
    value: Estimate
    # To each of REFERENCES, and to BEST_ADAM, with the same seeds.
    differences: dict[str, Estimate]


def summarize(runs: Iterable[Run]) -> list[Row]:
    """The rows of the runs there are, all methods of a metric after each other."""
    groups: dict[str, dict[str, list[Run]]] = {task: {} for task in ALL_TASKS}
    for run in runs:
        groups[run.task].setdefault(run.method, []).append(run)
    rows = []
    for task, methods in groups.items():
        best = {method: _at_best(all_runs) for method, all_runs in methods.items()}
        for i, metric in enumerate(ALL_TASKS[task].metrics):
            for method, all_runs in methods.items():
                rows.append(_row(task, metric, i, method, all_runs, best))
    return rows


def _row(task, metric, i, method, all_runs, best):
    """A row, given all runs of its method and those at the best rate of each method."""
    runs = best[method]
    differences = {}
    for name, reference in _references(best).items():
        values = {run.seed: run.metrics[i] for run in best[reference]}
        pairs = [
            run.metrics[i] - values[run.seed] for run in runs if run.seed in values
        ]
        if pairs and reference != method:
            differences[name] = estimate(pairs)
    return Row(
        task=task,
        metric=metric,
        method=method,
        bytes_per_parameter=runs[0].bytes_per_parameter,
        learning_rate=runs[0].learning_rate,
        search={
            rate: float(np.mean([run.metrics[i] for run in tried]))
            for rate, tried in _searched(all_runs).items()
        },
        seeds=len(runs),
        value=estimate([run.metrics[i] for run in runs]),
        differences=differences,
    )


def _references(best):
    """Which methods the others are compared to, by the names of the columns."""
    references = {name: name for name in REFERENCES if name in best}
    adams = [name for name in ADAM if name in best]
    if len(adams) > 1:
        references[BEST_ADAM] = min(adams, key=lambda name: mean_cost(best[name]))
    return references


def _at_best(runs):
    """The runs at the best learning rate, by seed, but for those that chose it."""
    tried = _searched(runs)
    # Where nothing was learned at any, the search ended at the lowest.
    best = min(tried, key=lambda rate: mean_cost(tried[rate]))
    at_best = [run for run in runs if run.learning_rate == best]
    if len(tried) > 1:
        at_best = [run for run in at_best if run.seed not in SEARCH_SEEDS] or at_best
    return sorted(at_best, key=lambda run: run.seed)


def _searched(runs):
    """For each learning rate, from the lowest on, the runs that choose among them."""
    return {
        rate: [r for r in runs if r.learning_rate == rate and r.seed in SEARCH_SEEDS]
        for rate in sorted({run.learning_rate for run in runs})
    }


def digits_to_show(values: Iterable[Estimate]) -> int:
    """As many decimals as show two digits of the typical deviation.

    One table column has one format; a training that diverged does not set it.
    """
    scales = [value.deviation for value in values if 0 < value.deviation < math.inf]
    if not scales:
        return 4
    return min(8, max(1, 1 - math.floor(math.log10(statistics.median_low(scales)))))


def show(mean: float, spread: float, digits: int, sign: str = "") -> str:
    """A mean and its spread after ±, if there is one."""
    shown = f"{mean:{sign}z.{digits}f}"
    return shown if math.isnan(spread) else f"{shown} ± {spread:.{digits}f}"


def markdown(rows: Sequence[Row]) -> str:
    """One table for each metric of each task."""
    tables = []
    for place in dict.fromkeys((row.task, row.metric) for row in rows):
        group = [row for row in rows if (row.task, row.metric) == place]
        digits = digits_to_show(row.value for row in group)
        named = {reference for row in group for reference in row.differences}
        references = [name for name in (BEST_ADAM, *REFERENCES) if name in named]
        columns = ["method", "bytes per parameter", "learning rate", "seeds"]
        columns += ["mean ± sd", *(f"to {reference}" for reference in references)]
        lines = []
        for row in group:
            cells = [
                row.method,
                f"{row.bytes_per_parameter:.2f}",
                f"{row.learning_rate:.2g}",
                str(row.seeds),
                show(row.value.mean, row.value.deviation, digits),
            ]
            for reference in references:
                difference = row.differences.get(reference)
                # Pairs differ less than seeds: one digit more.
                cells.append(
                    ""
                    if difference is None
                    else show(difference.mean, difference.margin, digits + 1, sign="+")
                )
            lines.append(cells)
        tables.append(f"{place[0]}: {place[1]}\n\n{table(columns, lines)}\n")
    return "\n".join(tables)


def _add_options(parser):
    add_names(
        parser,
        "--tasks",
        ALL_TASKS,
        default=TASKS,
        help=f"listed below (default: {' '.join(TASKS)})",
    )
    add_names(
        parser,
        "--methods",
        METHODS | GROUPS,
        default=["storages"],
        help="methods or groups of them, listed below; a name with spaces or commas "
        "in quotes (default: the group storages)",
    )
    parser.add_argument(
        "--rates",
        choices=("task", "search"),
        default="task",
        help="the learning rates: the task's, or each method's best, which is "
        "searched for (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=positive_int,
        default=5,
        metavar="N",
        help="how many, from 0 on, or from 2 on where 0 and 1 choose the learning "
        "rate (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=positive_int,
        metavar="N",
        help="of each training, in place of its own",
    )


def _names():
    """The tasks, and the methods by their groups, for the help."""
    lines = ["tasks:", *_wrapped(ALL_TASKS), "", "methods, by groups:"]
    for group, methods in GROUPS.items():
        lines += [f"  {shlex.quote(group)}", *_wrapped(methods)]
    return "\n".join(lines)


def _wrapped(names):
    """Lines of names, none of which is broken."""
    text = " ".join(shlex.quote(name).replace(" ", "\0") for name in names)
    lines = textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return [line.replace("\0", " ") for line in lines]


def _methods(options):
    """Each once, also where it was named twice or is in two groups."""
    groups = [GROUPS.get(name, [name]) for name in options.methods]
    return list(dict.fromkeys(method for group in groups for method in group))


def _total(options):
    """How many trainings there will be; a search does not know."""
    trainings = len(set(options.tasks)) * len(_methods(options)) * options.seeds
    return None if options.rates == "search" else trainings


def _first_line(options):
    total = _total(options)
    what = "A search of trainings" if total is None else plural(total, "training")
    return f"{what} of 2 to 60 seconds each. Loading Flax ..."


def _describe(run):
    return (
        f"{run.task}, {run.method}, learning rate {run.learning_rate:.2g}, "
        f"seed {run.seed}: {run.metrics[0]:.5g} ({run.seconds:.0f} s)"
    )


def _settings(runs, options):
    """What the numbers come from."""
    return {
        "environment": environment(),
        "versions": versions("adamax_jax", "jax", "optax", "flax", "scikit-learn"),
        "seeds": options.seeds,
        "rates": options.rates,
        "tasks": {
            name: task.settings() | {"steps": options.steps or task.steps}
            for name, task in ALL_TASKS.items()
            if any(run.task == name for run in runs)
        },
    }


def _numbers(runs: Sequence[Run], options: argparse.Namespace) -> dict[str, Any]:
    return _settings(runs, options) | {
        "table": [asdict(row) for row in summarize(runs)],
        "runs": [run.numbers() for run in runs],
    }


def _text(runs: Sequence[Run], options: argparse.Namespace) -> str:
    """The tables and what they come from."""
    settings = _settings(runs, options)
    rates = {
        "task": "Learning rates are the tasks', chosen for AdaMax",
        "search": "Learning rates are the best of those a factor of 2 apart, by seeds "
        "0 and 1, which are not counted",
    }[options.rates]
    trained = ", ".join(
        f"{name} {task['steps']} ({'cosine' if task['cosine'] else 'constant'}"
        + (f", {task['warm_up']:.0%} warm-up" if task["warm_up"] else "")
        + (f", weight decay {task['weight_decay']})" if task["weight_decay"] else ")")
        for name, task in settings["tasks"].items()
    )
    return (
        f"{markdown(summarize(runs))}\n{rates}; differences are between runs with the "
        f"same seed, with the 95 % interval of Student's t; steps: {trained}; Optax "
        f"{settings['versions']['optax']}, Flax {settings['versions']['flax']}, "
        f"{settings['environment']}.\n"
    )


COMMAND = Command(
    name="study",
    help="compare optimizers and storages of their state, in the quality of training",
    description=__doc__,
    epilog=_names(),
    add_options=_add_options,
    first_line=_first_line,
    needs=lambda options: FLAX | SKLEARN,
    total=_total,
    results=lambda options: study(
        dict.fromkeys(options.tasks),
        _methods(options),
        options.seeds,
        options.steps,
        options.rates,
    ),
    describe=_describe,
    text=_text,
    numbers=_numbers,
)
