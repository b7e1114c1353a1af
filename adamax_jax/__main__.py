"""``python -m adamax_jax``: the commands of the package."""

import _thread
import argparse
import os
import sys
import threading
from collections.abc import Sequence

import adamax_jax


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments name and returns its exit status."""
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        # There is nothing to save yet.
        return 130


def _run(arguments):
    # Imported here, so that Ctrl-C during these imports is caught as well.
    from adamax_jax._lab import bench, command, demo, study

    parser = argparse.ArgumentParser(
        prog="python -m adamax_jax", description="AdaMax and Adam for JAX."
    )
    parser.add_argument("--version", action="version", version=adamax_jax.__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for each in (demo.COMMAND, bench.COMMAND, study.COMMAND):
        command.add_parser(commands, each)
    options = parser.parse_args(arguments)
    if "command" not in options:
        parser.print_help()
        return 0
    return command.run(options.command, options)


def _interrupt_again(unraisable):
    """Repeats Ctrl-C where it was ignored, in JAX's callback of garbage collection."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        threading.Timer(0.01, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(unraisable)


if __name__ == "__main__":
    sys.unraisablehook = _interrupt_again
    status = main()
    if status == 130:
        # Exits at once: XLA may still be computing, and would crash as Python ends.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
