"""What a step costs, beside what one could use instead.

A compiled step is the update and its addition to the parameters. It is timed on one
array of growing size, on a transformer's 100 arrays, and on 100 small arrays. On the
small arrays the update without jit, tracing, and compiling are timed as well.

Each optimizer takes turns with optax.adamax, in random order. A ratio is the median
over rounds of the ratios within a round. The row of optax.adamax shows the noise.

Time and memory: TIME. Both grow with --max-size.

--for DEVICES measures no times. JAX compiles for devices that are not there, and what a
step moves in their memory is read from the compiled program.
"""

import argparse
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adamax_jax._lab import compiled, shapes
from adamax_jax._lab.command import (
    Command,
    environment,
    is_installed,
    plural,
    positive_int,
    table,
    versions,
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
# Each contender first takes steps that are not timed, for so many seconds: the one
# before leaves threads spinning and memory to be freed.
SETTLE = 0.01
SIZES = (100_000, 1_600_000, 16_000_000)
MANY = "100 arrays of 1000"
TREES = {"a transformer's 100 arrays": shapes.transformer(), MANY: shapes.many()}
# Contenders that are measured on CPUs, if installed: modules and their packages.
OPTIONAL = {"torch": "torch", "flashoptim_jax": "flashoptim-jax"}

TIME = "about five minutes and 2 GB on two cores"
# What is timed; tracing and compiling with empty caches.
STEP, EAGER = "compiled step", "update without jit"
TRACE, COMPILE = "trace and lower", "compile"
CALL_TIMES = (EAGER, TRACE, COMPILE)
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

    def __call__(self) -> None:
        """Takes a step and waits for it."""
        self._params, self._state = self._step(
            self._params, self._state, self._gradients
        )
        jax.block_until_ready((self._params, self._state))


class TorchRun:
    """``torch.optim.Adamax`` on a CPU, its arrays handled together (foreach)."""

    temporary_bytes = None

    def __init__(self, gradients: Tree):
        import torch  # pyright: ignore[reportMissingImports]

        params = []
        for g in gradients.values():
            param = torch.nn.Parameter(torch.ones(g.shape))
            param.grad = torch.tensor(np.asarray(g))
            params.append(param)
        self._optimizer = torch.optim.Adamax(params, LEARNING_RATE, foreach=True)
        self()
        self.state_bytes = sum(
            x.nbytes for s in self._optimizer.state.values() for x in s.values()
        )

    def __call__(self) -> None:
        """Takes a step."""
        self._optimizer.step()


def _optax_run(optimizer, gradients, dtype=jnp.float32):
    gradients = jax.tree.map(lambda g: g.astype(dtype), gradients)
    return JaxRun(optimizer.init, optax_step(optimizer), gradients)


def _flash_run(gradients):
    import flashoptim_jax as flash  # pyright: ignore[reportMissingImports]

    # Its fused kernels are for GPUs.
    optimizer = flash.flash_adam(LEARNING_RATE, master_weight_bits=None, fused=False)
    return JaxRun(optimizer.init, optimizer.step, gradients)


def contenders() -> dict[str, Callable[[Tree], Any]]:
    """The rows: what makes the run of each contender, given the gradients.

    A new optimizer is added to ``contenders.py``.
    """
    flattened = optax.flatten(OPTIMIZERS["adamax float32"])
    in_float32 = OPTIMIZERS | {"adamax float32, flattened": flattened}
    makers: dict[str, Callable[[Tree], Any]] = {}
    for name, optimizer in in_float32.items():
        makers[name] = functools.partial(_optax_run, optimizer)
    for name, optimizer in HALF.items():
        makers[name] = functools.partial(_optax_run, optimizer, dtype=jnp.bfloat16)
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu and is_installed("torch"):
        makers["torch Adamax"] = TorchRun
    if on_cpu and is_installed("flashoptim_jax"):
        makers["flashoptim-jax Adam, 8 bits, not fused"] = _flash_run
    return makers


# Takes a measurement and returns its seconds.
Measure = Callable[[], float]


def take_turns(
    measure: Measure, reference: Measure, rounds: int
) -> list[tuple[float, float]]:
    """The seconds of both in each round, in random order within a round."""
    order = np.random.default_rng(0)
    pairs = []
    for _ in range(WARM_UP + rounds):
        is_first = order.random() < 0.5
        before = None if is_first else reference()
        seconds = measure()
        pairs.append((seconds, reference() if before is None else before))
    return pairs[WARM_UP:]


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


# The median, and the tenth and the ninetieth percentile.
Spread = tuple[float, float, float]


@dataclass
class Row:
    """A time of one contender on one tree."""

    time_of: str
    arrays: str
    parameters: int
    contender: str
    milliseconds: Spread
    # Its time relative to that of optax.adamax in the same round.
    ratio: Spread
    # Of compiled steps alone, and None where they are not known.
    state_bytes: int | None
    temporary_bytes: int | None


def _row(time_of, name, arrays, contender, pairs, run=None):
    return Row(
        time_of=time_of,
        arrays=name,
        parameters=sum(map(math.prod, arrays.values())),
        contender=contender,
        milliseconds=_spread([1e3 * seconds for seconds, _ in pairs]),
        ratio=_spread([seconds / reference for seconds, reference in pairs]),
        state_bytes=run and run.state_bytes,
        temporary_bytes=run and run.temporary_bytes,
    )


def _spread(values):
    median, low, high = np.percentile(values, [50, 10, 90])
    return float(median), float(low), float(high)


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
    for time_of in CALL_TIMES:
        turns = rounds if time_of == EAGER else max(1, rounds // 4)
        reference = _call(time_of, OPTIMIZERS[REFERENCE], gradients)
        for contender in CALLED:
            own = _call(time_of, OPTIMIZERS[contender], gradients)
            pairs = take_turns(own, reference, turns)
            yield _row(time_of, name, arrays, contender, pairs)


def _call(time_of, optimizer, gradients):
    """What takes one of the times CALL_TIMES: without jit, to trace, or to compile."""
    state = optimizer.init(gradients)
    if time_of == EAGER:
        return settled(
            lambda: jax.block_until_ready(optimizer.update(gradients, state, gradients))
        )

    def measure():
        jax.clear_caches()
        start = time.perf_counter()
        lowered = jax.jit(optax_step(optimizer)).lower(gradients, state, gradients)
        if time_of == COMPILE:
            start = time.perf_counter()
            lowered.compile()
        return time.perf_counter() - start

    return measure


def _trees(options):
    """The trees by their names, but those with an array larger than --max-size."""
    largest = options.max_size or SIZES[-1]
    one = {
        f"one array of {size:,}": {"array": _matrix(size)}
        for size in sorted({*SIZES, largest})
    }
    return {
        name: arrays
        for name, arrays in (one | TREES).items()
        if max(map(math.prod, arrays.values())) <= largest
    }


def _matrix(size):
    """The shape of one array, in rows of 1000 where they divide it."""
    return (size // 1000, 1000) if size % 1000 == 0 else (size,)


def _results(options):
    rounds = options.repetitions or REPETITIONS
    # Or compiling would read files of an earlier run.
    on_disk = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        trees = _trees(options)
        for name, arrays in trees.items():
            yield from step_rows(name, arrays, rounds)
        if MANY in trees:
            yield from call_rows(MANY, trees[MANY], rounds)
    finally:
        jax.config.update("jax_enable_compilation_cache", on_disk)


def _total(options):
    """How many rows there will be, if no contender is left out."""
    trees = _trees(options)
    calls = len(CALL_TIMES) * len(CALLED) if MANY in trees else 0
    return len(trees) * len(contenders()) + calls


def _text(rows: Sequence[Row], options: argparse.Namespace) -> str:
    columns = ["arrays", "time of", "optimizer", "ms", "time / optax.adamax"]
    columns += [f"{x}, bytes per parameter" for x in ("state", "temporary")]
    lines = []
    for row in rows:
        line = [row.arrays, row.time_of, row.contender]
        for median, low, high in (row.milliseconds, row.ratio):
            line.append(f"{median:.2f} ({low:.2f} to {high:.2f})")
        for size in (row.state_bytes, row.temporary_bytes):
            line.append("" if size is None else f"{size / row.parameters:.2f}")
        lines.append(line)
    settings = _settings(options)
    listed = ", ".join(f"{k} {v}" for k, v in settings["versions"].items())
    return table(columns, lines) + (
        f"\n\nMedians of {plural(settings['rounds'], 'round')} after {WARM_UP} of "
        "warm-up (of tracing and compiling, of a quarter), and from the tenth to the "
        "ninetieth percentile; parameters and gradients in float32, or bfloat16 where "
        f"a row begins with it; {settings['environment']}, {settings['cores']} cores; "
        f"{listed}; {settings['command']}.\n"
    )


def _settings(options):
    given = {"max-size": options.max_size, "repetitions": options.repetitions}
    given = [f" --{name} {value}" for name, value in given.items() if value]
    return {
        "environment": environment(),
        "versions": versions(
            "adamax_jax", "jax", "jaxlib", "optax", *OPTIONAL.values()
        ),
        "cores": os.cpu_count(),
        "rounds": options.repetitions or REPETITIONS,
        "command": f"python -m adamax_jax bench{''.join(given)}",
    }


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
    epilog="Measured on CPUs, if installed: " + ", ".join(OPTIONAL.values()) + ".",
    add_options=_add_options,
    first_line=lambda options: (
        f"{_total(options)} rows, {TIME} at the default sizes. Making arrays ..."
    ),
    total=_total,
    results=_results,
    describe=lambda row: f"{row.arrays}, {row.time_of}, {row.contender}",
    text=_text,
    numbers=lambda rows, options: (
        _settings(options) | {"rows": [asdict(row) for row in rows]}
    ),
    variant=lambda options: compiled.COMMAND if options.targets else None,
)
