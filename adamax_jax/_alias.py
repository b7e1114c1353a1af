"""Ready-made optimizers: AdaMax with a learning rate, and with weight decay."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from adamax_jax._axes import SharedAxes
from adamax_jax._checks import check_finite, check_shapes
from adamax_jax._lp import scale_by_lp_adam
from adamax_jax._transform import scale_by_adamax


def adamax(
    learning_rate: optax.ScalarOrSchedule = 2e-3,
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
    r"""AdaMax: Adam with the infinity norm in place of the second moment.

    .. math::

      \begin{align*}
        m_t &\leftarrow \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        u_t &\leftarrow \max(\beta_2 u_{t-1}, |g_t| + \varepsilon) \\
        \theta_t &\leftarrow \theta_{t-1}
          - \alpha_t \frac{m_t}{(1 - \beta_1^t)\, u_t}
      \end{align*}

    with :math:`\theta` the parameters and :math:`\alpha_t` the learning rate. The
    positional arguments and their meaning are those of ``optax.adamax``.

    Args:
      learning_rate: The largest change of a parameter in one step (without
        ``nesterov`` and at the default decay rates, to within 0.91 %), in the
        parameter's unit: a number, a scalar array, or a schedule from the count of
        updates, starting at 0.
      b1: See :func:`scale_by_adamax`, also for the following arguments.
      b2: Decay rate of the maximum of the gradients.
      eps: Floor of the denominator.
      nesterov: Whether to look one step ahead in the mean.
      eps_inside: Whether ``eps`` is added inside the maximum.
      m_dtype: What m is stored in; None: the parameter's dtype.
      u_dtype: What u is stored in; None: the parameter's dtype.
      shared_axes: Axes of matrices and larger arrays along which u is shared.

    Returns:
      An optimizer whose updates are to be added to the parameters
      (``optax.apply_updates``), in the gradients' dtypes. Its state is a tuple whose
      first item is a :class:`ScaleByAdamaxState`.

    Raises:
      ValueError, TypeError: As :func:`scale_by_adamax`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
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
    return optax.chain(
        scale_by_adamax(
            b1,
            b2,
            eps,
            nesterov=nesterov,
            eps_inside=eps_inside,
            m_dtype=m_dtype,
            u_dtype=u_dtype,
            shared_axes=shared_axes,
        ),
        _scale_by_learning_rate(learning_rate),
    )


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
    m_dtype: DTypeLike | None = None,
    u_dtype: DTypeLike | None = None,
    shared_axes: SharedAxes = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaMax with decoupled weight decay.

    .. math::

      \theta_t \leftarrow \theta_{t-1} - \alpha_t \left(
        \frac{m_t}{(1 - \beta_1^t)\, u_t} + \lambda_t\, \theta_{t-1} \right)

    with :math:`m_t` and :math:`u_t` as in :func:`adamax` and :math:`\lambda_t` the
    ``weight_decay``, which never enters :math:`m_t` or :math:`u_t`. The positional
    arguments and their meaning are those of ``optax.adamaxw``. For the L2 penalty of
    ``torch.optim.Adamax(weight_decay=...)``, which does enter them, use
    ``optax.chain(optax.add_decayed_weights(weight_decay), adamax(...))``.

    Args:
      learning_rate: As in :func:`adamax`; it multiplies the weight decay as well.
      b1: See :func:`scale_by_adamax`, also for the following arguments.
      b2: Decay rate of the maximum of the gradients.
      eps: Floor of the denominator.
      weight_decay: The share of a parameter that one step at learning rate 1 removes:
        a number, a scalar array, or a schedule from the count of updates.
      mask: Which parameters decay: a tree of booleans with the structure of the
        parameters or a prefix of it, or a function that returns one, given the
        parameters. None: all of them.
      nesterov: Whether to look one step ahead in the mean.
      eps_inside: Whether ``eps`` is added inside the maximum.
      m_dtype: What m is stored in; None: the parameter's dtype.
      u_dtype: What u is stored in; None: the parameter's dtype.
      shared_axes: Axes of matrices and larger arrays along which u is shared.

    Returns:
      An optimizer as :func:`adamax` returns; its ``update`` needs the parameters.

    Raises:
      ValueError, TypeError: As :func:`scale_by_adamax`; ValueError also by ``update``
        without parameters, or with parameters of another shape than the gradients.

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
    return optax.chain(
        scale_by_adamax(
            b1,
            b2,
            eps,
            nesterov=nesterov,
            eps_inside=eps_inside,
            m_dtype=m_dtype,
            u_dtype=u_dtype,
            shared_axes=shared_axes,
        ),
        _add_decayed_weights(weight_decay, mask),
        _scale_by_learning_rate(learning_rate),
    )


def lp_adam(
    learning_rate: optax.ScalarOrSchedule,
    p: ArrayLike,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    nesterov: bool = False,
    eps_inside: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with the L^p norm in place of the root mean square.

    .. math::

      \theta_t \leftarrow \theta_{t-1}
        - \alpha_t \frac{m_t / (1 - \beta_1^t)}{u_t + \varepsilon}

    with :math:`m_t` and :math:`u_t` as in :func:`scale_by_lp_adam`: Adam at p = 2 (with
    the square root of its ``b2``), AdaMax at p = infinity, and stable between them. The
    larger p, the closer is the longest step to the learning rate (to within 1 %), and
    the more do large first gradients count: warm up, or lower ``b2``. In this package's
    study (its README) no p above 2 was clearly better than Adam.

    Args:
      learning_rate: A number, a scalar array, or a schedule from the count of updates,
        starting at 0.
      p: The order of the norm, at least 1; ``jnp.inf`` for AdaMax.
      b1: See :func:`scale_by_lp_adam`, also for the following arguments.
      b2: Decay rate of the norm of the gradients.
      eps: Floor of the denominator.
      nesterov: Whether to look one step ahead in the mean.
      eps_inside: Whether ``eps`` is added to the gradient's modulus.

    Returns:
      An optimizer whose updates are to be added to the parameters
      (``optax.apply_updates``), in the gradients' dtypes. Its state is a tuple whose
      first item is a :class:`ScaleByLpAdamState`.

    Raises:
      ValueError, TypeError: As :func:`scale_by_lp_adam`.

    Examples:
      From Adam to AdaMax in the course of training:

      >>> import jax.numpy as jnp, optax
      >>> from adamax_jax import lp_adam
      >>> optimizer = optax.inject_hyperparams(lp_adam)(
      ...     learning_rate=0.1, p=lambda count: 2.0 + count.astype(float)
      ... )
      >>> x = jnp.array([1.0, -2.0])
      >>> state = optimizer.init(x)
      >>> for _ in range(3):
      ...     updates, state = optimizer.update(2 * x, state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> float(state.hyperparams["p"])
      4.0

    References:
      Daley and Amato, `Investigating Alternatives to the Root Mean Square for Adaptive
      Gradient Methods <https://arxiv.org/abs/2106.05449>`_, 2021.
    """
    return optax.chain(
        scale_by_lp_adam(p, b1, b2, eps, nesterov=nesterov, eps_inside=eps_inside),
        _scale_by_learning_rate(learning_rate),
    )


def lp_adamw(
    learning_rate: optax.ScalarOrSchedule,
    p: ArrayLike,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    nesterov: bool = False,
    eps_inside: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with the L^p norm and decoupled weight decay.

    .. math::

      \theta_t \leftarrow \theta_{t-1} - \alpha_t \left(
        \frac{m_t / (1 - \beta_1^t)}{u_t + \varepsilon}
        + \lambda_t\, \theta_{t-1} \right)

    with :math:`m_t` and :math:`u_t` as in :func:`scale_by_lp_adam` and
    :math:`\lambda_t` the ``weight_decay``, which never enters them.

    Args:
      learning_rate: As in :func:`lp_adam`; it multiplies the weight decay as well.
      p: The order of the norm, at least 1; ``jnp.inf`` for AdaMax.
      b1: See :func:`scale_by_lp_adam`, also for the following arguments.
      b2: Decay rate of the norm of the gradients.
      eps: Floor of the denominator.
      weight_decay: As in :func:`adamaxw`.
      mask: Which parameters decay, as in :func:`adamaxw`.
      nesterov: Whether to look one step ahead in the mean.
      eps_inside: Whether ``eps`` is added to the gradient's modulus.

    Returns:
      An optimizer as :func:`lp_adam` returns; its ``update`` needs the parameters.

    Raises:
      ValueError, TypeError: As :func:`scale_by_lp_adam`; ValueError also by ``update``
        without parameters, or with parameters of another shape than the gradients.

    Examples:
      >>> import jax.numpy as jnp
      >>> from adamax_jax import lp_adamw
      >>> params = {"kernel": jnp.array([2.0]), "bias": jnp.array([2.0])}
      >>> decayed = {"kernel": True, "bias": False}
      >>> optimizer = lp_adamw(0.1, p=3, weight_decay=0.5, mask=decayed)
      >>> no_gradient = {"kernel": jnp.zeros(1), "bias": jnp.zeros(1)}
      >>> updates, _ = optimizer.update(no_gradient, optimizer.init(params), params)
      >>> float(updates["kernel"][0]), float(updates["bias"][0]) + 0.0
      (-0.10000000149011612, 0.0)

    References:
      As of :func:`adamaxw` and :func:`lp_adam`.
    """
    return optax.chain(
        scale_by_lp_adam(p, b1, b2, eps, nesterov=nesterov, eps_inside=eps_inside),
        _add_decayed_weights(weight_decay, mask),
        _scale_by_learning_rate(learning_rate),
    )


def _scale_by_learning_rate(learning_rate):
    """Multiplies by the learning rate and turns the update downhill."""
    return _scale("learning_rate", learning_rate, sign=-1)


def _add_decayed_weights(weight_decay, mask):
    """Adds ``weight_decay`` times the parameters, keeping the updates' dtypes.

    Optax's transformation adds as dtypes promote, so that the updates may change dtype
    or strict promotion refuse them, and gives a mask function the updates to look at.
    """
    scale = _scale("weight_decay", weight_decay, sign=1)

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError(
                "Weight decay needs the parameters: call "
                "update(gradients, state, params)."
            )
        check_shapes(updates, params)
        decays = _broadcast(mask(params) if callable(mask) else mask, params)
        params = jax.tree.map(
            lambda g, p: None if g is None else jnp.asarray(p),
            updates,
            params,
            is_leaf=_is_none,
        )
        decay, state = scale.update(params, state)
        updates = jax.tree.map(
            lambda g, d, decays: _add(g, d) if g is not None and decays else g,
            updates,
            decay,
            decays,
            is_leaf=_is_none,
        )
        return updates, state

    return optax.GradientTransformation(scale.init, update_fn)


def _broadcast(mask, params):
    """The mask as a tree with a boolean for every parameter."""
    if mask is None:
        return jax.tree.map(lambda p: True, params)
    return jax.tree.map(
        lambda decays, subtree: jax.tree.map(lambda p: decays, subtree), mask, params
    )


def _add(g, d):
    """The sum, computed in the wider dtype, float32 at least, and rounded to g's."""
    wide = max(g.dtype, d.dtype, key=lambda dtype: dtype.itemsize)
    wide = jnp.float32 if wide.itemsize < 4 else wide
    return (g.astype(wide) + d.astype(wide)).astype(g.dtype)


def _is_none(leaf):
    return leaf is None


def _scale(name, factor, sign):
    """Multiplies updates by a number, an array or a schedule, keeping their dtypes.

    ``optax.scale`` multiplies as dtypes promote: an array factor, such as
    ``inject_hyperparams`` makes, would turn bfloat16 updates into float32 and be
    refused under strict promotion.
    """
    if callable(factor):
        return optax.scale_by_schedule(lambda count: sign * factor(count))
    factor = check_finite(name, factor)
    return optax.stateless(
        lambda updates, params: jax.tree.map(
            lambda g: _multiply(g, factor, sign=sign), updates
        )
    )


# Jitted for the same reason as the update of a leaf.
@functools.partial(jax.jit, static_argnames="sign")
def _multiply(g, factor, *, sign):
    return sign * jnp.asarray(factor, g.dtype) * g
