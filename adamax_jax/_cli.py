"""What the commands of ``python -m adamax_jax`` share."""

import argparse
import json
import math
import platform
from collections.abc import Iterable
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
