"""Who may import whom: the laboratory from nowhere, nothing private from elsewhere."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import adamax_jax

PACKAGE = "adamax_jax"
ROOT = Path(adamax_jax.__file__).parent
LABORATORY = f"{PACKAGE}._lab"
# The one module outside of it that may import it.
DOOR = f"{PACKAGE}.__main__"
OTHERS = ("jax", "jaxlib", "optax")
# What the commands need and the optimizer must not.
EXTRAS = ("flax", "matplotlib", "sklearn")
NAME = r"[^\W\d]\w*"
DOTTED = re.compile(rf"{NAME}(\.{NAME})*")


def modules(root=ROOT):
    """The name and the source of every file of a package."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        yield ".".join(parts).removesuffix(".__init__"), path.read_text()


def bindings(tree, module):
    """What the imports of a module bind, as pairs of a name and what it stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                # Without "as", the first part alone is bound.
                yield alias.asname or alias.name.split(".")[0], alias.name
        elif isinstance(node, ast.ImportFrom):
            source = source_of(node, module)
            for alias in node.names:
                yield alias.asname or alias.name, f"{source}.{alias.name}"


def source_of(node, module):
    """The absolute name of what follows "from", which may be relative to a module."""
    if node.level == 0:
        return node.module
    package = module if module in {PACKAGE, LABORATORY} else module.rpartition(".")[0]
    for _ in range(node.level - 1):
        package = package.rpartition(".")[0]
    return f"{package}.{node.module}" if node.module else package


def reached(source, module):
    """The dotted names that a module imports, follows from imports or spells out."""
    tree = ast.parse(source)
    bound = list(bindings(tree, module))
    yield from (target for _, target in bound)
    stands_for = {
        # "import jax.numpy" binds jax, "import jax.numpy as jnp" jax.numpy.
        name: name if target.startswith(f"{name}.") else target
        for name, target in bound
    }
    for node in ast.walk(tree):
        match node:
            case ast.Attribute():
                yield resolved(node, stands_for)
            case ast.Call(
                func=ast.Name("getattr"), args=[of, ast.Constant(str(name)), *_]
            ):
                yield f"{resolved(of, stands_for)}.{name}"
            case ast.Constant(str(text)) if DOTTED.fullmatch(text):
                yield text


def resolved(node, stands_for):
    """The dotted name of an attribute of an attribute of ... an imported name."""
    if isinstance(node, ast.Attribute):
        return f"{resolved(node.value, stands_for)}.{node.attr}"
    return stands_for.get(node.id, "") if isinstance(node, ast.Name) else ""


def is_within(name, package):
    return name == package or name.startswith(f"{package}.")


def is_private_elsewhere(name):
    first, *rest = name.split(".")
    return first in OTHERS and any(
        part.startswith("_") and not part.endswith("__") for part in rest
    )


def laboratory_in(source, module=f"{PACKAGE}._adamax"):
    """What a module reaches in the laboratory, from where it must not."""
    if is_within(module, LABORATORY) or module == DOOR:
        return []
    return [name for name in reached(source, module) if is_within(name, LABORATORY)]


def private_in(source, module=f"{PACKAGE}._adamax"):
    """What a module reaches that is private to other packages."""
    return [name for name in reached(source, module) if is_private_elsewhere(name)]


def unwanted(loaded):
    """Of the names of loaded modules, those that the optimizer must not load."""
    return [
        name for name in loaded for p in (LABORATORY, *EXTRAS) if is_within(name, p)
    ]


def test_every_file_is_looked_at():
    names = {name for name, _ in modules()}
    assert {
        PACKAGE,
        DOOR,
        LABORATORY,
        f"{LABORATORY}.cli",
        f"{PACKAGE}._adamax",
    } <= names
    assert len(names) == len(list(ROOT.rglob("*.py")))


def test_the_laboratory_is_imported_from_nowhere_else():
    found = {name: laboratory_in(source, name) for name, source in modules()}
    assert {name: bad for name, bad in found.items() if bad} == {}
    # The door is one: without its name, it would be found out.
    (door,) = (source for name, source in modules() if name == DOOR)
    assert laboratory_in(door) != []


def test_nothing_private_is_used_of_other_packages():
    found = {name: private_in(source, name) for name, source in modules()}
    assert {name: bad for name, bad in found.items() if bad} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import adamax_jax._lab",
        "import adamax_jax._lab.cli as cli",
        "from adamax_jax import _lab",
        "from adamax_jax import __version__, _lab as laboratory",
        "from adamax_jax._lab import shapes",
        "from adamax_jax._lab.cli import main",
        "from . import _lab",
        "from ._lab.cli import main",
        "def f():\n    from ._lab import demo",
        "import adamax_jax\nadamax_jax._lab.cli.main()",
        "import importlib\nimportlib.import_module('adamax_jax._lab.cli')",
    ],
)
def test_importing_the_laboratory_would_be_seen(source):
    assert laboratory_in(source) != []
    assert laboratory_in(source, DOOR) == laboratory_in(source, f"{LABORATORY}.x") == []


@pytest.mark.parametrize(
    "source",
    [
        "import jax._src",
        "import jax._src.core as core",
        "from jax import _src",
        "from jax._src import core",
        "from jax._src.core import Tracer",
        "from jax.numpy import _private",
        "from jaxlib import _jax",
        "from optax._src import base as b",
        "from optax import adam, _src",
        "import jax\njax._src.core.Tracer",
        "import jax.numpy as jnp\njnp._private",
        "import jax.numpy\njax._src",
        "from jax import numpy as n\nn._private(1)",
        "import optax as o\no.transforms._masking",
        "import jax\ngetattr(jax, '_src')",
        "import importlib\nimportlib.import_module('optax._src.base')",
        "try:\n    import jax._src\nexcept ImportError:\n    pass",
    ],
)
def test_private_names_would_be_seen(source):
    assert private_in(source) != []


@pytest.mark.parametrize(
    "source",
    [
        "import jax\nfrom jax import numpy as jnp\njax.__version__\njnp.ones(1)",
        "from adamax_jax._checks import check_eps",
        "from ._checks import check_eps",
        "def f(state):\n    return state._replace(count=state._asdict())",
        "import jax\njax.tree.map(lambda x: x, _jax)",
        "'''Of jax._src nothing is used.'''",
    ],
)
def test_what_is_allowed_is_not_refused(source):
    assert private_in(source) == laboratory_in(source) == []


def test_relative_imports_are_followed():
    assert list(reached("from .. import _lab", f"{LABORATORY}.cli")) == [LABORATORY]
    assert list(reached("from . import cli", LABORATORY)) == [f"{LABORATORY}.cli"]
    assert list(reached("from . import _lab", PACKAGE)) == [LABORATORY]


def test_files_of_a_tree_are_found(tmp_path):
    """A wrong tree, from the files on."""
    package = tmp_path / PACKAGE
    (package / "_lab").mkdir(parents=True)
    (package / "__init__.py").write_text("from adamax_jax import _lab\n")
    (package / "_lab" / "__init__.py").write_text("import jax._src\n")
    found = dict(modules(package))
    assert set(found) == {PACKAGE, LABORATORY}
    assert laboratory_in(found[PACKAGE], PACKAGE) == [LABORATORY]
    assert private_in(found[LABORATORY], LABORATORY) == ["jax._src"]


CHILD = """
import json, sys
import adamax_jax
at_first = list(sys.modules)
import adamax_jax._lab.shapes
print(json.dumps([at_first, list(sys.modules)]))
"""


def test_importing_the_package_loads_neither_laboratory_nor_extras():
    done = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    at_first, with_laboratory = json.loads(done.stdout)
    assert PACKAGE in at_first and "optax" in at_first
    assert unwanted(at_first) == []
    # And they would be seen.
    assert {LABORATORY, f"{LABORATORY}.shapes"} <= set(unwanted(with_laboratory))
    assert unwanted(["flax.nnx", "matplotlib", "sklearn.svm", "flaxen"]) == [
        "flax.nnx",
        "matplotlib",
        "sklearn.svm",
    ]
