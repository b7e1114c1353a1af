"""``python -m adamax_jax demo`` as a user types it."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys

import pytest

from adamax_jax import _demo
from adamax_jax.__main__ import main

COMMAND = [sys.executable, "-m", "adamax_jax"]
PNG = b"\x89PNG\r\n"


def demo(folder, *arguments, code=0):
    done = subprocess.run(
        [*COMMAND, "demo", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_help_without_a_command():
    done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "demo" in done.stdout


def test_version():
    done = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == importlib.metadata.version("adamax_jax")


def test_training_is_real_and_deterministic(tmp_path):
    arguments = ["--epochs", "12", "--optimizers", "sgd", "adamax", "--seed", "3"]
    output = demo(tmp_path, *arguments, "--json", "a.json")
    assert str(tmp_path / "adamax_demo.png") in output
    assert (tmp_path / "adamax_demo.png").read_bytes().startswith(PNG)
    results = json.loads((tmp_path / "a.json").read_text())
    assert [run["optimizer"] for run in results["runs"]] == ["sgd", "adamax"]
    for run in results["runs"]:
        assert len(run["costs"]) == 12
        assert run["costs"][-1] < run["costs"][0] / 3
        assert run["test_accuracy"] > 0.9
    sgd, adamax = results["runs"]
    parameters = 64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10
    assert sgd["state_bytes"] == 4 * parameters
    assert adamax["state_bytes"] == 8 * parameters + 4 + 4

    demo(tmp_path, *arguments, "--json", "b.json", "--figure", "b.png")
    again = json.loads((tmp_path / "b.json").read_text())
    for run, run_again in zip(results["runs"], again["runs"], strict=True):
        assert run["costs"] == run_again["costs"]
        assert run["test_accuracy"] == run_again["test_accuracy"]


def test_learning_rate(tmp_path):
    arguments = ["--epochs", "2", "--optimizers", "adam", "--json", "a.json"]
    demo(tmp_path, *arguments, "--learning-rate", "adam=0.0123")
    assert json.loads((tmp_path / "a.json").read_text())["runs"][0][
        "learning_rate"
    ] == pytest.approx(0.0123)


def test_sweep_marks_one_best(tmp_path):
    output = demo(tmp_path, "--epochs", "2", "--optimizers", "adamax", "--sweep")
    assert output.count("  best") == 1
    assert output.count("AdaMax  ") >= 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizers", "lion"], "adamax"),
        (["--learning-rate", "lion=1"], "NAME must be one of adagrad, rmsprop"),
        (["--learning-rate", "adam=fast"], "VALUE must be a number above 0"),
        (["--learning-rate", "adam=-1"], "VALUE must be a number above 0"),
        (["--learning-rate", "adam=1", "--optimizers", "sgd"], "adam is not trained"),
        (["--epochs", "0"], "'0' is not a whole number above 0"),
        (["--seed", "-1"], "'-1' is not a whole number below 2^32"),
        (["--figure", "a.pdf"], "'a.pdf' does not end in .png"),
    ],
)
def test_unknown_values_list_what_is_allowed(tmp_path, arguments, message):
    assert message in demo(tmp_path, *arguments, code=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--figure", "none/figure.png"], "no folder none"),
        (["--json", "."], "it is a folder"),
    ],
)
def test_what_cannot_be_saved_is_said_before_training(tmp_path, arguments, message):
    assert message in demo(tmp_path, *arguments, code=1)


def test_divergence_is_valid_json(tmp_path):
    arguments = ["--epochs", "1", "--optimizers", "sgd", "--json", "a.json"]
    demo(tmp_path, *arguments, "--learning-rate", "sgd=1e30")
    assert "NaN" not in (tmp_path / "a.json").read_text()
    assert json.loads((tmp_path / "a.json").read_text())["runs"][0]["costs"] == [None]


def test_missing_extra_is_reported_as_the_command_that_installs_it(tmp_path):
    (tmp_path / "flax.py").write_text("raise ImportError")
    (tmp_path / "tqdm.py").write_text("raise ImportError")
    message = demo(tmp_path, code=1)
    assert "needs flax, tqdm" in message
    assert 'pip install -e ".[demo]"' in message


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send")
def test_interrupt_leaves_a_figure_of_what_was_done(tmp_path):
    # A shell's background job, as CI may be, ignores SIGINT; a user's command does not.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "import sys; from adamax_jax.__main__ import main; sys.exit(main())"
    )
    arguments = ["demo", "--epochs", "100000", "--optimizers", "adamax"]
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        try:
            # The progress bar shows a cost as soon as one pass is done.
            seen = b""
            while b"cost=" not in seen and (more := process.stdout.read1()):
                seen += more
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, output.decode()
    assert b"AdaMax" in output
    assert b"Traceback" not in output
    assert (tmp_path / "adamax_demo.png").read_bytes().startswith(PNG)


def test_an_interrupt_that_jax_wraps_is_one_and_an_error_is_none(monkeypatch, capsys):
    def wrap(*_):
        raise ValueError("while comparing") from KeyboardInterrupt()

    monkeypatch.setattr(_demo, "_train_all", wrap)
    assert main(["demo"]) == 130

    def fail(*_):
        raise ValueError("another")

    monkeypatch.setattr(_demo, "_train_all", fail)
    with pytest.raises(ValueError, match="another"):
        main(["demo"])
