"""What all commands share: options, checks before the work, progress, saved files.

A command is a :class:`Command` in a file of its own. It supplies its options, its
results one after the other, and how they are shown.
"""

import argparse
import difflib
import json
import math
import os
import platform
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

import adamax_jax

# Columns of the help.
WIDTH = 79
FIGURES = (".pdf", ".png", ".svg")
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
    # Printed before anything slow is imported.
    first_line: Callable[[Options], str | None] = lambda options: None
    # Modules that the command imports, with the packages that have them.
    needs: Callable[[Options], Mapping[str, str]] = lambda options: {}
    # The extra of pyproject.toml with these packages.
    extra: str = "demo"
    # How many results there will be, if that is known.
    total: Callable[[Options], int | None] = lambda options: None
    # Yields one result after the other.
    results: Callable[[Options], Iterator[Any]]
    # Describes a result in one line of progress.
    describe: Callable[[Any], str]
    # The tables of the results so far, and their caption.
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
        "--json", type=Path, metavar="PATH", help="where to save all numbers"
    )
    parser.add_argument(
        "--markdown", type=Path, metavar="PATH", help="where to save the table"
    )
    parser.set_defaults(command=command)


def run(command: Command, options: Options) -> int:
    """Saves after each result, prints the tables at the end; returns the exit status.

    What was measured before an error is printed and saved as well.
    """
    command = command.variant(options) or command
    paths = [options.json, options.markdown, vars(options).get("figure")]
    paths = [path for path in paths if path is not None]
    if problem := command.problem(options):
        print(problem, file=sys.stderr)
        return 2
    if problem := _unwritable(paths):
        print(problem, file=sys.stderr)
        return 1
    if line := command.first_line(options):
        print(line, file=sys.stderr, flush=True)
    if problem := _missing(command, options):
        print(problem, file=sys.stderr)
        return 1
    total = command.total(options)
    results: list[Any] = []
    status = 0
    try:
        # Other libraries' optimizers mix dtypes, whatever the user's settings are.
        with jax.numpy_dtype_promotion("standard"):
            for result in command.results(options):
                results.append(result)
                progress = f"{len(results)}/{total}" if total else f"{len(results):>4}"
                print(f"{progress}  {command.describe(result)}", file=sys.stderr)
                _save(command, results, options)
    except BaseException as error:
        if not _is_interrupt(error):
            raise
        status = 130
    finally:
        if results:
            _finish(command, results, options, paths)
    return status


def _finish(command, results, options, paths):
    """Prints the tables, draws the figure, and saves all once more.

    An interrupt may have come during the last save, and files may be impossible to
    write: the tables come first.
    """
    print("\n" + command.text(results, options), end="", flush=True)
    if command.draw is not None and options.figure is not None:
        command.draw(results, options)
    _save(command, results, options)
    for path in paths:
        print(f"Saved: {path.resolve()}")


def _save(command, results, options):
    if options.json is not None:
        numbers = _finite_or_none(command.numbers(results, options))
        options.json.write_text(json.dumps(numbers) + "\n", encoding="utf-8")
    if options.markdown is not None:
        options.markdown.write_text(command.text(results, options), encoding="utf-8")


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


def _missing(command, options):
    """Says which packages to install and how, or returns None."""
    needed = command.needs(options)
    missing = [package for module, package in needed.items() if not _can_import(module)]
    if not missing:
        return None
    packages = list(dict.fromkeys(missing))
    needs = f"The command {command.name} needs {', '.join(packages)}"
    folder = Path(adamax_jax.__file__).parent.parent
    if (folder / "pyproject.toml").exists():
        install = f'pip install -e ".[{command.extra}]"'
        return f"{needs}. In the folder of adamax_jax:\n    {install}"
    # Installed from a wheel, which pip may not find by its name.
    return f"{needs}:\n    pip install {shlex.join(packages)}"


def _can_import(module):
    try:
        __import__(module)
    except ImportError:
        return False
    return True


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


def positive_int(text: str) -> int:
    """The type of an option that counts something."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def add_figure(parser: argparse.ArgumentParser, default: Path | None = None) -> None:
    """Adds the option --figure."""
    parser.add_argument(
        "--figure",
        type=_figure_path,
        default=default,
        metavar="PATH",
        help="where to save the figure"
        + (" (default: %(default)s)" if default else ""),
    )


def _figure_path(text):
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


def environment() -> str:
    """The device, versions, and settings of JAX that the numbers come from."""
    device = jax.devices()[0].device_kind
    text = f"jax {jax.__version__} on {device}, Python {platform.python_version()}"
    for name in sorted(os.environ):
        if name == "XLA_FLAGS" or (name.startswith("JAX_") and name != "JAX_PLATFORMS"):
            text += f", {name}={os.environ[name]}"
    return text
