"""``python -m adamax_jax demo``: the trainings, the table and the figure."""

import contextlib
import io
import json
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import squeezed

from adamax_jax.__main__ import main
from adamax_jax._lab import demo

PNG = b"\x89PNG\r\n"
# The weights and biases of the three layers.
PARAMETERS = 64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10
# AdaMax's state in float32, beside m and u.
COUNT_AND_SCALE = 4 + 4


def run_demo(folder, *arguments):
    """What ``demo`` saves as JSON, prints, and tells of its progress."""
    output, progress = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(progress),
        # Flax's layers broadcast and promote, which the suite refuses.
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        assert main(["demo", *arguments, "--json", "a.json"]) == 0
    numbers = json.loads((folder / "a.json").read_text(encoding="utf-8"))
    return numbers, output.getvalue(), progress.getvalue()


EPOCHS, SEED = 8, 3
TRAINING = ["--epochs", str(EPOCHS), "--seed", str(SEED), "--optimizers"]


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """Two optimizers, and the folder in which the figure is."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, *run_demo(folder, *TRAINING, "sgd", "adamax")


def test_training_is_real(training):
    _, results, _, _ = training
    assert (results["epochs"], results["seed"]) == (EPOCHS, SEED)
    for run in results["runs"]:
        assert len(run["costs"]) == EPOCHS
        assert run["costs"][-1] < run["costs"][0] / 3
        last = run["costs"][-demo.FINAL_PASSES :]
        assert run["final_cost"] == pytest.approx(np.mean(last))
        assert run["test_accuracy"] > 90
        assert (run["seed"], run["parameters"]) == (SEED, PARAMETERS)
    sgd, adamax = results["runs"]
    assert (sgd["method"], adamax["method"]) == ("sgd", "adamax")
    for run in (sgd, adamax):
        expected = demo.CONTENDERS[run["method"]].learning_rate
        assert run["learning_rate"] == expected
    assert sgd["state_bytes"] == 4 * PARAMETERS
    assert adamax["state_bytes"] == 8 * PARAMETERS + COUNT_AND_SCALE


def test_table_caption_figure_and_progress(training):
    folder, results, output, progress = training
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in output.strip().splitlines()[:4]
    ]
    assert header[:2] == ["optimizer", "bytes per parameter"]
    assert header[2:] == ["learning rate", "training cost", "test accuracy", "seconds"]
    for row, run in zip(rows, results["runs"], strict=True):
        assert row[:5] == [
            demo.CONTENDERS[run["method"]].label,
            f"{run['bytes_per_parameter']:.2f}",
            f"{run['learning_rate']:g}",
            f"{run['final_cost']:.4f}",
            f"{run['test_accuracy']:.1f}%",
        ]
    assert f"over the last {demo.FINAL_PASSES} of {EPOCHS} passes." in output
    assert f"Default learning rates were chosen for {demo.EPOCHS} passes." in output
    assert f"\nOne seed ({SEED}) of a small problem: not a ranking." in output
    assert " best |" not in squeezed(output)
    first, *lines = progress.splitlines()
    assert first == f"{len(rows)} trainings of 2 to 8 seconds each. Loading Flax ..."
    for i, (line, run) in enumerate(zip(lines, results["runs"], strict=True), 1):
        label = demo.CONTENDERS[run["method"]].label
        assert line.startswith(f"{i}/{len(rows)}  {label}, learning rate ")
    figure = folder / "adamax_demo.png"
    assert f"Saved: {figure.resolve()}" in output
    assert figure.read_bytes().startswith(PNG)


def test_bytes_of_state():
    """Of the figure's second panel, which compares them."""
    kernel = jnp.ones([8, 8])
    _, by_bytes, *_ = demo.PANELS.values()
    for name in by_bytes:
        size = 2 if name.endswith("two-bytes") else 8
        state = demo.CONTENDERS[name].optimizer(0.1).init(kernel)
        arrays = [x for x in jax.tree.leaves(state) if x.ndim]
        assert sum(x.nbytes for x in arrays) == size * kernel.size


def test_every_contender_is_drawn():
    assert {name for names in demo.PANELS.values() for name in names} == {
        *demo.CONTENDERS
    }


def test_a_sweep_draws_its_best_and_trains_as_before(training, tmp_path):
    arguments = [*TRAINING, "adamax", "--sweep", "--figure", "a.svg"]
    rate = demo.CONTENDERS["adamax"].learning_rate
    results, output, _ = run_demo(tmp_path, *arguments)
    runs = {run["learning_rate"]: run for run in results["runs"]}
    expected = [rate * 2.0**k for k in range(-3, 4)]
    assert list(runs) == pytest.approx(expected)
    assert output.count("\n| AdaMax ") == len(expected)
    best = min(runs.values(), key=lambda run: run["final_cost"])
    (marked,) = re.findall(r"^\| AdaMax +\|.*\| (\S+) best", output, re.MULTILINE)
    assert marked == f"{best['learning_rate']:g}"
    # Matplotlib names in comments what it writes; one panel has all that was trained.
    drawn = (tmp_path / "a.svg").read_text(encoding="utf-8")
    label = r"<!-- AdaMax: 8 bytes, learning rate (\S+) -->"
    assert set(re.findall(label, drawn)) == {marked}
    # The same training once more.
    _, before = training[1]["runs"]
    for what in ("costs", "curve", "metrics", "state_bytes"):
        assert runs[rate][what] == before[what]


def test_the_best_of_a_sweep_ends_with_the_least_cost():
    costs = [("sgd", math.nan), ("sgd", 1.5), ("sgd", math.inf), ("adamax", 0.5)]
    # Nothing else was trained with the last.
    costs += [("adamax", 0.7), ("adam", math.nan)]
    runs = [SimpleNamespace(method=name, losses=np.full(4, x)) for name, x in costs]
    best = demo._best(runs, epochs=2)
    assert best == {"sgd": runs[1], "adamax": runs[3], "adam": runs[5]}


def test_a_best_at_the_edge_of_a_sweep_is_said():
    def marks(*costs):
        runs = [
            SimpleNamespace(method="sgd", learning_rate=2.0**i, losses=np.full(4, x))
            for i, x in enumerate(costs)
        ]
        return [demo._mark(run, runs, epochs=2) for run in runs]

    assert marks(3.0, 1.0, 2.0) == ["", " best", ""]
    assert marks(1.0, 2.0, 3.0) == [" best, at the edge", "", ""]
    assert marks(3.0, 2.0, 1.0) == ["", "", " best, at the edge"]


def test_divergence_is_valid_json_and_drawn(monkeypatch, tmp_path):
    diverging = demo.CONTENDERS["sgd"]._replace(learning_rate=1e30)
    monkeypatch.setitem(demo.CONTENDERS, "sgd", diverging)
    arguments = ["--epochs", "1", "--optimizers", "sgd"]
    results, _, _ = run_demo(tmp_path, *arguments)
    assert "NaN" not in (tmp_path / "a.json").read_text()
    assert results["runs"][0]["costs"] == [None]
    assert (tmp_path / "adamax_demo.png").read_bytes().startswith(PNG)
