"""The command line, and what is the same for all commands.

A command supplies its options, its results one after the other, and how they are shown.
Missing packages, files, interrupts, progress and printing are taken care of here.
"""

import argparse
import json
import math
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

import adamax_jax

# The packages of the extra "demo", by the modules in them.
PACKAGES = {"flax": "flax", "matplotlib": "matplotlib", "sklearn": "scikit-learn"}
# Those of the extra "aot".
AOT_PACKAGES = {
    "libtpu": "libtpu",
    "jax_plugins.xla_cuda13": "jax[cuda13-local]",
    "jax_cuda13_plugin": "jax[cuda13-local]",
    "nvidia.cu13.bin": "nvidia-cuda-nvcc",
}
FIGURES = (".pdf", ".png", ".svg")


@dataclass(frozen=True)
class Command:
    """What a command supplies."""

    name: str
    help: str
    description: str | None
    add_options: Callable[[argparse.ArgumentParser], None]
    # The modules that it needs.
    needs: Callable[[argparse.Namespace], Iterable[str]]
    # One result after the other.
    results: Callable[[argparse.Namespace], Iterator[Any]]
    # A result in a line, to show that there is progress.
    describe: Callable[[Any], str]
    # The tables of the results there are, and what is said below them.
    text: Callable[[Sequence[Any], argparse.Namespace], str]
    # All numbers, for --json.
    numbers: Callable[[Sequence[Any], argparse.Namespace], Mapping[str, Any]]
    # Saves the figure, for --figure.
    draw: Callable[[Sequence[Any], argparse.Namespace], None] | None = None
    # What is wrong with the options taken together, or None.
    problem: Callable[[argparse.Namespace], str | None] = lambda options: None
    # Below the options in the help.
    epilog: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments name and returns its exit status."""
    # Imported here, since they import what they share from this file.
    from adamax_jax._lab import bench, demo, study

    parser = argparse.ArgumentParser(
        prog="python -m adamax_jax", description="AdaMax for JAX."
    )
    parser.add_argument("--version", action="version", version=adamax_jax.__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in (demo.COMMAND, bench.COMMAND, study.COMMAND):
        _add_parser(commands, command)
    options = parser.parse_args(arguments)
    if "command" not in options:
        parser.print_help()
        return 0
    return _carry_out(options.command, options)


def _add_parser(commands, command):
    parser = commands.add_parser(
        command.name,
        help=command.help,
        description=command.description,
        epilog=command.epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_options(parser)
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="where to save all numbers"
    )
    parser.add_argument(
        "--markdown", type=Path, metavar="PATH", help="where to save the table"
    )
    parser.set_defaults(command=command)


def _carry_out(command, options):
    """Saves after each result, prints the tables in the end; returns the exit status.

    What was measured before an error is shown, too.
    """
    paths = [options.json, options.markdown, vars(options).get("figure")]
    paths = [path for path in paths if path is not None]
    if problem := command.problem(options):
        print(problem, file=sys.stderr)
        return 2
    if problem := _missing(command, options) or _unwritable(paths):
        print(problem, file=sys.stderr)
        return 1
    results: list[Any] = []
    status = 0
    try:
        for result in command.results(options):
            results.append(result)
            print(f"{len(results):>4}  {command.describe(result)}", file=sys.stderr)
            _save(command, results, options)
    except BaseException as error:
        if not is_interrupt(error):
            raise
        status = 130
    finally:
        if results:
            # Before the files, which may fail to be written.
            print("\n" + command.text(results, options), end="")
            # Once more: the interrupt may have come while it saved.
            _save(command, results, options)
            if command.draw is not None and options.figure is not None:
                command.draw(results, options)
            for path in paths:
                print(f"Saved: {path.resolve()}")
    return status


def _save(command, results, options):
    if options.json is not None:
        numbers = _finite_or_none(command.numbers(results, options))
        options.json.write_text(json.dumps(numbers) + "\n", encoding="utf-8")
    if options.markdown is not None:
        options.markdown.write_text(command.text(results, options), encoding="utf-8")


def _missing(command, options):
    """What to install, or None."""
    missing = [name for name in command.needs(options) if not _can_import(name)]
    if not missing:
        return None
    known = PACKAGES | AOT_PACKAGES
    packages = list(dict.fromkeys(known[name] for name in missing))
    needs = f"The command {command.name} needs {', '.join(packages)}"
    extra = "aot" if missing[0] in AOT_PACKAGES else "demo"
    folder = Path(adamax_jax.__file__).parent.parent
    if (folder / "pyproject.toml").exists():
        return f'{needs}. In the folder of adamax_jax:\n    pip install -e ".[{extra}]"'
    # From a wheel, which pip may not find by its name.
    return f"{needs}:\n    pip install {shlex.join(packages)}"


def _can_import(module):
    try:
        __import__(module)
    except ImportError:
        return False
    return True


def _unwritable(paths):
    """Which file cannot be saved and why, or None."""
    for path in paths:
        if path.is_dir():
            return f"Cannot save to {path}: it is a folder."
        if not path.parent.is_dir():
            return f"Cannot save to {path}: no folder {path.parent}."
    return None


def is_interrupt(error: BaseException) -> bool:
    """Whether Ctrl-C was the reason; JAX wraps one that comes as it compares trees."""
    return isinstance(error, KeyboardInterrupt) or isinstance(
        error.__cause__, KeyboardInterrupt
    )


def _finite_or_none(value):
    """A value for JSON that every parser reads: null for what is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def positive_int(text: str) -> int:
    """The type of an option that counts something."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def figure_path(text: str) -> Path:
    """The type of an option that names a figure."""
    path = Path(text)
    if path.suffix.lower() not in FIGURES:
        raise argparse.ArgumentTypeError(
            f"{text!r} does not end in {', '.join(FIGURES[:-1])} or {FIGURES[-1]}"
        )
    return path


def add_names(
    parser: argparse.ArgumentParser,
    option: str,
    names: Iterable[str],
    default: Iterable[str],
) -> None:
    """Adds an option that takes some of several names."""
    parser.add_argument(
        option,
        nargs="+",
        metavar="NAME",
        choices=list(names),
        default=list(default),
        help=f"of {', '.join(map(repr, names))} (default: %(default)s)",
    )


def environment() -> str:
    """The versions and the device that the numbers come from."""
    device = jax.devices()[0].device_kind
    return f"jax {jax.__version__} on {device}, Python {platform.python_version()}"
