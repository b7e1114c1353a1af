"""Other AdaMax optimizers, run on given gradients, and the record of their runs.

``python tests/peers.py`` runs them on the cases below and writes what they did to
``tests/data``, where the tests read it without them; ``python tests/peers.py NAME ...``
does so for some files only. That needs ``jax``, ``optax``, ``torch``, ``keras``,
``tensorflow``, ``mlx[cpu]`` and ``pytorch_optimizer``; the module itself only NumPy, in
which the peers are restated that cannot be installed beside the others.
"""

import contextlib
import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Keras reads this when it is imported, which only the functions below do.
os.environ["KERAS_BACKEND"] = "jax"

DATA = Path(__file__).parent / "data"
STEPS, SIZE = 60, 12


class Trajectory(NamedTuple):
    """The parameters and the state after each step: arrays of steps by size."""

    params: np.ndarray
    m: np.ndarray
    u: np.ndarray


class Case(NamedTuple):
    """A peer, its options, the gradients it is fed, its precisions, what is kept."""

    peer: str
    options: dict
    gradients: str = "decades"
    dtypes: tuple = ("float64", "float32")
    every: int = 1

    @property
    def module(self):
        """The module that must be installed to run the peer."""
        return "numpy" if self.peer in RESTATED else self.peer

    def run(self, initial, gradients, dtype):
        """What is kept of the installed peer's trajectory, computed in ``dtype``."""
        run = PEERS[self.peer]
        return self.keep(
            run(
                np.asarray(initial, dtype), np.asarray(gradients, dtype), **self.options
            )
        )

    def keep(self, trajectory):
        """Each ``every``-th step, which suffices, as an error of one step stays."""
        return Trajectory(*(x[self.every - 1 :: self.every] for x in trajectory))


TORCH_DENSE = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.1, "weight_decay": 0.1}
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
    "tensorflow-defaults": Case("tensorflow", {}, every=10),
    "tensorflow-dense": Case(
        "tensorflow",
        {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "epsilon": 0.1},
        gradients="dense",
        every=10,
    ),
    # MLX has no float64 on some of its devices.
    "mlx-defaults": Case("mlx", {"learning_rate": 1e-3}, dtypes=("float32",), every=10),
    "mlx-dense": Case(
        "mlx",
        {"learning_rate": 0.1, "betas": [0.8, 0.9], "eps": 0.1},
        gradients="dense",
        dtypes=("float32",),
        every=10,
    ),
    "optax-dense": Case(
        "optax",
        {"learning_rate": 0.1, "b1": 0.8, "b2": 0.9, "eps": 0.1},
        gradients="dense",
        every=10,
    ),
    "optax-decay": Case(
        "optax", {"learning_rate": 2e-3, "weight_decay": 0.1}, every=10
    ),
    "pytorch_optimizer-l2": Case("pytorch_optimizer", {"weight_decay": 0.1}, every=10),
    "pytorch_optimizer-dense": Case(
        "pytorch_optimizer",
        TORCH_DENSE | {"weight_decouple": True},
        gradients="dense",
        every=10,
    ),
    "fairseq-dense": Case("fairseq", TORCH_DENSE, gradients="dense", every=10),
    "fairseq-uncorrected": Case(
        "fairseq", {"weight_decay": 0.1, "bias_correction": False}, every=10
    ),
    "mt_dnn-defaults": Case("mt_dnn", {}, every=10),
    "mt_dnn-dense": Case("mt_dnn", TORCH_DENSE, gradients="dense", every=10),
    "paddle-dense": Case(
        "paddle", {}, gradients="dense", dtypes=("float32",), every=10
    ),
    # A floor of 0.001 / (1 - 0.8) = 0.005, to which the maximum falls within the run.
    "paddle-vanishing": Case(
        "paddle",
        {"learning_rate": 0.1, "beta1": 0.5, "beta2": 0.8, "epsilon": 1e-3},
        gradients="vanishing",
        every=10,
    ),
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


def vanishing():
    """Gradients as above, and of 1e-4 of their size after the tenth step."""
    g = dense()
    g[10:] *= 1e-4
    return g


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

    return _run_torch(torch.optim.Adamax, initial, gradients, options)


def run_pytorch_optimizer(initial, gradients, **options):
    """The trajectory of the ``AdaMax`` of kozistr's package ``pytorch_optimizer``."""
    import pytorch_optimizer

    return _run_torch(pytorch_optimizer.AdaMax, initial, gradients, options)


def _run_torch(optimizer_class, initial, gradients, options):
    import torch

    param = torch.nn.Parameter(torch.tensor(initial))
    optimizer = optimizer_class([param], **options)
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
    import keras
    from versions import enable_x64

    before = keras.config.floatx()
    keras.config.set_floatx(dtype)
    try:
        with enable_x64(dtype == "float64"):
            yield
    finally:
        keras.config.set_floatx(before)


def run_tensorflow(initial, gradients, lr=1e-3, beta1=0.9, beta2=0.999, epsilon=1e-7):
    """The trajectory of TensorFlow's kernel, the one behind Keras's legacy Adamax.

    Nothing but the power of beta1 is left to the caller of ``ResourceApplyAdaMax``.
    """
    import tensorflow as tf

    var, m, v = (tf.Variable(x) for x in (initial, 0 * initial, 0 * initial))
    lr, beta1, beta2, epsilon = (
        tf.constant(x, var.dtype) for x in (lr, beta1, beta2, epsilon)
    )
    steps = []
    for t, grad in enumerate(gradients, start=1):
        tf.raw_ops.ResourceApplyAdaMax(
            var=var.handle,
            m=m.handle,
            v=v.handle,
            beta1_power=beta1 ** tf.cast(t, var.dtype),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            epsilon=epsilon,
            grad=grad,
        )
        steps.append([x.numpy() for x in (var, m, v)])
    return _stack(steps)


def run_mlx(initial, gradients, **options):
    """The trajectory of ``mlx.optimizers.Adamax``, on the CPU."""
    import mlx.core as mx
    import mlx.optimizers

    optimizer = mlx.optimizers.Adamax(**options)
    params = {"w": mx.array(initial)}
    steps = []
    with mx.stream(mx.cpu):
        for g in gradients:
            params = optimizer.apply_gradients({"w": mx.array(g)}, params)
            state = optimizer.state["w"]
            steps.append([np.array(x) for x in (params["w"], state["m"], state["v"])])
    return _stack(steps)


def run_optax(initial, gradients, **options):
    """The trajectory of ``optax.adamax``, or with weight decay ``optax.adamaxw``."""
    import jax
    import jax.numpy as jnp
    import optax
    from versions import enable_x64

    alias = optax.adamaxw if "weight_decay" in options else optax.adamax
    optimizer = alias(**options)
    steps = []
    # Optax's AdaMax is refused under strict promotion, under which the tests run.
    with (
        enable_x64(initial.dtype == np.float64),
        jax.numpy_dtype_promotion("standard"),
    ):
        params = jnp.asarray(initial)
        state = optimizer.init(params)
        update = jax.jit(optimizer.update)
        for g in gradients:
            updates, state = update(jnp.asarray(g), state, params)
            params = optax.apply_updates(params, updates)
            steps.append([np.array(x) for x in (params, state[0].mu, state[0].nu)])
    return _stack(steps)


def run_fairseq(
    p,
    gradients,
    lr=2e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    bias_correction=True,
):
    """The trajectory of fairseq's Adamax, restated and not run.

    From ``fairseq/optim/adamax.py`` of facebookresearch/fairseq, which computes in
    float32 alone.
    """
    beta1, beta2 = betas
    exp_avg = exp_inf = np.zeros_like(p)
    steps = []
    for step, grad in enumerate(gradients, start=1):
        exp_avg = beta1 * exp_avg + (1 - beta1) * grad
        exp_inf = np.maximum(beta2 * exp_inf, np.abs(grad))
        step_size = lr / (1 - beta1**step) if bias_correction else lr
        p = p - weight_decay * lr * p
        p = p - step_size * exp_avg / (exp_inf + eps)
        steps.append((p, exp_avg, exp_inf))
    return _stack(steps)


def run_mt_dnn(p, gradients, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
    """The trajectory of MT-DNN's AdamaxW, restated and not run.

    From ``mt_dnn/optim.py`` of namisan/mt-dnn. Its older ``module/bert_optim.py``
    is another rule: it has eps in both places and no bias correction.
    """
    beta1, beta2 = betas
    exp_avg = exp_inf = np.zeros_like(p)
    steps = []
    for step, grad in enumerate(gradients, start=1):
        p = (1 - lr * weight_decay) * p
        exp_avg = beta1 * exp_avg + (1 - beta1) * grad
        exp_inf = np.maximum(beta2 * exp_inf, np.abs(grad) + eps)
        clr = lr / (1 - beta1**step)
        p = p - clr * exp_avg / exp_inf
        steps.append((p, exp_avg, exp_inf))
    return _stack(steps)


def run_paddle(
    param, gradients, learning_rate=1e-3, beta1=0.9, beta2=0.999, epsilon=1e-8
):
    """The trajectory of ``paddle.optimizer.Adamax``, restated and not run.

    From ``paddle/phi/kernels/impl/adamax_kernel_impl.h`` of PaddlePaddle/Paddle. The
    package can be installed, but a process that imports TensorFlow before it aborts.
    """
    moment = inf_norm = np.zeros_like(param)
    steps = []
    for t, grad in enumerate(gradients, start=1):
        moment = beta1 * moment + (1 - beta1) * grad
        inf_norm = np.maximum(np.abs(grad), beta2 * inf_norm + epsilon)
        lr_t = learning_rate / (1 - beta1**t)
        param = param - lr_t * (moment / inf_norm)
        steps.append((param, moment, inf_norm))
    return _stack(steps)


def _stack(steps):
    return Trajectory(*(np.stack(field) for field in zip(*steps, strict=True)))


RESTATED = {"fairseq": run_fairseq, "mt_dnn": run_mt_dnn, "paddle": run_paddle}
PEERS = RESTATED | {
    "numpy": run_numpy,
    "torch": run_torch,
    "pytorch_optimizer": run_pytorch_optimizer,
    "keras": run_keras,
    "tensorflow": run_tensorflow,
    "mlx": run_mlx,
    "optax": run_optax,
}


class TorchModel(NamedTuple):
    """A model that PyTorch trained, and its optimizer in the middle of that.

    Attributes:
      x: The inputs of the regression, batch by features.
      y: Its targets, batch by outputs.
      names: The parameters' names, in the order of the optimizer's indices.
      params: For each name the parameter after 20, 21, ..., 40 steps, stacked.
      losses: The losses of those parameters.
      state_dict: The optimizer's after 20 steps, in the form of PyTorch's but with
        arrays of NumPy.
    """

    x: np.ndarray
    y: np.ndarray
    names: list
    params: dict
    losses: np.ndarray
    state_dict: dict


def record_torch_model():
    """Trains a perceptron in PyTorch for 40 steps and writes the latter 20."""
    import torch

    rng = np.random.default_rng(3)
    x = rng.normal(size=(32, 8))
    y = np.tanh(x @ rng.normal(size=(8, 3))) + 0.1 * rng.normal(size=(32, 3))
    x, y = np.float32(x), np.float32(y)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)
    )
    optimizer = torch.optim.Adamax(model.parameters(), lr=1e-2)
    named = dict(model.named_parameters())
    arrays = {"x": x, "y": y, "names": np.array(list(named)), "losses": []}
    arrays |= {f"params_{name}": [] for name in named}
    for step in range(41):
        loss = torch.nn.functional.mse_loss(model(torch.tensor(x)), torch.tensor(y))
        if step == 20:
            # Copied on the way: the state dict shares the optimizer's tensors.
            state_dict = optimizer.state_dict()
            arrays["param_groups"] = json.dumps(state_dict["param_groups"])
            for i, state in state_dict["state"].items():
                arrays |= {f"state_{i}_{k}": v.numpy().copy() for k, v in state.items()}
        if step >= 20:
            arrays["losses"].append(loss.item())
            for name, param in named.items():
                arrays[f"params_{name}"].append(param.detach().numpy().copy())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    np.savez_compressed(
        DATA / "torch-model.npz", version=np.array(metadata.version("torch")), **arrays
    )


def torch_model():
    """The recorded :class:`TorchModel`."""
    with np.load(DATA / "torch-model.npz", allow_pickle=False) as file:
        names = [str(name) for name in file["names"]]
        fields = ("step", "exp_avg", "exp_inf")
        state = {
            i: {field: file[f"state_{i}_{field}"] for field in fields}
            for i in range(len(names))
        }
        param_groups = json.loads(str(file["param_groups"]))
        # JSON has no tuples.
        param_groups = [
            group | {"betas": tuple(group["betas"])} for group in param_groups
        ]
        return TorchModel(
            x=file["x"],
            y=file["y"],
            names=names,
            params={name: file[f"params_{name}"] for name in names},
            losses=file["losses"],
            state_dict={"state": state, "param_groups": param_groups},
        )


def record(names):
    """Runs the peers of these files, or of all, and writes the files."""
    DATA.mkdir(exist_ok=True)
    for name in names or [*CASES, "torch-model"]:
        if name == "torch-model":
            record_torch_model()
            continue
        case = CASES[name]
        makers = {"decades": decades, "dense": dense, "vanishing": vanishing}
        g = makers[case.gradients]()
        # Numbers that float32 holds: the same inputs, in either precision.
        arrays = {"initial": np.float32(initial()), "gradients": np.float32(g)}
        for dtype in case.dtypes:
            run = case.run(arrays["initial"], arrays["gradients"], dtype)
            arrays |= {f"{dtype}_{k}": v for k, v in run._asdict().items()}
        # TensorFlow's module is in one of several distributions.
        distribution, *_ = metadata.packages_distributions()[case.module]
        np.savez_compressed(
            DATA / f"{name}.npz",
            version=np.array(metadata.version(distribution)),
            **arrays,
        )


if __name__ == "__main__":
    record(sys.argv[1:])
