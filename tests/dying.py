"""Means of gradients that die down: in float64, and what rounding may add to them."""

import functools
from typing import NamedTuple

import numpy as np

# Of int8: 16 codes to each octave of the ratio plus this.
KNEE_OF_INT8 = 1.375 / 256
# How far apart the numbers of another narrow m are, relative to it and at least.
EPS_OF_M = {"bfloat16": (2**-7, 0.0)}
DECAYS = np.float32([0.0, 0.9, 0.99, 0.997])


def spacing(ratio, m_dtype):
    """How far apart numbers of an m are where it is this share of u."""
    ratio = np.abs(ratio)
    if m_dtype == "int8":
        return 2.0 ** np.floor(np.log2(ratio + KNEE_OF_INT8)) / 16
    relative, least = EPS_OF_M[m_dtype]
    return np.maximum(relative * ratio, least)


@functools.cache
def dying_gradients(steps=20_000):
    """Spikes, rare ones, noise after 1, what fades, and what ends: columns in pairs."""
    rng = np.random.default_rng(0)
    t = np.arange(steps)[:, None]
    spikes = np.where(t < 1, [1e-3, 1.0], 0.0)
    rare = np.where(rng.random([steps, 2]) < 0.002, [1.0, 1e-3], 0.0)
    fallen = np.where(t < 1000, 1.0, 1e-4 * rng.standard_normal([steps, 2]))
    fading = np.maximum(np.array([0.99, 0.997]) ** t, 1e-30)
    ended = np.where(t < [50, 1000], 1.0, 0.0)
    return np.hstack([spikes, rare, fallen, fading, ended]).astype(np.float32)


class Exact(NamedTuple):
    """In float64, for every decay of m: ratios m/u, and what a rounding does to them.

    ``kept[t]`` is the share of m_(t-1)/u_(t-1) in m_t/u_t, ``correction[t]`` that of
    m_t/u_t in a step.
    """

    ratio: np.ndarray
    kept: np.ndarray
    correction: np.ndarray


@functools.cache
def exact_mean():
    """Of AdaMax."""
    u, norms = 0.0, []
    for g_t in np.abs(dying_gradients(), dtype=np.float64):
        u = np.maximum(np.float64(np.float32(0.999)) * u, g_t + 1e-8)
        norms.append(u)
    return exact_mean_beside(norms, eps=0.0)


def exact_mean_beside(norms, eps):
    """Of the mean of dying gradients beside these u, and an eps that is added."""
    g, b1 = dying_gradients(), DECAYS[:, None].astype(np.float64)
    m, before = np.zeros((len(b1), g.shape[1])), np.zeros(g.shape[1])
    rows = []
    for t, (g_t, u) in enumerate(zip(g.astype(np.float64), norms, strict=True), 1):
        m = b1 * m + (1 - b1) * g_t
        # Before the first gradient nothing is kept.
        whole = np.where(u == 0, 1, u)
        rows.append((m / whole, b1 * (before / whole), u / (u + eps) / (1 - b1**t)))
        before = u
    return Exact(*(np.array(x) for x in zip(*rows, strict=True)))


def noise_of_rounding(exact, m_dtype):
    """The standard deviations of the travel and of the last step, if unbiased.

    A rounding is in the step at which it is made, and in what is kept of it after that.
    """
    ratio, kept, correction = exact
    h = spacing(ratio, m_dtype)
    # Of a number at a share p between its neighbours: p (1 - p) h^2.
    variance = np.minimum(h**2 / 4, np.abs(ratio) * h)
    travel = weight = last = np.zeros(ratio.shape[1:])
    for t in reversed(range(len(ratio))):
        weight = correction[t] + weight
        travel = travel + weight**2 * variance[t]
        weight = kept[t] * weight
    for t in range(len(ratio)):
        last = kept[t] ** 2 * last + variance[t]
    return np.sqrt(travel), correction[-1] * np.sqrt(last)
