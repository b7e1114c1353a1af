"""Breaks the optimizer in one place after another, to see whether the tests notice.

    pip install -e ".[test]" cosmic-ray && python .ci/mutate.py --sample 110

Cosmic Ray finds the places: numbers, operators, comparisons, conditions, loops and
decorators. One of the changes that it knows for a place is made, in a copy of the
project, and the tests of its module run until one fails. Prints each change that none
of them noticed, and the share of those that one did. A survivor may still be noticed by
other files' tests: the share is a lower bound.
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.plugins import get_operator, operator_names
from cosmic_ray.work_item import MutationSpec, TestOutcome

# The tests that look at a module, those first that notice most in little time.
TESTS = {
    "_adamax": "reference optax_parity growth errors adamax fuzz formats shared_axes",
    "_checks": "errors adamax formats lp_adam growth master_weights learning_rate",
    "_diagnose": "diagnose errors shared_axes",
    "_formats": "formats growth reference diagnose lp_adam shared_axes state",
    "_halves": "master_weights",
    "_interop": "interop errors state",
    "_learning_rate": "learning_rate optax_parity errors adamax lp_adam",
    "_lp_adam": "lp_adam derivatives errors shared_axes trees",
    "_master_weights": "master_weights errors",
    "_numerics": "reference growth optax_parity adamax formats lp_adam derivatives",
    "_sharding": "zero_shardings errors",
    "_shared_axes": "shared_axes errors zero_shardings state",
    "_state": "state interop errors shared_axes trees",
    "_trees": "trees adamax reference errors lp_adam state zero_shardings interop",
    "_update": "reference optax_parity adamax lp_adam formats facts",
    "_xla": "derivatives growth shared_axes formats bench",
}
# None of these takes as long; what does, an endless loop, is counted as not noticed.
SECONDS = 1800


def annotations(source):
    """Where types are written: from and to, as (line, column)."""
    for node in ast.walk(ast.parse(source)):
        for name in ("annotation", "returns"):
            part = getattr(node, name, None)
            if part is not None:
                start = part.lineno, part.col_offset
                yield start, (part.end_lineno, part.end_col_offset)


def places(path):
    """The changes that there are for each place of a module."""
    found = defaultdict(list)
    types, lines = list(annotations(path.read_text())), path.read_text().splitlines()
    nodes = list(ast_nodes(get_ast_from_path(path)))
    for name in sorted(operator_names()):
        if get_operator(name).arguments():
            continue
        operator = get_operator(name)()
        spans = (span for node in nodes for span in operator.mutation_positions(node))
        for occurrence, (start, end) in enumerate(spans):
            # What zip checks of lists that are of one length.
            is_strict = lines[start[0] - 1][: start[1]].endswith("strict=")
            is_type = any(first <= start < last for first, last in types)
            if not is_strict and not is_type:
                kind = name.split("_")[0]
                found[kind, start, end].append((name, occurrence, start, end))
    return list(found.values())


def chosen(folder, modules, sample, seed):
    """One change for each place, or for some of the places."""
    rng = random.Random(seed)
    every = [
        (module, *rng.choice(changes))
        for module in modules
        for changes in places(folder / "adamax_jax" / f"{module}.py")
    ]
    rng.shuffle(every)
    return every[:sample], len(every)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", nargs="+", default=sorted(TESTS), choices=TESTS)
    parser.add_argument("--sample", type=int, help="places in all (default: every one)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        ignored = shutil.ignore_patterns(".*", "__pycache__", "notebooks")
        shutil.copytree(Path(__file__).parents[1], folder, ignore=ignored)
        os.chdir(folder)
        # The copy comes before what is installed.
        os.environ |= {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"}
        run(folder, options)


def command(*modules):
    names = dict.fromkeys(name for module in modules for name in TESTS[module].split())
    files = " ".join(f"tests/test_{name}.py" for name in names)
    return f"{sys.executable} -m pytest -x -q -n0 -p no:cacheprovider {files}"


def run(folder, options):
    mutations, there_are = chosen(folder, options.modules, options.sample, options.seed)
    print(f"{len(mutations)} of {there_are} places, seed {options.seed}", flush=True)
    unbroken = command(*{module for module, *_ in mutations})
    if subprocess.run(unbroken.split()).returncode:
        sys.exit(f"these tests fail without a change: {unbroken}")
    noticed, tried = Counter(), Counter()
    for number, (module, name, occurrence, start, end) in enumerate(mutations):
        path = folder / "adamax_jax" / f"{module}.py"
        mutation = MutationSpec(
            module_path=path,
            operator_name=name,
            occurrence=occurrence,
            start_pos=start,
            end_pos=end,
        )
        began = time.monotonic()
        result = mutate_and_test([mutation], command(module), SECONDS)
        is_in_time = result.output != "timeout"
        is_noticed = is_in_time and result.test_outcome == TestOutcome.KILLED
        tried[module] += 1
        noticed[module] += is_noticed
        print(
            f"{number} {module}:{start[0]} {name.removeprefix('core/')}",
            "noticed" if is_noticed else "SURVIVED" if is_in_time else "TOO LONG",
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
        if not is_noticed:
            print(result.diff or result.output, flush=True)
    for module in sorted(tried):
        print(f"{module:12} {noticed[module]:4} of {tried[module]}")
    share = noticed.total() / tried.total()
    print(f"noticed: {noticed.total()} of {tried.total()} ({share:.1%})")


if __name__ == "__main__":
    main()
