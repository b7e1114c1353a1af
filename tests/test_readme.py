"""What the README and the pages of the documentation say is true."""

import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import optax
import peers
import pytest
import test_peers
from flax import nnx

import adamax_jax

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "notebooks").glob("*.md"))]
FLAGS = re.DOTALL | re.MULTILINE


def page(name):
    return (ROOT / "notebooks" / f"{name}.md").read_text()


def section(text, heading):
    """What stands below a heading, up to the next one."""
    pattern = rf"^#+ {re.escape(heading)}\n(.*?)(?=^##+ |\Z)"
    return re.search(pattern, text, FLAGS)[1]


def examples(text, heading):
    """The examples of a section."""
    return re.findall(r"^```python\n(.*?)^```", section(text, heading), FLAGS)


def example(text, heading):
    """The first example of a section."""
    return examples(text, heading)[0]


def run(code, **names):
    exec(compile(code, "an example", "exec"), names)
    return names


FLAX = example(README.read_text(), "Replace Adam")
STORAGE = example(page("choosing"), "AdaMax in two bytes")
ONE_BYTE = example(page("choosing"), "AdaMax in one byte")


def test_flax_example():
    names = run(FLAX)
    with jax.numpy_rank_promotion("allow"):
        for x in jax.random.normal(jax.random.key(0), (500, 64, 3)):
            y = x @ jnp.array([[1.0], [-2.0], [3.0]])
            loss = names["train_step"](names["model"], names["optimizer"], x, y)
    assert loss < 1e-4


def test_quick_start():
    """On the first page of the documentation."""
    in_flax, in_a_loop = examples(page("index"), "Quick start")
    with jax.numpy_rank_promotion("allow"):
        assert run(in_flax)["loss"] < 1e-4
    kernel = run(in_a_loop)["params"]["kernel"]
    assert kernel.ravel() == pytest.approx(1 - 1e-3 * (1 + 1e-4), abs=2e-4)


def test_flax_example_has_eleven_lines():
    assert len([line for line in FLAX.splitlines() if line]) == 11


def test_chain_example():
    # Optax's cosine schedule mixes integers and floats.
    with jax.numpy_dtype_promotion("standard"):
        params = run(example(page("coming_from"), "In a chain"))["params"]
    # The first step is a learning rate of 0.01 and 1e-3 of it for the decay of ones.
    assert params["kernel"].ravel() == pytest.approx(1 - 1.001e-2)
    assert params["bias"] == pytest.approx(-1e-2)


def test_storage_example():
    names = run(STORAGE)
    arrays = [x for x in jax.tree.leaves(names["state"]) if x.ndim]
    assert sum(x.nbytes for x in arrays) == 200
    assert names["m"].dtype == names["u"].dtype == jnp.float32


def test_one_byte_example(capsys):
    names = run(ONE_BYTE)
    assert names["state"][0].u["kernel"].shape == (256, 1)
    adam = jax.tree.leaves(optax.adam(1e-2).init(names["params"]))
    stated = re.search(r"# (\d+); Adam's has (\d+)", ONE_BYTE).groups()
    assert capsys.readouterr().out.split() == [stated[0]]
    assert sum(x.nbytes for x in adam) == int(stated[1])


def test_half_precision_example():
    # Optax adds float32 updates to bfloat16 parameters.
    with jax.numpy_dtype_promotion("standard"):
        names = run(example(page("choosing"), "Half-precision parameters"))
    assert_trained_in_six_bytes(names, 1e-3, 1e-3, 0.15)


def test_half_precision_and_sharding_example():
    with jax.numpy_dtype_promotion("standard"):
        names = run(example(README.read_text(), "bfloat16 parameters and FSDP"))
    # The decay is a tenth of a step.
    assert_trained_in_six_bytes(names, 1e-3, 1.1e-3, 0.25)
    m = optax.tree.get(names["state"], "ScaleByLpAdamState").m
    for name, sharding in (("kernel", names["rows"]), ("bias", names["whole"])):
        assert names["params"][name].sharding.is_equivalent_to(sharding, 2)
    assert m["kernel"].sharding.is_equivalent_to(names["rows"], 2)


def assert_trained_in_six_bytes(names, learning_rate, travel, rounding):
    """One step from 1, as two bytes hold it, up to a fraction of the learning rate.

    A uint8 u is rounded by a ninth at most in AdaMax, and in Adam to either of two
    codes, up to a quarter apart.
    """
    assert names["params"]["kernel"].dtype == jnp.bfloat16
    full = names["full"]["kernel"]
    assert jnp.max(jnp.abs(full - (1 - travel))) < rounding * learning_rate
    arrays = [x for x in jax.tree.leaves((names["params"], names["state"])) if x.ndim]
    size = sum(p.size for p in jax.tree.leaves(names["params"]))
    assert sum(x.nbytes for x in arrays) == 6 * size


def continued(example):
    """The names of an example that continues a run of Optax's and one of PyTorch's."""
    recorded = peers.torch_model()
    weights = {name: steps[0] for name, steps in recorded.params.items()}
    names = run(
        example,
        optax_state=optax.adam(1e-3).init({"kernel": jnp.ones([8, 8])}),
        to_jax=lambda weights: {k: jnp.asarray(v.T) for k, v in weights.items()},
        torch_model=SimpleNamespace(
            state_dict=lambda: weights, named_parameters=weights.items
        ),
        torch_optimizer=SimpleNamespace(state_dict=lambda: recorded.state_dict),
    )
    return names, recorded.state_dict["state"][0]


def test_continuing_examples():
    """A running Adam in two bytes, and what PyTorch gave when it was there."""
    heading = re.search(r"^## (I have .*)$", README.read_text(), re.MULTILINE)[1]
    code = example(README.read_text(), heading)
    of_optax, of_torch = code.split("\n\n# torch.optim.Adamax")
    arrays = [x for x in jax.tree.leaves(continued(of_optax)[0]["state"]) if x.ndim]
    assert sum(x.nbytes for x in arrays) == 2 * 64
    header, _ = of_optax.split("\n\n", 1)
    names, first = continued(f"{header}\n#{of_torch}")
    assert int(names["state"][0].count) == 20
    assert jnp.array_equal(names["state"][0].u["0.weight"], first["exp_inf"].T)


@pytest.mark.parametrize("jit", [lambda function: function, nnx.jit])
def test_runs_continue_in_flax_nnx(jit, lenient):
    """As README says: in place of the transformation and the state."""
    params = {"kernel": jnp.ones([3, 1]), "bias": jnp.zeros(1)}

    def steps(optimizer, count):
        model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
        nnx.update(model, params)
        found = nnx.Optimizer(model, optimizer, wrt=nnx.Param)

        @jit
        def step(model, found):
            found.update(model, nnx.state(model, nnx.Param))

        for _ in range(count):
            step(model, found)
        return model, found, step

    # Optax's Adam in two bytes.
    model, optimizer, step = steps(optax.adam(1e-3), 2)
    two_bytes = {"m_dtype": "int8", "u_dtype": "uint8"}
    optimizer.tx = adamax_jax.adam(1e-3, **two_bytes)
    optimizer.opt_state = adamax_jax.convert_state(
        adamax_jax.from_optax(optimizer.opt_state, adam_b2=0.999), **two_bytes
    )
    step(model, optimizer)
    assert int(optimizer.opt_state[0].count[...]) == int(optimizer.step[...]) == 3
    # The state of another tree of the same names, as from_torch makes it.
    _, old = adamax_jax.scale_by_adamax().update(
        params, adamax_jax.scale_by_adamax().init(params)
    )
    model, optimizer, step = steps(adamax_jax.adamax(1e-3, **two_bytes), 0)
    optimizer.opt_state = adamax_jax.insert_state(optimizer.opt_state, old)
    step(model, optimizer)
    assert int(optimizer.opt_state[0].count[...]) == 2


def test_the_bytes_of_each_line_that_saves_memory():
    lines = re.findall(r"^(optimizer = .*)  # (\d)", README.read_text(), re.MULTILINE)
    assert [int(stated) for _, stated in lines] == [4, 3, 2, 1]
    params = jax.ShapeDtypeStruct([512, 512], jnp.float32)
    for line, stated in lines:
        optimizer = run(line, **vars(adamax_jax))["optimizer"]
        state = jax.eval_shape(optimizer.init, params)
        found = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        assert found / params.size == pytest.approx(int(stated), abs=0.01)


def test_continuing_both_example():
    state = run(examples(page("coming_from"), "Continue a run")[2])["state"]
    kinds = {name: inner.inner_state[0] for name, inner in state.inner_states.items()}
    assert isinstance(kinds["rare"], adamax_jax.ScaleByLpAdamState)
    assert isinstance(kinds["rest"], adamax_jax.ScaleByAdamaxState)


def test_continuing_adam_example():
    names = run(examples(page("coming_from"), "Continue a run")[1])
    assert int(names["back"][0].count) == 1
    assert names["state"][0].u["kernel"].dtype == jnp.uint8


def test_family_example():
    # Optax's schedule mixes integers and floats.
    with jax.numpy_dtype_promotion("standard"):
        optimizer = run(example(page("family"), "Between Adam and AdaMax"))["optimizer"]
        state = optimizer.init(jnp.ones(3))
        updates, state = optimizer.update(jnp.ones(3), state)
    assert updates.tolist() == pytest.approx([-3e-3] * 3, rel=1e-5)
    assert state.hyperparams["p"] == 2


def test_devices_example():
    names = run(example(page("devices"), "Many devices"))
    # Ten steps downhill, each of at most the learning rate.
    kernel = names["params"]["kernel"]
    assert jnp.all((kernel > 0.89) & (kernel < 0.98))
    assert names["state"][0].m["kernel"].sharding.mesh == names["mesh"]


@pytest.mark.skipif(
    not hasattr(jax.sharding, "reshard"), reason="JAX before 0.7 has it elsewhere"
)
def test_explicit_devices_example():
    with pytest.warns(UserWarning, match=r"\[0\]\.m\['bias'\]"):
        names = run(example(page("devices"), "Explicit axes"))
    # A first step of the learning rate, up to the rounding of u.
    for p in jax.tree.leaves(names["params"]):
        assert jnp.all(jnp.abs(p - 0.99) < 0.002)


def test_diagnosis_example(capsys):
    text = page("diagnosing")
    run(example(text, "Diagnosing a run"))
    table = re.search(r"print\(diagnose.*?^```\n\n```\n(.*?)^```", text, FLAGS)[1]
    assert capsys.readouterr().out == table


def test_silent_units_example(capsys):
    with jax.numpy_rank_promotion("allow"):
        run(example(page("diagnosing"), "Which units are silent"))
    assert capsys.readouterr().out == "[1 4]\n"


def test_sharing_in_other_layouts_example():
    """The same numbers share u, whether kernels are (inputs, outputs) or transposed."""
    names = run(example(page("choosing"), "Which axis"))
    params = {"blocks": {"kernel": jnp.ones([3, 8, 4]), "bias": jnp.ones([3, 4])}}
    u = names["optimizer"].init(params)[0].u["blocks"]
    assert u["kernel"].shape == (3, 8, 1)
    assert u["bias"].shape == (3, 4)


def test_torch_example():
    names, first = continued(example(page("coming_from"), "Continue a run"))
    assert int(names["state"][0].count) == 20
    assert jnp.array_equal(names["state"][0].u["0.weight"], first["exp_inf"].T)


D = {"lr": 0.1, "b1": 0.8, "b2": 0.9, "eps": 0.1, "w": 0.1}
# For the beginning of each row, the recorded run and what its letters stand for.
ROWS = {
    "`torch.optim.Adamax(params, lr)`": ("torch-defaults", {"lr": 2e-3}),
    "`torch.optim.Adamax(params, lr, weight_decay": (
        "torch-l2",
        {"lr": 2e-3, "w": 0.1},
    ),
    "`torch.optim.Adamax(params, lr, maximize": ("torch-maximize", {"lr": 2e-3}),
    "`keras.optimizers.Adamax(lr)`": ("keras-defaults", {"lr": 1e-3}),
    "`keras.optimizers.Adamax(lr, weight": ("keras-decay", {"lr": 1e-3, "w": 0.004}),
    "TensorFlow": (
        "tensorflow-dense",
        D | {"beta1": 0.8, "beta2": 0.9, "epsilon": 0.1},
    ),
    "`mlx": ("mlx-defaults", {"lr": 1e-3}),
    "`optax.adamax(": ("optax-dense", D),
    "`optax.adamaxw": ("optax-decay", {"lr": 2e-3, "w": 0.1}),
    "fairseq's `adamax` with `lr": ("fairseq-dense", D | {"betas": (0.8, 0.9)}),
    "fairseq's `adamax` without": ("fairseq-uncorrected", {"lr": 2e-3, "w": 0.1}),
    "MT-DNN": ("mt_dnn-defaults", {"lr": 1e-3, "w": 1e-2}),
    "`paddle": ("paddle-dense", {"lr": 1e-3}),
}
ROW = re.compile(r"^\| (.+?) \| (.+) \|$", re.MULTILINE)
TABLE = ROW.findall(section(page("coming_from"), "The same updates"))


def test_every_row_of_the_table_is_held_to_a_run():
    left = [row[0] for row in TABLE if row[1] != "here"]
    assert len(left) == len(ROWS)
    for start in ROWS:
        assert len([cell for cell in left if cell.startswith(start)]) == 1, start


@pytest.mark.parametrize("start", ROWS)
def test_coming_from(start):
    name, letters = ROWS[start]
    (right,) = (right for left, right in TABLE if left.startswith(start))
    expression = re.findall("`([^`]+)`", right)[-1]
    optimizer = eval(expression, vars(adamax_jax) | {"optax": optax} | letters)
    initial, gradients, expected = test_peers.recorded(name, "float32")
    # The schedules mix integers and floats, as a reader's would.
    with jax.numpy_dtype_promotion("standard"):
        actual = test_peers.run(optimizer, initial, gradients, "float32")
    test_peers.assert_same(peers.CASES[name].keep(actual), expected, "float32")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    targets = re.findall(r"\]\(([^)]+)\)", path.read_text())
    for target in targets:
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), target


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 200


def test_all_public_names_are_on_the_page_of_them():
    names = re.findall(r"auto\w+:: (\w+)", page("api"))
    assert sorted(names) == sorted(adamax_jax.__all__)


def test_all_pages_are_in_the_index():
    listed = re.findall(r"^(\w+)$", page("index"), re.MULTILINE)
    there = [path.stem for path in (ROOT / "notebooks").glob("*.*b")]
    there += [path.stem for path in PAGES if path.stem not in ("README", "index")]
    assert sorted(listed) == sorted(there)


@pytest.mark.parametrize("extra", ["demo", "test", "dev", "docs"])
def test_extras_exist(extra):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f'pip install -e ".[{extra}]"' in README.read_text()
    assert extra in project["optional-dependencies"]
