"""Trainings of other kinds than those of ``tasks``, each of a few seconds at most.

Rare rows of embeddings, skewed or heavy-tailed gradients, weight decay, and losses that
are no classification: where an optimizer that was chosen elsewhere may fail.
"""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np

from adamax_jax._lab.tasks import (
    TASKS,
    Problem,
    Task,
    cross_entropy,
    digits,
    library,
    log_likelihood,
    text_as_numbers,
)


def _dense(key, *sizes):
    """Layers from each size to the next: weights by Glorot and Bengio, biases of 0."""
    keys = jax.random.split(key, len(sizes) - 1)
    make = jax.nn.initializers.glorot_uniform()
    return [
        {"kernel": make(k, (n, m)), "bias": jnp.zeros(m)}
        for k, n, m in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def _perceptron(layers, x, activation):
    for layer in layers[:-1]:
        x = activation(x @ layer["kernel"] + layer["bias"])
    return x @ layers[-1]["kernel"] + layers[-1]["bias"]


def _words(vocabulary: int) -> list[np.ndarray]:
    """Each file of Python's library as numbers of its words; 0 for the rarer ones."""
    files = [re.findall(r"[a-zA-Z_]+", text) for text in library()]
    counts = Counter(word for words in files for word in words)
    common = counts.most_common(vocabulary - 1)
    numbers = {word: n for n, (word, _) in enumerate(common, start=1)}
    return [np.array([numbers.get(w, 0) for w in words], np.int32) for words in files]


def _skip_gram() -> Problem:
    """Words from their neighbours, with 5 negative samples; most words are rare."""
    words, width, negatives = 2000, 16, 5
    text = np.concatenate(_words(words))
    shifts = (-2, -1, 1, 2)
    pairs = np.concatenate(
        [np.stack([text, np.roll(text, shift)], 1) for shift in shifts]
    )
    pairs = np.random.default_rng(0).permutation(pairs)
    frequency = np.bincount(text, minlength=words) ** 0.75
    below = np.float32(np.cumsum(frequency / frequency.sum()))
    test = pairs[-10_000:]

    def init(key):
        return {
            "word_embedding": jax.random.normal(key, (words, width)) / width,
            "neighbour_embedding": jnp.zeros((words, width)),
        }

    def loss(params, pairs, key):
        """In nats per pair, the negative samples included."""
        word = params["word_embedding"][pairs[:, 0]]
        drawn = jnp.searchsorted(
            below, jax.random.uniform(key, (len(pairs), negatives))
        ).clip(max=words - 1)
        near = jnp.sum(word * params["neighbour_embedding"][pairs[:, 1]], 1)
        far = jnp.sum(word[:, None] * params["neighbour_embedding"][drawn], 2)
        return jnp.mean(jax.nn.softplus(-near) + jax.nn.softplus(far).sum(1))

    return Problem(
        init, loss, pairs[:-10_000], lambda p: (loss(p, test, jax.random.key(0)),)
    )


def _bag() -> Problem:
    """Of which file 16 words in a row are, from the mean of their embeddings."""
    words, width, length = 4000, 16, 16
    files = _words(words)
    rows = [x[: len(x) // length * length].reshape(-1, length) for x in files]
    labels = np.repeat(np.arange(len(rows), dtype=np.int32), [len(x) for x in rows])
    order = np.random.default_rng(0).permutation(len(labels))
    rows, labels = np.concatenate(rows)[order], labels[order]
    held_out = len(rows) // 5

    def init(key):
        return {
            "embedding": 0.1 * jax.random.normal(key, (words, width)),
            "output": _dense(key, width, len(files)),
        }

    def loss(params, batch, key=None):
        rows, labels = batch
        means = params["embedding"][rows].mean(1)
        return cross_entropy(_perceptron(params["output"], means, jnp.tanh), labels)

    test = rows[:held_out], labels[:held_out]
    train = rows[held_out:], labels[held_out:]
    return Problem(init, loss, train, lambda params: (loss(params, test),))


def _hash_grid() -> Problem:
    """An image as a function of the place: features in hashed grids (Mueller 2022)."""
    from sklearn.datasets import load_sample_image

    image = np.float32(load_sample_image("china.jpg")[::3, ::3] / 255)
    places = np.moveaxis(np.indices(image.shape[:2]), 0, -1).reshape(-1, 2)
    places = np.float32(places / max(image.shape))
    colors = image.reshape(-1, 3)
    resolutions, entries, features = (8, 16, 32, 64, 128), 2**11, 2

    def init(key):
        shape = len(resolutions), entries, features
        table = 1e-4 * jax.random.uniform(key, shape, minval=-1)
        return {"embedding": table, "layers": _dense(key, shape[0] * features, 32, 3)}

    def color(params, places):
        found = []
        for table, resolution in zip(params["embedding"], resolutions, strict=True):
            corner = jnp.floor(places * resolution)
            part = places * resolution - corner
            value = 0.0
            for i in (0, 1):
                for j in (0, 1):
                    x, y = (corner + jnp.array([i, j], corner.dtype)).T.astype(np.int32)
                    row = (x + y * (resolution + 1)) % entries
                    if (resolution + 1) ** 2 > entries:
                        row = (x ^ (y * 19349663)) % entries
                    sides = jnp.abs(jnp.array([1 - i, 1 - j], part.dtype) - part)
                    value += sides.prod(1, keepdims=True) * table[row]
            found.append(value)
        return _perceptron(params["layers"], jnp.concatenate(found, 1), jax.nn.relu)

    def squared_error(params, places, colors):
        return jnp.mean((color(params, places) - colors) ** 2)

    return Problem(
        init,
        lambda params, batch, key: squared_error(params, *batch),
        (places, colors),
        lambda params: (10 * jnp.log10(squared_error(params, places, colors)),),
    )


def _variational() -> Problem:
    """Bayesian softmax regression of the digits: a mean and a log deviation per weight.

    The loss is the negative ELBO of all the data, estimated on a batch and one sample
    of the weights; the prior is a standard normal distribution.
    """
    data = digits()
    total = len(data.train_labels)

    def init(key):
        zeros = jnp.zeros((65, 10))
        return {"mean": zeros, "log_deviation": zeros - 3.0}

    def negative_elbo(params, images, labels, key):
        mean, log = params["mean"], params["log_deviation"]
        weights = mean + jnp.exp(log) * jax.random.normal(key, mean.shape)
        logits = images @ weights[:64] + weights[64]
        kl = (jnp.exp(2 * log) + mean**2 - 1) / 2 - log
        return total * cross_entropy(logits, labels) + jnp.sum(kl)

    def measure(params):
        def of_sample(key):
            return negative_elbo(params, data.train_images, data.train_labels, key)

        return (jax.vmap(of_sample)(jax.random.split(jax.random.key(0), 64)).mean(),)

    return Problem(
        init,
        lambda params, batch, key: negative_elbo(params, batch[0], batch[1], key),
        (data.train_images, data.train_labels),
        measure,
    )


def _physics() -> Problem:
    """u'' - u = f on an interval, u(0) = u(1) = 0, by a physics-informed network."""

    def exact(x):
        return jnp.sin(2 * jnp.pi * x) + 0.3 * jnp.sin(6 * jnp.pi * x)

    def u(params, x):
        return x * (1 - x) * _perceptron(params, x[None] * 2 - 1, jnp.tanh)[0]

    def left_side(u, x):
        return jax.grad(jax.grad(u))(x) - u(x)

    def loss(params, batch, key):
        # A place in each of so many parts of the interval.
        x = (batch + jax.random.uniform(key, batch.shape)) / 64
        of_net = jax.vmap(lambda x: left_side(lambda x: u(params, x), x))(x)
        return jnp.mean((of_net - jax.vmap(lambda x: left_side(exact, x))(x)) ** 2)

    def measure(params):
        x = jnp.linspace(0, 1, 257)
        error = jax.vmap(lambda x: u(params, x))(x) - exact(x)
        ratio = jnp.mean(error**2) / jnp.mean(exact(x) ** 2)
        return (jnp.log10(ratio) / 2,)

    return Problem(
        lambda key: _dense(key, 1, 32, 32, 1),
        loss,
        np.arange(64, dtype=np.float32),
        measure,
    )


def _convolutions() -> Problem:
    """Digits, each moved at random, by convolutions with batch normalization."""
    data = digits()

    def init(key):
        make = jax.nn.initializers.he_normal()
        keys = jax.random.split(key, 3)
        return {
            "layers": [
                {
                    "kernel": make(k, (3, 3, n, m)),
                    "scale": jnp.ones(m),
                    "bias": jnp.zeros(m),
                }
                for k, n, m in zip(keys[:2], (1, 8), (8, 16), strict=True)
            ],
            "output": _dense(keys[2], 16, 10),
        }

    def logits(params, images):
        x = images.reshape(-1, 8, 8, 1)
        for layer in params["layers"]:
            x = jax.lax.conv_general_dilated(
                x,
                layer["kernel"],
                (2, 2),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x = jax.nn.standardize(x, axis=(0, 1, 2))
            x = jax.nn.relu(x * layer["scale"] + layer["bias"])
        return _perceptron(params["output"], x.mean((1, 2)), jax.nn.relu)

    def loss(params, batch, key):
        images, labels = batch
        moves = jax.random.randint(key, (2, len(images)), -1, 2)
        roll = jax.vmap(lambda image, dy, dx: jnp.roll(image, (dy, dx), (0, 1)))
        moved = roll(images.reshape(-1, 8, 8), *moves)
        return cross_entropy(logits(params, moved), labels)

    def measure(params):
        # The statistics of all test images.
        return (cross_entropy(logits(params, data.test_images), data.test_labels),)

    return Problem(init, loss, (data.train_images, data.train_labels), measure)


def _cart_pole() -> Problem:
    """A pole kept upright by a policy that learns by its gradient (REINFORCE).

    The rewards that it learns from have noise with heavy tails: Student's t, of two
    degrees of freedom.
    """
    episodes, length = 8, 200

    def move(state, right):
        """The equations of Barto, Sutton and Anderson (1983), in steps of 0.02 s."""
        _, dx, angle, turn = state
        sine, cosine = jnp.sin(angle), jnp.cos(angle)
        push = (jnp.where(right, 10.0, -10.0) + 0.05 * turn**2 * sine) / 1.1
        spin = (9.8 * sine - cosine * push) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
        slide = push - 0.05 * spin * cosine / 1.1
        return state + 0.02 * jnp.stack([dx, slide, turn, spin])

    def play(params, key):
        """The states, the choices, and whether the pole stood before and after each."""

        def step(carry, key):
            state, stands = carry
            right = jax.random.bernoulli(key, jax.nn.sigmoid(preference(params, state)))
            after = move(state, right)
            x, _, angle, _ = after
            still = stands & (jnp.abs(x) < 2.4) & (jnp.abs(angle) < 0.21)
            return (jnp.where(still, after, state), still), (
                state,
                right,
                stands,
                still,
            )

        keys = jax.random.split(key, length + 1)
        start = jax.random.uniform(keys[0], (4,), minval=-0.05, maxval=0.05)
        return jax.lax.scan(step, (start, jnp.array(True)), keys[1:])[1]

    def preference(params, state):
        return _perceptron(params, state, jnp.tanh)[..., 0]

    def loss(params, batch, key):
        fixed = jax.lax.stop_gradient(params)
        keys = jax.random.split(key, episodes)
        states, right, before, after = jax.vmap(lambda k: play(fixed, k))(keys)
        noise = jax.random.t(jax.random.fold_in(key, 1), 2.0, after.shape)
        rewards = jnp.where(before, after + 2 * noise, 0.0)
        to_come = jnp.cumsum(rewards[:, ::-1], 1)[:, ::-1]
        gain = (to_come - to_come.mean(0)) / length
        chosen = jax.nn.log_sigmoid(
            jnp.where(right, 1.0, -1.0) * preference(params, states)
        )
        surrogate = -jnp.sum(jnp.where(before, gain * chosen, 0.0)) / episodes
        lost = -after.sum(1).mean()
        return surrogate - jax.lax.stop_gradient(surrogate) + lost

    def measure(params):
        keys = jax.random.split(jax.random.key(0), 256)
        after = jax.vmap(lambda k: play(params, k))(keys)[3]
        return (-after.sum(1).mean(),)

    return Problem(
        lambda key: _dense(key, 4, 16, 1), loss, np.zeros(1, np.float32), measure
    )


def _characters() -> Problem:
    """A gated recurrent network writes Python, character by character."""
    width, context = 48, 24
    text, symbols = text_as_numbers()
    windows = np.lib.stride_tricks.sliding_window_view(text, context + 1)
    held_out = len(text) // 10
    train = windows[: -held_out - context : context]
    test = windows[-held_out::context][:512]

    def init(key):
        keys = jax.random.split(key, 3)
        return {
            "embedding": jax.random.normal(keys[0], (symbols, width)),
            "gates": _dense(keys[1], 2 * width, 2 * width),
            "output": _dense(keys[2], width, symbols),
        }

    def loss(params, windows, key=None):
        """In nats per character."""
        seen = params["embedding"][windows[:, :-1].T]

        def step(hidden, now):
            both = _perceptron(params["gates"], jnp.concatenate([hidden, now], 1), None)
            gate, new = jnp.split(both, 2, axis=1)
            gate = jax.nn.sigmoid(gate)
            hidden = gate * hidden + (1 - gate) * jnp.tanh(new)
            return hidden, hidden

        start = jnp.zeros((len(windows), width))
        hidden = jax.lax.scan(step, start, seen, unroll=4)[1]
        logits = _perceptron(params["output"], hidden, None)
        return cross_entropy(logits, windows[:, 1:].T)

    return Problem(init, loss, train, lambda params: (loss(params, test),))


def _spiking() -> Problem:
    """Digits by neurons that leak, spike and are reset, for 16 steps of time.

    The derivative of a spike is a surrogate, that of a fast sigmoid (Zenke, 2018).
    """
    data = digits()
    hidden, duration, leak = 64, 16, 0.9

    @jax.custom_jvp
    def spike(v):
        return jnp.where(v > 0, 1.0, 0.0)

    @spike.defjvp
    def _(primals, tangents):
        (v,), (dv,) = primals, tangents
        return spike(v), dv / (1 + 5 * jnp.abs(v)) ** 2

    def logits(params, images, key):
        first, last = params
        rates = jax.random.uniform(key, (duration, *images.shape))
        spikes = jnp.where(rates < images, 1.0, 0.0)

        def step(v, inputs):
            v = leak * v + inputs
            fired = spike(v - 1)
            return v - fired, fired

        start = jnp.zeros((len(images), hidden))
        inputs = spikes @ first["kernel"] + first["bias"]
        fired = jax.lax.scan(step, start, inputs, unroll=4)[1]
        return fired.mean(0) @ last["kernel"] + last["bias"]

    def measure(params):
        found = logits(params, data.test_images, jax.random.key(0))
        return (cross_entropy(found, data.test_labels),)

    return Problem(
        lambda key: _dense(key, 64, hidden, 10),
        lambda params, batch, key: cross_entropy(
            logits(params, batch[0], key), batch[1]
        ),
        (data.train_images, data.train_labels),
        measure,
    )


def _mixer() -> Problem:
    """Digits in 16 patches by two layers that mix the patches, then the features."""
    data = digits()
    patches, width = 16, 24

    def as_patches(images):
        x = images.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4)
        return x.reshape(-1, patches, 4)

    def init(key):
        keys = jax.random.split(key, 6)
        return {
            "embed": _dense(keys[0], 4, width),
            "layers": [
                {
                    "scales": jnp.ones((2, width)),
                    "patches": _dense(keys[i], patches, 32, patches),
                    "features": _dense(keys[i + 1], width, 48, width),
                }
                for i in (1, 3)
            ],
            "output": _dense(keys[5], width, 10),
        }

    def loss(params, batch, key=None):
        images, labels = batch
        x = _perceptron(params["embed"], as_patches(images), None)
        for layer in params["layers"]:
            normal = jax.nn.standardize(x) * layer["scales"][0]
            mixed = _perceptron(layer["patches"], normal.swapaxes(1, 2), jax.nn.gelu)
            x = x + mixed.swapaxes(1, 2)
            normal = jax.nn.standardize(x) * layer["scales"][1]
            x = x + _perceptron(layer["features"], normal, jax.nn.gelu)
        logits = _perceptron(params["output"], jax.nn.standardize(x).mean(1), None)
        return cross_entropy(logits, labels)

    train = data.train_images, data.train_labels
    test = data.test_images, data.test_labels
    return Problem(init, loss, train, lambda params: (loss(params, test),))


def _autoencoder() -> Problem:
    """A variational autoencoder of the digits, whose pixels are binomial."""
    data, latent = digits(), 8

    def init(key):
        keys = jax.random.split(key)
        return [_dense(keys[0], 64, 64, 2 * latent), _dense(keys[1], latent, 64, 64)]

    def negative_elbo(params, images, key):
        """In nats per image."""
        encoder, decoder = params
        mean, log = jnp.split(_perceptron(encoder, images, jax.nn.relu), 2, axis=1)
        code = mean + jnp.exp(log) * jax.random.normal(key, mean.shape)
        logits = _perceptron(decoder, code, jax.nn.relu)
        likelihood = log_likelihood(logits, images)
        kl = (jnp.exp(2 * log) + mean**2 - 1) / 2 - log
        return (jnp.sum(kl) - jnp.sum(likelihood)) / len(images)

    def measure(params):
        keys = jax.random.split(jax.random.key(0), 16)
        bounds = jax.vmap(lambda key: negative_elbo(params, data.test_images, key))
        return (bounds(keys).mean(),)

    return Problem(init, negative_elbo, data.train_images, measure)


def _recommender() -> Problem:
    """Clicks of users on items. Half of the items are in less than 5 % of the batches.

    Not among the trainings from which a setting was chosen: its rows are rarer.
    """
    rows, width, train, test = 1500, 8, 600_000, 50_000
    random = np.random.default_rng(0)
    pairs, tables = [], []
    for power in (0.8, 1.0):
        frequency = np.arange(1.0, rows + 1) ** -power
        drawn = random.choice(rows, train + test, p=frequency / frequency.sum())
        pairs.append(drawn.astype(np.int32))
        tables.append(random.normal(size=(rows, width)) / width**0.25)
    users, items = pairs
    logits = (tables[0][users] * tables[1][items]).sum(1)
    clicks = random.random(train + test) < 1 / (1 + np.exp(-logits))
    clicks = clicks.astype(np.float32)

    def init(key):
        keys = jax.random.split(key)
        return {
            f"{name}_embedding": {
                "factors": 0.1 * jax.random.normal(k, (rows, width)),
                "bias": jnp.zeros(rows),
            }
            for name, k in zip(("user", "item"), keys, strict=True)
        }

    def cross_entropy(params, users, items, clicks):
        """In nats per click."""
        user = jax.tree.map(lambda x: x[users], params["user_embedding"])
        item = jax.tree.map(lambda x: x[items], params["item_embedding"])
        logits = jnp.sum(user["factors"] * item["factors"], 1)
        logits = logits + user["bias"] + item["bias"]
        return jnp.mean(jax.nn.softplus(logits) - clicks * logits)

    examples = users, items, clicks
    held_out = [x[train:] for x in examples]
    return Problem(
        init,
        lambda params, batch, key: cross_entropy(params, *batch),
        tuple(x[:train] for x in examples),
        lambda params: (cross_entropy(params, *held_out),),
    )


# Each with its metric, learning rate, steps and batch size.
VARIED = {
    "skip-gram": Task(_skip_gram, ("held-out loss, nats per pair",), 1e-2, 1500, 256),
    "bag of words": Task(_bag, ("held-out loss, nats",), 1e-2, 600, 64),
    "hash grid": Task(_hash_grid, ("error, dB",), 1e-2, 600, 512),
    "variational": Task(_variational, ("negative ELBO, nats",), 1e-2, 1500, 64),
    "physics": Task(_physics, ("error, log10",), 4e-3, 2000, 64),
    "convolutions": Task(_convolutions, ("test loss, nats",), 1e-2, 400, 64),
    "cart-pole": Task(_cart_pole, ("return, negated",), 2e-2, 40, 1, cosine=False),
    "characters": Task(
        _characters, ("held-out loss, nats",), 1e-2, 500, 32, weight_decay=0.1
    ),
    "spiking": Task(_spiking, ("test loss, nats",), 8e-3, 400, 32),
    "mixer": Task(_mixer, ("test loss, nats",), 8e-3, 500, 32, weight_decay=0.1),
    "autoencoder": Task(
        _autoencoder, ("test negative ELBO, nats per image",), 8e-3, 1000, 64
    ),
    "flow, short": TASKS["flow"]._replace(steps=800),
    "recommender": Task(_recommender, ("held-out loss, nats",), 8e-3, 6000, 256),
}
