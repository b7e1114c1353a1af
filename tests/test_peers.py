"""AdaMax of ten other sources, each written as one of this package's.

``peers.py`` recorded their runs; where a peer is installed, it is run again. Paddle's
is no AdaMax of this package for any eps, unless eps is too small to matter.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
import pytest
from versions import installed

from adamax_jax import adamax, adamaxw, scale_by_adamax


def uncorrected(learning_rate, b1=0.9):
    """A schedule that takes the bias correction back; Optax counts from 0."""
    return lambda count: learning_rate * (1 - b1 ** jnp.asarray(count + 1, float))


OTHER = (0.1, 0.8, 0.95, 1e-6)
DENSE = (0.1, 0.8, 0.9, 0.1)
KERAS = {"learning_rate": 1e-3, "eps": 1e-7, "eps_inside": False}
L2 = optax.add_decayed_weights(0.1)
ASCENT = optax.scale(-1.0)

EQUIVALENTS = {
    "torch-defaults": adamax(),
    "torch-l2": optax.chain(L2, adamax()),
    "torch-maximize": optax.chain(ASCENT, adamax()),
    # PyTorch turns the gradient around before it adds the penalty.
    "torch-maximize-l2": optax.chain(ASCENT, L2, adamax()),
    "torch-other": adamax(*OTHER),
    "keras-defaults": adamax(**KERAS),
    # Keras first takes lr * weight_decay * params off, and the step that follows
    # depends on the gradient alone: the order makes no difference.
    "keras-decay": adamaxw(**KERAS, weight_decay=0.004),
    "keras-dense": adamax(*DENSE, eps_inside=False),
    "numpy-defaults": adamax(**KERAS),
    "tensorflow-defaults": adamax(**KERAS),
    "tensorflow-dense": adamax(*DENSE, eps_inside=False),
    "mlx-defaults": adamax(uncorrected(1e-3), eps_inside=False),
    "mlx-dense": adamax(uncorrected(0.1, 0.8), *DENSE[1:], eps_inside=False),
    "optax-dense": adamax(*DENSE),
    "optax-decay": adamaxw(2e-3, weight_decay=0.1),
    "pytorch_optimizer-l2": optax.chain(L2, adamax(1e-3)),
    "pytorch_optimizer-dense": adamaxw(*DENSE, weight_decay=0.1),
    "fairseq-dense": adamaxw(*DENSE, weight_decay=0.1, eps_inside=False),
    # The weight decay is scaled by the learning rate alone.
    "fairseq-uncorrected": optax.chain(
        scale_by_adamax(eps_inside=False),
        optax.scale_by_schedule(uncorrected(1.0)),
        optax.add_decayed_weights(0.1),
        optax.scale(-2e-3),
    ),
    "mt_dnn-defaults": adamaxw(1e-3, weight_decay=1e-2),
    "mt_dnn-dense": adamaxw(*DENSE, weight_decay=0.1),
    # Gradients of 1e-3 to 1 hide an eps of 1e-8.
    "paddle-dense": adamax(1e-3),
}
# What differs in one respect, and by how much at least the parameters show it.
NEAR_MISSES = {
    "torch-l2": (adamaxw(weight_decay=0.1), 1e-2),
    "torch-maximize-l2": (optax.chain(L2, ASCENT, adamax()), 1e-2),
    "torch-other": (adamax(*OTHER, eps_inside=False), 1e-3),
    "keras-decay": (adamax(**KERAS), 1e-4),
    "keras-dense": (adamax(*DENSE), 3e-2),
    "tensorflow-dense": (adamax(*DENSE), 3e-2),
    "mlx-defaults": (adamax(1e-3, eps_inside=False), 1e-3),
    "mlx-dense": (adamax(uncorrected(0.1, 0.8), *DENSE[1:]), 3e-2),
    "optax-dense": (adamax(*DENSE, eps_inside=False), 3e-2),
    "optax-decay": (optax.chain(L2, adamax(2e-3)), 1e-2),
    "pytorch_optimizer-l2": (adamaxw(1e-3, weight_decay=0.1), 1e-2),
    "pytorch_optimizer-dense": (
        adamaxw(*DENSE, weight_decay=0.1, eps_inside=False),
        3e-2,
    ),
    "fairseq-dense": (adamaxw(*DENSE, weight_decay=0.1), 3e-2),
    "fairseq-uncorrected": (
        adamaxw(uncorrected(2e-3), weight_decay=0.1, eps_inside=False),
        1e-3,
    ),
    "mt_dnn-dense": (optax.chain(L2, adamax(*DENSE)), 1e-2),
}
# Paddle decays its eps, again and again, so that it adds up to eps / (1 - b2).
UNMATCHED = "paddle-vanishing"
RUNS = [(name, dtype) for name, case in peers.CASES.items() for dtype in case.dtypes]
MATCHED_RUNS = [(name, dtype) for name, dtype in RUNS if name != UNMATCHED]


@pytest.fixture
def dtype(request):
    """The precision of a run, with double precision on where that is needed."""
    if request.param == "float64":
        request.getfixturevalue("x64")
    return request.param


def recorded(name, dtype):
    """The initial parameters, the gradients and the trajectory in one file."""
    with np.load(peers.DATA / f"{name}.npz", allow_pickle=False) as file:
        fields = [file[f"{dtype}_{field}"] for field in peers.Trajectory._fields]
        return file["initial"], file["gradients"], peers.Trajectory(*fields)


def run(optimizer, initial, gradients, dtype):
    """The trajectory of our optimizer, from one compiled loop."""

    def step(carry, g):
        params, state = carry
        updates, state = optimizer.update(g, state, params)
        params = optax.apply_updates(params, updates)
        m, u = (optax.tree_utils.tree_get(state, field) for field in ("m", "u"))
        return (params, state), peers.Trajectory(params, m, u)

    params = jnp.asarray(initial, dtype)
    scan = jax.jit(lambda carry, gs: jax.lax.scan(step, carry, gs)[1])
    return scan((params, optimizer.init(params)), jnp.asarray(gradients, dtype))


def deviation(actual, expected, field):
    """The largest deviation at any step, as a share of a field's size.

    Parameters, and a mean of gradients of both signs, may pass near zero: their size
    is the coordinate's largest of the run. The maximum u is measured as it is.
    """
    x, y = getattr(actual, field), getattr(expected, field)
    assert x.dtype == y.dtype
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    size = np.abs(y) if field == "u" else np.abs(y).max(axis=0, keepdims=True)
    is_zero = np.broadcast_to(size == 0, y.shape)
    assert np.all(x[is_zero] == 0)
    return np.max(np.abs(x - y) / np.where(size == 0, 1, size))


def assert_same(actual, expected, dtype):
    """Every step's parameters and state are the same but for rounding.

    The same formula in another order rounds differently, at each step by up to half
    an eps, and at worst every time in the same direction: 6.7e-15 in float64, 3.6e-6
    in float32. Peers that round decayed parameters before they take the step come near
    that; the others stay below 6e-7 in float32, and all below 4e-15 in float64.
    """
    tolerance = peers.STEPS * np.finfo(dtype).eps / 2
    for field in peers.Trajectory._fields:
        assert deviation(actual, expected, field) <= tolerance, field


@pytest.mark.parametrize(("name", "dtype"), MATCHED_RUNS, indirect=["dtype"])
def test_recorded_run(name, dtype):
    initial, gradients, expected = recorded(name, dtype)
    actual = run(EQUIVALENTS[name], initial, gradients, dtype)
    assert_same(peers.CASES[name].keep(actual), expected, dtype)


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_told_apart(x64, name):
    optimizer, margin = NEAR_MISSES[name]
    case = peers.CASES[name]
    dtype, *_ = case.dtypes
    initial, gradients, expected = recorded(name, dtype)
    actual = case.keep(run(optimizer, initial, gradients, dtype))
    assert deviation(actual, expected, "params") > margin


@pytest.mark.parametrize("eps_inside", [True, False])
def test_paddle_after_gradients_vanished_is_matched_by_no_eps(x64, eps_inside):
    """Neither by its own, 0.001, nor by its floor, nor by any other."""
    case = peers.CASES[UNMATCHED]
    lr, b1, b2, paddle_eps = case.options.values()
    initial, gradients, expected = recorded(UNMATCHED, "float64")
    # The last of the large gradients, at most 1, has decayed for 50 steps.
    floor = paddle_eps / (1 - b2)
    np.testing.assert_allclose(expected.u[-1], floor, rtol=0, atol=b2**50)

    def trajectory(eps):
        optimizer = adamax(lr, b1, b2, eps, eps_inside=eps_inside)
        return case.keep(run(optimizer, initial, gradients, "float64"))

    eps = jnp.asarray([paddle_eps, floor, *np.geomspace(1e-6, 1, 61)])
    for params in jax.vmap(trajectory)(eps).params:
        actual = peers.Trajectory(params, None, None)
        assert deviation(actual, expected, "params") > 1e-2


def test_paddle_eps_fades_beside_gradients(x64):
    """It adds at most eps to u at each step and shortens the step by that share."""
    lr, b1, b2, eps = 1e-3, 0.9, 0.999, 1e-8
    initial, gradients, _ = recorded("paddle-dense", "float32")
    initial, gradients = np.float64(initial), np.float64(gradients)
    ours = run(adamax(lr, b1, b2, eps=0), initial, gradients, "float64")
    paddle = peers.run_paddle(initial, gradients, lr, b1, b2, eps)
    t = np.arange(1, peers.STEPS + 1)[:, None]
    added = eps * (1 - b2**t) / (1 - b2)
    rounding = peers.STEPS * np.finfo(np.float64).eps
    excess = paddle.u - ours.u
    assert np.all((-rounding <= excess) & (excess <= added + rounding))
    # No step is longer than 1.0091 times the learning rate.
    bound = np.cumsum(1.0091 * lr * added / ours.u, axis=0)
    assert np.all(np.abs(paddle.params - ours.params) <= bound + 2 * rounding)
    assert np.max(bound) < 1e-7


COMMAND = 'pip install keras "mlx[cpu]" pytorch_optimizer tensorflow torch'


@pytest.mark.parametrize(("name", "dtype"), RUNS)
def test_record_is_not_stale(name, dtype):
    """Another version or processor may round differently, but no more than that."""
    case = peers.CASES[name]
    installed(case.module, COMMAND)
    initial, gradients, expected = recorded(name, dtype)
    assert_same(case.run(initial, gradients, dtype), expected, dtype)


def test_keras_golden_table():
    """The table of test_correctness_with_golden in Keras's adamax_test.py.

    https://github.com/keras-team/keras/blob/master/keras/src/optimizers/adamax_test.py
    """
    golden = [
        [0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8],
        [0.6827, 0.6873, 0.6888, 0.6896, 0.6901, 0.6904, 0.6906, 0.6908, 0.6909, 0.691],
        [0.5333, 0.5407, 0.5431, 0.5444, 0.5451, 0.5456, 0.546, 0.5462, 0.5464, 0.5466],
        [0.368, 0.3773, 0.3804, 0.382, 0.3829, 0.3835, 0.384, 0.3843, 0.3846, 0.3848],
        [0.1933, 0.204, 0.2076, 0.2094, 0.2105, 0.2112, 0.2117, 0.2121, 0.2124, 0.2126],
    ]
    gradients = np.array([np.full(10, 0.01)] + 4 * [np.arange(0.1, 1.1, 0.1)])
    optimizer = adamax(0.2, 0.85, 0.95, 1e-6, eps_inside=False)
    params = run(optimizer, np.ones(10), gradients, "float32").params
    # The table has four decimals; Keras itself allows 5e-4.
    np.testing.assert_allclose(params, golden, rtol=0, atol=6e-5)
