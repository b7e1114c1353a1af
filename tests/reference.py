"""AdaMax in NumPy float64, line for line from the paper (arXiv 1412.6980, section 7.1).

Slow and plain on purpose: the optimizer is tested against this.
"""

from typing import NamedTuple

import numpy as np


class Step(NamedTuple):
    m: np.ndarray
    u: np.ndarray
    update: np.ndarray


def adamax(
    gradients,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    eps_inside=True,
    nesterov=False,
    max_growth=None,
):
    """Yields m_t, u_t and the update for each gradient of a sequence."""
    m = np.zeros(np.shape(gradients[0]), np.result_type(gradients[0], np.float64))
    u = np.zeros(np.shape(gradients[0]))
    for t, g in enumerate(gradients, start=1):
        g = np.asarray(g, m.dtype)
        norm = np.abs(g) + (eps if eps_inside else 0)
        if max_growth is not None:
            # A u that has seen no gradient takes any.
            norm = np.where(u > 2 * eps, np.minimum(norm, max_growth * u), norm)
        u = np.maximum(b2 * u, norm)
        if max_growth is not None:
            is_beyond = np.abs(g) > u
            g = np.where(is_beyond, g * (u / np.where(is_beyond, np.abs(g), 1)), g)
        m = b1 * m + (1 - b1) * g
        denominator = u if eps_inside else u + eps
        m_hat = m / (1 - b1**t)
        if nesterov:
            m_hat = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        # 0/0 is 0: a coordinate that never saw a gradient does not move.
        update = np.divide(
            m_hat, denominator, out=np.zeros_like(m), where=denominator > 0
        )
        yield Step(m, u, update)
