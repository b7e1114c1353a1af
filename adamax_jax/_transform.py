"""AdaMax as a gradient transformation: Kingma & Ba (2014), section 7.1."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from adamax_jax import _storage
from adamax_jax._adam import (
    Leaf,
    corrected_mean,
    is_surely_positive,
    one_minus_power,
    quotient,
    update_leaves,
)
from adamax_jax._axes import (
    SharedAxes,
    axes_between,
    axes_of,
    check_shared_axes,
    maximum,
)
from adamax_jax._checks import (
    check_decay,
    check_dtype,
    check_eps,
    check_gradients,
    check_params,
    check_ratio,
)


class ScaleByAdamaxState(NamedTuple):
    """State of AdaMax.

    m and u are stored as ``m_dtype`` and ``u_dtype`` say; :func:`moments` reads them.

    Attributes:
      count: The number of updates so far; int32 scalar.
      m: The moving average of the gradients: a tree of the parameters' structure and
        shapes. In one byte it holds m/u.
      u: The exponentially weighted infinity norm of the gradients: the same, real
        also where the parameters are complex, and of size 1 along axes that share it.
        Below 32 bits it holds u / u_scale.
      u_scale: The decay of u that is not in the stored numbers yet; float32 scalar in
        [1/2, 1], 1 where all of u has 32 bits or more.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    m: optax.Updates
    u: optax.Updates
    u_scale: jax.Array


def scale_by_adamax(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    nesterov: bool = False,
    eps_inside: bool = True,
    m_dtype: DTypeLike | None = None,
    u_dtype: DTypeLike | None = None,
    shared_axes: SharedAxes = None,
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

    Arithmetic is done in float32, or float64 where the state is; the update has the
    gradient's dtype. Complex gradients count by their modulus. A gradient of ``None``
    leaves that part of the state as it is, or counts as zero where u is stored below 32
    bits, since that decays with all the others.

    **Storage.** Rounding commutes with a maximum. So ``u`` can be stored in few bytes
    without drift: each stored number is the exact one rounded once, at any age, and the
    decay is exact, as long as u / u_scale is a normal number of the dtype. What is
    below its smallest number (above its largest) counts as that number, and where u
    was cut down, m is too: steps keep their bound, times 1.13 for what rounding may
    take off a uint8 u. Derivatives do not pass through numbers stored in one byte.

    **Sharing u.** With ``shared_axes`` one u stands for each slice S of a parameter
    along these axes,

    .. math::

      u_t \leftarrow \max(\beta_2 u_{t-1}, \max_{j \in S} |g_{t,j}| + \varepsilon),

    and being a maximum of maxima, it is the largest of the slice's element-wise u, to
    the bit. So, but for the rounding of m, no step is longer than the element-wise one,
    and the bound above holds. It keeps size 1 along these axes, and where it is left, 4
    bytes for each row of a matrix are little: with m in int8 the state has one byte per
    parameter. (float8 is too coarse there for the means of coordinates far below the
    slice's largest.) The update reads from the shapes of the state alone which axes are
    shared; ``optax.flatten`` leaves none. Where parameters are divided along a shared
    axis, the maximum is all that devices exchange; in ``jax.shard_map`` each would take
    the maximum over its own part, and Flax's partitioning metadata, which u inherits,
    cannot be met by its size of 1: divide along other axes there.

    **Not-a-number and infinity** are carried by the update in every storage. The state
    keeps them in floats, so that the coordinate stays NaN; in uint8 u becomes the
    largest code and in int8 m becomes 0, which all but stops the coordinate for some
    ten thousand steps. A shared u hands that on to its whole slice (a NaN not always
    across devices, whose exchange may drop it). To leave the state untouched by such a
    gradient, wrap the optimizer in ``optax.apply_if_finite``.

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
      m_dtype: What m is stored in: None for the parameter's own dtype, "float32",
        "bfloat16", "float16", "float64" or, in one byte and as its ratio to u, "int8",
        "float8_e4m3fn" or "float8_e5m2" (these need ``b1 < b2``, which is not checked
        for traced numbers). A ratio is cut off at 1.25 on either side of 0. In int8 its
        steps grow from 8e-5 at 0 to 1.8 % at 1, and it is rounded up or down in
        proportion to its place between them, so that small means are not lost: by a
        hash of ``count``, without random keys.
      u_dtype: What u is stored in: None for the parameter's own dtype, one of those
        floats, or "uint8": 4 codes per octave, so that u is known to a ninth of
        itself at worst, from 2.3e-10 to 1.6e9. Gradients outside of that count as its
        ends; code 0 is a coordinate without any gradient, where ``eps`` is not inside.
      shared_axes: Along which axes u is shared: None for none, an integer or a tuple of
        them (negative ones count from the last), or a function of the parameter's path
        (as of ``jax.tree_util.tree_map_with_path``) and the parameter that returns one
        of these. Parameters with fewer than two axes stay element-wise. With
        ``optax.inject_hyperparams`` pass that ``static_args="shared_axes"``. For
        Flax's kernels, (inputs, outputs), -1 has trained transformers best; the
        learning rate is then up to 4 times the element-wise one, so search from twice
        that upwards. Warm it up, since one large early gradient holds up a whole slice,
        and leave embeddings with rare rows out. In ``notebooks/04_one_byte.ipynb`` it
        was, with warm-up, as good as element-wise AdaMax, and 1 to 2 % behind Adam.

    ``b1``, ``b2`` and ``eps`` may be traced scalars, for instance those of
    ``optax.inject_hyperparams`` (with half-precision parameters pass that
    ``hyperparam_dtype=jnp.float32``: in bfloat16 ``b2=0.999`` is 1); only Python and
    NumPy numbers are range-checked.

    Returns:
      A transformation whose state is a :class:`ScaleByAdamaxState`.

    Raises:
      ValueError: If ``b1`` or ``b2`` is outside [0, 1), ``eps`` is negative or not
        finite, a dtype is not one of those above, or one byte for m meets
        ``b1 >= b2``; by ``init``, if a parameter does not have the ``shared_axes`` or
        has one twice; by ``update``, if the gradients differ from the state in tree
        structure or shape.
      TypeError: If a hyperparameter is not a number or a scalar array of at least 32
        bits, a dtype is none, or ``shared_axes`` are no integers; by ``init``, if a
        parameter is not floating-point or complex; by ``update``, if a gradient is not,
        or if it is complex where the parameter is real or the other way round.

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
    m_dtype = check_dtype("m_dtype", m_dtype, integer="int8")
    u_dtype = check_dtype("u_dtype", u_dtype, integer="uint8")
    check_ratio(b1, b2, m_dtype)
    shared_axes = check_shared_axes(shared_axes)
    rule = _Rule(nesterov, eps_inside, is_surely_positive(eps))

    def init_fn(params):
        check_params(params, m_dtype)
        return ScaleByAdamaxState(
            count=jnp.zeros([], jnp.int32),
            m=jax.tree.map(
                lambda p: jnp.zeros_like(p, dtype=_mean_dtype(p, m_dtype)), params
            ),
            u=jax.tree_util.tree_map_with_path(
                lambda path, p: _zeros_like_maximum(
                    jnp.zeros_like(p, dtype=_norm_dtype(p, u_dtype)),
                    axes_of(path, p, shared_axes),
                ),
                params,
            ),
            u_scale=jnp.ones([], jnp.float32),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        check_gradients(updates, state.m)
        count = jnp.asarray(optax.safe_increment(state.count))
        t = jnp.asarray(count, float)
        u_scale = state.u_scale
        if not all(_storage.is_wide(u.dtype) for u in jax.tree.leaves(state.u)):
            u_scale = _storage.decay_scale(u_scale, jnp.asarray(b2, u_scale.dtype))
        coefficients = _Coefficients(
            b1=b1,
            one_minus_b1=1 - b1,
            correction=1 / one_minus_power(b1, t),
            next_correction=1 / one_minus_power(b1, t + 1),
            b2=b2,
            eps=eps,
            u_scale=state.u_scale,
            next_u_scale=u_scale,
            dither=_storage.dither(count),
        )
        # Arrays: numbers would be brought to the device for every leaf anew.
        coefficients = _Coefficients(*(jnp.asarray(x, float) for x in coefficients))

        def update_leaf(g, m, u):
            if g is None:
                return Leaf(None, *_without_gradient(m, u, coefficients, rule))
            return Leaf(*_update_leaf(g, m, u, coefficients, rule))

        step, m, u = update_leaves(update_leaf, updates, state.m, state.u)
        return step, ScaleByAdamaxState(count=count, m=m, u=u, u_scale=u_scale)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _zeros_like_maximum(zeros, axes):
    """Zeros that lie on the devices as the maximum over axes does."""
    # The maximum of zeros itself would take the compiler seconds to evaluate.
    return jnp.zeros_like(maximum(zeros, axes)) if axes else zeros


class _Rule(NamedTuple):
    """What is known of the equations before they are compiled."""

    nesterov: bool
    eps_inside: bool
    eps_is_positive: bool


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
    eps: ArrayLike
    u_scale: ArrayLike
    next_u_scale: ArrayLike
    dither: ArrayLike


# Jitted here, once for all optimizers: leaves of one shape share one trace, and the
# update outside of jax.jit takes one dispatch a leaf.
@functools.partial(jax.jit, static_argnames="rule")
def _update_leaf(g, stored_m, stored_u, coefficients, rule):
    """One leaf's step in the gradient's dtype, and its new state."""
    g_dtype = jnp.result_type(g)
    real = _arithmetic_dtype(stored_m.dtype, stored_u.dtype)
    c = _Coefficients(*(jnp.asarray(x, real) for x in coefficients))
    u = _storage.decode_u(stored_u, c.u_scale).astype(real)
    m = _storage.decode_m(stored_m, u)
    is_complex = jnp.iscomplexobj(g)
    dtype = _storage.complex_dtype(real) if is_complex else real
    m, g = m.astype(dtype), jnp.asarray(g, dtype)
    # u says itself which axes share it: those along which it has size 1.
    norm = maximum(jnp.abs(g), axes_between(g.shape, u.shape))
    if is_complex:
        # The two parts share u and are otherwise independent. In real arithmetic
        # nothing is squared; a complex division by u would overflow above 1e19.
        step_re, m_re, new_u = _adamax(g.real, norm, m.real, u, c, rule)
        step_im, m_im, _ = _adamax(g.imag, norm, m.imag, u, c, rule)
        step, m, u = lax.complex(step_re, step_im), lax.complex(m_re, m_im), new_u
    else:
        step, m, u = _adamax(g, norm, m, u, c, rule)
    stored_u = _storage.encode_u(u, c.next_u_scale, stored_u.dtype)
    next_u = _storage.decode_u(stored_u, c.next_u_scale).astype(real)
    m = jnp.asarray(m)
    if _storage.saturates(stored_u.dtype) and not _storage.is_ratio(stored_m.dtype):
        share = _storage.kept_share(u, next_u)
        m = lax.complex(m.real * share, m.imag * share) if is_complex else m * share
    stored_m = _storage.encode_m(m, u, next_u, stored_m.dtype, c.dither)
    return step.astype(g_dtype), stored_m, stored_u


def _adamax(g, norm, m, u, c, rule):
    """The paper's equations on real arrays."""
    # In the order of Optax's sum, which the compiler fuses to the same bits.
    m = c.one_minus_b1 * g + c.b1 * m
    u = jnp.maximum(c.b2 * u, norm + c.eps if rule.eps_inside else norm)
    m_hat = corrected_mean(g, m, c, rule.nesterov)
    denominator = u if rule.eps_inside else u + c.eps
    return quotient(m_hat, denominator, rule.eps_is_positive), m, u


def _without_gradient(m, u, coefficients, rule):
    """The state of leaves without a gradient.

    It is kept; but a u that shares ``u_scale`` decays with it, and so that no m is left
    beside a vanishing u, the gradient then counts as zero.
    """

    def next_state(m, u):
        if _storage.is_wide(u.dtype):
            return m, u
        zero = jnp.zeros_like(m, complex if jnp.iscomplexobj(m) else float)
        return _update_leaf(zero, m, u, coefficients, rule)[1:]

    return (jax.tree.map(lambda m, u, i=i: next_state(m, u)[i], m, u) for i in range(2))


def _arithmetic_dtype(m_dtype, u_dtype):
    """float32, or float64 where m or u is stored in it."""
    is_double = {jnp.dtype(jnp.float64), jnp.dtype(jnp.complex128)} & {m_dtype, u_dtype}
    return jnp.float64 if is_double else jnp.float32


def _mean_dtype(p, m_dtype):
    """The dtype of m for a parameter: complex where the parameter is."""
    own = jnp.result_type(p)
    if m_dtype is None:
        return own
    is_complex = jnp.issubdtype(own, jnp.complexfloating)
    return _storage.complex_dtype(m_dtype) if is_complex else m_dtype


def _norm_dtype(p, u_dtype):
    """The dtype of u for a parameter: real also where the parameter is complex."""
    return jnp.finfo(jnp.result_type(p)).dtype if u_dtype is None else u_dtype
