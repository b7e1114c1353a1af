"""Training a Flax NNX model, the state converted on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

from adamax_jax import adamax, convert_state, moments

FULL = {"m_dtype": "float32", "u_dtype": "float32"}
TWO_BYTES = {"m_dtype": "int8", "u_dtype": "uint8"}


@pytest.fixture(autouse=True)
def flax_needs_rank_promotion():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 32, rngs=rngs)
        self.output = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.output(nnx.relu(self.hidden(x)))


@nnx.jit
def step(model, optimizer, x, y):
    def cost(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    loss, gradients = nnx.value_and_grad(cost)(model)
    optimizer.update(model, gradients)
    return loss


def train(storages, steps=60):
    """The loss of each step, the state converted before each further storage."""
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
    model = MLP(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, adamax(0.01, **storages[0]), wrt=nnx.Param)
    losses = []
    for i, storage in enumerate(storages):
        if i > 0:
            state = convert_state(optimizer.opt_state, **storage)
            optimizer = nnx.Optimizer(model, adamax(0.01, **storage), wrt=nnx.Param)
            optimizer.opt_state = state
        losses += [float(step(model, optimizer, x, y)) for _ in range(steps)]
    return np.array(losses), optimizer


@pytest.mark.parametrize("storage", [FULL, TWO_BYTES], ids=["float32", "two bytes"])
def test_training(storage):
    losses, optimizer = train([storage])
    assert losses[-1] < 0.15 * losses[0]
    _, u = moments(optimizer.opt_state)
    assert all(np.all(np.asarray(x) > 0) for x in jax.tree.leaves(u))


def test_training_continues_through_conversions():
    """There and back again: the losses stay those of float32."""
    converted, _ = train([FULL, TWO_BYTES, FULL])
    straight, _ = train([FULL], steps=180)
    np.testing.assert_array_equal(converted[:61], straight[:61])
    np.testing.assert_allclose(converted, straight, rtol=0.05)
    assert converted[-1] < 0.05 * converted[0]
