"""Figure 2 of the Adam paper, redrawn with AdaMax and with small states: a minute.

A multilayer perceptron with dropout learns the 1797 handwritten digits that
scikit-learn ships, with the optimizers of the paper, with AdaMax, and with Adam and
AdaMax in two bytes of state per parameter. It takes 0.6 GB, and
--sweep four to eight minutes.
"""

import argparse
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from adamax_jax import adam, adamax
from adamax_jax._lab.command import (
    FLAX,
    MATPLOTLIB,
    SKLEARN,
    Command,
    add_names,
    environment,
    file_path,
    plural,
    positive_int,
    table,
)
from adamax_jax._lab.contenders import RECOMMENDED, TWO_BYTES
from adamax_jax._lab.tasks import TASKS
from adamax_jax._lab.train import Method, Run, Trainer

TASK = "perceptron"
# The default, at which the learning rates were chosen.
EPOCHS = 200
# The final cost is the mean over so many passes.
FINAL_PASSES = 5
# A point of a strong line is a mean over so many passes on either side.
NEIGHBOURS = 4
# Multiples of the default learning rates.
SWEEP = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)


class Contender(NamedTuple):
    """An optimizer of the figure: how it is made and how it is drawn."""

    label: str
    optimizer: Method
    learning_rate: float
    color: str
    style: Any


# The learning rates were chosen with `demo --sweep`, of seed 0 and EPOCHS. The colours
# are Okabe and Ito's and Tol's, which colour-blind readers can tell apart; the line
# styles serve print.
CONTENDERS = {
    "adagrad": Contender("AdaGrad", optax.adagrad, 0.2, "#E69F00", (0, (1, 1))),
    "rmsprop": Contender("RMSProp", optax.rmsprop, 0.002, "#009E73", "-."),
    "sgd": Contender(
        "SGD Nesterov",
        functools.partial(optax.sgd, momentum=0.9, nesterov=True),
        0.05,
        "#56B4E9",
        (0, (5, 1, 1, 1, 1, 1)),
    ),
    "adadelta": Contender("AdaDelta", optax.adadelta, 2.0, "#CC79A7", (0, (5, 3))),
    "adam": Contender("Adam", optax.adam, 0.001, "#0072B2", "--"),
    "adamax": Contender("AdaMax", adamax, 0.008, "#D55E00", "-"),
    "adam-two-bytes": Contender(
        "Adam, two bytes",
        functools.partial(adam, **TWO_BYTES),
        0.002,
        "#882255",
        (0, (5, 1, 1, 1)),
    ),
    "adamax-short": Contender(
        "AdaMax, b2=0.98",
        functools.partial(adamax, **RECOMMENDED),
        0.004,
        "#999933",
        "-.",
    ),
    "adamax-short-two-bytes": Contender(
        "AdaMax, b2=0.98, two bytes",
        functools.partial(adamax, **RECOMMENDED, **TWO_BYTES),
        0.004,
        "#000000",
        (0, (1, 1)),
    ),
}
# The panels of the figure, by their titles. Each contender is in one at least.
PANELS = {
    "Figure 2 of the Adam paper, and AdaMax": (
        "adagrad",
        "rmsprop",
        "sgd",
        "adadelta",
        "adam",
        "adamax",
    ),
    "Adam and AdaMax, by bytes of state, each at its own rate": (
        "adam",
        "adamax",
        "adam-two-bytes",
        "adamax-short",
        "adamax-short-two-bytes",
    ),
}


def costs_of(run: Run, epochs: int) -> np.ndarray:
    """The mean training cost of each pass over the data."""
    return np.array([part.mean() for part in np.array_split(run.losses, epochs)])


def final_cost(run: Run, epochs: int) -> float:
    """The training cost over the last passes, which dropout makes noisy."""
    return float(np.mean(costs_of(run, epochs)[-FINAL_PASSES:]))


def _add_options(parser):
    parser.add_argument(
        "--epochs",
        type=positive_int,
        default=EPOCHS,
        metavar="N",
        help="passes over the data (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="of the weights, the order of the data and the dropout (default: 0)",
    )
    add_names(
        parser,
        "--optimizers",
        CONTENDERS,
        default=CONTENDERS,
        help="listed below (default: all)",
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="train each at 1/8 to 8 times its learning rate, in steps of 2, and draw "
        "its best; the table says where that is at the edge",
    )
    parser.add_argument(
        "--figure",
        type=_figure_path,
        default=Path("adamax_demo.png"),
        metavar="PATH",
        help="where to save the figure (default: %(default)s)",
    )


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number below 2^32")
    return int(text)


def _figure_path(text: str) -> Path:
    path = file_path(text)
    if path.suffix.lower() not in (".pdf", ".png", ".svg"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .pdf, .png or .svg")
    return path


def _results(options: argparse.Namespace) -> Iterator[Run]:
    task = TASKS[TASK]
    problem = task.make()
    examples = len(jax.tree.leaves(problem.examples)[0])
    steps = max(options.epochs, round(options.epochs * examples / task.batch))
    for name in dict.fromkeys(options.optimizers):
        trainer = Trainer(problem, task, CONTENDERS[name].optimizer, steps)
        for factor in SWEEP if options.sweep else (1,):
            rate = float(f"{factor * CONTENDERS[name].learning_rate:.4g}")
            yield trainer.run(TASK, name, rate, options.seed)


def _total(options):
    return len(set(options.optimizers)) * (len(SWEEP) if options.sweep else 1)


def _first_line(options):
    trainings = plural(_total(options), "training")
    return f"{trainings} of 2 to 8 seconds each. Loading Flax ..."


def _best(runs, epochs):
    """The run of each optimizer that ends with the least cost."""

    def cost(run):
        return np.nan_to_num(final_cost(run, epochs), nan=math.inf)

    # The last one of each optimizer remains.
    return {run.method: run for run in sorted(runs, key=cost, reverse=True)}


def _text(runs: Sequence[Run], options: argparse.Namespace) -> str:
    columns = ["optimizer", "bytes per parameter", "learning rate", "training cost"]
    columns += ["test accuracy", "seconds"]
    rows = [
        [
            CONTENDERS[run.method].label,
            f"{run.bytes_per_parameter:.2f}",
            f"{run.learning_rate:g}"
            + (_mark(run, runs, options.epochs) if options.sweep else ""),
            f"{final_cost(run, options.epochs):.4f}",
            f"{run.metrics[1]:.1f}%",
            f"{run.seconds:.1f}",
        ]
        for run in runs
    ]
    return table(columns, rows) + (
        "\n\nTraining cost: mean cross-entropy with dropout, in nats, over the last "
        f"{min(FINAL_PASSES, options.epochs)} of {options.epochs} passes. Bytes are "
        "those of the optimizer's state. Default learning rates were chosen for "
        f"{EPOCHS} passes. {environment()}.\n"
        f"One seed ({options.seed}) of a small problem: not a ranking. "
        "`python -m adamax_jax study` compares with\nfive seeds. What to choose: "
        "README.md, and notebooks/choosing.md.\n"
    )


def _mark(run, runs, epochs):
    """Marks the best run of an optimizer in a sweep, which may be at its edge."""
    if _best(runs, epochs)[run.method] is not run:
        return ""
    rates = [other.learning_rate for other in runs if other.method == run.method]
    at_edge = run.learning_rate in (min(rates), max(rates))
    return " best, at the edge" if at_edge else " best"


def _numbers(runs: Sequence[Run], options: argparse.Namespace) -> dict[str, Any]:
    return {
        "epochs": options.epochs,
        "seed": options.seed,
        "environment": environment(),
        "runs": [
            run.numbers()
            | {
                "costs": costs_of(run, options.epochs).tolist(),
                "final_cost": final_cost(run, options.epochs),
                "test_accuracy": run.metrics[1],
                "bytes_per_parameter": run.bytes_per_parameter,
            }
            for run in runs
        ],
    }


def _draw(runs: Sequence[Run], options: argparse.Namespace) -> None:
    """The training cost of each optimizer, at its best learning rate."""
    from matplotlib.figure import Figure

    best = _best(runs, options.epochs)
    panels = {
        title: trained
        for title, names in PANELS.items()
        if (trained := [name for name in names if name in best])
    }
    figure = Figure(figsize=(6 * len(panels), 5.6), layout="constrained")
    rows = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axes, (title, names) in zip(rows[0], panels.items(), strict=True):
        for name in names:
            _draw_run(axes, best[name], options.epochs)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("passes over the training data")
        axes.set_xlim(1, max(2, options.epochs))
        axes.grid(which="both", alpha=0.25)
        axes.legend(handlelength=3.5, fontsize="small")
    rows[0][0].set_ylabel("training cost (cross-entropy with dropout, nats)")
    figure.suptitle(
        "Multilayer perceptron with dropout, handwritten digits, one seed\nfaint: each "
        f"pass; strong: geometric mean over up to {2 * NEIGHBOURS + 1} passes",
        fontsize="small",
    )
    figure.savefig(options.figure, dpi=150)


def _draw_run(axes, run, epochs):
    label, _, _, color, style = CONTENDERS[run.method]
    costs = costs_of(run, epochs)
    passes = range(1, len(costs) + 1)
    axes.semilogy(passes, costs, color=color, alpha=0.15, linewidth=1)
    axes.semilogy(
        passes,
        _smooth(costs),
        color=color,
        linestyle=style,
        linewidth=1.8,
        # A line needs two points.
        marker="o" if len(costs) == 1 else None,
        label=f"{label.removesuffix(', two bytes')}: "
        f"{run.bytes_per_parameter:.0f} bytes, "
        f"learning rate {run.learning_rate:g}",
    )


def _smooth(costs):
    """Means over neighbouring passes, geometric because the axis is logarithmic."""
    logs = np.log(costs)
    # As many on either side, also at both ends: at the start the cost falls fast.
    return [
        math.exp(np.mean(logs[i - n : i + n + 1]))
        for i in range(len(logs))
        for n in [min(NEIGHBOURS, i, len(logs) - 1 - i)]
    ]


COMMAND = Command(
    name="demo",
    help="train Adam, AdaMax and others, in 8 to 2 bytes, and draw the figure",
    description=__doc__,
    epilog=f"default learning rates, chosen with --sweep, seed 0, {EPOCHS} passes:"
    + "".join(f"\n  {name}={c.learning_rate}" for name, c in CONTENDERS.items()),
    add_options=_add_options,
    needs=lambda options: FLAX | SKLEARN | MATPLOTLIB,
    total=_total,
    first_line=_first_line,
    results=_results,
    describe=lambda run: (
        f"{CONTENDERS[run.method].label}, learning rate {run.learning_rate:g} "
        f"({run.seconds:.0f} s)"
    ),
    text=_text,
    numbers=_numbers,
    draw=_draw,
)
