"""Which optimizer learns best, each at its own best learning rate.

For every task and method, learning rates a factor of 2 apart are tried with one seed
until the best lies between two others; then all seeds are trained at the best. For one
seed all methods start from the same weights and see the same data and noise, so that
methods are compared in pairs.
"""

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

from adamax_jax._alias import adamax, lp_adam
from adamax_jax._cli import add_training_options, obstacle, train_all
from adamax_jax._results import Estimate, digits_to_show, estimate, save, settings_of
from adamax_jax._tasks import LARGER, TASKS
from adamax_jax._trainer import Trainer

ALL_TASKS = TASKS | LARGER
REFERENCES = ("Adam", "AdaMax")
# A search that goes further than this finds no best.
MOST_RATES = 12


def _all_but_last(path, leaf):
    return range(leaf.ndim - 1)


def _all(path, leaf):
    return range(leaf.ndim)


def _is_embedding(path):
    return "embed" in jax.tree_util.keystr(path)


# From a learning rate to an optimizer.
Method = Callable[[Any], optax.GradientTransformation]
SHARED_AXES = {
    "u per input": -1,
    "u per output": _all_but_last,
    "u per array": _all,
}
METHODS: dict[str, Method] = {
    "Adam": optax.adam,
    "AdaMax": adamax,
    "AdaMax, int8": functools.partial(adamax, m_dtype="int8"),
}
for _name, _axes in SHARED_AXES.items():
    METHODS[_name] = functools.partial(adamax, shared_axes=_axes)
    METHODS[f"{_name}, int8"] = functools.partial(
        adamax, shared_axes=_axes, m_dtype="int8"
    )
# The embedding tables on their own; only the transformers have some.
EMBEDDING_METHODS: dict[str, Method] = {
    "embeddings: u per symbol": functools.partial(
        adamax, shared_axes=lambda path, leaf: -1 if _is_embedding(path) else None
    ),
    "embeddings: u per feature": functools.partial(
        adamax, shared_axes=lambda path, leaf: 0 if _is_embedding(path) else None
    ),
}
# From Adam to AdaMax, which is p = infinity, with the decay rate of AdaMax.
LP_METHODS: dict[str, Method] = {
    f"p = {p}": functools.partial(lp_adam, p=p) for p in (1, 2, 3, 4, 6, 8, 16)
}
# And with the memory of Adam.
for _p in (3, 6):
    LP_METHODS[f"p = {_p}, b2^p = 0.999"] = functools.partial(
        lp_adam, p=_p, b2=0.999 ** (1 / _p)
    )
ALL_METHODS = METHODS | EMBEDDING_METHODS | LP_METHODS


@dataclass
class Trial:
    """One training: a task, a method, a learning rate and a seed."""

    task: str
    method: str
    learning_rate: float
    seed: int
    # As the task's `metrics` names them; the search goes by the first.
    metrics: list[float]
    state_bytes: int
    parameters: int
    seconds: float
    # The training loss of every step.
    losses: np.ndarray


def compare(
    tasks: Iterable[str],
    methods: Iterable[str],
    seeds: int,
    steps: int | None = None,
) -> Iterator[Trial]:
    """Yields each training as soon as it is done; ``steps`` are the task's if None."""
    for name in tasks:
        task = ALL_TASKS[name]
        problem = task.make()
        measure = jax.jit(problem.measure)
        exponent = 0
        for method in methods:
            trainer = Trainer(problem, task, ALL_METHODS[method], steps or task.steps)
            train = functools.partial(_train, name, method, trainer, measure)
            # The search begins where that of the method before ended.
            exponent = yield from _search(train, exponent, seeds)


def _search(train, exponent, seeds):
    """Yields trials at several learning rates, then seeds; returns the best's power."""
    costs: dict[int, float] = {}
    while (exponent := next_exponent(costs, exponent)) not in costs:
        trial = train(exponent, seed=0)
        costs[exponent] = _cost(trial)
        yield trial
    for seed in range(1, seeds):
        yield train(exponent, seed)
    return exponent


def _train(name, method, trainer, measure, exponent, seed):
    start = time.perf_counter()
    learning_rate = ALL_TASKS[name].learning_rate * 2.0**exponent
    params, losses = trainer(seed, learning_rate)
    return Trial(
        task=name,
        method=method,
        learning_rate=learning_rate,
        seed=seed,
        metrics=[float(x) for x in measure(params)],
        state_bytes=trainer.state_bytes,
        parameters=trainer.parameters,
        seconds=time.perf_counter() - start,
        losses=np.asarray(losses),
    )


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


def _cost(trial):
    """What the search minimizes; of a training that diverged, infinity."""
    cost, losses = trial.metrics[0], trial.losses
    # The training loss may end finite, but above where it began.
    has_learned = np.mean(losses[-math.ceil(len(losses) / 10) :]) <= losses[0]
    return cost if math.isfinite(cost) and has_learned else math.inf


@dataclass
class Row:
    """A line of the table: one metric of one task with one method."""

    task: str
    metric: str
    method: str
    bytes_per_parameter: float
    learning_rate: float
    # The metric of seed 0 for each learning rate that was tried.
    search: dict[float, float]
    seeds: int
    value: Estimate
    # To each of REFERENCES with the same seed.
    differences: dict[str, Estimate]


def summarize(trials: Iterable[Trial]) -> list[Row]:
    """The table, of the trials there are."""
    groups: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.task, trial.method), []).append(trial)
    best = {place: _at_best(group) for place, group in groups.items()}
    rows = []
    for task in ALL_TASKS:
        for i, metric in enumerate(ALL_TASKS[task].metrics):
            for (other, method), at_best in best.items():
                if other != task:
                    continue
                one = at_best[0]
                references = {
                    name: {t.seed: t.metrics[i] for t in best.get((task, name), [])}
                    for name in REFERENCES
                    if name != method
                }
                differences = {
                    name: [
                        trial.metrics[i] - values[trial.seed]
                        for trial in at_best
                        if trial.seed in values
                    ]
                    for name, values in references.items()
                }
                search = sorted(
                    (t.learning_rate, t.metrics[i])
                    for t in groups[task, method]
                    if t.seed == 0
                )
                rows.append(
                    Row(
                        task=task,
                        metric=metric,
                        method=method,
                        bytes_per_parameter=one.state_bytes / one.parameters,
                        learning_rate=one.learning_rate,
                        search=dict(search),
                        seeds=len(at_best),
                        value=estimate([trial.metrics[i] for trial in at_best]),
                        differences={
                            name: estimate(values)
                            for name, values in differences.items()
                            if values
                        },
                    )
                )
    return rows


def _at_best(group):
    """The trials at the best learning rate, by seed."""
    best = min((trial for trial in group if trial.seed == 0), key=_cost)
    at_best = [t for t in group if t.learning_rate == best.learning_rate]
    return sorted(at_best, key=lambda trial: trial.seed)


def markdown(rows: Sequence[Row]) -> str:
    """One table for each metric of each task."""
    tables = []
    for place in dict.fromkeys((row.task, row.metric) for row in rows):
        group = [row for row in rows if (row.task, row.metric) == place]
        digits = digits_to_show(row.value for row in group)
        lines = [
            f"{place[0]}: {place[1]}",
            "",
            "| method | bytes per parameter | learning rate | seeds | mean ± sd | "
            + " | ".join(f"to {name}" for name in REFERENCES)
            + " |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in group:
            cells = [
                row.method,
                f"{row.bytes_per_parameter:.2f}",
                f"{row.learning_rate:.2g}",
                str(row.seeds),
                _show(row.value.mean, row.value.deviation, digits, sign=""),
            ]
            for name in REFERENCES:
                difference = row.differences.get(name)
                # Pairs differ less than seeds: one digit more.
                cells.append(
                    ""
                    if difference is None
                    else _show(difference.mean, difference.margin, digits + 1, sign="+")
                )
            lines.append(f"| {' | '.join(cells)} |")
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def _show(mean, spread, digits, sign):
    shown = f"{mean:{sign}z.{digits}f}"
    return shown if math.isnan(spread) else f"{shown} ± {spread:.{digits}f}"


def _caption(settings: dict[str, Any]) -> str:
    """The line under the tables."""
    trained = ", ".join(
        f"{name} {task['steps']} ({task['schedule']}"
        + (f", {task['warm_up']:.0%} warm-up)" if task["warm_up"] else ")")
        for name, task in settings["tasks"].items()
    )
    return (
        "Learning rates are the best of those a factor of 2 apart, by seed 0; "
        "differences are between runs with the same seed, with the 95 % interval of "
        f"Student's t; steps: {trained}; Optax {settings['versions']['optax']}, Flax "
        f"{settings['versions']['flax']}, {settings['environment']}.\n"
    )


def add_parser(commands) -> None:
    """Adds the command ``compare`` to the command line."""
    parser = commands.add_parser(
        "compare",
        help="compare optimizers, each at its best learning rate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_training_options(parser, {"--tasks": ALL_TASKS, "--methods": ALL_METHODS})
    parser.set_defaults(methods=list(METHODS), run=run)


def run(options: argparse.Namespace) -> int:
    """Trains all, saving each result; prints the tables; returns the exit status."""
    paths = options.json, options.markdown
    trouble = obstacle("comparison", paths)
    if trouble is not None:
        print(trouble, file=sys.stderr)
        return 1
    tasks, methods = (
        list(dict.fromkeys(names)) for names in (options.tasks, options.methods)
    )
    return train_all(
        compare(tasks, methods, options.seeds, options.steps),
        None,
        lambda trial: (
            f"{trial.task}, {trial.method}, {trial.learning_rate:.2g}, seed "
            f"{trial.seed}"
        ),
        lambda trials: _save(trials, options),
        paths,
    )


def _save(trials: Sequence[Trial], options: argparse.Namespace) -> str:
    """Writes the files; returns the tables and their caption."""
    rows = summarize(trials)
    tasks = {trial.task: ALL_TASKS[trial.task] for trial in trials}
    settings = settings_of(tasks, options)
    text = f"{markdown(rows)}\n{_caption(settings)}"
    save(text, settings, rows, trials, options)
    return text
