"""What all commands share: options, checks before the work, progress, saved files.

A command is a :class:`Command` in a file of its own. It supplies its options, its
results one after the other, and how they are shown.
"""

import argparse
import contextlib
import difflib
import importlib.util
import json
import math
import os
import platform
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

# Columns of the help.
WIDTH = 79
# Modules that commands import, and the packages that have them.
FLAX = {"flax": "flax"}
MATPLOTLIB = {"matplotlib": "matplotlib"}
SKLEARN = {"sklearn": "scikit-learn"}

Options = argparse.Namespace


@dataclass(frozen=True, kw_only=True)
class Command:
    """The parts of a command, in the order of their use."""

    name: str
    # Why the options contradict each other, or None.
    problem: Callable[[Options], str | None] = lambda options: None
    # Modules that the command imports, with the packages that have them.
    needs: Callable[[Options], Mapping[str, str]] = lambda options: {}
    # The extra of this package that installs them.
    extra: str = "demo"
    # Printed before anything slow is imported.
    first_line: Callable[[Options], str | None] = lambda options: None
    # How many results there will be, if that is known.
    total: Callable[[Options], int | None] = lambda options: None
    # Yields one result after the other.
    results: Callable[[Options], Iterator[Any]]
    # Describes a result in one line of progress.
    describe: Callable[[Any], str]
    # The tables of the results, and their caption.
    text: Callable[[Sequence[Any], Options], str]
    # All numbers, for --json.
    numbers: Callable[[Sequence[Any], Options], Mapping[str, Any]]
    # Saves the figure, for --figure.
    draw: Callable[[Sequence[Any], Options], None] | None = None
    # The help: in the list of commands, above the options, and below them.
    help: str = ""
    description: str | None = None
    epilog: str | None = None
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    # The command that runs in place of this one, given the options.
    variant: Callable[[Options], "Command | None"] = lambda options: None


def add_parser(commands: Any, command: Command) -> None:
    """Adds the parser of a command to those of all commands."""
    paragraphs = (command.description or "").strip().split("\n\n")
    parser = commands.add_parser(
        command.name,
        help=command.help,
        description="\n\n".join(textwrap.fill(text, WIDTH) for text in paragraphs),
        epilog=command.epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_options(parser)
    parser.add_argument(
        "--json", type=file_path, metavar="PATH", help="where to save all numbers"
    )
    parser.add_argument(
        "--markdown", type=file_path, metavar="PATH", help="where to save the table"
    )
    parser.set_defaults(command=command)


def run(command: Command, options: Options) -> int:
    """Saves after each result, prints the tables at the end; returns the exit status.

    What was measured before an error or Ctrl-C is printed and saved as well.
    """
    command = command.variant(options) or command
    files = _files(command, options)
    if problem := command.problem(options):
        print(problem, file=sys.stderr)
        return 2
    paths = [path for path, _ in files]
    if problem := _missing(command, options) or _unwritable(paths):
        print(problem, file=sys.stderr)
        return 1
    if line := command.first_line(options):
        print(line, file=sys.stderr, flush=True)
    total = command.total(options)
    # A figure takes long to draw.
    often = [file for file in files if file[1] is not command.draw]
    results: list[Any] = []
    status = 0
    try:
        # Other libraries' optimizers mix dtypes, whatever the user's settings are.
        with jax.numpy_dtype_promotion("standard"):
            for result in command.results(options):
                results.append(result)
                progress = f"{len(results)}/{total}" if total else f"{len(results):>4}"
                print(f"{progress}  {command.describe(result)}", file=sys.stderr)
                _save(often, results, options)
    except BaseException as error:
        if not _is_interrupt(error):
            raise
        status = 130
    finally:
        if results:
            # Before the files: an error or Ctrl-C may come while they are saved.
            print("\n" + command.text(results, options), end="", flush=True)
            saved = _save(files, results, options)
            for path in saved:
                print(f"Saved: {path.resolve()}")
            status = status or int(len(saved) < len(files))
    return status


def _files(command, options):
    """The paths of the files to save, each with the function that writes it."""

    def write_numbers(results, options):
        numbers = _finite_or_none(command.numbers(results, options))
        options.json.write_text(json.dumps(numbers) + "\n", encoding="utf-8")

    def write_text(results, options):
        options.markdown.write_text(command.text(results, options), encoding="utf-8")

    write = {"json": write_numbers, "markdown": write_text, "figure": command.draw}
    given = {name: vars(options).get(name) for name in write}
    return [(path, write[name]) for name, path in given.items() if path is not None]


def _save(files, results, options):
    """Writes files, and says which cannot be written; returns the paths of the others.

    After an error the work goes on: the tables will be printed.
    """
    saved = []
    for path, write in files:
        try:
            write(results, options)
            saved.append(path)
        except OSError as error:
            print(f"Cannot save to {path}: {error.strerror or error}.", file=sys.stderr)
    return saved


def _unwritable(paths):
    """Opens each file; says which one cannot be written and why, or returns None."""
    if len({path.resolve() for path in paths}) < len(paths):
        return "Two of --json, --markdown and --figure name one file."
    for path in paths:
        if not path.parent.is_dir():
            return f"Cannot save to {path}: there is no folder {path.parent}."
        is_new = not path.exists()
        try:
            path.open("ab").close()
        except OSError as error:
            return f"Cannot save to {path}: {error.strerror}."
        if is_new:
            path.unlink()
    return None


def is_installed(module: str) -> bool:
    """Whether a module could be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        # The package that the module is in is not there.
        return False


def _missing(command, options):
    """Says which packages to install and how, or returns None."""
    needed = command.needs(options)
    missing = {needed[module]: 0 for module in needed if not is_installed(module)}
    if not missing:
        return None
    return (
        f"The command {command.name} needs {', '.join(missing)}. "
        f'In a clone of the repository:\n    pip install -e ".[{command.extra}]"'
    )


def _is_interrupt(error):
    """Whether Ctrl-C was the reason; JAX wraps one raised while it compares trees."""
    return isinstance(error, KeyboardInterrupt) or isinstance(
        error.__cause__, KeyboardInterrupt
    )


def _finite_or_none(value):
    """Replaces NaN and infinities by None, since JSON has neither."""
    if isinstance(value, Mapping):
        return {key: _finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def file_path(text: str) -> Path:
    """The type of an option that names a file; a shell leaves quoted ~ to it."""
    return Path(os.path.expanduser(text))


def positive_int(text: str) -> int:
    """The type of an option that counts something."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def add_names(
    parser: argparse.ArgumentParser,
    option: str,
    names: Iterable[str],
    default: Iterable[str],
    help: str,
) -> None:
    """Adds an option that takes some of several names, which the epilog lists."""
    known = list(names)

    def name(text):
        if text in known:
            return text
        close = difflib.get_close_matches(text.lower(), map(str.lower, known), n=3)
        similar = [repr(name) for name in known if name.lower() in close]
        hint = f"; similar: {', '.join(similar)}" if similar else ""
        raise argparse.ArgumentTypeError(
            f"{text!r} is not one of the names that --help lists{hint}"
        )

    parser.add_argument(
        option, nargs="+", metavar="NAME", type=name, default=list(default), help=help
    )


def plural(count: int, noun: str) -> str:
    """A number of things."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned."""
    lines = [columns, *rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(n) for cell, n in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


def versions(*packages: str) -> dict[str, str]:
    """The versions of these packages, but for those that are not installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def environment() -> str:
    """The device, versions, and settings of JAX that the numbers come from."""
    device = jax.devices()[0].device_kind
    text = f"jax {jax.__version__} on {device}, Python {platform.python_version()}"
    for name in sorted(os.environ):
        if name == "XLA_FLAGS" or (name.startswith("JAX_") and name != "JAX_PLATFORMS"):
            text += f", {name}={os.environ[name]}"
    return text
