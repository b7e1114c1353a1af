"""``python -m adamax_jax``: what is the same for all commands.

Most of it is asked of a command that takes no time.
"""

import argparse
import importlib.metadata
import json
import math
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import adamax_jax
from adamax_jax._lab import cli, demo
from adamax_jax._lab.cli import main

COMMANDS = ["demo", "bench", "study"]
MODULE = [sys.executable, "-m", "adamax_jax"]
INTERRUPTED = 130


def use(monkeypatch, results, **changes):
    """Puts a command "quick" with such results in the place of the demo.

    ``results`` is a function that returns or yields them.
    """
    parts = {
        "name": "quick",
        "help": "no work",
        "description": None,
        "add_options": lambda parser: parser.add_argument(
            "--figure", type=cli.figure_path
        ),
        "needs": lambda options: [],
        "results": lambda options: iter(results()),
        "describe": lambda result: f"result {result}",
        "text": lambda results, options: f"table of {results}\n",
        "numbers": lambda results, options: {"results": results},
        "draw": lambda results, options: options.figure.write_text(f"{results}"),
    }
    monkeypatch.setattr(demo, "COMMAND", cli.Command(**parts | changes))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


ALL_FILES = ["--json", "a.json", "--markdown", "a.md", "--figure", "a.png"]


def assert_saved(folder, results):
    """That all files show these results."""
    assert_numbers_saved(folder, results)
    assert (folder / "a.png").read_text() == f"{results}"


def assert_numbers_saved(folder, results):
    assert json.loads((folder / "a.json").read_text()) == {"results": results}
    assert (folder / "a.md").read_text() == f"table of {results}\n"


def test_progress_then_the_tables_and_the_files(folder, monkeypatch, capsys):
    use(monkeypatch, lambda: [10, 20])
    assert main(["quick", *ALL_FILES]) == 0
    output, progress = capsys.readouterr()
    assert progress == "   1  result 10\n   2  result 20\n"
    assert output == "\ntable of [10, 20]\n" + "".join(
        f"Saved: {(folder / name).resolve()}\n" for name in ("a.json", "a.md", "a.png")
    )
    assert_saved(folder, [10, 20])


def test_without_options_nothing_is_saved(folder, monkeypatch, capsys):
    use(monkeypatch, lambda: [10])
    assert main(["quick"]) == 0
    assert capsys.readouterr().out == "\ntable of [10]\n"
    assert list(folder.iterdir()) == []


def test_each_result_is_saved_as_soon_as_there_is_one(folder, monkeypatch):
    """The figure, which takes time, once in the end."""

    def results():
        yield 10
        assert_numbers_saved(folder, [10])
        yield 20
        assert_numbers_saved(folder, [10, 20])
        assert not (folder / "a.png").exists()

    use(monkeypatch, results)
    assert main(["quick", *ALL_FILES]) == 0
    assert_saved(folder, [10, 20])


def test_the_tables_are_shown_also_where_files_cannot_be_written(
    folder, monkeypatch, capsys
):
    def numbers(results, options):
        raise OSError("no space left")

    use(monkeypatch, lambda: [10, 20], numbers=numbers)
    with pytest.raises(OSError, match="no space left"):
        main(["quick", *ALL_FILES])
    assert "table of [10]\n" in capsys.readouterr().out


def test_an_error_keeps_what_there_is_and_is_raised(folder, monkeypatch, capsys):
    def results():
        yield 10
        raise RuntimeError("out of memory")

    use(monkeypatch, results)
    with pytest.raises(RuntimeError, match="out of memory"):
        main(["quick", *ALL_FILES])
    assert "table of [10]\n" in capsys.readouterr().out
    assert_saved(folder, [10])


def wrapped():
    """As JAX wraps an interrupt that comes while it compares trees."""
    error = ValueError("while comparing")
    error.__cause__ = KeyboardInterrupt()
    return error


@pytest.mark.parametrize("make", [KeyboardInterrupt, wrapped])
def test_an_interrupt_keeps_what_there_is(make, folder, monkeypatch, capsys):
    def results():
        yield 10
        raise make()

    use(monkeypatch, results)
    assert main(["quick", *ALL_FILES]) == INTERRUPTED
    assert "table of [10]\n" in capsys.readouterr().out
    assert_saved(folder, [10])


def test_an_interrupt_while_it_saves_leaves_whole_files(folder, monkeypatch):
    interrupts = [KeyboardInterrupt()]

    def numbers(results, options):
        options.json.write_text("half of a fi")
        if results == [10, 20] and interrupts:
            raise interrupts.pop()
        return {"results": results}

    use(monkeypatch, lambda: [10, 20, 30], numbers=numbers)
    assert main(["quick", *ALL_FILES]) == INTERRUPTED
    assert_saved(folder, [10, 20])


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), INTERRUPTED), (wrapped(), INTERRUPTED), (OSError(), None)],
)
def test_before_the_first_result_there_is_nothing_to_keep(
    error, status, folder, monkeypatch, capsys
):
    def results():
        raise error

    use(monkeypatch, results)
    if status is None:
        with pytest.raises(type(error)):
            main(["quick", *ALL_FILES])
    else:
        assert main(["quick", *ALL_FILES]) == status
    assert capsys.readouterr().out == ""
    assert list(folder.iterdir()) == []


def test_an_error_is_an_interrupt_only_where_one_was_its_cause():
    assert cli.is_interrupt(KeyboardInterrupt())
    assert cli.is_interrupt(wrapped())
    other = ValueError("another")
    other.__cause__ = OSError()
    assert not cli.is_interrupt(other)
    assert not cli.is_interrupt(ValueError("another"))


def test_json_has_null_for_what_is_not_finite(folder, monkeypatch):
    numbers = {"a": [math.nan, 1.5], "b": {"c": (math.inf, -math.inf)}, "d": "nan"}
    use(monkeypatch, lambda: [10], numbers=lambda results, options: numbers)
    assert main(["quick", "--json", "a.json"]) == 0

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    saved = json.loads((folder / "a.json").read_text(), parse_constant=refuse)
    assert saved == {"a": [None, 1.5], "b": {"c": [None, None]}, "d": "nan"}


def never():
    raise AssertionError("this must be said before the work")


OPTIONS = {"--json": "a.json", "--markdown": "a.md", "--figure": "a.png"}


@pytest.mark.parametrize("option", OPTIONS)
def test_what_cannot_be_saved_is_said_before_the_work(
    option, folder, monkeypatch, capsys
):
    use(monkeypatch, never)
    missing = Path("missing", OPTIONS[option])
    assert main(["quick", option, str(missing)]) == 1
    assert f"Cannot save to {missing}: no folder missing." in capsys.readouterr().err
    (folder / OPTIONS[option]).mkdir()
    assert main(["quick", option, OPTIONS[option]]) == 1
    assert (
        f"Cannot save to {OPTIONS[option]}: it is a folder" in capsys.readouterr().err
    )


def test_options_that_contradict_each_other(folder, monkeypatch, capsys):
    use(monkeypatch, never, problem=lambda options: "One of the two, please.")
    assert main(["quick"]) == 2
    assert capsys.readouterr() == ("", "One of the two, please.\n")


def hide(monkeypatch, *modules):
    """Makes them impossible to import."""
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.parametrize(
    ("is_clone", "how"),
    [
        (True, 'In the folder of adamax_jax:\n    pip install -e ".[demo]"'),
        (False, ":\n    pip install flax scikit-learn"),
    ],
    ids=["clone", "wheel"],
)
def test_missing_packages_and_how_to_install_them(
    is_clone, how, tmp_path, monkeypatch, capsys
):
    use(monkeypatch, never, needs=lambda options: ["flax", "matplotlib", "sklearn"])
    hide(monkeypatch, "flax", "sklearn")
    module = tmp_path / "adamax_jax" / "__init__.py"
    monkeypatch.setattr(adamax_jax, "__file__", str(module))
    if is_clone:
        (tmp_path / "pyproject.toml").touch()
    assert main(["quick"]) == 1
    message = capsys.readouterr().err
    assert "The command quick needs flax, scikit-learn" in message
    assert message.endswith(f"{how}\n")


@pytest.mark.parametrize(
    ("arguments", "module", "package"),
    [
        (["demo"], "flax", "flax"),
        (["demo"], "matplotlib", "matplotlib"),
        (["demo"], "sklearn", "scikit-learn"),
        (["study"], "flax", "flax"),
        (["study"], "sklearn", "scikit-learn"),
        (["bench", "--figure", "a.png"], "matplotlib", "matplotlib"),
    ],
)
def test_commands_say_what_they_need(
    arguments, module, package, folder, monkeypatch, capsys
):
    hide(monkeypatch, module)
    assert main(arguments) == 1
    message = f"The command {arguments[0]} needs {package}"
    assert message in capsys.readouterr().err
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("command", ["demo", "bench"])
def test_figures_are_of_kinds_that_can_be_drawn(command, folder, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command, "--figure", "a.xyz"])
    assert exit.value.code == 2
    message = "'a.xyz' does not end in .pdf, .png or .svg"
    assert message in capsys.readouterr().err
    for name in ("a.pdf", "a.png", "a.svg", "A.PNG"):
        # Goes on to the next check.
        assert main([command, "--figure", str(Path("missing", name))]) == 1
        assert "no folder missing" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", ""])
def test_what_is_counted_is_a_whole_number_above_0(text):
    assert cli.positive_int("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match="whole number above 0"):
        cli.positive_int(text)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--json PATH", "--markdown PATH"):
        assert option in shown


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    version = importlib.metadata.version("adamax_jax")
    assert capsys.readouterr().out.strip() == version


def test_the_environment_is_this_one():
    python = ".".join(map(str, sys.version_info[:3]))
    expected = f"jax {jax.__version__} on {jax.devices()[0].device_kind}"
    assert cli.environment() == f"{expected}, Python {python}"


def test_the_module_exits_with_the_status(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["adamax_jax", "study", "--json", "none/a.json"])
    file = Path(adamax_jax.__file__).with_name("__main__.py")
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(file), run_name="__main__")
    assert exit.value.code == 1
    assert "no folder none" in capsys.readouterr().err


def test_a_process_without_arguments_shows_the_commands():
    done = subprocess.run(MODULE, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage: python -m adamax_jax" in done.stdout
    for command in COMMANDS:
        assert f"\n    {command} " in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send")
def test_ctrl_c_ends_a_process_that_has_saved_its_work(tmp_path):
    # A shell's background job, as CI may be, ignores SIGINT; a user's command does not.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "import runpy; runpy.run_module('adamax_jax', run_name='__main__')"
    )
    arguments = ["study", "--tasks", "mlp", "--methods", "AdaMax", "--seeds", "9999"]
    arguments += ["--steps", "3", "--json", "a.json"]
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=tmp_path,
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        try:
            # A run is named as soon as it is done.
            seen = b""
            while b"seed 1" not in seen and (more := process.stdout.read1()):
                seen += more
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == INTERRUPTED, output.decode()
    assert b"| AdaMax | 8.00 | 0.008 |" in output
    assert b"Traceback" not in output
    assert len(json.loads((tmp_path / "a.json").read_text())["runs"]) >= 2
