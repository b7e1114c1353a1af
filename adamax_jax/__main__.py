"""``python -m adamax_jax``: the commands of the package."""

import argparse
import sys
from collections.abc import Sequence

from adamax_jax import __version__, _bench, _compare, _demo, _study


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments name and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m adamax_jax", description="AdaMax for JAX."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _demo.add_parser(commands)
    _bench.add_parser(commands)
    _study.add_parser(commands)
    _compare.add_parser(commands)
    options = parser.parse_args(arguments)
    if "run" not in options:
        parser.print_help()
        return 0
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
