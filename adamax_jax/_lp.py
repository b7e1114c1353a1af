"""From Adam to AdaMax: the L^p family of Kingma & Ba (2014), section 7.1."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from adamax_jax._adam import (
    Leaf,
    corrected_mean,
    divide,
    is_surely_positive,
    one_minus_power,
    quotient,
    update_leaves,
)
from adamax_jax._checks import (
    check_decay,
    check_eps,
    check_gradients,
    check_order,
    check_params,
)
from adamax_jax._storage import complex_dtype

# In the place of infinity, where a power of the ratio 1 would be undefined; in float32
# what it gives is the same, and its product with any count is finite.
_LARGEST = 1e28
# Whole powers up to this one are taken by products, in half the time of exp and log.
_LARGEST_PRODUCT = 64


class ScaleByLpAdamState(NamedTuple):
    """State of the L^p family.

    Attributes:
      count: The number of updates so far; int32 scalar.
      m: The moving average of the gradients: a tree of the parameters' structure,
        shapes and dtypes (float32 for those of 8 bits).
      u: The exponentially weighted L^p mean of the gradients: the same, but real also
        where the parameters are complex, and in float32 at least.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    m: optax.Updates
    u: optax.Updates


def scale_by_lp_adam(
    p: ArrayLike,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    nesterov: bool = False,
    eps_inside: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales gradients by momentum divided by a decayed L^p norm.

    With :math:`g_t` the gradient at step :math:`t = 1, 2, \dots` and
    :math:`m_0 = u_0 = 0`, element by element,

    .. math::

      \begin{align*}
        m_t &\leftarrow \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        w_t &\leftarrow \frac{1 - \beta_2^p}{1 - \beta_2^{pt}} \\
        u_t &\leftarrow \left( (1 - w_t)\, u_{t-1}^p
          + w_t\, |g_t|^p \right)^{1/p} \\
        \text{update}_t &\leftarrow \frac{m_t / (1 - \beta_1^t)}{u_t + \varepsilon}
      \end{align*}

    where :math:`\beta_1, \beta_2, \varepsilon` are ``b1``, ``b2`` and ``eps``. With
    p = 2 it is Adam, whose own :math:`\beta_2` is the square of this one:
    ``optax.adam(b2=0.999)`` is ``b2=0.999**0.5`` here. With p = infinity it is AdaMax.

    The paper keeps :math:`v_t = \beta_2^p v_{t-1} + (1 - \beta_2^p) |g_t|^p`, whose
    :math:`v_t / (1 - \beta_2^{pt})` is :math:`u_t^p` here. It overflows, or vanishes,
    for large p: the family was called unstable. Kept is u here, and the larger of the
    two terms taken out of the sum,

    .. math::

      u_t \leftarrow h \exp\left( \tfrac{1}{p} \log(1 + (l / h)^p) \right), \qquad
      l, h = \text{the smaller, the larger of } (1 - w_t)^{1/p} u_{t-1},\;
      w_t^{1/p} |g_t|,

    so that no power exceeds 1: it is stable for every p. In float32 and at the default
    ``b2``, a u of finite p is within 1e-5 of the exact one (relative), and within 1e-4
    where gradients hardly change for thousands of steps. As the weights add up to 1, it
    needs no correction, and remains a mean of the gradients where p or ``b2`` changes
    on the way.

    While p and the decay rates are constant and :math:`\beta_1 < \beta_2`, no update
    without Nesterov momentum exceeds, by Hölder's inequality with q the conjugate of p,

    .. math::

      \frac{1 - \beta_1}{(1 - \beta_2^p)^{1/p} (1 - (\beta_1 / \beta_2)^q)^{1/q}},
      \qquad \tfrac{1}{p} + \tfrac{1}{q} = 1,

    which is approached: at the default rates 100 for p = 1, 5.15 for 2, 2.51 for 3,
    1.24 for 8, 1.0017 for 64 and 1.0091 for infinity (7.27 for ``optax.adam``).

    Arithmetic is done in float32, or float64 where the state is; the update has the
    gradient's dtype. Complex gradients count by their modulus. A gradient of ``None``
    leaves that part of the state as it is. Unlike AdaMax's, a u of finite p is an
    average, which drifts if it is rounded at every step: it is stored in float32 at
    least, also where the parameters have fewer bits. m has the parameters' dtype; in
    bfloat16 it does not follow slow changes where ``b1`` is above about 0.9.

    Args:
      p: The order of the norm, at least 1; ``jnp.inf`` for AdaMax.
      b1: Decay rate of the mean of the gradients, in [0, 1).
      b2: Decay rate of the norm of the gradients, in [0, 1).
      eps: Floor of the denominator, in the gradient's unit; at least 0. With ``eps=0``
        0/0 is 0: a coordinate that never saw a gradient does not move.
      nesterov: Whether to look one step ahead in the mean, as
        ``optax.adam(nesterov=True)`` does.
      eps_inside: Whether ``eps`` is added to :math:`|g_t|`, as :func:`scale_by_adamax`
        does by default, or to the denominator as above, as Adam does.

    ``p``, ``b1``, ``b2`` and ``eps`` may be traced scalars, for instance those of
    ``optax.inject_hyperparams`` (with half-precision parameters pass that
    ``hyperparam_dtype=jnp.float32``); only Python and NumPy numbers are range-checked.
    So p can be scheduled; from Adam to AdaMax by its inverse, as in
    ``p=lambda count: 2 / jnp.maximum(1 - count / 1000, 0)``.

    Returns:
      A transformation whose state is a :class:`ScaleByLpAdamState`.

    Raises:
      ValueError: If ``p`` is below 1, ``b1`` or ``b2`` is outside [0, 1), or ``eps`` is
        negative or not finite; by ``update``, if the gradients differ from the state in
        tree structure or shape.
      TypeError: If a hyperparameter is not a number or a scalar array of at least 32
        bits; by ``init``, if a parameter is not floating-point or complex; by
        ``update``, if a gradient is not, or if it is complex where the parameter is
        real or the other way round.

    Examples:
      >>> import jax.numpy as jnp
      >>> from adamax_jax import scale_by_lp_adam
      >>> transformation = scale_by_lp_adam(p=3)
      >>> state = transformation.init(jnp.zeros(2))
      >>> for scale in (1.0, 0.1):
      ...     gradient = scale * jnp.array([4.0, -0.001])
      ...     update, state = transformation.update(gradient, state)
      >>> [round(float(x), 4) for x in update]
      [0.6632, -0.6632]

    References:
      Kingma and Ba, `Adam: A Method for Stochastic Optimization
      <https://arxiv.org/abs/1412.6980>`_, 2014. Daley and Amato, `Investigating
      Alternatives to the Root Mean Square for Adaptive Gradient Methods
      <https://arxiv.org/abs/2106.05449>`_, 2021, on p other than 2.
    """
    p = check_order("p", p)
    b1 = check_decay("b1", b1)
    b2 = check_decay("b2", b2)
    eps = check_eps("eps", eps)
    is_maximum = isinstance(p, float) and math.isinf(p)
    # Added to the gradient, eps has a weight that may flush it to 0.
    is_floor = is_maximum or not eps_inside
    rule = _Rule(
        nesterov=nesterov,
        eps_inside=eps_inside,
        eps_is_positive=is_floor and is_surely_positive(eps),
        is_maximum=is_maximum,
        whole_p=_whole(p),
    )

    def init_fn(params):
        check_params(params, None)
        return ScaleByLpAdamState(
            count=jnp.zeros([], jnp.int32),
            m=jax.tree.map(lambda x: jnp.zeros_like(x, dtype=_mean_dtype(x)), params),
            u=jax.tree.map(lambda x: jnp.zeros_like(x, dtype=_norm_dtype(x)), params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        check_gradients(updates, state.m)
        count = jnp.asarray(optax.safe_increment(state.count))
        t = jnp.asarray(count, float)
        order = min(p, _LARGEST) if isinstance(p, float) else p
        order = jnp.minimum(jnp.asarray(order, float), _LARGEST)
        w = one_minus_power(b2, order) / one_minus_power(b2, order * t)
        # 1 - w is b2^p times 1 - w b2^(p (t - 1)), which comes to 1 in time. It is 0 at
        # the first step; but u is, too, and the root of 0 has no derivative.
        past = jnp.maximum(t - 1, 1)
        growth = jnp.log1p(-w * (1 - one_minus_power(b2, order * past))) / order
        rate = jnp.asarray(b2, float)
        coefficients = _Coefficients(
            p=order,
            b1=b1,
            one_minus_b1=1 - b1,
            correction=1 / one_minus_power(b1, t),
            next_correction=1 / one_minus_power(b1, t + 1),
            # (1 - w)^(1/p), 1 minus it to all digits, and w^(1/p): b2, 1 - b2 and 1
            # where p is infinity.
            decay=rate * jnp.exp(growth),
            loss=jnp.asarray(1 - b2, float) - rate * jnp.expm1(growth),
            weight=jnp.exp(jnp.log(w) / order),
            eps=eps,
        )
        coefficients = _Coefficients(*(jnp.asarray(x, float) for x in coefficients))

        def update_leaf(g, m, u):
            if g is None:
                return Leaf(None, m, u)
            return Leaf(*_update_leaf(g, m, u, coefficients, rule))

        step, m, u = update_leaves(update_leaf, updates, state.m, state.u)
        return step, ScaleByLpAdamState(count, m, u)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Rule(NamedTuple):
    """What is known of the equations before they are compiled."""

    nesterov: bool
    eps_inside: bool
    eps_is_positive: bool
    is_maximum: bool
    # None where it is not a small whole number, or not known.
    whole_p: int | None


class _Coefficients(NamedTuple):
    """The scalars of one step, the same for every leaf."""

    p: ArrayLike
    b1: ArrayLike
    one_minus_b1: ArrayLike
    correction: ArrayLike
    next_correction: ArrayLike
    decay: ArrayLike
    loss: ArrayLike
    weight: ArrayLike
    eps: ArrayLike


@functools.partial(jax.jit, static_argnames="rule")
def _update_leaf(g, stored_m, u, coefficients, rule):
    """One leaf's step in the gradient's dtype, and its new state."""
    g_dtype = jnp.result_type(g)
    real = u.dtype
    c = _Coefficients(*(jnp.asarray(x, real) for x in coefficients))
    is_complex = jnp.iscomplexobj(g)
    dtype = complex_dtype(real) if is_complex else real
    m, g = stored_m.astype(dtype), jnp.asarray(g, dtype)
    u = _norm(u, jnp.abs(g), c, rule)
    if is_complex:
        step_re, m_re = _lp_adam(g.real, m.real, u, c, rule)
        step_im, m_im = _lp_adam(g.imag, m.imag, u, c, rule)
        step, m = lax.complex(step_re, step_im), lax.complex(m_re, m_im)
    else:
        step, m = _lp_adam(g, m, u, c, rule)
    if stored_m.dtype.itemsize < 4:
        largest = float(jnp.finfo(stored_m.dtype).max)
        m = jnp.where(jnp.isinf(m), m, jnp.clip(m, -largest, largest))
    return step.astype(g_dtype), m.astype(stored_m.dtype), u


def _norm(u, norm, c, rule):
    """((1 - w) u^p + w |g|^p)^(1/p), no power of which exceeds 1."""
    if rule.eps_inside:
        norm = norm + c.eps
    old, new = c.decay * u, c.weight * norm
    maximum = jnp.maximum(old, new)
    if rule.is_maximum:
        return maximum
    is_old = new <= old
    high, low = jnp.where(is_old, old, new), jnp.where(is_old, new, old)
    ratio = divide(low, jnp.where(high == 0, 1, high))
    gain = jnp.expm1(jnp.log1p(_power(ratio, c.p, rule)) / c.p)
    # An average changes by little at a step and remembers an error of it for long: the
    # change is added to u, instead of multiplying by a number close to 1.
    is_close = is_old & (c.decay > 0.5)
    base = jnp.where(is_close, u, high)
    change = jnp.where(is_close, c.decay * gain - c.loss, gain)
    return jnp.where(c.p < _LARGEST, base + base * change, maximum)


def _power(x, p, rule):
    """x^p for x in [0, 1]."""
    if rule.whole_p is not None:
        return x**rule.whole_p
    # A logarithm of 0 has no derivative, and one of the smallest number no second one.
    floor = float(jnp.finfo(x.dtype).tiny) ** 0.5
    return jnp.exp(p * jnp.log(jnp.maximum(x, floor)))


def _lp_adam(g, m, u, c, rule):
    """The step and the mean of real arrays."""
    m = c.one_minus_b1 * g + c.b1 * m
    m_hat = corrected_mean(g, m, c, rule.nesterov)
    denominator = u if rule.eps_inside else u + c.eps
    return quotient(m_hat, denominator, rule.eps_is_positive), m


def _whole(p):
    is_small = isinstance(p, float) and p <= _LARGEST_PRODUCT
    return int(p) if is_small and p.is_integer() else None


def _mean_dtype(x):
    """The dtype of m for a parameter: its own, of 16 bits at least."""
    dtype = jnp.result_type(x)
    return dtype if dtype.itemsize >= 2 else jnp.float32


def _norm_dtype(x):
    """The dtype of u for a parameter: real, float32 at least."""
    dtype = jnp.finfo(jnp.result_type(x)).dtype
    return dtype if dtype.itemsize >= 4 else jnp.float32
