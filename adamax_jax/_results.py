"""Statistics of trainings, and the files that studies save."""

import argparse
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from adamax_jax._cli import environment, write_json
from adamax_jax._tasks import Task

CURVE_POINTS = 200


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


def digits_to_show(values: Iterable[Estimate]) -> int:
    """As many decimals as show two digits of the typical deviation.

    One table column has one format; a training that diverged does not set it.
    """
    scales = [value.deviation for value in values if 0 < value.deviation < math.inf]
    if not scales:
        return 4
    return min(8, max(1, 1 - math.floor(math.log10(statistics.median_low(scales)))))


def settings_of(
    tasks: Mapping[str, Task], options: argparse.Namespace
) -> dict[str, Any]:
    """What the numbers come from."""
    return {
        "environment": environment(),
        "versions": {
            package: version(package)
            for package in ("adamax_jax", "jax", "optax", "flax", "scikit-learn")
        },
        "seeds": options.seeds,
        "tasks": {
            name: {
                "metrics": task.metrics,
                "learning_rate": task.learning_rate,
                "schedule": "cosine" if task.cosine else "constant",
                "warm_up": task.warm_up,
                "steps": options.steps or task.steps,
                "batch": task.batch,
            }
            for name, task in tasks.items()
        },
    }


def save(
    text: str,
    settings: Mapping[str, Any],
    rows: Sequence[Any],
    runs: Sequence[Any],
    options: argparse.Namespace,
) -> None:
    """Writes the tables and all numbers, where the options say."""
    if options.markdown is not None:
        options.markdown.write_text(text, encoding="utf-8")
    if options.json is not None:
        results = {
            **settings,
            "table": [asdict(row) for row in rows],
            "runs": [with_curve(run) for run in runs],
        }
        write_json(options.json, results)


def with_curve(run: Any) -> dict[str, Any]:
    """A run for JSON, its losses few: means over ``curve_every`` steps each."""
    result = asdict(run)
    losses = result.pop("losses")
    every = math.ceil(len(losses) / CURVE_POINTS)
    parts = np.split(losses, range(every, len(losses), every))
    curve = [float(f"{part.mean():.5g}") for part in parts]
    return result | {"curve_every": every, "curve": curve}
