"""What a step costs, beside what one could use instead.

A compiled step is the update and its addition to the parameters. It is timed on one
array of growing size, on a transformer's 100 arrays, and on 100 small arrays. On the
small arrays the update without jit, tracing, and compiling are timed as well.

Each optimizer takes turns with optax.adamax, in random order. A ratio is the median
over rounds of the ratios within a round. The row of optax.adamax shows the noise. The
row "copy" reads and writes an array in place: where arrays are larger than the caches,
its GB/s are the limit for the others.

Time and memory: TIME. Both grow with --max-size.

--for DEVICES measures no times. JAX compiles for devices that are not there, and what a
step moves in their memory is read from the compiled program.
"""

import argparse
import functools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adamax_jax._lab import compiled, shapes
from adamax_jax._lab.command import (
    MATPLOTLIB,
    Command,
    add_figure,
    environment,
    positive_int,
    table,
)
from adamax_jax._lab.contenders import (
    HALF,
    LEARNING_RATE,
    OPTIMIZERS,
    REFERENCE,
    Step,
    optax_step,
)

WARM_UP, REPETITIONS = 1, 10
# The contender before leaves threads spinning and memory to be freed. So each takes
# steps that are not timed for so many seconds, before the one that is.
SETTLE = 0.01
SIZES = (100_000, 1_600_000, 16_000_000)
MANY = "100 arrays of 1000"
TREES = {"a transformer's 100 arrays": shapes.transformer(), MANY: shapes.many()}
# Distribution packages of the contenders that are measured where they are installed.
OPTIONAL = ("torch", "flashoptim-jax")

TIME = "about four minutes and 2 GB on two cores"
# What is timed; tracing and compiling with empty caches.
STEP, EAGER = "compiled step", "update without jit"
TRACE, COMPILE = "trace and lower", "compile"
# The contenders of all but steps: compiling takes a minute a round for all.
CALLED = (
    REFERENCE,
    "optax.adam",
    "adamax float32",
    "adamax bfloat16/bfloat16",
    "adamax int8/uint8",
    "adam float32",
    "adam int8/uint8",
)

Tree = dict[str, jax.Array]


def gradients_for(arrays: Mapping[str, shapes.Shape]) -> Tree:
    """Gradients from a normal distribution."""
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(rng.standard_normal(shape, np.float32))
        for name, shape in arrays.items()
    }


class JaxRun:
    """A JAX optimizer at work on one tree: compiled, its buffers donated to it."""

    def __init__(self, init: Callable[[Any], Any], step: Step, gradients: Tree):
        self._gradients = gradients
        self._params = jax.tree.map(jnp.ones_like, gradients)
        self._state = init(self._params)
        jitted = jax.jit(step, donate_argnums=(0, 1))
        self._step = jitted.lower(self._params, self._state, gradients).compile()
        self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(self._state))
        analysis = self._step.memory_analysis()
        self.temporary_bytes = analysis.temp_size_in_bytes if analysis else None
        # Read the gradient; read and write the parameter and the state.
        parameter_bytes = sum(x.nbytes for x in jax.tree.leaves(gradients))
        self.moved_bytes = 3 * parameter_bytes + 2 * self.state_bytes

    def __call__(self) -> None:
        """Takes a step and waits for it."""
        self._params, self._state = self._step(
            self._params, self._state, self._gradients
        )
        jax.block_until_ready((self._params, self._state))


class CopyRun:
    """Reads and writes as many numbers as there are parameters, in place."""

    state_bytes = temporary_bytes = 0

    def __init__(self, gradients: Tree):
        size = sum(x.size for x in jax.tree.leaves(gradients))
        self._array = jnp.ones(size, jnp.float32)
        self._negate = jax.jit(jnp.negative, donate_argnums=0)
        self.moved_bytes = 2 * self._array.nbytes

    def __call__(self) -> None:
        """Negates the array and waits for it."""
        self._array = self._negate(self._array).block_until_ready()


class TorchRun:
    """``torch.optim.Adamax``, its arrays handled together (foreach)."""

    temporary_bytes = None

    def __init__(self, gradients: Tree):
        import torch  # pyright: ignore[reportMissingImports]

        self._cuda = torch.cuda if jax.default_backend() == "gpu" else None
        device = "cuda" if self._cuda else "cpu"
        params = []
        for g in gradients.values():
            param = torch.nn.Parameter(torch.ones(g.shape, device=device))
            param.grad = torch.tensor(np.asarray(g), device=device)
            params.append(param)
        self._optimizer = torch.optim.Adamax(params, LEARNING_RATE, foreach=True)
        self()
        self.state_bytes = sum(
            x.nbytes for s in self._optimizer.state.values() for x in s.values()
        )
        self.moved_bytes = 3 * sum(p.nbytes for p in params) + 2 * self.state_bytes

    def __call__(self) -> None:
        """Takes a step and waits for it."""
        self._optimizer.step()
        if self._cuda:
            self._cuda.synchronize()


def _optax_run(optimizer, gradients):
    return JaxRun(optimizer.init, optax_step(optimizer), gradients)


def _half_run(optimizer, gradients):
    gradients = jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradients)
    return _optax_run(optimizer, gradients)


def _flash_run(gradients):
    from flashoptim_jax import (  # pyright: ignore[reportMissingImports]
        flash_adam,
    )

    optimizer = flash_adam(
        LEARNING_RATE, master_weight_bits=None, fused=jax.default_backend() == "gpu"
    )
    return JaxRun(optimizer.init, optimizer.step, gradients)


def contenders() -> dict[str, Callable[[Tree], Any]]:
    """The rows: what makes the run of each contender, given the gradients.

    A new optimizer is added to ``contenders.py``.
    """
    makers: dict[str, Callable[[Tree], Any]] = {"copy": CopyRun}
    for name, optimizer in OPTIMIZERS.items():
        makers[name] = functools.partial(_optax_run, optimizer)
    for name, optimizer in HALF.items():
        makers[name] = functools.partial(_half_run, optimizer)
    flattened = optax.flatten(OPTIMIZERS["adamax float32"])
    makers["adamax float32, flattened"] = functools.partial(_optax_run, flattened)
    if "torch" in installed():
        makers["torch Adamax"] = TorchRun
    if "flashoptim-jax" in installed():
        # Its kernels are for GPUs.
        fused = "fused" if jax.default_backend() == "gpu" else "not fused"
        makers[f"flashoptim-jax Adam, 8 bits, {fused}"] = _flash_run
    return makers


def installed() -> list[str]:
    """The optional contenders' packages that are there."""
    return [name for name in OPTIONAL if _is_installed(name)]


def _is_installed(package):
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


# Takes a measurement and returns its seconds.
Measure = Callable[[], float]


def take_turns(
    measure: Measure, reference: Measure, rounds: int
) -> list[tuple[float, float]]:
    """The seconds of both in each round, in random order within a round."""
    order = np.random.default_rng(0)
    pairs = []
    for i in range(WARM_UP + rounds):
        if order.random() < 0.5:
            seconds = measure()
            pair = seconds, reference()
        else:
            seconds = reference()
            pair = measure(), seconds
        if i >= WARM_UP:
            pairs.append(pair)
    return pairs


def settled(call: Callable[[], Any]) -> Measure:
    """Measures a call, after calls that are not timed."""

    def measure():
        begin = start = time.perf_counter()
        while start - begin < SETTLE:
            call()
            start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return measure


class Spread(NamedTuple):
    """A median, and the tenth and the ninetieth percentile."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """The median and the percentiles of some values."""
    low, high = np.percentile(values, [10, 90])
    return Spread(statistics.median(values), float(low), float(high))


@dataclass
class Row:
    """A time of one contender on one tree; bytes are those of a step."""

    time_of: str
    arrays: str
    leaves: int
    parameters: int
    contender: str
    milliseconds: Spread
    # Its time relative to that of optax.adamax in the same round.
    ratio: Spread
    # The rest is of compiled steps alone, and None where it is not known.
    state_bytes_per_parameter: float | None = None
    moved_bytes_per_parameter: float | None = None
    temporary_bytes_per_parameter: float | None = None


def _row(time_of, name, arrays, contender, pairs, run=None):
    parameters = sum(map(math.prod, arrays.values()))
    per_parameter = {
        f"{kind}_bytes_per_parameter": size / parameters
        for kind in ("state", "moved", "temporary")
        if run and (size := getattr(run, f"{kind}_bytes")) is not None
    }
    return Row(
        time_of=time_of,
        arrays=name,
        leaves=len(arrays),
        parameters=parameters,
        contender=contender,
        milliseconds=spread([1e3 * seconds for seconds, _ in pairs]),
        ratio=spread([seconds / reference for seconds, reference in pairs]),
        **per_parameter,
    )


def step_rows(
    name: str, arrays: Mapping[str, shapes.Shape], rounds: int
) -> Iterator[Row]:
    """Times compiled steps; each contender is freed before the next is made."""
    gradients = gradients_for(arrays)
    makers = contenders()
    reference = settled(makers[REFERENCE](gradients))
    for contender, make in makers.items():
        try:
            run = make(gradients)
            pairs = take_turns(settled(run), reference, rounds)
        except Exception as error:
            print(f"left out: {contender}: {error}", file=sys.stderr)
            continue
        yield _row(STEP, name, arrays, contender, pairs, run)
        del run
        jax.clear_caches()


def call_rows(
    name: str, arrays: Mapping[str, shapes.Shape], rounds: int
) -> Iterator[Row]:
    """Times updates without jit, tracing and lowering, and compiling.

    The last two take long and vary little: they have a quarter of the rounds.
    """
    gradients = gradients_for(arrays)
    few = max(1, rounds // 4)
    for time_of, measure, turns in (
        (EAGER, _eager, rounds),
        (TRACE, functools.partial(_compile, end=TRACE), few),
        (COMPILE, functools.partial(_compile, end=COMPILE), few),
    ):
        reference = measure(OPTIMIZERS[REFERENCE], gradients)
        for contender in CALLED:
            own = measure(OPTIMIZERS[contender], gradients)
            pairs = take_turns(own, reference, turns)
            yield _row(time_of, name, arrays, contender, pairs)


def _eager(optimizer, gradients):
    params = jax.tree.map(jnp.ones_like, gradients)
    state = optimizer.init(params)
    return settled(
        lambda: jax.block_until_ready(optimizer.update(gradients, state, params))
    )


def _compile(optimizer, gradients, end):
    state = jax.eval_shape(optimizer.init, gradients)

    def measure():
        jax.clear_caches()
        start = time.perf_counter()
        lowered = jax.jit(optax_step(optimizer)).lower(gradients, state, gradients)
        if end == TRACE:
            return time.perf_counter() - start
        start = time.perf_counter()
        lowered.compile()
        return time.perf_counter() - start

    def without_files():
        on_disk = jax.config.jax_enable_compilation_cache
        jax.config.update("jax_enable_compilation_cache", False)
        try:
            return measure()
        finally:
            jax.config.update("jax_enable_compilation_cache", on_disk)

    return without_files


def _stages(options):
    """The stages of a run: a function of a name, arrays and rounds, with the first two.

    --max-size leaves out the trees with a larger array.
    """
    largest = options.max_size or SIZES[-1]
    sizes = [size for size in SIZES if size < largest] + [largest]
    one = {f"one array of {size:,}": {"array": shapes.matrix(size)} for size in sizes}
    trees = {
        name: arrays
        for name, arrays in TREES.items()
        if max(map(math.prod, arrays.values())) <= largest
    }
    stages = [(step_rows, name, arrays) for name, arrays in (one | trees).items()]
    if MANY in trees:
        stages.append((call_rows, MANY, trees[MANY]))
    return stages


def _results(options):
    for rows, name, arrays in _stages(options):
        yield from rows(name, arrays, options.repetitions or REPETITIONS)


def _total(options):
    """How many rows there will be, if no contender is left out."""
    kinds = {step_rows: len(contenders()), call_rows: 3 * len(CALLED)}
    return sum(kinds[rows] for rows, _, _ in _stages(options))


def _text(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """A table of compiled steps, and one of the other times."""
    columns = ["arrays", "optimizer", "ms", "time / optax.adamax"]
    columns += ["bytes moved per parameter", "GB/s", "state, bytes per parameter"]
    columns += ["temporary, bytes per parameter"]
    steps = [
        [
            row.arrays,
            row.contender,
            _interval(row.milliseconds),
            _interval(row.ratio),
            f"{row.moved_bytes_per_parameter:.1f}",
            f"{_gigabytes_per_second(row):.1f}",
            f"{row.state_bytes_per_parameter:.2f}",
            "" if temporary is None else f"{temporary:.2f}",
        ]
        for row in rows
        if row.time_of == STEP
        for temporary in [row.temporary_bytes_per_parameter]
    ]
    calls = [
        [
            row.arrays,
            row.time_of,
            row.contender,
            _interval(row.milliseconds),
            _interval(row.ratio),
        ]
        for row in rows
        if row.time_of != STEP
    ]
    tables = [table(columns, steps)]
    if calls:
        columns = ["arrays", "time of", "optimizer", "ms", "time / optax.adamax"]
        tables.append(table(columns, calls))
    return "\n\n".join([*tables, _caption(_settings(options))])


def _gigabytes_per_second(row):
    return (
        row.moved_bytes_per_parameter * row.parameters / row.milliseconds.median / 1e6
    )


def _interval(spread):
    median, low, high = (f"{x:.2f}" for x in spread)
    return f"{median} ({low} to {high})"


def _settings(options):
    packages = ["adamax_jax", "jax", "jaxlib", "optax", *installed()]
    given = {"max-size": options.max_size, "repetitions": options.repetitions}
    given = [f" --{name} {value}" for name, value in given.items() if value]
    return {
        "environment": environment(),
        "versions": {package: version(package) for package in packages},
        "cores": os.cpu_count(),
        "rounds": options.repetitions or REPETITIONS,
        "warm_up_rounds": WARM_UP,
        "command": f"python -m adamax_jax bench{''.join(given)}",
    }


def _caption(settings):
    versions = ", ".join(f"{k} {v}" for k, v in settings["versions"].items())
    return (
        f"Medians of {settings['rounds']} rounds after {settings['warm_up_rounds']} of "
        "warm-up (of tracing and compiling, of a quarter), and from the tenth to the "
        "ninetieth percentile; parameters and gradients in float32, or bfloat16 where "
        "a row begins with it; "
        f"{settings['environment']}, {settings['cores']} cores; {versions}; "
        f"{settings['command']}.\n"
    )


# The contenders of the figure. Okabe and Ito's colours, which colour-blind readers can
# tell apart.
COLORS = {
    REFERENCE: "#000000",
    "optax.adam": "#0072B2",
    "adamax float32": "#D55E00",
    "adamax int8/uint8": "#E69F00",
    "adam int8/uint8": "#009E73",
}


def _draw(rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Times relative to optax.adamax, a line for each optimizer; and bytes of state."""
    from matplotlib.figure import Figure

    steps = [r for r in rows if r.time_of == STEP and r.contender in COLORS]
    names = list(dict.fromkeys(row.arrays for row in steps))
    figure = Figure(figsize=(10, 1.5 + 0.9 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    for i, (contender, color) in enumerate(COLORS.items()):
        group = [row for row in steps if row.contender == contender]
        if not group:
            continue
        # Side by side, so that no contender hides another.
        places = [names.index(row.arrays) + 0.14 * (i - 2) for row in group]
        median, low, high = np.array([row.ratio for row in group]).T
        left.errorbar(
            median,
            places,
            xerr=(median - low, high - median),
            fmt="o",
            color=color,
        )
        state = group[0].state_bytes_per_parameter
        right.barh(contender, state, color=color)
        right.text(state, contender, f" {state:.0f}", va="center")
    left.axvline(1, color="0.7", lw=1, zorder=0)
    left.set_yticks(range(len(names)), names)
    left.set_xlim(0, None)
    left.set_xlabel("time of a step, relative to optax.adamax")
    right.set_xlabel("bytes of state\nper parameter")
    right.set_xlim(0, 10)
    for axes in (left, right):
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_caption(_settings(options)), fontsize=7, color="0.4", wrap=True)
    figure.savefig(options.figure, dpi=150)


def _add_options(parser):
    parser.add_argument(
        "--max-size",
        type=positive_int,
        metavar="N",
        help=f"of the largest array, in parameters (default: {SIZES[-1]})",
    )
    parser.add_argument(
        "--repetitions",
        type=positive_int,
        metavar="N",
        help=f"rounds of which the medians are taken (default: {REPETITIONS})",
    )
    add_figure(parser)
    parser.add_argument(
        "--for",
        dest="targets",
        type=_target_names,
        metavar="DEVICES",
        help=f"of {','.join(compiled.TARGETS)}: what a step moves there, compiled, "
        "not run",
    )


def _target_names(text):
    """The type of an option that lists devices."""
    names = text.split(",")
    for name in names:
        if name not in compiled.TARGETS:
            known = ", ".join(compiled.TARGETS)
            raise argparse.ArgumentTypeError(f"{name!r} is none of {known}")
    return names


COMMAND = Command(
    name="bench",
    help="measure what an update costs, beside other optimizers",
    description=(__doc__ or "").replace("TIME", TIME),
    epilog="Measured where installed: " + ", ".join(OPTIONAL) + ".",
    add_options=_add_options,
    first_line=lambda options: (
        f"{_total(options)} rows, {TIME} at the default sizes. Making arrays ..."
    ),
    needs=lambda options: MATPLOTLIB if options.figure else {},
    total=_total,
    results=_results,
    describe=lambda row: f"{row.arrays}, {row.time_of}, {row.contender}",
    text=_text,
    numbers=lambda rows, options: (
        _settings(options) | {"rows": [asdict(row) for row in rows]}
    ),
    draw=_draw,
    variant=lambda options: compiled.COMMAND if options.targets else None,
)
