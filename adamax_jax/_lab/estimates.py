"""Means over seeds, and how sure they are."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


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


def show(mean: float, spread: float, digits: int, sign: str = "") -> str:
    """A mean with what is to stand behind ±, if there is something."""
    shown = f"{mean:{sign}z.{digits}f}"
    return shown if math.isnan(spread) else f"{shown} ± {spread:.{digits}f}"
