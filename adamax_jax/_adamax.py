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
      m: The moving average of the gradients: a tree of the parameters' structure and
        shapes, None where a parameter has no gradients. In int8 it holds m/u: averages
        of it over several states are none (``notebooks/checkpoints.md``).
      u: The exponentially weighted infinity norm of the gradients: the same, real
        also where the parameters are complex, and of size 1 along axes that share it.
        Below 32 bits it holds u / u_scale.
      u_scale: The decay of u that is not in the stored numbers yet; float32 scalar in
        [1, 2), 1 where all of u has 32 bits or more.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    m: optax.Updates
    u: optax.Updates
    u_scale: jax.Array


# A pickle names this place, whatever file the class moves to.
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
    """Rescales gradients by AdaMax: momentum divided by a decayed maximum.

    With ``g_t`` the gradient at step t = 1, 2, ... and ``m_0 = u_0 = 0``, element by
    element,

    ::

      m_t = b1 * m_{t-1} + (1 - b1) * g_t
      u_t = max(b2 * u_{t-1}, |g_t| + eps)
      update_t = m_t / ((1 - b1^t) * u_t)

    An update is dimensionless, and for ``b1 < b2`` never exceeds in
    magnitude ::

      (1 - b1) / (1 - b1^t) * (1 - (b1 / b2)^t) / (1 - b1 / b2)
        <= (1 - b1) / (1 - b1 / b2)

    which is 1 at the first step and tends to 1.0091 at the defaults (the bound holds
    for ``nesterov=False``). The update points uphill; :func:`adamax` turns it around
    and multiplies it by a learning rate.

    Arithmetic is done in float32, or float64 where the state or the gradient is. The
    update has the gradient's dtype; but beside a parameter of more bits, if ``update``
    is given the parameters, that of the parameter, since float16 would round small
    learning rates to 0. (As in Optax, ``optax.apply_if_finite`` and others that return
    either updates or zeros like the gradients then need gradients in the parameters'
    dtype: cast them before.) Complex gradients count by their modulus. A gradient of
    ``None`` leaves that part of the state as it is, or counts as zero where u is stored
    below 32 bits, since that decays with all the others. Integer, boolean and
    key parameters are allowed: their state and update are None, and their gradients
    must be. ``optax.apply_updates`` does not take None for an update: use
    ``eqx.apply_updates``, or leave such parameters out.

    **Bounded growth.** One gradient of k times the usual size holds a coordinate back
    for ``ln(k) / (1 - b2)`` steps, until u has forgotten it. With ``max_growth`` u
    grows by at most this factor in one step, and m sees of a gradient no more than u
    does::

      u_t = max(b2 * u_{t-1}, min(|g_t| + eps, max_growth * u_{t-1}))
      m_t = b1 * m_{t-1} + (1 - b1) * g_t * min(1, u_t / |g_t|)

    where ``u_{t-1} > 2 * eps``, with u_t as it is stored. The bound above holds. A u
    of at most ``2 * eps``, or at the smallest number of its dtype, takes any gradient:
    it has seen none yet, or none for so long that it has decayed. So ``eps`` must be
    well below the gradients: where they are smaller, nothing is bounded. An infinite
    gradient is cut off as well, unless u takes any or it is complex; NaN is not.

    So u does not follow the maximum of the gradients but a quantile: where a share s of
    them raises u by the factor and the others lie below u, it stands still if
    ``s ln(max_growth) = -(1 - s) ln(b2)``. At ``b2=0.99, max_growth=1.1`` this share is
    10 %. Where fewer gradients than that differ from 0, as of rare words, u decays, and
    steps tell little more than the sign.

    The factor is exact in float32 and float64. In bfloat16 it is 1 + 2^-7 at least, a
    step of its numbers, and u is rounded to nearest. In uint8 u grows by whole codes,
    of which a factor of 2 is exactly 4: by the most codes that stay within the factor,
    and by one at least, or it could not grow at all. For ``max_growth=1.1`` that is one
    code, 14 to 25 % before the decay of the step, so that u follows a higher quantile
    (about 6 %).

    **Storage.** Rounding commutes with a maximum. So ``u`` can be stored in few bytes
    without drift: each stored number is the exact one rounded once, at any age, and the
    decay is exact, as long as u / u_scale is a normal number of the dtype. Gradients
    above its largest number count as that, for m as for u; u below its smallest counts
    as that. An m below 32 bits is an average and cannot be exact. It is rounded up or
    down in proportion to its place between two numbers, by a hash of ``count``, without
    random keys: so it has no bias, small means are not lost, and when gradients stop
    it decays to 0. The step uses the stored, rounded values, so that it always matches
    the state. So rounding lengthens steps a little: beside a wide u the longest seen
    at the default rates, where the bound is 1.0091, were 1.04 in bfloat16 and 1.10 in
    int8. What rounding may take off a uint8 u adds a factor of 1.14, but none with
    ``max_growth``, which cuts gradients off at the rounded u.
    Derivatives of a step are those before that rounding. Through the state they pass
    where it is stored in floats; int8 and uint8 are constants there, so differentiate
    through several steps with floats alone. A state that was cast is not what it was,
    and is refused where that can be seen: :func:`convert_state` stores it in other
    dtypes.

    **Sharing u.** With ``shared_axes`` one u stands for each slice S of a parameter
    along these axes, ::

      u_t = max(b2 * u_{t-1}, max over j in S of |g_{t,j}| + eps)

    and being a maximum of maxima, it is the largest of the slice's element-wise u, to
    the bit, and but for the rounding of m no step is longer than the element-wise one
    (both without ``max_growth``). The bound above holds. It keeps size 1 along these
    axes, and where it is left, 4 bytes for each row of a matrix are little: with m in
    int8 the state has one byte per parameter. The update reads from the state's
    shapes which axes are shared, but it refuses a state that shares none where the
    optimizer shares some, or the other way round; ``optax.flatten`` leaves none. Where
    parameters are sharded along a shared axis, the maximum is all that devices
    exchange; in ``jax.shard_map`` each would take the maximum over its own part, and
    Flax's partitioning metadata, which u inherits, cannot be met by its size of 1:
    shard along other axes there.

    **Not-a-number and infinity** (unless ``max_growth`` cuts it off) are
    carried by the update in every storage, and kept by the state, so that the
    coordinate stays NaN (or infinite); only a uint8 u becomes
    its largest number. A shared u hands that on to its whole slice (a NaN not always
    across devices, whose exchange may drop it): beside an infinite one, or the largest
    of uint8, the other coordinates do not move. To leave the state untouched by such a
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
        and PyTorch, or to the denominator, ``m_t / ((1 - b1^t) * (u_t + eps))`` with
        ``u_t = max(b2 * u_{t-1}, |g_t|)``, as in Keras, TensorFlow and MLX. True by
        default, since this takes the place of ``optax.scale_by_adamax``; False in
        :func:`scale_by_lp_adam`, which takes that of ``optax.scale_by_adam``.
      max_growth: The largest factor by which u grows in one step, above 1 (also as
        float32 rounds it); None for no bound, as in the paper and in Optax.
      m_dtype: What m is stored in: None for the parameter's own dtype (bfloat16 where
        that has fewer than 32 bits), "float64", "float32", "bfloat16" or, as its ratio
        to u, "int8" (which needs ``b1 < b2``, not checked for traced numbers). In int8
        a ratio is cut off at 1.3 on either side of 0. The bound above exceeds that from
        ``b1 = 0.996`` up at the default ``b2`` and from ``b2 = 0.975`` down at the
        default ``b1``; gradients of training were not seen to
        (``notebooks/07_memory.ipynb``). Codes of int8 are 2.4e-4 apart at 0, and from
        there on 3 to 6 % of their sum with 0.005.
      u_dtype: What u is stored in: None as for m, "float64", "float32", "bfloat16" or
        "uint8": 4 codes per octave, with a relative error of at most 1/9, from 4.7e-10
        to 3.2e9. Values are clamped to this range; code 0 is a coordinate without any
        gradient, where ``eps`` is not inside.
      shared_axes: Along which axes u is shared: None for none, an integer or a tuple of
        them (negative ones count from the last), or a function of the parameter's path
        (as of ``jax.tree_util.tree_map_with_path``) and the parameter that returns one
        of these. Parameters with fewer than two axes stay element-wise. With
        ``optax.inject_hyperparams`` pass that ``static_args="shared_axes"``. For
        Flax's kernels, (inputs, outputs), -1 has trained transformers best (-2 for
        Equinox's weights, which are transposed); where units may be silent for long,
        share along the inputs, so that each has a u of its own. The learning rate is up
        to 4 times the element-wise one, so search from twice that upwards. Warm it up,
        since one large early gradient holds up a whole slice, and leave embeddings with
        rare rows out. In ``notebooks/04_one_byte.ipynb`` it was, with warm-up, as good
        as element-wise AdaMax, and up to 2 % behind Adam.

    ``b1``, ``b2``, ``eps`` and ``max_growth`` may be traced scalars, for instance those
    of ``optax.inject_hyperparams`` (with half-precision parameters pass that
    ``hyperparam_dtype=jnp.float32``: in bfloat16 ``b2=0.999`` is 1); only Python and
    NumPy numbers are range-checked.

    Returns:
      A transformation whose state is a :class:`ScaleByAdamaxState`.

    Raises:
      ValueError: If ``b1`` or ``b2`` is outside [0, 1), ``eps`` is negative or not
        finite, ``max_growth`` is not above 1 or not finite, a dtype is not one of those
        above, or m in int8 meets ``b1 >= b2``; by ``init``, if a parameter does not
        have the ``shared_axes`` or has one twice, or a decay rate is 1 in the precision
        of a parameter; by ``update``, if the gradients differ from the state in tree
        structure or shape, or u from what ``shared_axes`` make of it.
      TypeError: If a hyperparameter is not a number or a scalar array of at least 32
        bits, ``m_dtype`` or ``u_dtype`` is not a dtype, or ``shared_axes`` are not
        integers; by ``init``, if a parameter is not an array, has no negative numbers,
        or is complex where ``m_dtype`` has no complex counterpart; by ``update``, if a
        gradient is neither floating-point nor complex, if it is complex where the
        parameter is real or the other way round, or if the state is of another type or
        in other dtypes than ``init`` makes.

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
      Nesterov Momentum into Adam
      <https://openreview.net/pdf?id=OM0jvwB8jIp57ZJjtNEZ>`_, 2016.
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
        # Arrays: numbers would be brought to the device for every leaf anew.
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
    """AdaMax: Adam with the infinity norm in place of the second moment.

    ::

      m_t = b1 * m_{t-1} + (1 - b1) * g_t
      u_t = max(b2 * u_{t-1}, |g_t| + eps)
      theta_t = theta_{t-1} - learning_rate * m_t / ((1 - b1^t) * u_t)

    with g the gradients and theta the parameters. The positional arguments and their
    meaning are those of ``optax.adamax``; :func:`scale_by_adamax` explains those that
    are not listed here, and the storage.

    Args:
      learning_rate: The largest change of a parameter in one step (without
        ``nesterov``, at the default decay rates and with m and u in 32 bits, to within
        0.91 %; :func:`scale_by_adamax` says how much longer steps are in fewer bits),
        in the parameter's unit: a number, a scalar array, or a schedule from the count
        of updates, starting at 0.

    Returns:
      An optimizer whose updates are to be added to the parameters
      (``optax.apply_updates``), in the dtypes of :func:`scale_by_adamax`. Its state is
      a tuple whose first item is a :class:`ScaleByAdamaxState`.

    Raises:
      ValueError, TypeError: As :func:`scale_by_adamax`; also if ``learning_rate`` is
        not a finite number, a scalar array or a schedule.

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
    """AdaMax with decoupled weight decay.

    ::

      theta_t = theta_{t-1} - learning_rate * (
        m_t / ((1 - b1^t) * u_t) + weight_decay * theta_{t-1}
      )

    with m and u as in :func:`adamax`, which the weight decay never enters. The
    positional arguments and their meaning are those of ``optax.adamaxw``. For the L2
    penalty of ``torch.optim.Adamax(weight_decay=...)``, which does enter them, use
    ``optax.chain(optax.add_decayed_weights(weight_decay), adamax(...))``.

    Args:
      learning_rate: As in :func:`adamax`; it multiplies the weight decay as well.
      weight_decay: The share of a parameter that one step at learning rate 1 removes:
        a number, a scalar array, or a schedule from the count of updates.
      mask: Which parameters decay: a tree of booleans with the structure of the
        parameters or a prefix of it, or a function that returns one, given the
        parameters. None: all of them. With ``optax.inject_hyperparams`` pass that
        ``static_args="mask"``: it takes a function for a schedule, gives it the count
        instead of the parameters, and what comes back would decay all of them or none.

    The other arguments are explained at :func:`scale_by_adamax`.

    Returns:
      An optimizer as :func:`adamax` returns; its ``update`` needs the parameters.

    Raises:
      ValueError, TypeError: As :func:`adamax`; ValueError also by ``update`` without
        parameters, or with parameters of another shape than the gradients; both if
        ``mask`` is not a tree of booleans like the parameters, or is just False.

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
    """max(b2 * u, |g| + eps), in the codes of a format; u grows by a factor at most."""
    new = norm.encode(magnitude, c.next_u_scale)
    if c.max_growth is not None:
        # A u that has seen no gradient takes any.
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
