"""Figure 2 of the Adam paper, redrawn with AdaMax in it.

A multilayer perceptron with dropout learns the 1797 handwritten digits that
scikit-learn ships, with AdaMax and five other optimizers.
"""

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from adamax_jax._alias import adamax
from adamax_jax._cli import (
    environment,
    is_interrupt,
    obstacle,
    positive_int,
    write_json,
)
from adamax_jax._digits import Digits, digits

BATCH = 128
HIDDEN = 256
DROPOUT = 0.5
FINAL_PASSES = 5
NEIGHBOURS = 4
SWEEP = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)


class Contender(NamedTuple):
    """An optimizer of the figure: how it is made and how it is drawn."""

    label: str
    optimizer: Callable[[float], optax.GradientTransformation]
    learning_rate: float
    color: str
    style: Any


# The learning rates are the best of `demo --sweep`. Colours: Okabe and Ito's, which
# colour-blind readers can tell apart; the line styles serve print.
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
    "adadelta": Contender("AdaDelta", optax.adadelta, 4.0, "#CC79A7", (0, (5, 3))),
    "adam": Contender("Adam", optax.adam, 0.002, "#0072B2", "--"),
    "adamax": Contender("AdaMax", adamax, 0.008, "#D55E00", "-"),
}


@dataclass
class Run:
    """One optimizer's training, as far as it got."""

    optimizer: str
    learning_rate: float
    state_bytes: int = 0
    costs: list[float] = field(default_factory=list)
    test_accuracy: float = math.nan
    seconds: float = 0.0

    @property
    def final_cost(self) -> float:
        """The training cost over the last passes, which dropout makes noisy."""
        return float(np.mean(self.costs[-FINAL_PASSES:]))


def add_parser(commands) -> None:
    """Adds the command ``demo`` to the command line."""
    parser = commands.add_parser(
        "demo",
        help="train AdaMax beside five other optimizers and draw the figure",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="default learning rates, the best of --sweep:"
        + "".join(f"\n  {name}={c.learning_rate}" for name, c in CONTENDERS.items()),
    )
    parser.add_argument(
        "--epochs",
        type=positive_int,
        default=200,
        help="passes over the data (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=_seed,
        default=0,
        help="of the weights, the order of the data and the dropout (default: 0)",
    )
    parser.add_argument(
        "--optimizers",
        nargs="+",
        metavar="NAME",
        choices=CONTENDERS,
        default=list(CONTENDERS),
        help=f"which to train, of {', '.join(CONTENDERS)} (default: all)",
    )
    parser.add_argument(
        "--learning-rate",
        action="append",
        type=_learning_rate,
        default=[],
        metavar="NAME=VALUE",
        help="another learning rate for one optimizer; may be repeated",
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="train each at 1/8 to 8 times its learning rate, in steps of 2, and draw "
        "its best",
    )
    parser.add_argument(
        "--figure",
        type=_png,
        default=Path("adamax_demo.png"),
        metavar="PATH",
        help="where to save the figure, a PNG (default: %(default)s)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="where to save all numbers"
    )
    parser.set_defaults(run=run)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number below 2^32")
    return int(text)


def _png(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png")
    return path


def _learning_rate(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if name not in CONTENDERS:
        raise argparse.ArgumentTypeError(
            f"{text!r}: NAME must be one of {', '.join(CONTENDERS)}"
        )
    try:
        rate = float(value)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: VALUE must be a number above 0")
    return name, rate


def run(options: argparse.Namespace) -> int:
    """Trains, prints the table and saves the figure; returns the exit status."""
    trouble = obstacle("demo", (options.figure, options.json))
    if trouble is not None:
        print(trouble, file=sys.stderr)
        return 1

    rates = {name: CONTENDERS[name].learning_rate for name in options.optimizers}
    for name, rate in options.learning_rate:
        if name not in rates:
            print(
                f"--learning-rate {name}={rate:g}: {name} is not trained; --optimizers "
                f"names {', '.join(rates)}.",
                file=sys.stderr,
            )
            return 2
        rates[name] = rate
    factors = SWEEP if options.sweep else (1,)
    runs = [
        Run(name, float(f"{factor * rate:.4g}"))
        for name, rate in rates.items()
        for factor in factors
    ]
    interrupted = False
    try:
        _train_all(runs, options.epochs, options.seed)
    except BaseException as error:
        if not is_interrupt(error):
            raise
        interrupted = True
    runs = [run for run in runs if run.costs]
    if runs:
        _report(runs, options)
    return 130 if interrupted else 0


def _train_all(runs: list[Run], epochs: int, seed: int) -> None:
    from tqdm import tqdm

    data = digits()
    with tqdm(total=len(runs) * epochs, unit="pass") as progress:
        for run in runs:
            label = CONTENDERS[run.optimizer].label
            progress.set_description(f"{label:<12} {run.learning_rate:g}")
            for cost in _train(run, data, epochs, seed):
                progress.set_postfix(cost=f"{cost:.4f}", refresh=False)
                progress.update()


def _train(run: Run, data: Digits, epochs: int, seed: int) -> Iterator[float]:
    """Yields the mean training cost of each pass; fills in the run as it goes."""
    from flax import nnx

    class MLP(nnx.Module):
        def __init__(self, rngs):
            self.hidden1 = nnx.Linear(64, HIDDEN, rngs=rngs)
            self.hidden2 = nnx.Linear(HIDDEN, HIDDEN, rngs=rngs)
            self.output = nnx.Linear(HIDDEN, 10, rngs=rngs)
            self.dropout = nnx.Dropout(DROPOUT, rngs=rngs)

        def __call__(self, x):
            x = self.dropout(nnx.relu(self.hidden1(x)))
            x = self.dropout(nnx.relu(self.hidden2(x)))
            return self.output(x)

    def cost(model, images, labels):
        losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
        return losses.mean()

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def train_pass(carry, batch):
        model, optimizer = carry
        value, gradients = nnx.value_and_grad(cost)(model, *batch)
        optimizer.update(model, gradients)
        return (model, optimizer), value

    start = time.perf_counter()
    model = MLP(nnx.Rngs(seed))
    transformation = CONTENDERS[run.optimizer].optimizer(run.learning_rate)
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
    state = jax.eval_shape(transformation.init, nnx.state(model, nnx.Param))
    run.state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))

    shuffle = np.random.default_rng(seed)
    batches = len(data.train_labels) // BATCH
    for _ in range(epochs):
        order = shuffle.permutation(len(data.train_labels))[: batches * BATCH]
        batch = tuple(
            x[order].reshape(batches, BATCH, *x.shape[1:])
            for x in (data.train_images, data.train_labels)
        )
        (model, optimizer), costs = train_pass((model, optimizer), batch)
        run.costs.append(float(costs.mean()))
        yield run.costs[-1]

    model.eval()
    predictions = np.argmax(model(data.test_images), axis=-1)
    run.test_accuracy = float(np.mean(predictions == data.test_labels))
    run.seconds = time.perf_counter() - start


def _report(runs: list[Run], options: argparse.Namespace) -> None:
    """Saves what was asked for, then prints it: the reader of a pipe may have left."""
    best = {}
    for run in sorted(runs, key=lambda run: run.final_cost):
        best.setdefault(run.optimizer, run)
    _draw(
        [best[name] for name in dict.fromkeys(run.optimizer for run in runs)], options
    )
    if options.json is not None:
        results = {
            "epochs": options.epochs,
            "seed": options.seed,
            "environment": environment(),
            "runs": [asdict(run) | {"final_cost": run.final_cost} for run in runs],
        }
        write_json(options.json, results)

    print()
    print(
        f"{'optimizer':<12} {'learning rate':>13} {'training cost':>13} "
        f"{'test accuracy':>13} {'state bytes':>11} {'seconds':>7}"
    )
    for run in runs:
        mark = "  best" if options.sweep and best[run.optimizer] is run else ""
        print(
            f"{CONTENDERS[run.optimizer].label:<12} {run.learning_rate:>13g} "
            f"{run.final_cost:>13.4f} {run.test_accuracy:>13.1%} "
            f"{run.state_bytes:>11,} {run.seconds:>7.1f}{mark}"
        )
    print(
        f"\nTraining cost: mean cross-entropy with dropout, in nats, over the last "
        f"{min(FINAL_PASSES, options.epochs)} of {options.epochs} passes; "
        f"seed {options.seed}; {environment()}."
    )
    print(f"Figure: {options.figure.resolve()}")
    if options.json is not None:
        print(f"Numbers: {options.json.resolve()}")


def _draw(runs: list[Run], options: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        contender = CONTENDERS[run.optimizer]
        passes = range(1, len(run.costs) + 1)
        is_adamax = run.optimizer == "adamax"
        axes.semilogy(passes, run.costs, color=contender.color, alpha=0.2, linewidth=1)
        axes.semilogy(
            passes,
            _smooth(run.costs),
            color=contender.color,
            linestyle=contender.style,
            linewidth=2.4 if is_adamax else 1.6,
            zorder=3 if is_adamax else 2,
            label=f"{contender.label}  (learning rate {run.learning_rate:g})",
        )
    axes.set_xlabel("passes over the training data")
    axes.set_ylabel("training cost (cross-entropy with dropout, nats)")
    axes.set_title(
        "Multilayer perceptron with dropout, handwritten digits\n"
        f"faint: each pass; strong: geometric mean over {2 * NEIGHBOURS + 1} passes",
        fontsize="medium",
    )
    axes.set_xlim(1, max(2, *(len(run.costs) for run in runs)))
    axes.grid(which="both", alpha=0.25)
    axes.legend(handlelength=3.5)
    figure.savefig(options.figure, format="png", dpi=150)


def _smooth(costs: list[float]) -> list[float]:
    """Means over neighbouring passes, geometric because the axis is logarithmic."""
    logs = np.log(costs)
    # At the start, where the cost falls fast, as many on either side.
    return [
        math.exp(np.mean(logs[i - n : i + n + 1]))
        for i in range(len(logs))
        for n in [min(NEIGHBOURS, i)]
    ]
