"""Training a task with an optimizer."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adamax_jax._tasks import Problem, Task


class Trainer:
    """Trains one problem with one optimizer: compiled once.

    One seed means the same weights, data and noise for all optimizers.
    """

    def __init__(
        self,
        problem: Problem,
        task: Task,
        make_optimizer: Callable[[Any], optax.GradientTransformation],
        steps: int,
    ):
        self._problem = problem
        self._batches = steps, task.batch
        self._examples = jax.tree.map(jnp.asarray, problem.examples)
        self._make_optimizer = lambda learning_rate: make_optimizer(
            task.schedule(learning_rate, steps)
        )
        self._train = jax.jit(self._scan)
        params = jax.eval_shape(problem.init, jax.random.key(0))
        state = jax.eval_shape(self._make_optimizer(task.learning_rate).init, params)
        self.parameters = sum(x.size for x in jax.tree.leaves(params))
        self.state_bytes = sum(
            x.size * x.dtype.itemsize for x in jax.tree.leaves(state)
        )

    def __call__(self, seed: int, learning_rate: float) -> tuple[Any, jax.Array]:
        """The trained parameters and the loss of each step."""
        init_key, noise_key = jax.random.split(jax.random.key(seed))
        order = order_of(len(jax.tree.leaves(self._examples)[0]), *self._batches, seed)
        params = self._problem.init(init_key)
        return self._train(params, self._examples, order, noise_key, learning_rate)

    def _scan(self, params, examples, order, key, learning_rate):
        optimizer = self._make_optimizer(learning_rate)

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


def order_of(examples: int, steps: int, batch: int, seed: int) -> np.ndarray:
    """Which examples each step sees: whole passes, each shuffled anew."""
    shuffle = np.random.default_rng(seed)
    passes = math.ceil(steps * batch / examples)
    order = np.concatenate([shuffle.permutation(examples) for _ in range(passes)])
    return order[: steps * batch].reshape(steps, batch).astype(np.int32)
