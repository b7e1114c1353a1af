"""``python -m adamax_jax study``: its tasks, its statistics and the command."""

import json
import math
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

from adamax_jax import _results, _study
from adamax_jax._tasks import TASKS
from adamax_jax._trainer import Trainer, order_of

COMMAND = [sys.executable, "-m", "adamax_jax", "study"]


@pytest.fixture(autouse=True)
def lenient():
    """Flax's layers broadcast, and Optax's AdaMax promotes, which the suite refuses."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def command(folder, *arguments, code=0):
    done = subprocess.run(
        [*COMMAND, *arguments], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.mark.parametrize("task", TASKS)
def test_a_task_learns_and_every_variant_starts_alike(task, monkeypatch):
    monkeypatch.setitem(_study.VARIANTS, "other", optax.sgd)
    run, other = _study.study([task], ["float32", "other"], seeds=1, steps=8)
    assert run.losses.shape == (8,)
    assert np.all(np.isfinite(run.losses))
    assert np.mean(run.losses[-2:]) < np.mean(run.losses[:2])
    assert len(run.metrics) == len(TASKS[task].metrics)
    assert np.all(np.isfinite(run.metrics))
    assert 8 <= run.state_bytes / run.parameters < 8.01
    assert other.state_bytes < 8
    assert other.losses[0] == pytest.approx(run.losses[0], rel=1e-6)


def test_a_seed_fixes_weights_data_and_noise_for_all_variants():
    task = TASKS["mlp"]
    problem = task.make()
    ours, optaxs = (
        Trainer(problem, task, _study.VARIANTS[variant], steps=4)
        for variant in ("float32", "optax float32")
    )
    rate = task.learning_rate
    (params, losses), (params_again, losses_again) = ours(0, rate), ours(0, rate)
    np.testing.assert_array_equal(losses, losses_again)
    jax.tree.map(np.testing.assert_array_equal, params, params_again)
    np.testing.assert_allclose(optaxs(0, rate)[1], losses, rtol=1e-4)
    assert ours(1, rate)[1][0] != losses[0]


def test_order_is_whole_passes():
    order = order_of(examples=10, steps=5, batch=4, seed=0)
    assert order.shape == (5, 4)
    assert sorted(order.reshape(-1)[:10]) == list(range(10))
    assert sorted(order.reshape(-1)[10:]) == list(range(10))


def run_of(variant, seed, metric, task="flow"):
    return _study.Run(task, variant, seed, [metric], 80, 10, 0.0, np.zeros(1))


def test_estimate_is_the_interval_of_the_textbook():
    # Mean 3, deviation sqrt(10 / 4), t of 4 degrees of freedom 2.776.
    estimate = _results.estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert estimate.mean == 3
    assert estimate.deviation == pytest.approx(math.sqrt(2.5))
    assert estimate.margin == pytest.approx(2.776 * math.sqrt(0.5), rel=1e-3)
    one = _results.estimate([1.0])
    assert one.mean == 1
    assert math.isnan(one.deviation)
    assert math.isnan(one.margin)


def test_differences_are_paired_by_seed():
    # The pairs differ by 1 and 3 and scatter far less than the seeds, 10 apart; seed 2
    # has no partner. t of 1 degree of freedom is 12.706; deviation sqrt(2).
    runs = [
        run_of("int8/uint8", 1, 23.0),
        run_of("int8/uint8", 0, 11.0),
        run_of("int8/uint8", 2, 99.0),
        run_of("float32", 0, 10.0),
        run_of("float32", 1, 20.0),
    ]
    narrow, reference = _study.summarize(runs)
    assert (narrow.variant, narrow.seeds) == ("int8/uint8", 3)
    assert narrow.bytes_per_parameter == 8
    assert narrow.difference.mean == 2
    assert narrow.difference.margin == pytest.approx(12.706, rel=1e-3)
    assert (reference.variant, reference.value.mean) == ("float32", 15)
    assert reference.difference is None
    assert "+2.00 ± 12.71 |" in _study.markdown([narrow])


def test_a_training_that_diverged_is_shown():
    runs = [run_of("float32", 0, 1.0), run_of("int8/uint8", 0, math.nan)]
    assert "| nan | +nan |" in _study.markdown(_study.summarize(runs))


def test_curves_are_short():
    run = run_of("float32", 0, 1.0)
    run.losses = np.arange(450.0)
    result = _results.with_curve(run)
    assert result["curve_every"] == 3
    assert len(result["curve"]) == 150
    assert result["curve"][:2] == [1.0, 4.0]
    assert "losses" not in result


def test_command_saves_the_table_and_the_numbers(tmp_path):
    output = command(
        tmp_path,
        *("--tasks", "mlp", "--variants", "float32", "optax float32"),
        *("--seeds", "2", "--steps", "3", "--json", "a.json", "--markdown", "a.md"),
    )
    table = (tmp_path / "a.md").read_text(encoding="utf-8")
    assert table in output
    assert table.count("| optax float32 | 8.0") == 2
    assert "mlp 3 at 0.008 (constant)" in table
    results = json.loads((tmp_path / "a.json").read_text())
    assert results["seeds"] == 2
    assert results["tasks"]["mlp"]["steps"] == 3
    assert len(results["table"]) == 4
    assert [(run["seed"], run["variant"]) for run in results["runs"]] == [
        (seed, variant) for seed in (0, 1) for variant in ("float32", "optax float32")
    ]
    for run in results["runs"]:
        assert len(run["curve"]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "gan"], "'transformer'"),
        (["--variants", "int4"], "'int8/uint8'"),
        (["--seeds", "0"], "'0' is not a whole number above 0"),
    ],
)
def test_unknown_values_list_what_is_allowed(arguments, message, capsys):
    from adamax_jax.__main__ import main

    with pytest.raises(SystemExit) as exit:
        main(["study", *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_extra_is_reported_as_the_command_that_installs_it(tmp_path):
    (tmp_path / "flax.py").write_text("raise ImportError")
    message = command(tmp_path, code=1)
    assert "The study needs flax" in message
    assert 'pip install -e ".[demo]"' in message


def test_json_in_a_folder_that_does_not_exist(tmp_path):
    assert "no folder none" in command(tmp_path, "--json", "none/a.json", code=1)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send")
def test_interrupt_leaves_what_was_done(tmp_path):
    # A shell's background job, as CI may be, ignores SIGINT; a user's command does not.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "import sys; from adamax_jax.__main__ import main; sys.exit(main())"
    )
    arguments = ["study", "--tasks", "mlp", "--variants", "float32", "--seeds", "9999"]
    arguments += ["--steps", "3", "--json", "a.json"]
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        try:
            # The progress bar names a run as soon as it is done.
            seen = b""
            while b"seed 1" not in seen and (more := process.stdout.read1()):
                seen += more
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, output.decode()
    assert b"| mlp | training loss, nats | float32 |" in output
    assert b"Traceback" not in output
    assert len(json.loads((tmp_path / "a.json").read_text())["runs"]) >= 2
