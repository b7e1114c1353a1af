"""Other AdaMax optimizers, run on given gradients, and the record of their runs.

``python tests/peers.py`` runs PyTorch, Keras and a NumPy class on the cases below and
writes what they did to ``tests/data``, where the tests read it without them. That
needs NumPy, ``torch``, ``keras`` and ``jax``; the module itself only NumPy.
"""

import contextlib
import os
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Keras reads this when it is imported, which only the functions below do.
os.environ["KERAS_BACKEND"] = "jax"

DATA = Path(__file__).parent / "data"
STEPS, SIZE = 60, 12


class Trajectory(NamedTuple):
    """The parameters and the state after every step: arrays of steps by size."""

    params: np.ndarray
    m: np.ndarray
    u: np.ndarray


class Case(NamedTuple):
    """A peer's module, its options, the gradients it is fed and its precisions."""

    peer: str
    options: dict
    gradients: str = "decades"
    dtypes: tuple = ("float64", "float32")

    def run(self, initial, gradients, dtype):
        """The trajectory of the installed peer, computed in ``dtype``."""
        run = {"torch": run_torch, "keras": run_keras, "numpy": run_numpy}[self.peer]
        return run(
            np.asarray(initial, dtype), np.asarray(gradients, dtype), **self.options
        )


CASES = {
    "torch-defaults": Case("torch", {}),
    "torch-l2": Case("torch", {"weight_decay": 0.1}),
    "torch-maximize": Case("torch", {"maximize": True}),
    "torch-maximize-l2": Case("torch", {"maximize": True, "weight_decay": 0.1}),
    "torch-other": Case("torch", {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}),
    "keras-defaults": Case("keras", {}),
    "keras-decay": Case("keras", {"weight_decay": 0.004}),
    # An eps of the gradients' size and a maximum that decays fast: between two record
    # gradients, eps decays with the maximum if it is inside, and else does not.
    "keras-dense": Case(
        "keras",
        {"learning_rate": 0.1, "beta_1": 0.8, "beta_2": 0.9, "epsilon": 0.1},
        gradients="dense",
    ),
    "numpy-defaults": Case("numpy", {}, dtypes=("float64",)),
}


def decades():
    """A scale for each coordinate, in all from 1e-7 to 1e3; sign flips and zeros.

    The first coordinate never sees a gradient.
    """
    rng = np.random.default_rng(0)
    g = 10.0 ** (np.linspace(-6, 2, SIZE) + rng.uniform(-1, 1, (STEPS, SIZE)))
    g *= rng.choice([-1, 1], g.shape)
    g[rng.random(g.shape) < 0.15] = 0
    g[:, 0] = 0
    return g


def dense():
    """Every gradient between 1e-3 and 1, mostly of its coordinate's sign."""
    rng = np.random.default_rng(1)
    g = 10.0 ** rng.uniform(-3, 0, (STEPS, SIZE))
    return g * rng.choice([-1, 1], g.shape, p=[0.25, 0.75]) * rng.choice([-1, 1], SIZE)


def initial():
    """Initial parameters of both signs, of magnitudes from 1/2 to 2."""
    rng = np.random.default_rng(2)
    return rng.uniform(0.5, 2, SIZE) * rng.choice([-1, 1], SIZE)


class Adamax:
    """AdaMax in NumPy as a stateful class, from which this package began."""

    def __init__(self, learning_rate=1e-3, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
        self.learning_rate = learning_rate
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.t = 0
        self.m = 0.0
        self.u = 0.0

    def update(self, theta, gradient):
        """The parameters after one more step."""
        self.t += 1
        self.m = self.beta_1 * self.m + (1 - self.beta_1) * gradient
        self.u = np.maximum(self.beta_2 * self.u, np.abs(gradient))
        m_hat = self.m / (1 - self.beta_1**self.t)
        return theta - self.learning_rate * m_hat / (self.u + self.epsilon)


def run_numpy(initial, gradients, **options):
    """The trajectory of the NumPy class."""
    optimizer = Adamax(**options)
    theta = initial
    steps = []
    for g in gradients:
        theta = optimizer.update(theta, g)
        steps.append((theta, optimizer.m, optimizer.u))
    return _stack(steps)


def run_torch(initial, gradients, **options):
    """The trajectory of ``torch.optim.Adamax``."""
    import torch

    param = torch.nn.Parameter(torch.tensor(initial))
    optimizer = torch.optim.Adamax([param], **options)
    steps = []
    for g in gradients:
        param.grad = torch.tensor(g)
        optimizer.step()
        state = optimizer.state[param]
        arrays = param, state["exp_avg"], state["exp_inf"]
        steps.append([x.detach().numpy().copy() for x in arrays])
    return _stack(steps)


def run_keras(initial, gradients, **options):
    """The trajectory of ``keras.optimizers.Adamax``, on its JAX backend."""
    import keras

    dtype = str(initial.dtype)
    with _keras_precision(dtype):
        variable = keras.Variable(initial, dtype=dtype)
        optimizer = keras.optimizers.Adamax(**options)
        steps = []
        for g in gradients:
            optimizer.apply([keras.ops.convert_to_tensor(g, dtype)], [variable])
            _, _, m, u = optimizer.variables
            steps.append([np.array(x.value) for x in (variable, m, u)])
    return _stack(steps)


@contextlib.contextmanager
def _keras_precision(dtype):
    """Keras in one precision: it stores the learning rate as ``floatx``.

    With float32 there, parameters in float64 would move by float32(0.001).
    """
    import jax
    import keras

    before = keras.config.floatx()
    keras.config.set_floatx(dtype)
    try:
        with jax.enable_x64(dtype == "float64"):
            yield
    finally:
        keras.config.set_floatx(before)


def _stack(steps):
    return Trajectory(*(np.stack(field) for field in zip(*steps, strict=True)))


def record():
    """Runs every peer on its cases and writes one file for each."""
    DATA.mkdir(exist_ok=True)
    for name, case in CASES.items():
        g = {"decades": decades, "dense": dense}[case.gradients]()
        # Numbers that float32 holds: the same inputs, in either precision.
        arrays = {"initial": np.float32(initial()), "gradients": np.float32(g)}
        for dtype in case.dtypes:
            run = case.run(arrays["initial"], arrays["gradients"], dtype)
            arrays |= {f"{dtype}_{k}": v for k, v in run._asdict().items()}
        np.savez_compressed(
            DATA / f"{name}.npz",
            version=np.array(metadata.version(case.peer)),
            **arrays,
        )


if __name__ == "__main__":
    record()
