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
    r"""Rescales gradients as ``optax.scale_by_adam``, in 2 to 8 bytes per parameter.

    Elementwise, with :math:`g_t` the gradient at step t >= 1 and :math:`m_0 = u_0 = 0`:

    .. math::

      m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
      w_t &= (1 - \beta_2) / (1 - \beta_2^t) \\
      u_t &= \sqrt{(1 - w_t) u_{t-1}^2 + w_t g_t^2} \\
      \mathrm{update}_t &= \frac{m_t}{(1 - \beta_1^t)
      (\sqrt{u_t^2 + \varepsilon_\mathrm{root}} + \varepsilon)}

    :math:`u_t^2` is Adam's second moment after its bias correction. With a constant
    ``b2`` the float32 updates are Optax's to rounding; if ``b2`` changes, the weights
    in u still add up to 1, unlike Optax's. No square overflows or underflows: u has the
    range of its dtype, not the root of that. ``b1``, ``b2``, ``eps`` and ``eps_root``
    may be traced scalars, as in ``optax.inject_hyperparams``.

    Below 32 bits m and u are rounded without bias, which is noise: :doc:`how_it_works`
    has its size, and what dtypes, complex gradients and None do.

    Args:
      b1: Decay rate of m, in [0, 1).
      b2: Decay rate of the mean of squared gradients, in [0, 1), as in Optax.
      eps: Floor of the denominator, in the gradient's unit, at least 0. With ``eps=0``,
        0/0 is 0: a coordinate whose gradients were all 0 does not move.
      eps_root: Added to u^2 under the root, in the unit of a squared gradient, at least
        0. Finite derivatives through an update do not need it here.
      mu_dtype: Optax's name of ``m_dtype``; give one of the two.
      nesterov: Whether to use Nesterov momentum, as in ``optax.adam``.
      m_dtype: What m is stored in: None for the parameter's dtype (bfloat16 if that has
        fewer than 32 bits), "float64", "float32", "bfloat16", or "int8" as m / (8 u),
        for ``|m/u|`` up to 10.46. Its bound, 7.27 at the default rates, is
        ``(1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2))``.
      u_dtype: What u is stored in: None for float32 (float64 if the parameter is),
        "float64", "float32", "bfloat16", or "uint8" (4 codes per octave from 4.7e-10 to
        3.2e9).

    Returns:
      A transformation whose state is a :class:`ScaleByLpAdamState`. :func:`from_optax`
      makes that of a running Adam, :func:`convert_state` stores it in other dtypes.
      Updates have the gradients' shapes and dtypes, or the dtypes of parameters that
      have more bits.

    Raises:
      ValueError: If a hyperparameter is out of range or a dtype is not listed above,
        the bound exceeds 10.46 with int8 (not checked if traced), or both ``mu_dtype``
        and ``m_dtype`` are given; by ``init`` and ``update``, as
        :func:`scale_by_lp_adam`.
      TypeError: If an argument has a wrong type; by ``init`` and ``update``, as
        :func:`scale_by_lp_adam`.

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
        # b2 is the decay rate of u^2.
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
    r"""Adam with the arguments of ``optax.adam`` and a state of 2 to 8 bytes.

    With :math:`\theta_t` the parameter, :math:`\alpha` the learning rate, and m and u
    as in :func:`scale_by_adam`:

    .. math::

      \theta_t = \theta_{t-1} - \frac{\alpha m_t}{(1 - \beta_1^t)
      (\sqrt{u_t^2 + \varepsilon_\mathrm{root}} + \varepsilon)}

    The positional arguments are those of ``optax.adam``.

    Args:
      learning_rate: A number, a scalar array, or a schedule (a function of the count of
        updates, which starts at 0).
      b1: Decay rate of m, in [0, 1).
      b2: Decay rate of the mean of squared gradients, in [0, 1), as in Optax.
      eps: Floor of the denominator, in the gradient's unit, at least 0. With ``eps=0``,
        0/0 is 0: a coordinate whose gradients were all 0 does not move.
      eps_root: Added to u^2 under the root, in the unit of a squared gradient, at least
        0. Finite derivatives through an update do not need it here.
      mu_dtype: Optax's name of ``m_dtype``; give one of the two.
      nesterov: Whether to use Nesterov momentum, as in ``optax.adam``.
      m_dtype: What m is stored in: None for the parameter's dtype (bfloat16 if that has
        fewer than 32 bits), "float64", "float32", "bfloat16", or "int8" for one byte
        (needs a bound of ``|m/u|`` below 10.46, not checked if a rate is traced).
      u_dtype: What u is stored in: None for float32 (float64 if the parameter is),
        "float64", "float32", "bfloat16", or "uint8" for one byte.

    Returns:
      An optimizer whose updates are to be added to the parameters, as
      ``optax.apply_updates`` does. They have the gradients' shapes and dtypes, or the
      dtypes of parameters that have more bits. Its state is a tuple whose first item is
      a :class:`ScaleByLpAdamState`.

    Raises:
      ValueError: If a hyperparameter is out of range or a dtype is not listed above,
        m/u may exceed what int8 holds, or both ``mu_dtype`` and ``m_dtype`` are given;
        by ``init`` and ``update``, as :func:`scale_by_lp_adam`.
      TypeError: If an argument has a wrong type; by ``init`` and ``update``, as
        :func:`scale_by_lp_adam`.

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
      Kingma and Ba, `Adam: A Method for Stochastic Optimization
      <https://arxiv.org/abs/1412.6980>`_, 2014.
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
    r"""AdamW with the arguments of ``optax.adamw`` and a state of 2 to 8 bytes.

    With :math:`\lambda` the weight decay, and m and u as in :func:`scale_by_adam`:

    .. math::

      \theta_t = \theta_{t-1} - \alpha \left( \frac{m_t}{(1 - \beta_1^t)
      (\sqrt{u_t^2 + \varepsilon_\mathrm{root}} + \varepsilon)}
      + \lambda \theta_{t-1} \right)

    The positional arguments are those of ``optax.adamw``.

    Args:
      learning_rate: A number, a scalar array, or a schedule (a function of the count of
        updates, which starts at 0). It multiplies the weight decay too.
      b1: Decay rate of m, in [0, 1).
      b2: Decay rate of the mean of squared gradients, in [0, 1), as in Optax.
      eps: Floor of the denominator, in the gradient's unit, at least 0. With ``eps=0``,
        0/0 is 0: a coordinate whose gradients were all 0 does not move.
      eps_root: Added to u^2 under the root, in the unit of a squared gradient, at least
        0. Finite derivatives through an update do not need it here.
      mu_dtype: Optax's name of ``m_dtype``; give one of the two.
      weight_decay: The fraction of a parameter that a step at learning rate 1 removes:
        a number, a scalar array, or a schedule.
      mask: Which parameters decay: a tree of booleans like the parameters, a prefix of
        it, or a function of the parameters that returns one; None for all. Pass
        ``static_args="mask"`` to ``optax.inject_hyperparams``.
      nesterov: Whether to use Nesterov momentum, as in ``optax.adam``.
      m_dtype: What m is stored in: None for the parameter's dtype (bfloat16 if that has
        fewer than 32 bits), "float64", "float32", "bfloat16", or "int8" for one byte
        (needs a bound of ``|m/u|`` below 10.46, not checked if a rate is traced).
      u_dtype: What u is stored in: None for float32 (float64 if the parameter is),
        "float64", "float32", "bfloat16", or "uint8" for one byte.

    Returns:
      An optimizer as :func:`adam` returns. Its ``update`` needs the parameters.

    Raises:
      ValueError: As :func:`adam`; also by ``update``, without parameters, if their
        shapes are not those of the gradients, or if ``mask`` is False or has another
        structure.
      TypeError: As :func:`adam`; also by ``update``, if ``mask`` holds anything but
        booleans.

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
