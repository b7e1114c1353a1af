"""AdaMax as a gradient transformation: Kingma & Ba (2014), section 7.1."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from adamax_jax._checks import (
    check_decay,
    check_dtype,
    check_eps,
    check_gradients,
    check_growth,
    check_is_available,
    check_params,
    check_ratio,
    check_rounding,
    check_state,
    check_stored,
)
from adamax_jax._formats import MEANS, NORMS, default_dtype, next_scale
from adamax_jax._learning_rate import decayed_weights, descend
from adamax_jax._numerics import cast, dtype_like, number
from adamax_jax._shared_axes import (
    SharedAxes,
    check_shared_axes,
    shape_beside,
    zeros_shared,
)
from adamax_jax._trees import dtypes_beside, update_leaves, zeros_beside
from adamax_jax._update import (
    Rule,
    Scalars,
    dither_of,
    is_surely_positive,
    mean_scalars,
    scalar_dtype,
    update_leaf,
)
from adamax_jax._xla import larger


class ScaleByAdamaxState(NamedTuple):
    """State of AdaMax.

    m and u are stored as ``m_dtype`` and ``u_dtype`` say; :func:`moments` reads them.

    Attributes:
      count: The number of updates so far; int32 scalar.
      m: The moving average of the gradients: a tree with the parameters' structure and
        shapes, None where a parameter has no gradients. In int8 it holds m/u, which
        must not be averaged over several states (:doc:`checkpoints`).
      u: The exponentially weighted infinity norm of the gradients: a tree like m. It is
        real where parameters are complex, and has size 1 along shared axes. Below 32
        bits it holds ``u / u_scale``.
      u_scale: The part of u's decay that is not in the stored u; float32 scalar in
        [1, 2). It is 1 if no u is stored below 32 bits.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    m: optax.Updates
    u: optax.Updates
    u_scale: jax.Array


# Pickles refer to this module, even if the class moves to another file.
ScaleByAdamaxState.__module__ = "adamax_jax"


def scale_by_adamax(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    nesterov: bool = False,
    eps_inside: bool = True,
    max_growth: ArrayLike | None = None,
    m_dtype: DTypeLike | None = None,
    u_dtype: DTypeLike | None = None,
    shared_axes: SharedAxes = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales gradients by AdaMax: momentum divided by a decayed maximum.

    Elementwise, with :math:`g_t` the gradient at step t >= 1 and :math:`m_0 = u_0 = 0`:

    .. math::

      m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
      u_t &= \max(\beta_2 u_{t-1}, |g_t| + \varepsilon) \\
      \mathrm{update}_t &= m_t / ((1 - \beta_1^t) u_t)

    With ``max_growth`` = k, where :math:`u_{t-1} > 2 \varepsilon`:

    .. math::

      u_t &= \max(\beta_2 u_{t-1}, \min(|g_t| + \varepsilon, k u_{t-1})) \\
      m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \min(1, u_t / |g_t|)

    The update has the sign of m and no unit; :func:`adamax` multiplies it by
    ``-learning_rate``. For ``b1 < b2`` and without Nesterov momentum its magnitude is
    at most ``(1 - b1) / (1 - b1 / b2)``, 1.0091 at the defaults. ``max_growth`` clips
    at most a fraction s of the gradients, ``s ln k = (1 - s)(-ln b2)``: at ``b2=0.99``
    9.5 % for k = 1.1, 1.4 % for k = 2. It biases the mean of skewed gradients: of
    exponential noise by 0.10 and 0.03 of its deviation; rarer events count for nothing.

    Below 32 bits u does not drift and m is rounded without bias. More on storage,
    dtypes, complex gradients and None: :doc:`how_it_works`; NaN and infinity:
    :doc:`faults`.

    Args:
      b1: Decay rate of m, in [0, 1).
      b2: Decay rate of u, in [0, 1). 0.98 is recommended (:doc:`07_memory`).
      eps: Floor of the denominator, in the gradient's unit, at least 0. With ``eps=0``,
        0/0 is 0: a coordinate whose gradients were all 0 does not move.
      nesterov: Whether to use Nesterov momentum (NadaMax), as in ``optax.adam``.
      eps_inside: True adds ``eps`` to ``|g|`` inside the maximum, as in Optax and
        PyTorch; False adds it to u in the denominator, as in Keras, TensorFlow and MLX.
      max_growth: Max factor by which u grows in one step, above 1 (also in float32); m
        sees gradients clipped to u. None for no bound, as in the paper and in Optax.
      m_dtype: What m is stored in: None for the parameter's dtype (bfloat16 if that has
        fewer than 32 bits), "float64", "float32", "bfloat16", or "int8" (as m/u,
        clipped to 1.3 in magnitude; needs ``b1 < b2``, not checked if they are traced).
      u_dtype: What u is stored in: None as for m, "float64", "float32", "bfloat16", or
        "uint8" (4 codes per octave from 4.7e-10 to 3.2e9, relative error at most 1/9).
      shared_axes: Axes along which one u is shared, in parameters with two axes or
        more: None, an integer, a tuple, or a function of the parameter's path and the
        parameter that returns one of these.

    Returns:
      A transformation whose state is a :class:`ScaleByAdamaxState`. Updates have the
      gradients' shapes and dtypes, or the dtypes of parameters that have more bits.

    Raises:
      ValueError: If a hyperparameter (not a traced one) is out of range or a dtype is
        not listed above; by ``init``, if a parameter lacks a shared axis, a decay rate
        rounds to 1, or float64 is not enabled; by ``update``, if structures or shapes
        of gradients and state differ, or u is not shared along ``shared_axes``.
      TypeError: If an argument has a wrong type or a hyperparameter fewer than 32 bits;
        by ``init``, if a parameter is no array, or m cannot be stored for its dtype; by
        ``update``, if a gradient is an integer, or complex where the parameter is real
        or vice versa, if they are None, or if the state has another type or dtypes.

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
      <https://arxiv.org/abs/1412.6980>`_, 2014. Dozat, `Incorporating Nesterov Momentum
      into Adam <https://openreview.net/pdf?id=OM0jvwB8jIp57ZJjtNEZ>`_, 2016.
    """
    b1 = check_decay("b1", b1)
    b2 = check_decay("b2", b2)
    eps = check_eps("eps", eps)
    max_growth = check_growth("max_growth", max_growth)
    m_dtype = check_dtype("m_dtype", m_dtype, MEANS)
    u_dtype = check_dtype("u_dtype", u_dtype, NORMS)
    check_ratio(b1, b2, m_dtype)
    shared_axes = check_shared_axes(shared_axes)
    rule = Rule(nesterov, eps_inside, is_surely_positive(eps), _next_u)

    def init_fn(params):
        check_params(params, m_dtype)
        check_is_available("m_dtype", m_dtype)
        check_is_available("u_dtype", u_dtype)
        check_rounding({"b1": b1, "b2": b2}, params, m_dtype, u_dtype)
        return ScaleByAdamaxState(
            count=jnp.zeros([], jnp.int32),
            m=zeros_beside(
                lambda _, p: jnp.zeros_like(p, dtype=m_dtype_of(p, m_dtype)), params
            ),
            u=zeros_beside(
                lambda path, p: zeros_shared(
                    path, p, _u_dtype(p, u_dtype), shared_axes
                ),
                params,
            ),
            u_scale=jnp.ones([], jnp.float32),
        )

    def as_at_init(path, m, u, p_dtype):
        return (
            m_dtype_of(p_dtype or m.dtype, m_dtype),
            _u_dtype(p_dtype or u.dtype, u_dtype),
            shape_beside(path, m, u, shared_axes),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_state(state, ScaleByAdamaxState)
        dtypes = dtypes_beside(params, state.m)
        check_stored(state, as_at_init, dtypes)
        check_gradients(updates, state.m)
        count = jnp.asarray(optax.safe_increment(state.count))
        dtype = scalar_dtype(updates, state.m, state.u)
        next_u_scale, halving = state.u_scale, 1.0
        is_scaled = any(NORMS[u.dtype.name].is_scaled for u in jax.tree.leaves(state.u))
        if is_scaled:
            next_u_scale, halving = next_scale(
                state.u_scale, number(b2, state.u_scale.dtype)
            )
        c = Scalars(
            **mean_scalars(b1, jnp.asarray(count, dtype)),
            eps=eps,
            dither=dither_of(count),
            decay=b2,
            max_growth=max_growth,
            u_scale=state.u_scale,
            next_u_scale=next_u_scale,
            halving=halving,
        )
        # Cast once: Python numbers would be transferred for every leaf.
        c = cast(c, dtype)
        step, m, u = update_leaves(
            lambda g, m, u, dtype: update_leaf(g, m, u, c, rule, dtype),
            updates,
            state.m,
            state.u,
            dtypes,
            decays_by_scale=is_scaled,
        )
        return step, ScaleByAdamaxState(count, m, u, next_u_scale)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def adamax(
    learning_rate: optax.ScalarOrSchedule = 2e-3,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    nesterov: bool = False,
    eps_inside: bool = True,
    max_growth: ArrayLike | None = None,
    m_dtype: DTypeLike | None = None,
    u_dtype: DTypeLike | None = None,
    shared_axes: SharedAxes = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaMax: Adam with the infinity norm in place of the second moment.

    With :math:`g_t` the gradient, :math:`\theta_t` the parameter and :math:`\alpha` the
    learning rate, elementwise:

    .. math::

      m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
      u_t &= \max(\beta_2 u_{t-1}, |g_t| + \varepsilon) \\
      \theta_t &= \theta_{t-1} - \alpha m_t / ((1 - \beta_1^t) u_t)

    The positional arguments are those of ``optax.adamax``. ``b1``, ``b2``, ``eps`` and
    ``max_growth`` may be traced scalars, as in ``optax.inject_hyperparams`` (pass it
    ``static_args="shared_axes"``, and ``hyperparam_dtype=jnp.float32`` if parameters
    have half precision). :func:`scale_by_adamax` has the equations with ``max_growth``.

    Args:
      learning_rate: A number, a scalar array, or a schedule (a function of the count of
        updates, which starts at 0). No step is longer by more than 0.91 %, in the
        parameter's unit, at the default decay rates and with m and u in 32 bits.
      b1: Decay rate of m, in [0, 1).
      b2: Decay rate of u, in [0, 1). 0.98 is recommended, but not for embeddings with
        rare rows (:doc:`07_memory`).
      eps: Floor of the denominator, in the gradient's unit, at least 0. With ``eps=0``,
        0/0 is 0: a coordinate whose gradients were all 0 does not move.
      nesterov: Whether to use Nesterov momentum (NadaMax), as in ``optax.adam``.
      eps_inside: True adds ``eps`` to ``|g|`` inside the maximum, as in Optax and
        PyTorch; False adds it to u in the denominator, as in Keras, TensorFlow and MLX.
      max_growth: Max factor by which u grows in one step, above 1 (also in float32); m
        sees gradients clipped to u. None for no bound, as in the paper and in Optax.
      m_dtype: What m is stored in: None for the parameter's dtype (bfloat16 if that has
        fewer than 32 bits), "float64", "float32", "bfloat16", or "int8" for one byte
        (needs ``b1 < b2``).
      u_dtype: What u is stored in: None as for m, "float64", "float32", "bfloat16", or
        "uint8" for one byte.
      shared_axes: Axes along which one u is shared, in parameters with two axes or
        more: None, an integer, a tuple, or a function of the parameter's path and the
        parameter that returns one of these.

    Returns:
      An optimizer whose updates are to be added to the parameters, as
      ``optax.apply_updates`` does. They have the gradients' shapes and dtypes, or the
      dtypes of parameters that have more bits. Its state is a tuple whose first item is
      a :class:`ScaleByAdamaxState`.

    Raises:
      ValueError: If a hyperparameter is out of range or a dtype is not listed above; by
        ``init`` and ``update``, as :func:`scale_by_adamax`.
      TypeError: If an argument has a wrong type; by ``init`` and ``update``, as
        :func:`scale_by_adamax`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from adamax_jax import adamax
      >>> def loss(x):
      ...     return jnp.sum(x**2)
      >>> optimizer = adamax(learning_rate=0.1)
      >>> x = jnp.array([1.0, -2.0, 3.0])
      >>> state = optimizer.init(x)
      >>> for _ in range(60):
      ...     updates, state = optimizer.update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-2 * loss(jnp.array([1.0, -2.0, 3.0])))
      True

    References:
      Kingma and Ba, `Adam: A Method for Stochastic Optimization
      <https://arxiv.org/abs/1412.6980>`_, 2014, section 7.1.
    """
    scale = scale_by_adamax(
        b1,
        b2,
        eps,
        nesterov=nesterov,
        eps_inside=eps_inside,
        max_growth=max_growth,
        m_dtype=m_dtype,
        u_dtype=u_dtype,
        shared_axes=shared_axes,
    )
    return descend(scale, learning_rate)


def adamaxw(
    learning_rate: optax.ScalarOrSchedule = 2e-3,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    nesterov: bool = False,
    eps_inside: bool = True,
    max_growth: ArrayLike | None = None,
    m_dtype: DTypeLike | None = None,
    u_dtype: DTypeLike | None = None,
    shared_axes: SharedAxes = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaMax with decoupled weight decay.

    With :math:`\lambda` the weight decay, and m and u as in :func:`adamax`:

    .. math::

      \theta_t = \theta_{t-1} - \alpha \left( \frac{m_t}{(1 - \beta_1^t) u_t}
      + \lambda \theta_{t-1} \right)

    The positional arguments are those of ``optax.adamaxw``. For the L2 penalty of
    ``torch.optim.Adamax(weight_decay=...)``, which enters m and u, use
    ``optax.chain(optax.add_decayed_weights(weight_decay), adamax(...))``.

    Args:
      learning_rate: A number, a scalar array, or a schedule (a function of the count of
        updates, which starts at 0). It multiplies the weight decay too.
      b1: Decay rate of m, in [0, 1).
      b2: Decay rate of u, in [0, 1). 0.98 is recommended, but not for embeddings with
        rare rows (:doc:`07_memory`).
      eps: Floor of the denominator, in the gradient's unit, at least 0. With ``eps=0``,
        0/0 is 0: a coordinate whose gradients were all 0 does not move.
      weight_decay: The fraction of a parameter that a step at learning rate 1 removes:
        a number, a scalar array, or a schedule.
      mask: Which parameters decay: a tree of booleans like the parameters, a prefix of
        it, or a function of the parameters that returns one; None for all. Pass
        ``static_args="mask"`` to ``optax.inject_hyperparams``.
      nesterov: Whether to use Nesterov momentum (NadaMax), as in ``optax.adam``.
      eps_inside: True adds ``eps`` to ``|g|`` inside the maximum, as in Optax and
        PyTorch; False adds it to u in the denominator, as in Keras, TensorFlow and MLX.
      max_growth: Max factor by which u grows in one step, above 1 (also in float32); m
        sees gradients clipped to u. None for no bound, as in the paper and in Optax.
      m_dtype: What m is stored in: None for the parameter's dtype (bfloat16 if that has
        fewer than 32 bits), "float64", "float32", "bfloat16", or "int8" for one byte
        (needs ``b1 < b2``).
      u_dtype: What u is stored in: None as for m, "float64", "float32", "bfloat16", or
        "uint8" for one byte.
      shared_axes: Axes along which one u is shared, in parameters with two axes or
        more: None, an integer, a tuple, or a function of the parameter's path and the
        parameter that returns one of these.

    Returns:
      An optimizer as :func:`adamax` returns. Its ``update`` needs the parameters.

    Raises:
      ValueError: As :func:`adamax`; also by ``update``, without parameters, if their
        shapes are not those of the gradients, or if ``mask`` is False or has another
        structure.
      TypeError: As :func:`adamax`; also by ``update``, if ``mask`` holds anything but
        booleans.

    Examples:
      >>> import jax.numpy as jnp
      >>> from adamax_jax import adamaxw
      >>> params = {"kernel": jnp.array([2.0]), "bias": jnp.array([2.0])}
      >>> decayed = {"kernel": True, "bias": False}
      >>> optimizer = adamaxw(0.1, weight_decay=0.5, mask=decayed)
      >>> no_gradient = {"kernel": jnp.zeros(1), "bias": jnp.zeros(1)}
      >>> updates, _ = optimizer.update(no_gradient, optimizer.init(params), params)
      >>> float(updates["kernel"][0]), float(updates["bias"][0]) + 0.0
      (-0.10000000149011612, 0.0)

    References:
      Loshchilov and Hutter, `Decoupled Weight Decay Regularization
      <https://arxiv.org/abs/1711.05101>`_, 2019.
    """
    scale = scale_by_adamax(
        b1,
        b2,
        eps,
        nesterov=nesterov,
        eps_inside=eps_inside,
        max_growth=max_growth,
        m_dtype=m_dtype,
        u_dtype=u_dtype,
        shared_axes=shared_axes,
    )
    return descend(scale, learning_rate, decayed_weights(weight_decay, mask))


def _next_u(norm, u, magnitude, c):
    """max(b2 * u, |g| + eps), as a code, with the growth of u limited."""
    new = norm.encode(magnitude, c.next_u_scale)
    if c.max_growth is not None:
        # A u that has seen no gradient, or has decayed, grows without limit.
        floor = norm.encode(jnp.maximum(2 * c.eps, norm.smallest), c.u_scale)
        limit = jnp.where(u > floor, norm.grown(u, c), norm.no_limit)
        new = norm.minimum(new, limit)
    return larger(norm.decayed(u, c), new)


def m_dtype_of(p, m_dtype):
    """The dtype of m for a parameter: complex where the parameter is."""
    if m_dtype is None:
        return default_dtype(jnp.result_type(p))
    return jnp.dtype(dtype_like(p, m_dtype))


def _u_dtype(p, u_dtype):
    """The dtype of u for a parameter: real also where the parameter is complex."""
    if u_dtype is not None:
        return u_dtype
    dtype = jnp.result_type(p)
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    return default_dtype(jnp.finfo(dtype).dtype if is_complex else dtype)
