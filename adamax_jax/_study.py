"""What a narrow optimizer state costs in quality.

Four small models learn real data with AdaMax, its state stored in several ways: a
perceptron, a variational autoencoder, a flow and a transformer. For one seed every
storage starts from the same weights and sees the same data and noise, so that the
differences are those of the storage. Optax's AdaMax differs from float32 in rounding
alone: its row tells how far that goes. The learning rates were chosen on float32.
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

from adamax_jax._alias import adamax
from adamax_jax._cli import add_training_options, obstacle, train_all
from adamax_jax._results import Estimate, digits_to_show, estimate, save, settings_of
from adamax_jax._tasks import TASKS
from adamax_jax._trainer import Trainer

# What the other storages are compared to.
REFERENCE = "float32"

# From a learning rate to an optimizer. The parameters are float32 in all of them.
VARIANTS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "optax float32": optax.adamax,
    REFERENCE: adamax,
    "bfloat16/bfloat16": functools.partial(
        adamax, m_dtype="bfloat16", u_dtype="bfloat16"
    ),
    "int8/uint8": functools.partial(adamax, m_dtype="int8", u_dtype="uint8"),
}


@dataclass
class Run:
    """One training: a task, a storage and a seed."""

    task: str
    variant: str
    seed: int
    # As the task's `metrics` names them.
    metrics: list[float]
    state_bytes: int
    parameters: int
    seconds: float
    # The training loss of every step.
    losses: np.ndarray


def study(
    tasks: Iterable[str] = tuple(TASKS),
    variants: Iterable[str] = tuple(VARIANTS),
    seeds: int = 5,
    steps: int | None = None,
) -> Iterator[Run]:
    """Yields each run as soon as it is done; ``steps`` are the task's if None."""
    for name in tasks:
        task = TASKS[name]
        problem = task.make()
        measure = jax.jit(problem.measure)
        trainers = {
            variant: Trainer(problem, task, VARIANTS[variant], steps or task.steps)
            for variant in variants
        }
        for seed in range(seeds):
            for variant, trainer in trainers.items():
                start = time.perf_counter()
                params, losses = trainer(seed, task.learning_rate)
                yield Run(
                    task=name,
                    variant=variant,
                    seed=seed,
                    metrics=[float(x) for x in measure(params)],
                    state_bytes=trainer.state_bytes,
                    parameters=trainer.parameters,
                    seconds=time.perf_counter() - start,
                    losses=np.asarray(losses),
                )


@dataclass
class Row:
    """A line of the table: one metric of one task with one storage."""

    task: str
    metric: str
    variant: str
    bytes_per_parameter: float
    seeds: int
    value: Estimate
    # To float32 with the same seed; None for float32 itself or without its runs.
    difference: Estimate | None


def summarize(runs: Iterable[Run]) -> list[Row]:
    """The table, of the runs there are."""
    groups: dict[tuple[str, str], dict[int, Run]] = {}
    for run in runs:
        groups.setdefault((run.task, run.variant), {})[run.seed] = run
    rows = []
    for (task, variant), group in groups.items():
        reference = groups.get((task, REFERENCE), {})
        paired = [] if variant == REFERENCE else sorted(group.keys() & reference)
        one = next(iter(group.values()))
        for i, metric in enumerate(TASKS[task].metrics):
            differences = [
                group[seed].metrics[i] - reference[seed].metrics[i] for seed in paired
            ]
            rows.append(
                Row(
                    task=task,
                    metric=metric,
                    variant=variant,
                    bytes_per_parameter=one.state_bytes / one.parameters,
                    seeds=len(group),
                    value=estimate([run.metrics[i] for run in group.values()]),
                    difference=estimate(differences) if differences else None,
                )
            )
    # All storages of a metric below each other; the sort keeps their order.
    places = [(task, metric) for task in TASKS for metric in TASKS[task].metrics]
    return sorted(rows, key=lambda row: places.index((row.task, row.metric)))


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    lines = [
        "| task | metric | state | bytes per parameter | seeds | mean ± sd "
        "| difference to float32, 95 % interval |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        digits = digits_to_show(
            [x.value for x in rows if (x.task, x.metric) == (row.task, row.metric)]
        )
        value = f"{row.value.mean:.{digits}f}"
        if not math.isnan(row.value.deviation):
            value += f" ± {row.value.deviation:.{digits}f}"
        difference = ""
        if row.difference is not None:
            # Pairs differ less than seeds: one digit more.
            difference = f"{row.difference.mean:+z.{digits + 1}f}"
            if not math.isnan(row.difference.margin):
                difference += f" ± {row.difference.margin:.{digits + 1}f}"
        lines.append(
            f"| {row.task} | {row.metric} | {row.variant} "
            f"| {row.bytes_per_parameter:.2f} | {row.seeds} | {value} | {difference} |"
        )
    return "\n".join(lines) + "\n"


def _caption(settings: dict[str, Any]) -> str:
    """The line under the table."""
    trained = ", ".join(
        f"{name} {task['steps']} at {task['learning_rate']:g} ({task['schedule']})"
        for name, task in settings["tasks"].items()
    )
    return (
        "Differences are between runs with the same seed; intervals are Student's t; "
        f"steps and learning rates, chosen on float32: {trained}; Optax "
        f"{settings['versions']['optax']}, Flax {settings['versions']['flax']}, "
        f"{settings['environment']}.\n"
    )


def add_parser(commands) -> None:
    """Adds the command ``study`` to the command line."""
    parser = commands.add_parser(
        "study",
        help="measure what a narrow optimizer state costs in quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_training_options(parser, {"--tasks": TASKS, "--variants": VARIANTS})
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Trains all, saving each result; prints the table; returns the exit status."""
    paths = options.json, options.markdown
    trouble = obstacle("study", paths)
    if trouble is not None:
        print(trouble, file=sys.stderr)
        return 1
    tasks, variants = (
        list(dict.fromkeys(names)) for names in (options.tasks, options.variants)
    )
    return train_all(
        study(tasks, variants, options.seeds, options.steps),
        len(tasks) * len(variants) * options.seeds,
        lambda run: f"{run.task}, {run.variant}, seed {run.seed}",
        lambda runs: _save(runs, options),
        paths,
    )


def _save(runs: Sequence[Run], options: argparse.Namespace) -> str:
    """Writes the files; returns the table and its caption."""
    rows = summarize(runs)
    settings = settings_of({run.task: TASKS[run.task] for run in runs}, options)
    text = f"{markdown(rows)}\n{_caption(settings)}"
    save(text, settings, rows, runs, options)
    return text
