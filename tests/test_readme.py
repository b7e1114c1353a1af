"""What the README says is true."""

import re
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def run(example):
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    return names


def test_flax_example():
    with jax.numpy_rank_promotion("allow"):
        assert run(EXAMPLES[0])["loss"] < 1e-4


def test_flax_example_has_twelve_lines():
    assert len([line for line in EXAMPLES[0].splitlines() if line]) == 12


def test_chain_example():
    # Optax's cosine schedule mixes integers and floats.
    with jax.numpy_dtype_promotion("standard"):
        params = run(EXAMPLES[1])["params"]
    # The first step is a learning rate of 0.01 and 1e-3 of it for the decay of ones.
    assert params["kernel"].ravel() == pytest.approx(1 - 1.001e-2)
    assert params["bias"] == pytest.approx(-1e-2)


def test_storage_example():
    names = {"params": jnp.ones(100)}
    exec(compile(EXAMPLES[2], "README.md", "exec"), names)
    arrays = [x for x in jax.tree.leaves(names["state"]) if x.ndim]
    assert sum(x.nbytes for x in arrays) == 200
    assert names["m"].dtype == names["u"].dtype == jnp.float32


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)]+)\)", README)
    local = [target for target in targets if not target.startswith("https://")]
    assert local
    for target in local:
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("extra", ["demo", "test", "dev"])
def test_extras_exist(extra):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f'pip install -e ".[{extra}]"' in README
    assert extra in project["optional-dependencies"]
