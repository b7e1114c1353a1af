"""``python -m adamax_jax study``: its tasks, trainings, search, statistics, tables."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sequences import trajectory
from tables import squeezed

from adamax_jax import adamax, moments
from adamax_jax.__main__ import main
from adamax_jax._lab import study, tasks
from adamax_jax._lab.study import ALL_TASKS, Estimate, digits_to_show, estimate, show
from adamax_jax._lab.tasks import TASKS
from adamax_jax._lab.train import CURVE_POINTS, InHalf, Run, Trainer, order_of
from adamax_jax._lab.varied import VARIED

# Of Student's t, for an interval of 95 %.
T_OF_1, T_OF_4 = 12.706, 2.776
DIGITS = 1e-3


@pytest.fixture(autouse=True)
def lenient():
    """Flax's layers broadcast, and Optax's AdaMax promotes, which the suite refuses."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# Compiling the others takes longer.
SOME_LONG = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long) if name != "perceptron" else name
        for name in TASKS
    ],
)


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("perceptron", "bag of words")
        else pytest.param(name, marks=pytest.mark.long)
        for name in TASKS | VARIED
    ],
)
def test_a_task_learns_and_every_method_starts_alike(name):
    task = ALL_TASKS[name]
    steps = 8 if name in TASKS else task.steps
    problem = task.make()
    trainer = Trainer(problem, task, study.METHODS["AdaMax"], steps)
    run = trainer.run(name, "AdaMax", task.learning_rate, seed=0)
    assert run.losses.shape == (steps,)
    assert np.all(np.isfinite(run.losses))
    part = steps // 4
    assert np.mean(run.losses[-part:]) < np.mean(run.losses[:part])
    assert len(run.metrics) == len(task.metrics)
    assert np.all(np.isfinite(run.metrics))
    # Beside m and u a few single numbers: counts, u_scale, the rate of the decay.
    assert 0 <= run.state_bytes - 8 * run.parameters <= 24
    # Of all others, one that goes nowhere compiles fastest.
    other = Trainer(problem, task, lambda rate: optax.set_to_zero(), steps=1)
    _, losses = other.train(task.learning_rate, seed=0)
    assert losses[0] == pytest.approx(run.losses[0], rel=1e-6)


def test_a_seed_fixes_weights_data_and_noise_for_all_methods():
    task = TASKS["perceptron"]
    problem = task.make()
    ours, optaxs = (
        Trainer(problem, task, study.METHODS[method], steps=4)
        for method in ("AdaMax", "optax.adamax")
    )
    rate = task.learning_rate
    params, losses = ours.train(rate, 0)
    params_again, losses_again = ours.train(rate, 0)
    np.testing.assert_array_equal(losses, losses_again)
    jax.tree.map(np.testing.assert_array_equal, params, params_again)
    # These differ in rounding.
    np.testing.assert_allclose(optaxs.train(rate, 0)[1], losses, rtol=1e-4)
    assert ours.train(rate, 1)[1][0] != losses[0]


STEPS, EXAMPLES = 8, 5


def trainer_of_a_number(loss, method=lambda rate: optax.set_to_zero(), **changes):
    """What trains one random number on one example at a time; quickly compiled."""
    problem = tasks.Problem(
        init=jax.random.normal,
        # A gradient of 0 where the loss does not say otherwise.
        loss=lambda w, batch, key: loss(w, batch, key) + 0 * w,
        examples=np.arange(EXAMPLES, dtype=np.float32),
        measure=lambda w: (w,),
    )
    task = TASKS["flow"]._replace(batch=1, **changes)
    return Trainer(problem, task, method, STEPS)


def test_each_seed_has_weights_data_and_noise_of_its_own():
    def losses_of_two_seeds(loss):
        trainer = trainer_of_a_number(loss)
        return [np.asarray(trainer.train(0.1, seed)[1]) for seed in (0, 1)]

    one, another = losses_of_two_seeds(lambda w, batch, key: w)
    assert len(set(one)) == len(set(another)) == 1
    assert one[0] != another[0]
    one, another = losses_of_two_seeds(lambda w, batch, key: batch[0])
    for seed, seen in enumerate((one, another)):
        order = order_of(EXAMPLES, STEPS, batch=1, seed=seed)
        np.testing.assert_array_equal(seen, order.ravel())
    assert list(one) != list(another)
    noise = losses_of_two_seeds(lambda w, batch, key: jax.random.uniform(key))
    assert len(set(np.concatenate(noise))) == 2 * STEPS


def test_the_schedule_is_that_of_the_task():
    rate = 0.5
    for cosine in (False, True):
        trainer = trainer_of_a_number(lambda w, *_: w, optax.sgd, cosine=cosine)
        w, losses = trainer.train(rate, seed=0)
        schedule = TASKS["flow"]._replace(cosine=cosine).schedule(rate, STEPS)
        rates = [schedule(t) if cosine else schedule for t in range(STEPS)]
        fallen = -np.diff([*losses, w])
        np.testing.assert_allclose(fallen, rates, atol=1e-6)


def test_order_is_whole_passes():
    first, second = np.split(order_of(10, steps=5, batch=4, seed=0).ravel(), 2)
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(first) != list(second)


def test_a_warm_up_rises_and_what_follows_falls():
    wide = ALL_TASKS["transformer, wide"]
    rate, steps = 0.5, 20
    schedule = wide.schedule(rate, steps)
    rates = [float(schedule(t)) for t in range(steps + 1)]
    assert rates[:3] == pytest.approx([0, rate / (wide.warm_up * steps), rate])
    assert all(np.diff(rates[2:]) < 0)
    assert rates[-1] == pytest.approx(0)


def searched(cost, first=0):
    """The powers that a search visits, and where it ends."""
    costs = {}
    exponent = first
    while (exponent := study.next_exponent(costs, exponent)) not in costs:
        costs[exponent] = cost(exponent)
    return list(costs), exponent


@pytest.mark.parametrize(("first", "best"), [(0, -5), (0, 0), (0, 1), (2, -1), (2, 4)])
def test_the_search_ends_between_two_worse(first, best):
    visited, end = searched(lambda exponent: (exponent - best) ** 2, first)
    assert visited[0] == first and end == best
    assert {best - 1, best, best + 1} <= set(visited)
    # The way there, its two ends, and one step in the wrong direction.
    assert len(visited) <= abs(best - first) + 4


def test_a_search_without_end_is_given_up():
    """And one begins again below what diverged."""
    visited, end = searched(lambda exponent: -exponent)
    assert len(visited) == study.MOST_RATES and end == max(visited)
    visited, _ = searched(lambda e: math.inf)
    assert visited == list(range(0, -study.MOST_RATES, -1))
    visited, end = searched(lambda e: math.inf if e > -3 else (e + 4) ** 2)
    assert visited[:4] == [0, -1, -2, -3] and end == -4


def markdown(rows):
    return squeezed(study.markdown(rows))


def run_of(method, seed, metric, learning_rate=0.1, task="flow", losses=(1.0, 0.5)):
    return Run(
        task=task,
        method=method,
        learning_rate=learning_rate,
        seed=seed,
        metrics=[metric],
        state_bytes=80,
        parameters=10,
        seconds=0.0,
        losses=np.array(losses),
    )


def test_what_diverged_is_not_the_best():
    first = [1.0] * 20
    for losses in (first + [1.1] * 3, [*first, math.nan], [math.nan] * 23):
        assert study.cost(run_of("Adam", 0, 0.3, losses=losses)) == math.inf
    assert study.cost(run_of("Adam", 0, math.nan)) == math.inf
    assert study.cost(run_of("Adam", 0, 0.3, losses=first + [0.9] * 3)) == 0.3


@pytest.fixture
def trainings(monkeypatch):
    """What is trained, without training it: the best power of 2 is -1, Adam's 1."""
    done = []

    class FakeTrainer:
        def __init__(self, problem, task, method, steps):
            done.append(("compiled", steps))
            self.task = task

        def run(self, task, method, learning_rate, seed, **_):
            exponent = math.log2(learning_rate / self.task.learning_rate)
            done.append((method, exponent, seed))
            best = 1 if method == "Adam" else -1
            run = run_of(method, seed, abs(exponent - best), learning_rate, task)
            run.metrics *= len(self.task.metrics)
            return run

    monkeypatch.setattr(study, "Trainer", FakeTrainer)
    return done


def test_all_methods_are_trained_at_the_rate_of_the_task(trainings):
    runs = list(study.study(["perceptron", "flow"], ["Adam", "AdaMax"], seeds=2))
    assert trainings == [
        step
        for task in ("perceptron", "flow")
        for method in ("Adam", "AdaMax")
        for step in (("compiled", TASKS[task].steps), (method, 0, 0), (method, 0, 1))
    ]
    assert [run.task for run in runs] == ["perceptron"] * 4 + ["flow"] * 4


def test_all_methods_are_trained_at_their_best_rate(trainings):
    """Seeds 0 and 1 choose it; the others count."""
    list(study.study(["flow"], ["Adam", "AdaMax"], seeds=2, steps=7, rates="search"))
    assert trainings == [
        ("compiled", 7),
        *(("Adam", exponent, seed) for exponent in (0, 1, 2) for seed in (0, 1)),
        *(("Adam", 1, seed) for seed in (2, 3)),
        ("compiled", 7),
        # From where the one before ended.
        *(("AdaMax", e, seed) for e in (1, 2, 0, -1, -2) for seed in (0, 1)),
        *(("AdaMax", -1, seed) for seed in (2, 3)),
    ]


def test_half_precision_is_trained_in_it():
    """By the bytes of its state: 2, and 1 of the residual, which float32 has not."""
    (run,) = study.study(["perceptron"], ["bfloat16, int8, two bytes"], 1, steps=1)
    assert run.bytes_per_parameter == pytest.approx(3, abs=1e-3)


def test_memories_are_what_they_are_called():
    """By their u, after gradients of 1, one of 9, and others of 0."""
    gradients = jnp.asarray([1.0, 9.0, *[0.0] * 8])
    for method in study.GRID:
        b2, *k = map(float, re.findall(r" ([\d.]+)", method))
        _, state = trajectory(study.METHODS[method](0.1), gradients)
        u = optax.tree.get(state, "u")[-1]
        expected = min(9, *k, 9) * b2**8
        np.testing.assert_allclose(u, expected, rtol=1e-4, err_msg=method)


def test_numbers_of_a_method_are_traced():
    """The same training, compiled once for several."""
    method = study.METHODS["AdaMax, b2 = 0.99, growth 2"]
    (make, others), numbers = study.split_traced(method)
    assert (make, others) == (adamax, ())
    assert numbers == {"b2": 0.99, "max_growth": 2.0}
    assert study.split_traced(optax.adamax) == ((optax.adamax, ()), {})

    def loss(w, batch, key):
        return (w - batch[0]) ** 2

    traced = trainer_of_a_number(loss, make)
    w, losses = traced.train(0.1, 0, **numbers)
    expected = trainer_of_a_number(loss, method).train(0.1, 0)
    np.testing.assert_allclose(losses, expected[1], rtol=1e-5)
    np.testing.assert_allclose(w, expected[0], rtol=1e-5)
    other = traced.train(0.1, 0, b2=0.5, max_growth=1.5)[0]
    assert abs(other - w) > 1e-4
    assert traced._scan._cache_size() == 1, "compiled anew"


def test_weight_decay_is_of_matrices_and_the_same_at_any_learning_rate():
    problem = tasks.Problem(
        init=lambda key: {"kernel": jnp.ones([2, 2]), "bias": jnp.ones(2)},
        loss=lambda params, batch, key: 0 * params["bias"].sum(),
        examples=np.arange(EXAMPLES, dtype=np.float32),
        measure=lambda params: (params["bias"][0],),
    )
    task = TASKS["flow"]._replace(batch=1, weight_decay=0.1)
    trainer = Trainer(problem, task, lambda rate: optax.set_to_zero(), STEPS)
    rates = [task.schedule(task.learning_rate, STEPS)(t) for t in range(STEPS)]
    for rate in (0.1, 0.2):
        params, _ = trainer.train(rate, 0)
        left = np.prod([1 - 0.1 * float(rate) for rate in rates])
        np.testing.assert_allclose(params["kernel"], left, rtol=1e-6)
        np.testing.assert_array_equal(params["bias"], 1)


def test_a_group_stands_for_its_methods(trainings, tmp_path):
    arguments = ["--tasks", "flow", "--methods", "Adam", "memory", "--seeds", "1"]
    _, results = run_command(tmp_path, *arguments)
    methods = [run["method"] for run in results["runs"]]
    assert methods == list(study.GROUPS["memory"])


def test_the_best_of_adam_is_a_reference():
    """That whose mean is best, not the best of seed 0."""
    means = {"Adam": (1.0, 5.0), "Adam, b2 = 0.98": (2.0, 3.0), "AdaMax": (4.0, 5.0)}
    runs = [
        run_of(method, seed, metric, 0.1, "flow")
        for method, metrics in means.items()
        for seed, metric in enumerate(metrics)
    ]
    adam, best, adamax = study.summarize(runs)
    assert best.differences.keys() == {"Adam", "AdaMax"}
    assert adam.differences[study.BEST_ADAM].mean == 0.5
    assert adamax.differences[study.BEST_ADAM].mean == 2
    assert adamax.differences["Adam"].mean == 1.5
    assert "| to Adam at its best b2 | to Adam | to AdaMax |" in markdown(
        study.summarize(runs)
    )


def test_spikes_multiply_some_gradients_and_no_losses():
    plain = tasks.Problem(
        init=None,
        loss=lambda w, batch, key: w**2 + jax.random.uniform(key),
        examples=None,
        measure=None,
    )
    spiked = tasks._with_spikes(lambda: plain, 0.25, 1e3)
    keys = jax.random.split(jax.random.key(0), 400)

    def of(problem):
        return jax.vmap(jax.value_and_grad(problem.loss), (None, None, 0))(3.0, 0, keys)

    losses, gradients = of(spiked)
    expected_losses, expected = of(plain)
    np.testing.assert_allclose(losses, expected_losses)
    ratio = np.asarray(gradients / expected)
    assert set(np.round(ratio)) == {1, 1000}
    assert np.mean(ratio > 2) == pytest.approx(0.25, abs=0.06)


def test_storages_are_what_they_are_called():
    """By the bytes of their state per parameter, and the shapes of u."""
    params = {
        "kernel": jnp.ones([64, 64]),
        "conv": jnp.ones([2, 2, 64, 4]),
        "embed": jnp.ones([50, 2]),
    }
    in_half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    size = sum(p.size for p in jax.tree.leaves(params))
    bytes_of = {
        "Adam": 8,
        "AdaMax": 8,
        "AdaMax, bfloat16": 4,
        "AdaMax, int8 and uint8": 2,
        "bfloat16": 8,
        "bfloat16, master weights": 12,
        "bfloat16, int16": 10,
        "bfloat16, int16, two bytes": 4,
        "bfloat16, int8": 9,
        "bfloat16, int8, two bytes": 3,
    } | {f"Adam, {n} bytes": n for n in (8, 4, 3, 2)}
    for name, expected in bytes_of.items():
        method = study.METHODS[name]
        start = in_half if isinstance(method, InHalf) else params
        state = jax.eval_shape(method(0.1).init, start)
        arrays = [x for x in jax.tree.leaves(state) if x.ndim]
        assert sum(x.size * x.dtype.itemsize for x in arrays) == expected * size, name
    for name, (kernel, conv, embed) in {
        "AdaMax": [(64, 64), (2, 2, 64, 4), (50, 2)],
        "u per input": [(64, 1), (2, 2, 64, 1), (50, 1)],
        "u per output": [(1, 64), (1, 1, 1, 4), (1, 2)],
        "u per array": [(1, 1), (1, 1, 1, 1), (1, 1)],
        "embeddings: u per symbol": [(64, 64), (2, 2, 64, 4), (50, 1)],
        "embeddings: u per feature": [(64, 64), (2, 2, 64, 4), (1, 2)],
    }.items():
        state = study.METHODS[f"{name}, int8"](0.1).init(params)[0]
        shapes = {key: u.shape for key, u in state.u.items()}
        assert shapes == {"kernel": kernel, "conv": conv, "embed": embed}
        assert {m.dtype.name for m in state.m.values()} == {"int8"}


def test_orders_are_what_they_are_called():
    """By u after gradients of 1 and 0: b2 of the mean of |g|^p is left."""
    for name in study.ORDERS:
        p = int(name.removeprefix("p = ").partition(",")[0])
        decay = 0.999 ** (1 / p) if "b2^p" in name else 0.999
        optimizer = study.METHODS[name](0.1)
        state = optimizer.init(jnp.ones(1))
        for g in (jnp.ones(1), jnp.zeros(1)):
            _, state = optimizer.update(g, state)
        # The second of two gradients, corrected for the start.
        power = decay**p
        expected = (power * (1 - power) / (1 - power**2)) ** (1 / p)
        np.testing.assert_allclose(moments(state)[1], expected, rtol=1e-3)


def test_estimate_is_the_interval_of_the_textbook():
    five = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert five.mean == 3
    assert five.deviation == pytest.approx(math.sqrt(10 / 4))
    error = math.sqrt(10 / 4) / math.sqrt(5)
    assert five.margin == pytest.approx(T_OF_4 * error, rel=DIGITS)
    one = estimate([1.0])
    assert one.mean == 1
    assert math.isnan(one.deviation)
    assert math.isnan(one.margin)


def test_numbers_are_shown_with_two_digits_of_their_spread():
    def digits(*deviations):
        return digits_to_show(Estimate(1.0, d, math.nan) for d in deviations)

    # What diverged, or was trained once, does not say how many.
    assert digits(0.011, 0.023, 5.0) == digits(0.023, math.inf, math.nan) == 3
    assert (digits(math.nan), digits(500.0), digits(1e-12)) == (4, 1, 8)
    assert show(1.25, 0.125, 2, sign="+") == "+1.25 ± 0.12"
    assert show(1.25, math.nan, 1) == "1.2"
    assert show(-0.001, math.nan, 2) == "0.00"


def test_differences_are_paired_by_seed():
    # The pairs differ by 1 and 3 and scatter far less than the seeds, 10 apart; seed 2
    # has no partner.
    narrow_name = "AdaMax, int8 and uint8"
    runs = [
        run_of(narrow_name, 1, 23.0),
        run_of(narrow_name, 0, 11.0),
        run_of(narrow_name, 2, 99.0),
        run_of("AdaMax", 0, 10.0),
        run_of("AdaMax", 1, 20.0),
    ]
    narrow, reference = rows = study.summarize(runs)
    assert (narrow.method, narrow.seeds) == (narrow_name, 3)
    assert narrow.bytes_per_parameter == 8
    (difference,) = narrow.differences.values()
    assert difference.mean == 2
    # The deviation of two numbers, 1 and 3, is the root of 2.
    margin = T_OF_1 * math.sqrt(2) / math.sqrt(2)
    assert difference.margin == pytest.approx(margin, rel=DIGITS)
    assert (reference.method, reference.value.mean) == ("AdaMax", 15)
    assert reference.differences == {}
    table = markdown(rows).splitlines()
    assert table[0] == f"flow: {TASKS['flow'].metrics[0]}"
    assert table[2].endswith("| mean ± sd | to AdaMax |")
    assert table[4].startswith(f"| {narrow_name} | 8.00 | 0.1 | 3 | 44.3 ± 47.7")
    assert table[4].endswith("| +2.00 ± 12.71 |")
    assert table[5] == "| AdaMax | 8.00 | 0.1 | 2 | 15.0 ± 7.1 | |"


def test_methods_are_compared_in_pairs_at_their_best():
    runs = [
        run_of("Adam", 0, 10.0, 0.1),
        run_of("Adam", 0, 30.0, 0.2),
        run_of("Adam", 2, 10.0, 0.1),
        run_of("Adam", 3, 20.0, 0.1),
        # Worse, and another that diverged.
        run_of("u per input", 0, 50.0, 0.1),
        run_of("u per input", 0, math.nan, 0.4),
        run_of("u per input", 0, 11.0, 0.2),
        run_of("u per input", 2, 11.0, 0.2),
        run_of("u per input", 3, 23.0, 0.2),
    ]
    adam, shared = study.summarize(runs)
    assert (adam.learning_rate, adam.value.mean, adam.differences) == (0.1, 15, {})
    assert (shared.learning_rate, shared.seeds, shared.value.mean) == (0.2, 2, 17)
    # The pairs differ by 1 and 3; seeds 0 and 1, which chose the rates, do not count.
    assert shared.differences["Adam"].mean == 2
    assert shared.differences["Adam"].margin == pytest.approx(T_OF_1, rel=DIGITS)
    assert list(shared.search) == [0.1, 0.2, 0.4]
    digits = digits_to_show([adam.value, shared.value])
    table = markdown([adam, shared])
    assert f"| +2.{'0' * (digits + 1)} ± 12.7" in table


def test_there_is_a_column_for_each_reference_that_was_trained():
    """And what diverged is shown."""
    runs = [
        run_of("Adam", 0, 1.0),
        run_of("AdaMax", 0, math.nan),
        run_of("p = 3", 0, 1),
    ]
    header, _, *rows = markdown(study.summarize(runs)).splitlines()[2:]
    assert header.endswith("| seeds | mean ± sd | to Adam | to AdaMax |")
    assert rows[1].endswith("| nan | +nan | |")
    header = markdown(study.summarize(runs[2:])).splitlines()[2]
    assert header.endswith("| seeds | mean ± sd |")


def test_where_all_rates_diverged_the_row_is_that_of_the_seeds():
    """They were trained at the lowest rate, where the search gave up."""
    runs = [run_of("Adam", 0, math.nan, 0.1), run_of("Adam", 0, math.nan, 0.05)]
    runs.append(run_of("Adam", 2, math.nan, 0.05))
    (row,) = study.summarize(runs)
    assert (row.learning_rate, row.seeds) == (0.05, 1)


def test_curves_are_short():
    run = run_of("AdaMax", 0, 1.0, losses=np.arange(450.0))
    result = run.numbers()
    every = math.ceil(450 / CURVE_POINTS)
    assert result["curve_every"] == every == 3
    assert len(result["curve"]) == 150
    assert result["curve"][:2] == [1.0, 4.0]
    assert "losses" not in result


def run_command(folder, *arguments):
    """What the command saves as Markdown and as JSON."""
    table, numbers = folder / "a.md", folder / "a.json"
    files = ["--json", str(numbers), "--markdown", str(table)]
    assert main(["study", *arguments, *files]) == 0
    text = squeezed(table.read_text(encoding="utf-8"))
    return text, json.loads(numbers.read_text())


def test_command_at_the_rates_of_the_tasks(trainings, tmp_path, capsys):
    # Each once, also where it is named twice.
    arguments = ["--tasks", "perceptron", "flow", "perceptron", "--methods", "AdaMax"]
    arguments += ["optax.adamax", "AdaMax", "--seeds", "2", "--steps", "3"]
    table, results = run_command(tmp_path, *arguments)
    output, progress = capsys.readouterr()
    assert table in squeezed(output)
    for task in ("perceptron", "flow"):
        for metric in TASKS[task].metrics:
            assert f"{task}: {metric}\n" in table
    assert table.count("| AdaMax | 8.00 | 0.008 | 2 |") == 2
    assert "Learning rates are the tasks', chosen for AdaMax; differences" in table
    assert "steps: perceptron 3 (constant), flow 3 (cosine); Optax" in table
    assert (results["seeds"], results["rates"]) == (2, "task")
    assert list(results["tasks"]) == ["perceptron", "flow"]
    expected = [
        (task, method, TASKS[task].learning_rate, seed)
        for task in ("perceptron", "flow")
        for method in ("AdaMax", "optax.adamax")
        for seed in (0, 1)
    ]
    names = ("task", "method", "learning_rate", "seed")
    assert [tuple(run[n] for n in names) for run in results["runs"]] == expected
    first, *lines = progress.splitlines()
    assert first.startswith("8 trainings of ")
    for i, (line, (task, method, rate, seed)) in enumerate(
        zip(lines, expected, strict=True), 1
    ):
        start = f"{i}/8  {task}, {method}, learning rate {rate:.2g}, seed {seed}: "
        assert line.startswith(start)


def test_all_settings_of_a_task_are_saved(trainings, tmp_path):
    arguments = ["--tasks", "mixer", "--methods", "AdaMax", "--seeds", "1"]
    table, results = run_command(tmp_path, *arguments)
    assert results["tasks"]["mixer"].keys() == {*tasks.Task._fields} - {"make"}
    assert "steps: mixer 500 (cosine, weight decay 0.1); Optax" in table


def test_command_at_the_best_rates(tmp_path, capsys):
    """This one trains."""
    arguments = ["--rates", "search", "--tasks", "perceptron", "--methods", "AdaMax"]
    table, results = run_command(tmp_path, *arguments, "--seeds", "2", "--steps", "3")
    assert table in squeezed(capsys.readouterr().out)
    assert table.count("| AdaMax | 8.00 |") == len(TASKS["perceptron"].metrics)
    assert "Learning rates are the best of those a factor of 2 apart" in table
    assert results["rates"] == "search"
    tried = {run["learning_rate"] for run in results["runs"]}
    for row in results["table"]:
        assert {row["learning_rate"] * 2.0**k for k in (-1, 0, 1)} <= tried
        assert (row["seeds"], len(row["search"])) == (2, len(tried))
    assert all(len(run["curve"]) == 3 for run in results["runs"])


@SOME_LONG
def test_a_model_in_bfloat16_computes_in_it(name):
    """No product has two float32 factors; JAX's own attention has some with one."""
    task = TASKS[name]
    method = study.METHODS["bfloat16"]
    trainer = Trainer(task.make(), task, method, steps=1)
    params = trainer.train(task.learning_rate, seed=0)[0]
    assert {p.dtype.name for p in jax.tree.leaves(params)} == {"bfloat16"}
    order = order_of(1000, 1, task.batch, 0)
    start = jax.eval_shape(trainer._init, jax.random.key(0))
    args = start, trainer._examples, order, jax.random.key(0), task.learning_rate, {}
    lowered = jax.jit(trainer._steps).lower(*args).as_text()
    products = re.findall(r"stablehlo\.(?:dot_general|convolution)\b.*", lowered)
    assert len(products) > 4
    for line in products:
        factors = re.search(r": \(tensor<[\dx]*(\w+)>, tensor<[\dx]*(\w+)>\)", line)
        assert factors and "bf16" in factors.groups(), line
