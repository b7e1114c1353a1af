"""Adam with Optax's arguments: the L^p family at p = 2, in few bytes."""

from collections.abc import Callable
from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from adamax_jax._checks import check_dtype
from adamax_jax._formats import MEANS
from adamax_jax._learning_rate import decayed_weights, descend
from adamax_jax._lp_adam import scale_by_order


def scale_by_adam(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    m_dtype: DTypeLike | None = None,
    u_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam's direction, as ``optax.scale_by_adam``, with a state of 2 to 8 bytes.

    With ``g_t`` the gradient at step t = 1, 2, ... and ``m_0 = u_0 = 0``, element by
    element,

    ::

      m_t = b1 * m_{t-1} + (1 - b1) * g_t
      w_t = (1 - b2) / (1 - b2^t)
      u_t = sqrt((1 - w_t) * u_{t-1}^2 + w_t * g_t^2)
      update_t = m_t / (1 - b1^t) / (sqrt(u_t^2 + eps_root) + eps)

    ``u_t^2`` is Adam's second moment after its bias correction, ``v_t / (1 - b2^t)``.
    In float32 the updates are Optax's to rounding, while ``b2`` is constant; where it
    changes, u remains a mean whose weights add up to 1, unlike Optax's. No square
    overflows or vanishes: u has the range of its dtype, not the root of that.

    Below 32 bits u is rounded up or down without bias, which is noise (see
    :func:`scale_by_lp_adam`, of which this is p = 2). Complex gradients, None,
    parameters without gradients and dtypes of updates are as there.

    Args:
      b1: Decay rate of the mean of the gradients, in [0, 1).
      b2: Decay rate of the mean of their squares, in [0, 1): Optax's, the square of
        that of :func:`scale_by_lp_adam`.
      eps: Floor of the denominator, in the gradient's unit; at least 0. With ``eps=0``
        0/0 is 0.
      eps_root: Added to the mean of the squares, in the unit of a squared gradient; at
        least 0. (Derivatives through an update do not need it here.)
      mu_dtype: Optax's name of ``m_dtype``.
      nesterov: Whether to look one step ahead in the mean, as in Optax.
      m_dtype: What m is stored in: None for the parameter's own dtype (bfloat16 where
        that has fewer than 32 bits), "float64", "float32", "bfloat16" or, as its ratio
        to 8 u, "int8", for m/u up to 10.46. Its bound is ``(1 - b1) / sqrt((1 - b2) *
        (1 - b1^2 / b2))``, 7.27 at the default rates; a ValueError is raised where it
        is above that, as for ``b1=0.5``, unless the rates are traced.
      u_dtype: What u is stored in: None for float32, or float64 where the parameter
        is; "float64", "float32", "bfloat16" or "uint8".

    ``b1``, ``b2``, ``eps`` and ``eps_root`` may be traced scalars, as those of
    ``optax.inject_hyperparams``.

    Returns:
      A transformation whose state is a :class:`ScaleByLpAdamState`. :func:`from_optax`
      makes one of a running Adam's, :func:`convert_state` stores it in other dtypes.

    Raises:
      ValueError, TypeError: As :func:`scale_by_lp_adam`; ValueError also if
        ``eps_root`` is negative, or both ``mu_dtype`` and ``m_dtype`` are given.

    Examples:
      >>> import jax.numpy as jnp
      >>> from adamax_jax import scale_by_adam
      >>> transformation = scale_by_adam(m_dtype="int8", u_dtype="uint8")
      >>> state = transformation.init(jnp.zeros(2))
      >>> state.m.nbytes, state.u.nbytes
      (2, 2)
      >>> update, state = transformation.update(jnp.array([1.0, -0.5]), state)
      >>> [round(float(x), 1) for x in update]
      [1.0, -1.0]

    References:
      Kingma and Ba, `Adam: A Method for Stochastic Optimization
      <https://arxiv.org/abs/1412.6980>`_, 2014.
    """
    if mu_dtype is not None and m_dtype is not None:
        raise ValueError(
            f"mu_dtype is Optax's name of m_dtype: give one of them, got "
            f"mu_dtype={mu_dtype!r} and m_dtype={m_dtype!r}."
        )
    if m_dtype is None:
        m_dtype = check_dtype("mu_dtype", mu_dtype, MEANS)
    return scale_by_order(
        2.0,
        b1,
        b2,
        eps,
        # u^2 decays by b2.
        decay_power=0.5,
        eps_root=eps_root,
        nesterov=nesterov,
        eps_inside=False,
        m_dtype=m_dtype,
        u_dtype=u_dtype,
    )


def adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    m_dtype: DTypeLike | None = None,
    u_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam, in the place of ``optax.adam``, with a state of 2 to 8 bytes per parameter.

    ::

      theta_t = theta_{t-1} - learning_rate * m_t / (1 - b1^t) / (u_t + eps)

    with m and u as in :func:`scale_by_adam`.

    Args:
      learning_rate: A number, a scalar array, or a schedule from the count of updates,
        starting at 0.
      b1, b2, eps, eps_root, mu_dtype, nesterov: As in ``optax.adam``.
      m_dtype: What m is stored in, as in :func:`scale_by_adam`: "int8" for one byte.
      u_dtype: What u is stored in, as in :func:`scale_by_adam`: "uint8" for one byte,
        "bfloat16" for two.

    Returns:
      An optimizer whose updates are to be added to the parameters
      (``optax.apply_updates``). Its state is a tuple whose first item is a
      :class:`ScaleByLpAdamState`.

    Raises:
      ValueError, TypeError: As :func:`scale_by_adam`; also if ``learning_rate`` is not
        a finite number, a scalar array or a schedule.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from adamax_jax import adam
      >>> optimizer = adam(0.1, m_dtype="int8", u_dtype="bfloat16")
      >>> x = jnp.array([1.0, -2.0])
      >>> state = optimizer.init(x)
      >>> updates, state = optimizer.update(2 * x, state, x)
      >>> [round(float(x), 2) for x in optax.apply_updates(x, updates)]
      [0.9, -1.9]

    References:
      As of :func:`scale_by_adam`.
    """
    scale = scale_by_adam(
        b1,
        b2,
        eps,
        eps_root,
        mu_dtype,
        nesterov=nesterov,
        m_dtype=m_dtype,
        u_dtype=u_dtype,
    )
    return descend(scale, learning_rate)


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    nesterov: bool = False,
    m_dtype: DTypeLike | None = None,
    u_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW, in the place of ``optax.adamw``, with 2 to 8 bytes per parameter.

    ::

      theta_t = theta_{t-1} - learning_rate * (
        m_t / (1 - b1^t) / (u_t + eps) + weight_decay * theta_{t-1}
      )

    with m and u as in :func:`scale_by_adam`, which the weight decay never enters.

    Args:
      learning_rate: As in :func:`adam`; it multiplies the weight decay as well.
      b1, b2, eps, eps_root, mu_dtype, nesterov: As in ``optax.adamw``.
      weight_decay: As in :func:`adamaxw`.
      mask: Which parameters decay, as in :func:`adamaxw`.
      m_dtype, u_dtype: As in :func:`adam`.

    Returns:
      An optimizer as :func:`adam` returns; its ``update`` needs the parameters.

    Raises:
      ValueError, TypeError: As :func:`adam`; ValueError also by ``update`` without
        parameters, or with parameters of another shape than the gradients.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from adamax_jax import adamw
      >>> params = {"kernel": jnp.ones([64, 8]), "bias": jnp.ones(8)}
      >>> optimizer = adamw(1e-3, m_dtype="int8", u_dtype="uint8")
      >>> state = optimizer.init(params)
      >>> sum(x.nbytes for x in jax.tree.leaves(state)) / (64 * 8 + 8)  # and the count
      2.0076923076923077

    References:
      Loshchilov and Hutter, `Decoupled Weight Decay Regularization
      <https://arxiv.org/abs/1711.05101>`_, 2019.
    """
    scale = scale_by_adam(
        b1,
        b2,
        eps,
        eps_root,
        mu_dtype,
        nesterov=nesterov,
        m_dtype=m_dtype,
        u_dtype=u_dtype,
    )
    return descend(scale, learning_rate, decayed_weights(weight_decay, mask))
