"""What an update costs, beside what one could use instead.

The update and its addition to the parameters are timed for one array of growing size
and for the arrays of real models, compiled and not, and so is compiling them. All
contenders take turns in one process, in another random order each round: a ratio is the
median over rounds of the ratios within a round. optax.adamax takes part twice: what its
second row differs from 1 is noise. One contender only reads and writes an array in
place: where arrays are larger than the caches, what it reaches is the limit for the
others.

--for DEVICES measures no times: JAX compiles for devices that are not there, and what
a step moves in their memory is read from the compiled program.
"""

import argparse
import functools
import gc
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

from adamax_jax._lab import compiled, shapes, targets
from adamax_jax._lab.cli import Command, environment, figure_path, positive_int
from adamax_jax._lab.contenders import (
    GROWTH,
    HALF,
    LEARNING_RATE,
    OPTIMIZERS,
    REFERENCE,
    SHARED,
    SHARED_NAME,
    Step,
    optax_step,
)

AGAIN = "optax.adamax, again"
WARM_UP, REPETITIONS = 3, 20
# The contender before leaves threads spinning and memory to be freed. So each takes
# steps that are not timed for so many seconds, before the one that is.
SETTLE = 0.05
SIZES = (100_000, 400_000, 1_600_000, 6_400_000, 16_000_000, 64_000_000)
TREES = {
    "transformer": shapes.transformer(),
    "ResNet-50": shapes.resnet50(),
    "1000 of 1000": shapes.many(),
}
MANY = "1000 of 1000"
# Distribution packages of the contenders that are measured where they are installed.
OPTIONAL = ("torch", "flashoptim-jax")

FLATTENED = {
    f"{name}, flattened": optax.flatten(OPTIMIZERS[name])
    for name in (REFERENCE, "adamax float32", "adamax int8/uint8")
}
Tree = dict[str, jax.Array]


def gradients_for(arrays: Mapping[str, shapes.Shape]) -> Tree:
    """Normal numbers."""
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(rng.standard_normal(shape, np.float32))
        for name, shape in arrays.items()
    }


class JaxRun:
    """A JAX optimizer at work on one tree: compiled, its buffers given back to it."""

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

    state_bytes = 0
    temporary_bytes = 0

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


def _half_run(optimizer, gradients):
    gradients = jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradients)
    return JaxRun(optimizer.init, optax_step(optimizer), gradients)


def _flash_run(gradients):
    from flashoptim_jax import (  # pyright: ignore[reportMissingImports]
        flash_adam,
    )

    optimizer = flash_adam(
        LEARNING_RATE, master_weight_bits=None, fused=jax.default_backend() == "gpu"
    )
    return JaxRun(optimizer.init, optimizer.step, gradients)


def contenders(flattened: bool) -> dict[str, Callable[[Tree], Any]]:
    """What makes the run of each contender, given the gradients."""
    makers: dict[str, Callable[[Tree], Any]] = {"copy": CopyRun}
    optimizers = (
        OPTIMIZERS | {SHARED_NAME: SHARED, AGAIN: OPTIMIZERS[REFERENCE]} | GROWTH
    )
    for name, optimizer in (optimizers | (FLATTENED if flattened else {})).items():
        makers[name] = functools.partial(JaxRun, optimizer.init, optax_step(optimizer))
    for name, optimizer in HALF.items():
        makers[name] = functools.partial(_half_run, optimizer)
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


def make_runs(gradients: Tree, flattened: bool) -> dict[str, Any]:
    """The contenders that this machine can run, and why not the others."""
    runs = {}
    for name, make in contenders(flattened).items():
        try:
            runs[name] = make(gradients)
        except Exception as error:
            if name in ("copy", REFERENCE):
                raise
            print(f"left out: {name}: {error}", file=sys.stderr)
    return runs


def take_turns(
    runs: Mapping[str, Callable[[], None]], rounds: int
) -> dict[str, list[float]]:
    """The seconds of each run in each round, all runs once a round in random order."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order = np.random.default_rng(0)
    for i in range(WARM_UP + rounds):
        for name in order.permutation(list(runs)):
            begin = start = time.perf_counter()
            while start - begin < SETTLE:
                runs[name]()
                start = time.perf_counter()
            runs[name]()
            elapsed = time.perf_counter() - start
            if i >= WARM_UP:
                seconds[name].append(elapsed)
    return seconds


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
class StepRow:
    """The time of compiled steps of one contender on one tree."""

    arrays: str
    leaves: int
    parameters: int
    contender: str
    milliseconds: Spread
    # Its time relative to that of optax.adamax in the same round.
    ratio: Spread
    state_bytes_per_parameter: float
    moved_bytes_per_parameter: float
    gigabytes_per_second: float
    # The time that moving these bytes takes at the bandwidth of the copy, by its time.
    share_of_bandwidth: float
    # Beyond the arguments and the results; None where that is not known.
    temporary_bytes_per_parameter: float | None


def step_rows(
    name: str, arrays: Mapping[str, shapes.Shape], rounds: int
) -> list[StepRow]:
    """Times the compiled steps of all contenders on one tree."""
    runs = make_runs(gradients_for(arrays), flattened=len(arrays) > 1)
    seconds = take_turns(runs, rounds)
    parameters = sum(math.prod(shape) for shape in arrays.values())
    bandwidth = [runs["copy"].moved_bytes / s for s in seconds["copy"]]
    return [
        StepRow(
            arrays=name,
            leaves=len(arrays),
            parameters=parameters,
            contender=contender,
            milliseconds=spread([1e3 * s for s in times]),
            ratio=spread(
                [s / r for s, r in zip(times, seconds[REFERENCE], strict=True)]
            ),
            state_bytes_per_parameter=run.state_bytes / parameters,
            moved_bytes_per_parameter=run.moved_bytes / parameters,
            gigabytes_per_second=statistics.median(
                run.moved_bytes / s / 1e9 for s in times
            ),
            share_of_bandwidth=statistics.median(
                run.moved_bytes / s / b for s, b in zip(times, bandwidth, strict=True)
            ),
            temporary_bytes_per_parameter=None
            if run.temporary_bytes is None
            else run.temporary_bytes / parameters,
        )
        for (contender, run), times in zip(runs.items(), seconds.values(), strict=True)
    ]


@dataclass
class CallRow:
    """A time that is not that of a compiled step, on many small arrays."""

    arrays: str
    what: str
    contender: str
    rounds: int
    milliseconds: Spread
    ratio: Spread


Row = StepRow | CallRow


def _call_rows(what, seconds):
    return [
        CallRow(
            arrays=MANY,
            what=what,
            contender=name,
            rounds=len(times),
            milliseconds=spread([1e3 * s for s in times]),
            ratio=spread(
                [s / r for s, r in zip(times, seconds[REFERENCE], strict=True)]
            ),
        )
        for name, times in seconds.items()
    ]


def uncompiled_rows(rounds: int) -> list[CallRow]:
    """Times updates outside of ``jax.jit``, without adding them to the parameters."""
    gradients = gradients_for(TREES[MANY])
    params = jax.tree.map(jnp.ones_like, gradients)

    def call(optimizer):
        state = optimizer.init(params)
        return lambda: jax.block_until_ready(optimizer.update(gradients, state, params))

    calls = {name: call(optimizer) for name, optimizer in OPTIMIZERS.items()}
    return _call_rows("update, not compiled", take_turns(calls, rounds))


def compile_rows(rounds: int) -> list[CallRow]:
    """Times tracing and lowering, and compiling, each time with empty caches."""
    gradients = jax.eval_shape(lambda: gradients_for(TREES[MANY]))
    front: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    back: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    order = np.random.default_rng(0)
    on_disk = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        for i in range(1 + rounds):
            for name in order.permutation(list(OPTIMIZERS)):
                seconds = _compile(OPTIMIZERS[name], gradients)
                if i > 0:
                    front[name].append(seconds[0])
                    back[name].append(seconds[1])
    finally:
        jax.config.update("jax_enable_compilation_cache", on_disk)
    return _call_rows("trace and lower", front) + _call_rows("compile", back)


def _compile(optimizer, gradients):
    """The seconds of tracing and lowering, and those of compiling."""
    state = jax.eval_shape(optimizer.init, gradients)
    jax.clear_caches()
    gc.collect()
    start = time.perf_counter()
    lowered = jax.jit(optax_step(optimizer)).lower(gradients, state, gradients)
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    del lowered, compiled
    return middle - start, end - middle


def markdown(rows: Sequence[Row]) -> str:
    """The tables: one for compiled steps, one for the other times."""
    steps = [row for row in rows if isinstance(row, StepRow)]
    calls = [row for row in rows if isinstance(row, CallRow)]
    tables = []
    if steps:
        lines = [
            "| arrays | optimizer | ms | time / optax.adamax "
            "| bytes moved per parameter | GB/s | of the copy's "
            "| state, bytes per parameter "
            "| temporary, bytes per parameter |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in steps:
            temporary = row.temporary_bytes_per_parameter
            lines.append(
                f"| {row.arrays} | {row.contender} | {_interval(row.milliseconds, 3)} "
                f"| {_interval(row.ratio, 2)} | {row.moved_bytes_per_parameter:.1f} "
                f"| {row.gigabytes_per_second:.1f} | {row.share_of_bandwidth:.0%} "
                f"| {row.state_bytes_per_parameter:.2f} "
                f"| {'' if temporary is None else f'{temporary:.2f}'} |"
            )
        tables.append(lines)
    if calls:
        lines = [
            "| arrays | time of | optimizer | rounds | ms | time / optax.adamax |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row.arrays} | {row.what} | {row.contender} | {row.rounds} "
            f"| {_interval(row.milliseconds, 0)} | {_interval(row.ratio, 2)} |"
            for row in calls
        ]
        tables.append(lines)
    return "\n\n".join("\n".join(lines) for lines in tables) + "\n"


def _interval(spread, digits):
    median, low, high = (f"{x:.{digits}f}" for x in spread)
    return f"{median} ({low} to {high})"


def _settings(options):
    packages = ["adamax_jax", "jax", "jaxlib", "optax", *installed()]
    flags = f"XLA_FLAGS={os.environ['XLA_FLAGS']} " if "XLA_FLAGS" in os.environ else ""
    return {
        "environment": environment(),
        "versions": {package: version(package) for package in packages},
        "cores": os.cpu_count(),
        "rounds": options.repetitions,
        "warm_up_rounds": WARM_UP,
        "max_size": options.max_size,
        "command": f"{flags}python -m adamax_jax bench --max-size {options.max_size} "
        f"--repetitions {options.repetitions}",
    }


def _caption(settings):
    """The lines under the tables."""
    versions = ", ".join(f"{k} {v}" for k, v in settings["versions"].items())
    return (
        f"Medians of {settings['rounds']} rounds after {settings['warm_up_rounds']} of "
        "warm-up (of compiling, of fewer), and from the tenth to the ninetieth "
        "percentile; parameters and gradients in float32, or bfloat16 where a row "
        "begins with it; "
        f"{settings['environment']}, {settings['cores']} cores; {versions}; "
        f"{settings['command']}.\n"
    )


def draw(rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Time and state per parameter against the size of one array."""
    import matplotlib.pyplot as plt

    by_contender: dict[str, list[StepRow]] = {}
    for row in rows:
        if isinstance(row, StepRow) and row.leaves == 1 and row.contender != AGAIN:
            by_contender.setdefault(row.contender, []).append(row)
    fig, (left, right) = plt.subplots(
        1, 2, figsize=(10, 4), constrained_layout=True, sharex=True
    )
    for i, (name, group) in enumerate(by_contender.items()):
        sizes = [row.parameters for row in group]
        per_parameter = np.array([row.milliseconds for row in group]) * 1e6
        per_parameter /= np.array(sizes)[:, None]
        look = {"color": _COLORS[i % len(_COLORS)], "marker": "osD^vP*X"[i % 8]}
        left.plot(sizes, per_parameter[:, 0], label=name, ms=4, **look)
        left.fill_between(
            sizes, *per_parameter[:, 1:].T, color=look["color"], alpha=0.15, lw=0
        )
        if name != "copy":
            state = [row.state_bytes_per_parameter for row in group]
            right.plot(sizes, state, ms=4, **look)
    left.set(xscale="log", yscale="log", xlabel="parameters", ylabel="ns per parameter")
    right.set(xscale="log", xlabel="parameters", ylabel="bytes of state per parameter")
    right.set_ylim(0, None)
    left.set_title("Time of a step")
    right.set_title("State")
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    fig.legend(loc="outside right upper", frameon=False)
    fig.suptitle(environment(), fontsize=9, color="0.4")
    fig.savefig(options.figure, dpi=150)
    plt.close(fig)


# Okabe and Ito's, which colour-blind readers can tell apart.
_COLORS = (
    "#999999",
    "#000000",
    "#E69F00",
    "#D55E00",
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#F0E442",
)


def measure(max_size: int, rounds: int) -> Iterator[Sequence[Row]]:
    """The rows of one set of measurements after another."""
    sizes = [size for size in SIZES if size < max_size] + [max_size]
    for size in sizes:
        yield step_rows(f"one of {size:,}", {"array": shapes.matrix(size)}, rounds)
    for name, arrays in TREES.items():
        if _largest(arrays) <= max_size:
            yield step_rows(name, arrays, rounds)
    if _largest(TREES[MANY]) <= max_size:
        yield uncompiled_rows(rounds)
        # Compiling takes minutes a round, and its time varies little.
        yield compile_rows(max(1, rounds // 4))


def _largest(arrays):
    return max(math.prod(shape) for shape in arrays.values())


def _add_options(parser):
    parser.add_argument(
        "--max-size",
        type=positive_int,
        default=SIZES[-1],
        metavar="N",
        help="of the largest array, in parameters (default: %(default)s)",
    )
    parser.add_argument(
        "--repetitions",
        type=positive_int,
        default=REPETITIONS,
        metavar="N",
        help="rounds of which the medians are taken (default: %(default)s)",
    )
    parser.add_argument(
        "--figure",
        type=figure_path,
        metavar="PATH",
        help="where to save the figure",
    )
    parser.add_argument(
        "--for",
        dest="targets",
        type=_target_names,
        metavar="DEVICES",
        help=f"of {','.join(targets.TARGETS)}: what a step moves there, compiled, "
        "not run",
    )


def _target_names(text):
    """The type of an option that lists devices."""
    names = text.split(",")
    for name in names:
        if name not in targets.TARGETS:
            known = ", ".join(targets.TARGETS)
            raise argparse.ArgumentTypeError(f"{name!r} is none of {known}")
    return names


def _describe(rows):
    """A set of measurements, or what was compiled."""
    return rows[0].arrays if isinstance(rows[0], Row) else rows[0].what


def _text(results, options):
    if options.targets:
        return compiled.text(_rows_of(results), options.targets)
    return f"{markdown(_rows_of(results))}\n{_caption(_settings(options))}"


def _numbers(results, options):
    settings = (
        compiled.settings(options.targets) if options.targets else _settings(options)
    )
    return settings | {"rows": [asdict(row) for row in _rows_of(results)]}


def _results(options):
    if options.targets:
        return compiled.measure(options.targets)
    return measure(options.max_size, options.repetitions)


def _needs(options):
    if options.targets:
        return targets.modules(options.targets)
    return ["matplotlib"] if options.figure else []


def _problem(options):
    if not options.targets:
        return None
    given = {
        "--figure": options.figure is not None,
        "--max-size": options.max_size != SIZES[-1],
        "--repetitions": options.repetitions != REPETITIONS,
    }
    for name in given:
        if given[name]:
            return f"{name} is for times, and --for measures none: leave one out."
    return None


def _rows_of(results):
    """The rows of all sets of measurements."""
    return [row for rows in results for row in rows]


COMMAND = Command(
    name="bench",
    help="measure what an update costs, beside other optimizers",
    description=__doc__,
    epilog="Measured where installed: " + ", ".join(OPTIONAL) + ".",
    add_options=_add_options,
    needs=_needs,
    results=_results,
    describe=_describe,
    text=_text,
    numbers=_numbers,
    draw=lambda results, options: draw(_rows_of(results), options),
    problem=_problem,
)
