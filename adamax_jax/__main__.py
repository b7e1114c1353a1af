"""``python -m adamax_jax``: the commands of the package."""

import argparse
import sys
from collections.abc import Sequence

import adamax_jax


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments name and returns its exit status."""
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        # Before there was anything to save.
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


if __name__ == "__main__":
    sys.exit(main())
