"""``python -m adamax_jax``: what is the same for all commands.

Most tests ask it of a command that takes no time.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from tables import squeezed

from adamax_jax.__main__ import main
from adamax_jax._lab import bench, command, demo

COMMANDS = ["demo", "bench", "study"]
MODULE = [sys.executable, "-m", "adamax_jax"]
INTERRUPTED = 130
FILES = {"--json": "a.json", "--markdown": "a.md", "--figure": "a.png"}
ALL_FILES = [word for pair in FILES.items() for word in pair]


def use(monkeypatch, results, **changes):
    """Puts a command "quick" with such results in the place of the demo.

    ``results`` is a function that returns or yields them.
    """

    def add_figure(parser):
        parser.add_argument("--figure", type=command.file_path)

    parts = {
        "name": "quick",
        "help": "no work",
        "add_options": add_figure,
        "needs": lambda options: {},
        "results": lambda options: iter(results()),
        "describe": lambda result: f"result {result}",
        "text": lambda results, options: f"table of {results}\n",
        "numbers": lambda results, options: {"results": results},
        "draw": lambda results, options: options.figure.write_text(f"{results}"),
    }
    monkeypatch.setattr(demo, "COMMAND", command.Command(**parts | changes))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_saved(folder, results):
    """Asserts that all files show these results."""
    assert json.loads((folder / "a.json").read_text()) == {"results": results}
    assert (folder / "a.md").read_text() == f"table of {results}\n"
    assert (folder / "a.png").read_text() == f"{results}"


@pytest.mark.parametrize(("total", "shown"), [(2, ["1/2", "2/2"]), (None, ["1", "2"])])
def test_progress_then_the_tables_and_the_files(
    total, shown, folder, monkeypatch, capsys
):
    def results():
        yield 10
        # Each is saved at once, but the figure, which takes time.
        assert json.loads((folder / "a.json").read_text()) == {"results": [10]}
        assert not (folder / "a.png").exists()
        yield 20

    use(
        monkeypatch,
        results,
        total=lambda options: total,
        first_line=lambda options: "quick, at once",
    )
    assert main(["quick", *ALL_FILES]) == 0
    output, progress = capsys.readouterr()
    first, *others = progress.splitlines()
    assert first == "quick, at once"
    assert [line.split() for line in others] == [
        [n, "result", result] for n, result in zip(shown, ("10", "20"), strict=True)
    ]
    assert output == "\ntable of [10, 20]\n" + "".join(
        f"Saved: {(folder / name).resolve()}\n" for name in FILES.values()
    )
    assert_saved(folder, [10, 20])


def test_without_options_nothing_is_saved(folder, monkeypatch, capsys):
    use(monkeypatch, lambda: [10])
    assert main(["quick"]) == 0
    assert capsys.readouterr().out == "\ntable of [10]\n"
    assert list(folder.iterdir()) == []


def wrapped():
    """As JAX wraps an interrupt that is raised while it compares trees."""
    error = ValueError("while comparing")
    error.__cause__ = KeyboardInterrupt()
    return error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), wrapped(), OSError("no room")])
@pytest.mark.parametrize("first", [[], [10]])
def test_an_error_keeps_the_results(first, error, folder, monkeypatch, capsys):
    """An interrupt sets the exit status; other errors are raised."""

    def results():
        yield from first
        raise error

    use(monkeypatch, results)
    if isinstance(error, OSError):
        with pytest.raises(OSError, match="no room"):
            main(["quick", *ALL_FILES])
    else:
        assert main(["quick", *ALL_FILES]) == INTERRUPTED
    if first:
        assert "table of [10]\n" in capsys.readouterr().out
        assert_saved(folder, [10])
    else:
        assert capsys.readouterr().out == ""
        assert list(folder.iterdir()) == []


def test_an_interrupt_during_a_save_leaves_whole_files(folder, monkeypatch):
    interrupts = [KeyboardInterrupt()]

    def numbers(results, options):
        options.json.write_text("half of a fi")
        if results == [10, 20] and interrupts:
            raise interrupts.pop()
        return {"results": results}

    use(monkeypatch, lambda: [10, 20, 30], numbers=numbers)
    assert main(["quick", *ALL_FILES]) == INTERRUPTED
    assert_saved(folder, [10, 20])


def test_the_tables_are_printed_also_where_files_cannot_be_written(
    folder, monkeypatch, capsys
):
    """The work goes on, and what can be written is."""

    def numbers(results, options):
        raise OSError(28, "No space left on device")

    use(monkeypatch, lambda: [10, 20], numbers=numbers)
    assert main(["quick", *ALL_FILES]) == 1
    output, progress = capsys.readouterr()
    assert "table of [10, 20]\n" in output
    assert "Cannot save to a.json: No space left on device.\n" in progress
    assert f"Saved: {(folder / 'a.png').resolve()}" in output
    assert "a.json" not in output


def test_an_interrupt_while_the_figure_is_drawn(folder, monkeypatch, capsys):
    def draw(results, options):
        raise KeyboardInterrupt

    use(monkeypatch, lambda: [10], draw=draw)
    assert main(["quick", *ALL_FILES]) == INTERRUPTED
    assert "table of [10]\n" in capsys.readouterr().out
    assert json.loads((folder / "a.json").read_text()) == {"results": [10]}


def test_json_has_null_for_what_is_not_finite(folder, monkeypatch):
    numbers = {"a": [math.nan, 1.5], "b": {"c": (math.inf, -math.inf)}, "d": "nan"}
    use(monkeypatch, lambda: [10], numbers=lambda results, options: numbers)
    assert main(["quick", "--json", "a.json"]) == 0
    text = (folder / "a.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text) == {"a": [None, 1.5], "b": {"c": [None, None]}, "d": "nan"}


def never():
    raise AssertionError("this must be said before the work")


def test_files_that_cannot_be_written_are_named_before_the_work(
    folder, monkeypatch, capsys
):
    use(monkeypatch, never)
    for option, name in FILES.items():
        assert main(["quick", option, f"none/{name}"]) == 1
        message = f"Cannot save to {Path('none', name)}: there is no folder none."
        assert message in capsys.readouterr().err
        (folder / name).mkdir()
        assert main(["quick", option, name]) == 1
        assert f"Cannot save to {name}: Is a directory." in capsys.readouterr().err
    assert main(["quick", "--json", "a", "--markdown", "./a"]) == 1
    assert "name one file" in capsys.readouterr().err


def test_a_path_begins_at_home_also_in_quotes(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    use(monkeypatch, lambda: [10])
    assert main(["quick", *(word.replace("a.", "~/a.") for word in ALL_FILES)]) == 0
    assert_saved(folder, [10])


def test_what_a_file_held_is_kept_until_there_is_a_result(folder, monkeypatch):
    def results():
        raise KeyboardInterrupt
        yield

    use(monkeypatch, results)
    (folder / "a.json").write_text("before")
    assert main(["quick", *ALL_FILES]) == INTERRUPTED
    assert [path.name for path in folder.iterdir()] == ["a.json"]
    assert (folder / "a.json").read_text() == "before"


@pytest.mark.parametrize("name", ["demo", "study"])
def test_missing_packages_and_how_to_install_them(name, folder, monkeypatch, capsys):
    for module in ("flax", "sklearn"):
        monkeypatch.setitem(sys.modules, module, None)
    assert main([name]) == 1
    # Before anything else.
    assert capsys.readouterr().err == (
        f"The command {name} needs flax, scikit-learn. In a clone of the repository:\n"
        '    pip install -e ".[demo]"\n'
    )
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--optimizers", "adan"], "similar: 'adam', 'adamax'"),
        (["demo", "--epochs", "0"], "'0' is not a whole number above 0"),
        (["demo", "--epochs", "1.5"], "'1.5' is not a whole number above 0"),
        (["demo", "--seed", "-1"], "'-1' is not a whole number below 2^32"),
        (["demo", "--seed", str(2**32)], "is not a whole number below 2^32"),
        (["demo", "--figure", "a.xyz"], "'a.xyz' does not end in .pdf, .png or .svg"),
        (["bench", "--for", "v5e,h200"], "'h200' is none of v4, v5e"),
        (["bench", "--for", "v5e", "--max-size", "9"], "are for times"),
        (["study", "--methods", "adamax"], "'AdaMax', 'Adam'"),
    ],
)
def test_options_that_are_not_known_name_the_known(arguments, message, folder, capsys):
    try:
        status = main(arguments)
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("demo", ["--figure PATH", "adamax=0.008"]),
        ("bench", [bench.TIME, "--for DEVICES", "torch, flashoptim-jax"]),
        ("study", ["--rates", "'transformer, warm-up'", "'memory, further'"]),
    ],
)
def test_help_of_a_command(name, shown, capsys):
    with pytest.raises(SystemExit) as exit:
        main([name, "--help"])
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    for text in ("--json PATH", "--markdown PATH", *shown):
        assert text in printed
    assert all(len(line) < 80 for line in printed.splitlines())


def test_a_table_is_aligned():
    assert command.table(["a", "long name"], [["left", "1"], ["b", ""]]) == (
        "| a    | long name |\n"
        "| ---- | --------- |\n"
        "| left | 1         |\n"
        "| b    |           |"
    )


def test_the_environment_is_this_one(monkeypatch):
    """With the settings of JAX and XLA that may change the numbers."""
    for name in [name for name in os.environ if name.startswith(("JAX_", "XLA_"))]:
        monkeypatch.delenv(name)
    assert command.environment().startswith(f"jax {jax.__version__} on ")
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert command.environment().endswith(", JAX_ENABLE_X64=1")


def test_a_process_without_arguments_shows_the_commands():
    done = subprocess.run(MODULE, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage: python -m adamax_jax" in done.stdout
    for name in COMMANDS:
        assert f"\n    {name} " in done.stdout


def interrupted(arguments, folder, at, seconds=0.0):
    """Ctrl-C in a process, some time after a text: the exit status and the output."""
    # A shell's background job, as CI may be, ignores SIGINT; a user's command does not.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "import runpy; runpy.run_module('adamax_jax', run_name='__main__')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=folder,
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        try:
            seen = b""
            while at not in seen and (more := process.stdout.read1()):
                seen += more
            time.sleep(seconds)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    return process.returncode, output


needs_sigint = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT")


@needs_sigint
def test_ctrl_c_ends_a_process_that_has_saved_its_work(tmp_path):
    arguments = ["study", "--tasks", "perceptron", "--methods", "AdaMax"]
    arguments += ["--seeds", "9999", "--steps", "3", "--json", "a.json"]
    # A training is named as soon as it is done.
    status, output = interrupted(arguments, tmp_path, at=b"seed 1")
    assert status == INTERRUPTED, output.decode()
    assert "| AdaMax | 8.00 | 0.008 |" in squeezed(output.decode())
    assert b"Traceback" not in output
    assert len(json.loads((tmp_path / "a.json").read_text())["runs"]) >= 2


@needs_sigint
@pytest.mark.parametrize("seconds", [0.0, 3.0], ids=["imports", "training"])
def test_ctrl_c_before_the_first_result(seconds, tmp_path):
    """While packages are imported, and while XLA compiles or trains."""
    arguments = ["demo", "--epochs", "40"]
    status, output = interrupted(arguments, tmp_path, b"Loading Flax", seconds)
    assert status == INTERRUPTED, output.decode()
    assert b"Traceback" not in output
    assert list(tmp_path.iterdir()) == []
