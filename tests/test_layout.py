"""Who may import whom: the laboratory from nowhere, nothing private from elsewhere.

Ruff sees what is imported (``banned-api`` in ``pyproject.toml``); here the text of the
package is searched for what is reached by a name, and a process for what it has loaded.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import adamax_jax

ROOT = Path(adamax_jax.__file__).parent
# Modules under private names, also in strings; and private attributes of anything but
# self, where namedtuples and ``os`` have public ones with such names.
PRIVATE = re.compile(
    r"\b_src\b|\b(?:from|import) (?:jax|optax).*\b_[a-z]"
    r"|(?<!\bself)(?<!\bcls)(?<=\w)\._(?!replace\b|fields\b|asdict\b|exit\b)[a-z]"
)
OURS = re.compile(r"^\s*from (adamax_jax)?\.\S* import .*$", re.MULTILINE)
LABORATORY = re.compile(r"\b_lab\b")
# What the commands need and the optimizer must not, beside the laboratory.
EXTRAS = ("flax", "matplotlib", "sklearn")


def found(pattern, text):
    return pattern.findall(OURS.sub("", text) if pattern is PRIVATE else text)


def test_nothing_private_is_used():
    files = list(ROOT.rglob("*.py"))
    assert ROOT / "_lab" / "command.py" in files
    for file in files:
        assert found(PRIVATE, file.read_text()) == [], file
        if "_lab" not in file.parts and file.name != "__main__.py":
            assert found(LABORATORY, file.read_text()) == [], file


@pytest.mark.parametrize(
    "source",
    [
        "getattr(jax, '_src')",
        "importlib.import_module('optax._src.base')",
        "import jax.numpy as jnp\njnp._private",
        "o.transforms._masking",
        "from jax.numpy import ones, _private",
    ],
)
def test_it_would_be_seen(source):
    assert found(PRIVATE, source)
    assert not found(PRIVATE, "from adamax_jax._checks import _a\nself._b\nc._replace")
    assert found(LABORATORY, "importlib.import_module('adamax_jax._lab.command')")


def test_importing_the_package_loads_neither_laboratory_nor_extras():
    code = "import json, sys, adamax_jax; print(json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    assert "optax" in loaded
    assert [x for x in loaded if x.startswith(("adamax_jax._lab", *EXTRAS))] == []
