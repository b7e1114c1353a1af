"""From Adam to AdaMax: the L^p family of Kingma & Ba (2014), section 7.1."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from adamax_jax._adamax import m_dtype_of, scale_by_adamax
from adamax_jax._checks import (
    check_bound,
    check_decay,
    check_dtype,
    check_eps,
    check_gradients,
    check_is_available,
    check_order,
    check_params,
    check_rounding,
    check_state,
    check_stored,
)
from adamax_jax._formats import MEANS, NORMS, Int8Mean
from adamax_jax._learning_rate import decayed_weights, descend
from adamax_jax._numerics import arithmetic_dtype, cast, divide, number
from adamax_jax._trees import dtypes_beside, update_leaves, zeros_beside
from adamax_jax._update import (
    Rule,
    Scalars,
    dither_of,
    is_surely_positive,
    mean_scalars,
    one_minus_power,
    scalar_dtype,
    update_leaf,
)
from adamax_jax._xla import as_rounded, larger, smaller

# Replaces an infinite order. 1 to this power is 1, where 1^infinity is undefined, and
# its product with any count is finite. In float32 the results are those of infinity.
_INFINITE_ORDER = 1e28
# Integer powers up to this one are computed by products, in half the time of exp, log.
_MAX_PRODUCT = 64
# In int8, m is stored as m / (8 u), for |m/u| up to 10.46. At p = 2 the bound is 5.15,
# and 7.27 at Optax's rates. Scaling by a power of 2 is exact.
RATIO_UNIT = 8.0


class ScaleByLpAdamState(NamedTuple):
    """State of the L^p family.

    Attributes:
      count: The number of updates so far; int32 scalar.
      m: The moving average of the gradients: a tree with the parameters' structure and
        shapes, None where a parameter has no gradients. In int8 it holds m / (8 u).
      u: The exponentially weighted L^p mean of the gradients: a tree like m. It is real
        where parameters are complex.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    m: optax.Updates
    u: optax.Updates


# Pickles refer to this module, even if the class moves to another file.
ScaleByLpAdamState.__module__ = "adamax_jax"


def scale_by_lp_adam(
    p: ArrayLike,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    nesterov: bool = False,
    eps_inside: bool = False,
    m_dtype: DTypeLike | None = None,
    u_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales gradients by momentum divided by a decayed L^p norm.

    Elementwise, with :math:`g_t` the gradient at step t >= 1 and :math:`m_0 = u_0 = 0`:

    .. math::

      m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
      w_t &= (1 - \beta_2^p) / (1 - \beta_2^{p t}) \\
      u_t &= ((1 - w_t) u_{t-1}^p + w_t |g_t|^p)^{1/p} \\
      \mathrm{update}_t &= \frac{m_t}{(1 - \beta_1^t) (u_t + \varepsilon)}

    This is Adam at p = 2, whose own ``b2`` is the square of this one, and AdaMax at p =
    infinity. No power exceeds 1, so that every p is stable. u needs no bias correction,
    and remains a mean while p or ``b2`` changes: both, ``b1`` and ``eps`` may be
    traced, as in ``optax.inject_hyperparams`` (with half-precision parameters pass it
    ``hyperparam_dtype=jnp.float32``).

    Unlike AdaMax's, a u of finite p is an average. Below 32 bits it is rounded without
    bias, which is noise: :doc:`how_it_works` has its size, the bound of ``|m/u|`` for
    each p, and what dtypes, complex gradients and None do.

    Args:
      p: The order of the norm, at least 1; ``jnp.inf`` for AdaMax.
      b1: Decay rate of m, in [0, 1).
      b2: Decay rate of u, in [0, 1): at p = 2 the square root of Adam's.
      eps: Floor of the denominator, in the gradient's unit, at least 0. With ``eps=0``,
        0/0 is 0: a coordinate whose gradients were all 0 does not move.
      nesterov: Whether to use Nesterov momentum, as in ``optax.adam``.
      eps_inside: False adds ``eps`` to u in the denominator, as Optax's Adam does; True
        adds it to ``|g|``, as Optax's AdaMax does.
      m_dtype: What m is stored in: None for the parameter's dtype (bfloat16 if that has
        fewer than 32 bits), "float64", "float32", "bfloat16", or "int8" for one byte
        (needs a bound of ``|m/u|`` below 10.46, not checked if a rate or p is traced).
      u_dtype: What u is stored in: None for float32 (float64 if the parameter is),
        "float64", "float32", "bfloat16", or "uint8" for one byte.

    Returns:
      A transformation whose state is a :class:`ScaleByLpAdamState`; for the number p =
      ``jnp.inf`` it is :func:`scale_by_adamax`. Updates have the gradients' shapes and
      dtypes, or the dtypes of parameters that have more bits.

    Raises:
      ValueError: If a hyperparameter is out of range (traced ones are not checked) or a
        dtype is not listed above, or m/u may exceed what int8 holds; by ``init``, if a
        decay rate rounds to 1, or float64 is not enabled; by ``update``, if structures
        or shapes of gradients and state differ.
      TypeError: If an argument has a wrong type or a hyperparameter fewer than 32 bits;
        by ``init``, if a parameter is no array, or m cannot be stored for its dtype; by
        ``update``, if a gradient is an integer, or complex where the parameter is real
        or vice versa, if they are None, or if the state has another type or dtypes.

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
    if isinstance(p, float) and math.isinf(p):
        return scale_by_adamax(
            b1,
            b2,
            eps,
            nesterov=nesterov,
            eps_inside=eps_inside,
            m_dtype=m_dtype,
            u_dtype=u_dtype,
        )
    return scale_by_order(
        p,
        b1,
        b2,
        eps,
        nesterov=nesterov,
        eps_inside=eps_inside,
        m_dtype=m_dtype,
        u_dtype=u_dtype,
    )


def scale_by_order(
    p: Any,
    b1: Any,
    b2: Any,
    eps: Any,
    *,
    decay_power: float = 1.0,
    eps_root: Any = 0.0,
    nesterov: bool,
    eps_inside: bool,
    m_dtype: Any,
    u_dtype: Any,
) -> optax.GradientTransformationExtraArgs:
    """The common implementation of :func:`scale_by_lp_adam` and :func:`scale_by_adam`.

    Args:
      p: A finite or traced order.
      decay_power: u decays by ``b2`` to this power.
      eps_root: Added to the square of u, under a root.

    The other arguments are those of :func:`scale_by_lp_adam`.
    """
    b1 = check_decay("b1", b1)
    b2 = check_decay("b2", b2)
    eps = check_eps("eps", eps)
    eps_root = check_eps("eps_root", eps_root)
    m_dtype = check_dtype("m_dtype", m_dtype, MEANS)
    u_dtype = check_dtype("u_dtype", u_dtype, NORMS)
    if m_dtype == jnp.int8:
        bound = _max_ratio(p, b1, b2, decay_power)
        limit = RATIO_UNIT * Int8Mean.LARGEST_RATIO
        check_bound(bound, limit, RATIO_UNIT, f"p={p}, b1={b1} and b2={b2}")
    # An eps inside is multiplied by a weight of the mean: the product may underflow.
    is_positive = not eps_inside and is_surely_positive(eps)
    rule = Rule(
        nesterov,
        eps_inside,
        is_positive,
        MeanOfOrder(_known(p)),
        is_average=True,
        ratio_unit=RATIO_UNIT,
    )

    def init_fn(params):
        check_params(params, m_dtype)
        check_is_available("m_dtype", m_dtype)
        check_is_available("u_dtype", u_dtype)
        wide = u_dtype if u_dtype == jnp.float64 else None
        check_rounding({"b1": b1, "b2": b2}, params, m_dtype, wide)
        return ScaleByLpAdamState(
            count=jnp.zeros([], jnp.int32),
            m=zeros_beside(
                lambda _, p: jnp.zeros_like(p, dtype=m_dtype_of(p, m_dtype)), params
            ),
            u=zeros_beside(
                lambda _, p: jnp.zeros_like(p, dtype=_u_dtype(p, u_dtype)), params
            ),
        )

    def as_at_init(path, m, u, p_dtype):
        return (
            m_dtype_of(p_dtype or m.dtype, m_dtype),
            _u_dtype(p_dtype or u.dtype, u_dtype),
            m.shape,
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_state(state, ScaleByLpAdamState)
        dtypes = dtypes_beside(params, state.m)
        check_stored(state, as_at_init, dtypes)
        check_gradients(updates, state.m)
        count = jnp.asarray(optax.safe_increment(state.count))
        dtype = scalar_dtype(updates, state.m, state.u)
        t = jnp.asarray(count, dtype)
        c = Scalars(
            **mean_scalars(b1, t),
            **_weights(p, b2, decay_power, t),
            eps=eps,
            eps_root=None
            if isinstance(eps_root, float) and eps_root == 0
            else eps_root,
            dither=dither_of(count),
        )
        c = cast(c, dtype)
        step, m, u = update_leaves(
            lambda g, m, u, dtype: update_leaf(g, m, u, c, rule, dtype),
            updates,
            state.m,
            state.u,
            dtypes,
            decays_by_scale=False,
        )
        return step, ScaleByLpAdamState(count, m, u)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def lp_adam(
    learning_rate: optax.ScalarOrSchedule,
    p: ArrayLike,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    nesterov: bool = False,
    eps_inside: bool = False,
    m_dtype: DTypeLike | None = None,
    u_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with the L^p norm in place of the root mean square.

    With :math:`\theta_t` the parameter, :math:`\alpha` the learning rate, and m and u
    as in :func:`scale_by_lp_adam`:

    .. math::

      \theta_t = \theta_{t-1} - \frac{\alpha m_t}{(1 - \beta_1^t) (u_t + \varepsilon)}

    The larger p, the closer is the longest step to the learning rate (within 1 %), and
    the more do large first gradients count: warm up, or lower ``b2``. No p above 2 was
    clearly better than Adam (:doc:`05_from_adam_to_adamax`).

    Args:
      learning_rate: A number, a scalar array, or a schedule (a function of the count of
        updates, which starts at 0).
      p: The order of the norm, at least 1: 2 for Adam, ``jnp.inf`` for AdaMax. To
        schedule it, use ``optax.inject_hyperparams``: by its inverse from Adam to
        AdaMax, as in ``p=lambda count: 2 / jnp.maximum(1 - count / 1000, 0)``.
      b1: Decay rate of m, in [0, 1).
      b2: Decay rate of u, in [0, 1): at p = 2 the square root of Adam's.
      eps: Floor of the denominator, in the gradient's unit, at least 0. With ``eps=0``,
        0/0 is 0: a coordinate whose gradients were all 0 does not move.
      nesterov: Whether to use Nesterov momentum, as in ``optax.adam``.
      eps_inside: False adds ``eps`` to u in the denominator, as Optax's Adam does; True
        adds it to ``|g|``, as Optax's AdaMax does.
      m_dtype: What m is stored in: None for the parameter's dtype (bfloat16 if that has
        fewer than 32 bits), "float64", "float32", "bfloat16", or "int8" for one byte
        (needs a bound of ``|m/u|`` below 10.46, not checked if a rate or p is traced).
      u_dtype: What u is stored in: None for float32 (float64 if the parameter is),
        "float64", "float32", "bfloat16", or "uint8" for one byte.

    Returns:
      An optimizer whose updates are to be added to the parameters, as
      ``optax.apply_updates`` does. They have the gradients' shapes and dtypes, or the
      dtypes of parameters that have more bits. Its state is a tuple whose first item is
      that of :func:`scale_by_lp_adam`.

    Raises:
      ValueError: If a hyperparameter is out of range or a dtype is not listed above, or
        m/u may exceed what int8 holds; by ``init`` and ``update``, as
        :func:`scale_by_lp_adam`.
      TypeError: If an argument has a wrong type; by ``init`` and ``update``, as
        :func:`scale_by_lp_adam`.

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
    scale = scale_by_lp_adam(
        p,
        b1,
        b2,
        eps,
        nesterov=nesterov,
        eps_inside=eps_inside,
        m_dtype=m_dtype,
        u_dtype=u_dtype,
    )
    return descend(scale, learning_rate)


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
    m_dtype: DTypeLike | None = None,
    u_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r""":func:`lp_adam` with decoupled weight decay.

    With :math:`\lambda` the weight decay, and m and u as in :func:`scale_by_lp_adam`:

    .. math::

      \theta_t = \theta_{t-1} - \alpha \left( \frac{m_t}{(1 - \beta_1^t)
      (u_t + \varepsilon)} + \lambda \theta_{t-1} \right)

    Args:
      learning_rate: A number, a scalar array, or a schedule (a function of the count of
        updates, which starts at 0). It multiplies the weight decay too.
      p: The order of the norm, at least 1: 2 for Adam, ``jnp.inf`` for AdaMax.
      b1: Decay rate of m, in [0, 1).
      b2: Decay rate of u, in [0, 1): at p = 2 the square root of Adam's.
      eps: Floor of the denominator, in the gradient's unit, at least 0. With ``eps=0``,
        0/0 is 0: a coordinate whose gradients were all 0 does not move.
      weight_decay: The fraction of a parameter that a step at learning rate 1 removes:
        a number, a scalar array, or a schedule.
      mask: Which parameters decay: a tree of booleans like the parameters, a prefix of
        it, or a function of the parameters that returns one; None for all. Pass
        ``static_args="mask"`` to ``optax.inject_hyperparams``.
      nesterov: Whether to use Nesterov momentum, as in ``optax.adam``.
      eps_inside: False adds ``eps`` to u in the denominator, as Optax's Adam does; True
        adds it to ``|g|``, as Optax's AdaMax does.
      m_dtype: What m is stored in: None for the parameter's dtype (bfloat16 if that has
        fewer than 32 bits), "float64", "float32", "bfloat16", or "int8" for one byte
        (needs a bound of ``|m/u|`` below 10.46, not checked if a rate or p is traced).
      u_dtype: What u is stored in: None for float32 (float64 if the parameter is),
        "float64", "float32", "bfloat16", or "uint8" for one byte.

    Returns:
      An optimizer as :func:`lp_adam` returns. Its ``update`` needs the parameters.

    Raises:
      ValueError: As :func:`lp_adam`; also by ``update``, without parameters, if their
        shapes are not those of the gradients, or if ``mask`` is False or has another
        structure.
      TypeError: As :func:`lp_adam`; also by ``update``, if ``mask`` holds anything but
        booleans.

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
      Loshchilov and Hutter, `Decoupled Weight Decay Regularization
      <https://arxiv.org/abs/1711.05101>`_, 2019. Daley and Amato, `Investigating
      Alternatives to the Root Mean Square for Adaptive Gradient Methods
      <https://arxiv.org/abs/2106.05449>`_, 2021.
    """
    scale = scale_by_lp_adam(
        p,
        b1,
        b2,
        eps,
        nesterov=nesterov,
        eps_inside=eps_inside,
        m_dtype=m_dtype,
        u_dtype=u_dtype,
    )
    return descend(scale, learning_rate, decayed_weights(weight_decay, mask))


def _weights(p, b2, decay_power, t):
    """The scalars of u at step t, where u decays by b2^decay_power.

    Returns:
      A dictionary of ``p``, ``decay`` = (1 - w)^(1/p), ``one_minus_decay``, computed
      without cancellation (None if ``decay_power`` is not 1: p = 2 does not need it),
      and ``weight`` = w^(1/p). For infinite p they are b2, 1 - b2 and 1.
    """
    # Clipped before it becomes an array, since jax.debug_infs checks arrays.
    p = min(p, _INFINITE_ORDER) if isinstance(p, float) else p
    p = smaller(number(p, t.dtype), number(_INFINITE_ORDER, t.dtype))
    power = decay_power * p
    w = one_minus_power(b2, power) / one_minus_power(b2, power * t)
    # With b the decay rate, 1 - w = b^p (1 - w b^(p (t - 1))). The decay is the p-th
    # root of 1 - w: b times a factor that tends to 1. At t = 1 the factor is 0 and has
    # no logarithm, but u_0 = 0, so that any decay will do.
    past = jnp.maximum(t - 1, 1)
    log_factor = jnp.log1p(-w * (1 - one_minus_power(b2, power * past))) / p
    rate, one_minus_decay = number(b2, t.dtype), None
    if decay_power == 1:
        one_minus_decay = number(1 - b2, t.dtype) - rate * jnp.expm1(log_factor)
    else:
        rate = rate**decay_power
    return {
        "p": p,
        "decay": rate * jnp.exp(log_factor),
        "one_minus_decay": one_minus_decay,
        # Rounding may lift it above 1, and its product with the max would overflow.
        "weight": smaller(jnp.exp(jnp.log(w) / p), jnp.ones_like(w)),
    }


def _max_ratio(p, b1, b2, decay_power):
    """The bound of |m/u| by Hölder's inequality; 0 if a number is traced."""
    if not all(isinstance(x, float) for x in (p, b1, b2)):
        return 0.0
    rate = b2**decay_power
    if b1 >= rate:
        return math.inf
    conjugate = math.inf if p == 1 else p / (p - 1)
    ended = 1.0 if p == 1 else (1 - (b1 / rate) ** conjugate) ** (1 / conjugate)
    return (1 - b1) / ((1 - rate**p) ** (1 / p) * ended)


class MeanOfOrder(NamedTuple):
    """The next u of the L^p family.

    ``known_p`` is an order for which the compiled code is faster, or None.
    """

    known_p: int | None

    def __call__(self, norm, u, magnitude, c):
        """((1 - w) u^p + w |g|^p)^(1/p), in floats, without powers above 1."""
        if self.known_p == 2:
            return _quadratic_mean(u, magnitude, c)
        old, new = c.decay * u, c.weight * magnitude
        # If both are equal, the old one is ``high``, as ``is_close`` below expects.
        high, low = larger(new, old), smaller(new, old)
        ratio = divide(low, jnp.where(high == 0, 1, high))
        power = _power(ratio, c.p, self.known_p)
        # (1 + power)^(1/p) - 1, without the rounding of 1 + power.
        gain = jnp.expm1(jnp.log1p(power) / c.p)
        # An average changes little in a step and keeps rounding errors for long. So the
        # change is added to u, instead of multiplying u by a number close to 1.
        is_close = (new <= old) & (c.decay > 0.5)
        # Adding zeros gives it the sharding of both, which ``where`` needs.
        base = jnp.where(is_close, u + jnp.zeros_like(high), high)
        change = jnp.where(is_close, c.decay * gain - c.one_minus_decay, gain)
        mean = base + base * change
        # A mean of finite numbers is finite, but may be rounded to infinity.
        largest = number(norm.largest, mean.dtype)
        mean = jnp.where(jnp.isinf(mean) & jnp.isfinite(high), largest, mean)
        return jnp.where(c.p < _INFINITE_ORDER, mean, high)


def _quadratic_mean(u, magnitude, c):
    """sqrt((1 - w) u^2 + w |g|^2): p = 2, in half the time of the other orders."""
    # u^2 + w (|g|^2 - u^2), which leaves u unchanged if |g| = u: an average keeps
    # rounding errors for long. If w is large, the difference would lose |g|.
    w = c.weight**2
    is_slow = w < 0.5
    past = jnp.where(is_slow, 1, c.decay) * u
    high = jnp.maximum(past, magnitude)
    # Scaled by a power of 2: no square overflows, and none that matters underflows.
    limit = 2.0 ** (jnp.finfo(u.dtype).maxexp * 5 // 16)
    is_huge, is_tiny = high > limit, high < 1 / limit
    scale = jnp.where(is_huge, limit**-2, jnp.where(is_tiny, limit**2, 1.0))
    inverse = jnp.where(is_huge, limit**2, jnp.where(is_tiny, limit**-2, 1.0))
    old, new = (scale * past) ** 2, (scale * magnitude) ** 2
    square = old + w * (new - jnp.where(is_slow, old, 0))
    # The inner ``where`` keeps the derivative at 0 finite.
    is_zero = square == 0
    mean = inverse * jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))
    # Rounding might lift a mean above its larger number, and to infinity.
    return as_rounded(mean, jnp.minimum(mean, jnp.maximum(u, magnitude)))


def _power(x, p, known_p):
    """x^p for x in [0, 1]."""
    if known_p is not None:
        return x**known_p
    # log has no derivative at 0, and no second one at the smallest number.
    floor = float(jnp.finfo(x.dtype).tiny) ** 0.5
    return jnp.exp(p * jnp.log(larger(x, number(floor, x.dtype))))


def _known(p):
    """p as an integer, for code of its own, if it is small and whole; else None."""
    is_whole = isinstance(p, float) and p <= _MAX_PRODUCT and p.is_integer()
    return int(p) if is_whole else None


def _u_dtype(p, u_dtype):
    """The dtype of u for a parameter: ``u_dtype``, or at least float32."""
    return u_dtype or jnp.dtype(arithmetic_dtype(jnp.result_type(p)))
