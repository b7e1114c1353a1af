"""Training a task with an optimizer."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adamax_jax._lab.tasks import Problem, Task

CURVE_POINTS = 200

# From a learning rate, or a schedule, to an optimizer.
Method = Callable[[Any], optax.GradientTransformation]


@dataclass(frozen=True)
class InHalf:
    """A method for a model whose weights, activations and gradients are bfloat16."""

    make: Method

    def __call__(self, learning_rate: Any) -> optax.GradientTransformation:
        return self.make(learning_rate)


@dataclass
class Run:
    """One training."""

    task: str
    method: str
    learning_rate: float
    seed: int
    # As the task's `metrics` names them.
    metrics: list[float]
    state_bytes: int
    parameters: int
    seconds: float
    # The training loss of every step.
    losses: np.ndarray

    @property
    def bytes_per_parameter(self) -> float:
        """Of the optimizer's state."""
        return self.state_bytes / self.parameters

    def numbers(self) -> dict[str, Any]:
        """For JSON, the losses few: means over ``curve_every`` steps each."""
        result = asdict(self)
        losses = result.pop("losses")
        every = math.ceil(len(losses) / CURVE_POINTS)
        parts = np.split(losses, range(every, len(losses), every))
        curve = [float(f"{part.mean():.5g}") for part in parts]
        return result | {"curve_every": every, "curve": curve}


class Trainer:
    """Trains one problem with one optimizer: compiled once for all learning rates.

    One seed means the same weights, data and noise for all optimizers.
    """

    def __init__(self, problem: Problem, task: Task, method: Method, steps: int):
        self._problem = problem
        self._dtype = jnp.bfloat16 if isinstance(method, InHalf) else jnp.float32
        # Also of a bfloat16 model, in float32: what its weights are worth.
        self._measure = jax.jit(
            lambda params: problem.measure(_floats_as(jnp.float32, params))
        )
        self._examples = _floats_as(
            self._dtype, jax.tree.map(jnp.asarray, problem.examples)
        )
        self._batches = steps, task.batch
        self._task, self._method = task, method
        self._scan = jax.jit(self._steps)

    def run(
        self,
        task_name: str,
        method_name: str,
        learning_rate: float,
        seed: int,
        **numbers: float,
    ) -> Run:
        """A training and its metrics, under the names of the task and the method.

        The numbers are those of the method that are traced, such as ``b2``.
        """
        start = time.perf_counter()
        params, losses = self.train(learning_rate, seed, **numbers)
        state = jax.eval_shape(self._optimizer(learning_rate, numbers).init, params)
        return Run(
            task=task_name,
            method=method_name,
            learning_rate=learning_rate,
            seed=seed,
            metrics=[float(x) for x in self._measure(params)],
            state_bytes=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
            parameters=sum(x.size for x in jax.tree.leaves(params)),
            seconds=time.perf_counter() - start,
            losses=np.asarray(losses),
        )

    def train(
        self, learning_rate: float, seed: int, **numbers: float
    ) -> tuple[Any, jax.Array]:
        """The trained parameters and the loss of each step."""
        init_key, noise_key = jax.random.split(jax.random.key(seed))
        order = order_of(len(jax.tree.leaves(self._examples)[0]), *self._batches, seed)
        params = self._init(init_key)
        return self._scan(
            params, self._examples, order, noise_key, learning_rate, numbers
        )

    def _optimizer(self, learning_rate, numbers):
        task, steps = self._task, self._batches[0]
        optimizer = self._method(task.schedule(learning_rate, steps), **numbers)
        if not task.weight_decay:
            return optimizer
        # The same of all methods, whatever their learning rates.
        schedule = task._replace(cosine=True).schedule(task.learning_rate, steps)
        decay = optax.inject_hyperparams(optax.add_decayed_weights)(
            lambda t: -task.weight_decay * schedule(t)
        )
        of_matrices = optax.masked(
            decay, lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
        )
        return optax.chain(optimizer, of_matrices)

    def _init(self, key):
        return _floats_as(self._dtype, self._problem.init(key))

    def _steps(self, params, examples, order, key, learning_rate, numbers):
        optimizer = self._optimizer(learning_rate, numbers)

        def step(carry, now):
            params, state = carry
            t, chosen = now
            batch = jax.tree.map(lambda x: x[chosen], examples)
            loss, gradients = jax.value_and_grad(self._problem.loss)(
                params, batch, jax.random.fold_in(key, t)
            )
            updates, state = optimizer.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), loss

        start = params, optimizer.init(params)
        (params, _), losses = jax.lax.scan(step, start, (jnp.arange(len(order)), order))
        return params, losses


def _floats_as(dtype, tree):
    """A tree with its floating-point arrays in a dtype."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def order_of(examples: int, steps: int, batch: int, seed: int) -> np.ndarray:
    """Which examples each step sees: whole passes, each shuffled anew."""
    shuffle = np.random.default_rng(seed)
    passes = math.ceil(steps * batch / examples)
    order = np.concatenate([shuffle.permutation(examples) for _ in range(passes)])
    return order[: steps * batch].reshape(steps, batch).astype(np.int32)
