"""What the commands of ``python -m adamax_jax`` share."""

import argparse
import json
import math
import platform
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax


def positive_int(text: str) -> int:
    """The type of an option that counts something."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


# The packages of the extra "demo", by the modules in them.
PACKAGES = {
    "flax": "flax",
    "matplotlib": "matplotlib",
    "sklearn": "scikit-learn",
    "tqdm": "tqdm",
}


def obstacle(
    command: str, paths: Iterable[Path | None], modules: Iterable[str] = PACKAGES
) -> str | None:
    """Why a command that imports modules and saves files cannot run, or None."""
    missing = _missing_packages(modules)
    if missing:
        return (
            f"The {command} needs {', '.join(missing)}. In the folder of adamax_jax:\n"
            '    pip install -e ".[demo]"'
        )
    for path in filter(None, paths):
        if path.is_dir():
            return f"Cannot save to {path}: it is a folder."
        if not path.parent.is_dir():
            return f"Cannot save to {path}: no folder {path.parent}."
    return None


def _missing_packages(modules: Iterable[str]) -> list[str]:
    missing = []
    for module in modules:
        try:
            __import__(module)
        except ImportError:
            missing.append(PACKAGES[module])
    return missing


def add_training_options(parser, choices: Mapping[str, Iterable[str]]) -> None:
    """Adds what commands that train models take: names to choose, seeds, files."""
    for option, names in choices.items():
        parser.add_argument(
            option,
            nargs="+",
            metavar="NAME",
            choices=names,
            default=list(names),
            help=f"of {', '.join(map(repr, names))} (default: %(default)s)",
        )
    parser.add_argument(
        "--seeds",
        type=positive_int,
        default=5,
        metavar="N",
        help="how many, from 0 on (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=positive_int,
        metavar="N",
        help="of each training, in place of its own",
    )
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="where to save all numbers"
    )
    parser.add_argument(
        "--markdown", type=Path, metavar="PATH", help="where to save the table"
    )


def is_interrupt(error: BaseException) -> bool:
    """Whether Ctrl-C was the reason; JAX wraps one that comes as it compares trees."""
    return isinstance(error, KeyboardInterrupt) or isinstance(
        error.__cause__, KeyboardInterrupt
    )


def train_all(
    trainings: Iterable[Any],
    total: int | None,
    describe: Callable[[Any], str],
    save: Callable[[list[Any]], str],
    paths: Iterable[Path | None],
) -> int:
    """Saves after each training, prints the end result; returns the exit status."""
    from tqdm import tqdm

    done: list[Any] = []
    interrupted = False
    try:
        with tqdm(total=total, unit="run") as progress:
            for training in trainings:
                done.append(training)
                save(done)
                progress.set_description(describe(training), refresh=False)
                progress.update()
    except BaseException as error:
        if not is_interrupt(error):
            raise
        interrupted = True
    if done:
        # Once more: the interrupt may have come while it saved.
        print("\n" + save(done), end="")
        for path in paths:
            if path is not None:
                print(f"Saved: {path.resolve()}")
    return 130 if interrupted else 0


def environment() -> str:
    """The versions and the device that the numbers come from."""
    device = jax.devices()[0].device_kind
    return f"jax {jax.__version__} on {device}, Python {platform.python_version()}"


def write_json(path: Path, value: Any) -> None:
    """Writes JSON that every parser reads: null for what is not finite."""
    path.write_text(json.dumps(_finite_or_none(value)) + "\n")


def _finite_or_none(value):
    if isinstance(value, dict):
        return {key: _finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
