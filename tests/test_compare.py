"""``python -m adamax_jax compare``: the search for learning rates, and the pairs."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adamax_jax import _compare
from adamax_jax.__main__ import main
from adamax_jax._results import digits_to_show


def searched(cost, first=0):
    """The powers that a search visits, and where it ends."""
    costs = {}
    exponent = first
    while (exponent := _compare.next_exponent(costs, exponent)) not in costs:
        costs[exponent] = cost(exponent)
    return list(costs), exponent


@pytest.mark.parametrize("best", [-5, -1, 0, 1, 4])
@pytest.mark.parametrize("first", [0, 2])
def test_the_search_ends_between_two_worse(best, first):
    visited, end = searched(lambda exponent: (exponent - best) ** 2, first)
    assert end == best
    assert {best - 1, best, best + 1} <= set(visited)
    assert visited[0] == first
    assert len(visited) <= abs(best - first) + 4


def test_a_search_without_end_is_given_up():
    visited, end = searched(lambda exponent: -exponent)
    assert len(visited) == _compare.MOST_RATES
    assert end == max(visited)


def test_a_search_begins_again_below_what_diverged():
    visited, end = searched(lambda e: math.inf if e > -3 else (e + 4) ** 2)
    assert visited[:4] == [0, -1, -2, -3]
    assert end == -4
    visited, _ = searched(lambda e: math.inf)
    assert visited == list(range(0, -_compare.MOST_RATES, -1))


def trial(method, learning_rate, seed, metric, task="flow", losses=(1.0, 0.5)):
    losses = np.array(losses)
    return _compare.Trial(
        task, method, learning_rate, seed, [metric], 80, 10, 0.0, losses
    )


def test_what_diverged_is_not_the_best():
    first = [1.0] * 20
    for losses in (first + [1.1] * 3, [*first, math.nan], [math.nan] * 23):
        assert _compare._cost(trial("Adam", 0.1, 0, 0.3, losses=losses)) == math.inf
    assert _compare._cost(trial("Adam", 0.1, 0, 0.3, losses=first + [0.9] * 3)) == 0.3


def test_methods_are_compared_in_pairs_at_their_best():
    trials = [
        trial("Adam", 0.1, 0, 10.0),
        trial("Adam", 0.2, 0, 30.0),
        trial("Adam", 0.1, 1, 20.0),
        # Worse, and another that diverged.
        trial("u per input", 0.1, 0, 50.0),
        trial("u per input", 0.4, 0, math.nan),
        trial("u per input", 0.2, 0, 11.0),
        trial("u per input", 0.2, 1, 23.0),
    ]
    adam, shared = _compare.summarize(trials)
    assert (adam.learning_rate, adam.value.mean, adam.differences) == (0.1, 15, {})
    assert (shared.learning_rate, shared.seeds, shared.value.mean) == (0.2, 2, 17)
    # The pairs differ by 1 and 3; t of 1 degree of freedom is 12.706.
    assert shared.differences["Adam"].mean == 2
    assert shared.differences["Adam"].margin == pytest.approx(12.706, rel=1e-3)
    assert list(shared.search) == [0.1, 0.2, 0.4]
    digits = digits_to_show([adam.value, shared.value])
    table = _compare.markdown([adam, shared])
    assert f"| +2.{'0' * (digits + 1)} ± 12.7" in table


def test_methods_are_what_they_are_called():
    params = {
        "kernel": jnp.ones([3, 4]),
        "conv": jnp.ones([2, 2, 3, 4]),
        "embed": jnp.ones([5, 2]),
        "bias": jnp.ones(4),
    }
    shapes = {
        "AdaMax": [(3, 4), (2, 2, 3, 4), (5, 2)],
        "u per input": [(3, 1), (2, 2, 3, 1), (5, 1)],
        "u per output": [(1, 4), (1, 1, 1, 4), (1, 2)],
        "u per array": [(1, 1), (1, 1, 1, 1), (1, 1)],
        "embeddings: u per symbol": [(3, 4), (2, 2, 3, 4), (5, 1)],
        "embeddings: u per feature": [(3, 4), (2, 2, 3, 4), (1, 2)],
    }
    for name, (kernel, conv, embed) in shapes.items():
        for suffix, dtype in (("", jnp.float32), (", int8", jnp.int8)):
            if name + suffix not in _compare.ALL_METHODS:
                assert name.startswith("embeddings")
                continue
            state = _compare.ALL_METHODS[name + suffix](0.1).init(params)[0]
            assert state.u["kernel"].shape == kernel
            assert state.u["conv"].shape == conv
            assert state.u["embed"].shape == embed
            assert state.u["bias"].shape == (4,)
            assert state.m["kernel"].dtype == dtype
    assert isinstance(
        _compare.METHODS["Adam"](0.1).init(params)[0], optax.ScaleByAdamState
    )


def test_orders_are_what_they_are_called():
    g = jnp.array([1.0, -2.0])
    updates = {}
    for name in ("Adam", "AdaMax", *_compare.LP_METHODS):
        optimizer = _compare.ALL_METHODS[name](0.1)
        state = optimizer.init(g)
        with jax.numpy_dtype_promotion("standard"):
            for scale in (1.0, 0.1, 0.3):
                updates[name], state = optimizer.update(scale * g, state)
    size = {name: abs(float(update[0])) for name, update in updates.items()}
    # The longer the memory, the less a larger p tells; Adam's is p = 2, b2^p = 0.999.
    assert size["p = 2"] == pytest.approx(size["Adam"], rel=1e-3)
    orders = ["p = 1", "Adam", "p = 3", "p = 4", "p = 6", "p = 8", "p = 16", "AdaMax"]
    assert sorted(orders, key=lambda name: -size[name]) == orders
    for p in (3, 6):
        long = size[f"p = {p}, b2^p = 0.999"]
        assert long != size[f"p = {p}"]
        assert long == pytest.approx(size[f"p = {p}"], rel=1e-2)


def test_command(tmp_path, capsys):
    arguments = ["compare", "--tasks", "mlp", "--methods", "Adam", "AdaMax"]
    arguments += ["--seeds", "2", "--steps", "3"]
    files = ["--json", str(tmp_path / "a.json"), "--markdown", str(tmp_path / "a.md")]
    # Flax's layers broadcast, which the suite refuses.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert main([*arguments, *files]) == 0
    output = capsys.readouterr().out
    table = (tmp_path / "a.md").read_text(encoding="utf-8")
    assert table in output
    assert "mlp 3 (constant)" in table
    assert table.count("| AdaMax | 8.00 |") == 2
    results = json.loads((tmp_path / "a.json").read_text())
    runs = results["runs"]
    for row in results["table"]:
        tried = {r["learning_rate"] for r in runs if r["method"] == row["method"]}
        assert {row["learning_rate"] * 2.0**k for k in (-1, 0, 1)} <= tried
        assert row["seeds"] == 2
        assert len(row["search"]) == len(tried)
    assert all(len(run["curve"]) == 3 for run in runs)


def test_missing_folder(capsys):
    assert main(["compare", "--json", "none/a.json"]) == 1
    assert "no folder none" in capsys.readouterr().err
