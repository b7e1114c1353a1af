"""AdaMax as a gradient transformation: Kingma & Ba (2014), section 7.1."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from adamax_jax._checks import check_decay, check_eps, check_gradients, check_params


class ScaleByAdamaxState(NamedTuple):
    """State of AdaMax.

    Attributes:
      count: The number of updates so far; int32 scalar.
      m: The moving average of the gradients: a tree of the parameters' structure and
        shapes, of their dtype or float32, whichever is wider.
      u: The exponentially weighted infinity norm of the gradients: the same, real
        also where the parameters are complex.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    m: optax.Updates
    u: optax.Updates


def scale_by_adamax(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    nesterov: bool = False,
    eps_inside: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales gradients by AdaMax: momentum divided by a decayed maximum.

    With :math:`g_t` the gradient at step :math:`t = 1, 2, \dots` and
    :math:`m_0 = u_0 = 0`, element by element,

    .. math::

      \begin{align*}
        m_t &\leftarrow \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        u_t &\leftarrow \max(\beta_2 u_{t-1}, |g_t| + \varepsilon) \\
        \text{update}_t &\leftarrow \frac{m_t}{(1 - \beta_1^t)\, u_t}
      \end{align*}

    where :math:`\beta_1, \beta_2, \varepsilon` are ``b1``, ``b2`` and ``eps``. An
    update is a pure number: it has no unit, and for :math:`\beta_1 < \beta_2` never
    exceeds in magnitude

    .. math::

      \frac{1 - \beta_1}{1 - \beta_1^t}
      \cdot \frac{1 - (\beta_1 / \beta_2)^t}{1 - \beta_1 / \beta_2}
      \le \frac{1 - \beta_1}{1 - \beta_1 / \beta_2},

    which is 1 at the first step and tends to 1.0091 at the defaults (the bound holds
    for ``nesterov=False``). The update points uphill; :func:`adamax` turns it around
    and multiplies it by a learning rate.

    Arithmetic is done and state is stored in the parameter's dtype or float32,
    whichever is wider; the update has the gradient's dtype. Complex gradients count
    by their modulus. A gradient of ``None`` leaves that part of the state as it is.

    Args:
      b1: Decay rate of the mean of the gradients, in [0, 1).
      b2: Decay rate of the maximum of the gradients, in [0, 1).
      eps: Floor of the denominator, in the gradient's unit; at least 0. With ``eps=0``
        the rule is the paper's, and 0/0 is 0: a coordinate that never saw a gradient
        does not move.
      nesterov: Whether to look one step ahead in the mean (NadaMax), as
        ``optax.adam(nesterov=True)`` does.
      eps_inside: Whether ``eps`` is added inside the maximum, as above and in Optax
        and PyTorch, or to the denominator, :math:`m_t / ((1-\beta_1^t)(u_t +
        \varepsilon))` with :math:`u_t = \max(\beta_2 u_{t-1}, |g_t|)`, as in Keras,
        TensorFlow and MLX.

    ``b1``, ``b2`` and ``eps`` may be traced scalars, for instance those of
    ``optax.inject_hyperparams`` (with half-precision parameters pass that
    ``hyperparam_dtype=jnp.float32``: in bfloat16 ``b2=0.999`` is 1); only Python and
    NumPy numbers are range-checked.

    Returns:
      A transformation whose state is a :class:`ScaleByAdamaxState`.

    Raises:
      ValueError: If ``b1`` or ``b2`` is outside [0, 1), or ``eps`` is negative or not
        finite; by ``update``, if the gradients differ from the state in tree structure
        or shape.
      TypeError: If a hyperparameter is not a number; by ``init``, if a parameter is
        not floating-point or complex; by ``update``, if a gradient is not, or if it is
        complex where the parameter is real or the other way round.

    Examples:
      >>> import jax.numpy as jnp
      >>> from adamax_jax import scale_by_adamax
      >>> transformation = scale_by_adamax()
      >>> state = transformation.init(jnp.zeros(3))
      >>> gradient = jnp.array([4.0, -0.001, 0.0])
      >>> update, state = transformation.update(gradient, state)
      >>> [round(float(x), 4) for x in update]
      [1.0, -1.0, 0.0]

    References:
      Kingma and Ba, `Adam: A Method for Stochastic Optimization
      <https://arxiv.org/abs/1412.6980>`_, 2014. Nesterov: Dozat, `Incorporating
      Nesterov Momentum into Adam <https://openreview.net/pdf?id=OM0jvwB8jIp57ZJjtNEZ>`_,
      2016.
    """
    b1 = check_decay("b1", b1)
    b2 = check_decay("b2", b2)
    eps = check_eps("eps", eps)

    def init_fn(params):
        check_params(params)
        return ScaleByAdamaxState(
            count=jnp.zeros([], jnp.int32),
            m=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=_wide(p)), params),
            u=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=_real(_wide(p))), params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        check_gradients(updates, state.m)
        count = jnp.asarray(optax.safe_increment(state.count))
        t = jnp.asarray(count, float)
        coefficients = _Coefficients(
            b1=b1,
            one_minus_b1=1 - b1,
            correction=1 / _one_minus_power(b1, t),
            next_correction=1 / _one_minus_power(b1, t + 1),
            b2=b2,
            eps_in_maximum=eps if eps_inside else 0.0,
            eps_in_denominator=0.0 if eps_inside else eps,
        )

        def update_leaf(g, m, u):
            if g is None:
                return _Leaf(None, m, u)
            return _Leaf(*_update_leaf(g, m, u, coefficients, nesterov=nesterov))

        leaves = jax.tree.map(
            update_leaf, updates, state.m, state.u, is_leaf=lambda g: g is None
        )

        def pick(field):
            return jax.tree.map(
                lambda leaf: getattr(leaf, field),
                leaves,
                is_leaf=lambda x: isinstance(x, _Leaf),
            )

        return pick("step"), ScaleByAdamaxState(count=count, m=pick("m"), u=pick("u"))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Leaf(NamedTuple):
    step: jax.Array | None
    m: jax.Array
    u: jax.Array


class _Coefficients(NamedTuple):
    """The scalars of one step, the same for every leaf."""

    b1: ArrayLike
    # Not left to the leaves: 1 - 0.9 in float32 is off by 2e-7, in Python by 1e-17.
    one_minus_b1: ArrayLike
    # 1 / (1 - b1^t). The compiler would replace a division by one scalar by this
    # product anyway, but not in leaves of a single element, whose bits would differ.
    correction: ArrayLike
    next_correction: ArrayLike
    b2: ArrayLike
    eps_in_maximum: ArrayLike
    eps_in_denominator: ArrayLike


# Jitted here, once for all optimizers: leaves of one shape share one trace, and the
# update outside of jax.jit takes one dispatch a leaf.
@functools.partial(jax.jit, static_argnames="nesterov")
def _update_leaf(g, m, u, coefficients, *, nesterov):
    """One leaf's step in the gradient's dtype, and its new state."""
    g_dtype = jnp.result_type(g)
    g = jnp.asarray(g, m.dtype)
    c = _Coefficients(*(jnp.asarray(x, u.dtype) for x in coefficients))
    norm = jnp.abs(g)
    if jnp.iscomplexobj(g):
        # The two parts share u and are otherwise independent. In real arithmetic
        # nothing is squared; a complex division by u would overflow above 1e19.
        real, m_real, new_u = _adamax(g.real, norm, m.real, u, c, nesterov)
        imag, m_imag, _ = _adamax(g.imag, norm, m.imag, u, c, nesterov)
        step, m, u = lax.complex(real, imag), lax.complex(m_real, m_imag), new_u
    else:
        step, m, u = _adamax(g, norm, m, u, c, nesterov)
    return step.astype(g_dtype), m, u


def _adamax(g, norm, m, u, c, nesterov):
    """The paper's equations on real arrays."""
    # In the order of Optax's sum, which the compiler fuses to the same bits.
    m = c.one_minus_b1 * g + c.b1 * m
    u = jnp.maximum(c.b2 * u, norm + c.eps_in_maximum)
    if nesterov:
        m_hat = c.b1 * c.next_correction * m + c.one_minus_b1 * c.correction * g
    else:
        m_hat = c.correction * m
    denominator = u + c.eps_in_denominator
    # 0/0 is 0; the inner where keeps the derivative of the untaken branch finite.
    # Compared with ==, a NaN goes on to the update instead of being hidden.
    is_zero = denominator == 0
    step = jnp.where(is_zero, 0, m_hat / jnp.where(is_zero, 1, denominator))
    return step, m, u


def _one_minus_power(b, t):
    """1 - b^t, exact to rounding also for b close to 1: -expm1(t log b)."""
    if isinstance(b, float):
        return -jnp.expm1(t * math.log(b)) if b > 0 else jnp.ones_like(t)
    b = jnp.asarray(b, float)
    is_zero = b == 0
    # b - 1 is exact for b >= 1/2; below, b^t is too small to need it exact. The inner
    # where keeps the derivative at b = 0, which is that of b^t, from becoming NaN.
    log_b = jnp.log1p(jnp.where(is_zero, 1, b) - 1)
    return jnp.where(is_zero, 1 - b**t, -jnp.expm1(t * log_b))


def _wide(leaf):
    """The leaf's dtype, or float32 where that is wider."""
    dtype = jnp.result_type(leaf)
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else dtype


def _real(dtype):
    """The dtype of the modulus: float32 for complex64, float64 for complex128."""
    return jnp.finfo(dtype).dtype
