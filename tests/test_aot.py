"""What a step moves on TPUs and GPUs that are not there, from what JAX compiles."""

import json
import math
import os
import re
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from sequences import STORAGES, TWO_BYTES
from tables import squeezed

from adamax_jax import (
    adamax,
    adamw,
    full_params,
    lp_adam,
    master_weights,
    set_full_params,
    zero_shardings,
)
from adamax_jax.__main__ import main
from adamax_jax._lab import compiled
from adamax_jax._lab.contenders import OPTIMIZERS, REFERENCE

PARAMETERS = math.prod(compiled.MATRIX)
# What the scalars of a step take on a GPU, and the vectors of a shared u.
SCALARS, VECTORS = 2**12, 2**20
# With a shared u the gradient is read twice: the maximum of a row comes before its
# steps; the other kernels are on vectors.
KERNELS_OF_SHARED_U = {"v5e": 5, "h100": 3}
# What notebooks/speed.md says: bytes per parameter, of moves.
PUBLISHED = {
    "optax.adamax": 28,
    "adamax float32": 28,
    "adamax bfloat16/bfloat16": 20,
    "adamax int8/uint8": 16,
    "adamax int8 and shared u": 18,
    "adam float32": 28,
    "adam int8/bfloat16": 18,
    "adam int8/uint8": 16,
    "bfloat16: optax.adamax": 14,
    "bfloat16: adamax bfloat16/bfloat16": 14,
    "bfloat16: adamax int8/uint8": 10,
    "bfloat16: optax.adam and a float32 copy": 30,
    "bfloat16: adamax float32 and int16": 26,
    "bfloat16: adamax int8/uint8 and int16": 14,
    "bfloat16: adamax int8/uint8 and int8": 12,
}
# TPUs and GPUs, one kind of each.
every_device = pytest.mark.parametrize("device", ["v5e", "h100"])


@pytest.fixture(autouse=True)
def use_lenient(lenient):
    """Optax mixes integers and floats."""


def needs(*devices):
    """Skips where what compiles for the devices is not installed."""
    if missing := compiled.missing(devices):
        command = 'pip install -e ".[aot]"'
        pytest.skip(f"{', '.join(missing)} is missing: {command}")


class Step(NamedTuple):
    """A compiled step."""

    kernels: list[int]
    ideal_bytes: int
    executable: jax.stages.Compiled

    @property
    def memory(self):
        return self.executable.memory_analysis()


def compile_step(device, optimizer, dtype=jnp.float32, shapes=(compiled.MATRIX,)):
    """A step on one device."""
    needs(device)
    params = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    state = jax.eval_shape(optimizer.init, params)
    params, state = compiled.on_device(device, (params, state))
    executable = compiled.compile_step(optimizer, params, state)
    kernels = compiled.bytes_of_kernels(executable.as_text())
    return Step(kernels, compiled.ideal_bytes(params, state), executable)


def assert_ideal(step, leaves=1):
    """A kernel a leaf reads and writes each number once, without temporary memory."""
    assert len(step.kernels) == leaves
    assert sum(step.kernels) == step.ideal_bytes
    assert step.memory.temp_size_in_bytes < SCALARS


@every_device
@pytest.mark.parametrize("name", compiled.contenders())
def test_one_kernel_moves_the_fewest_bytes(name, device):
    step = compile_step(device, *compiled.contenders()[name])
    moved = sum(step.kernels)
    if "shared" in name:
        assert len(step.kernels) == KERNELS_OF_SHARED_U[device]
        assert 0 <= moved - step.ideal_bytes - 4 * PARAMETERS < VECTORS
        assert step.memory.temp_size_in_bytes < VECTORS
    else:
        assert_ideal(step)
    if name in PUBLISHED:
        assert moved / PARAMETERS == pytest.approx(PUBLISHED[name], abs=0.01)
    if device == "v5e":
        # As JAX counts them; it counts nothing for a GPU.
        counted = step.executable.cost_analysis()["bytes accessed"]
        assert moved == pytest.approx(counted, rel=1e-3)


ADAMW = adamw(1e-3, **TWO_BYTES)
IDEAL = {
    f"bounded growth, {name}, {dtype.__name__}": (
        adamax(max_growth=1.1, **storage),
        dtype,
    )
    for name, storage in STORAGES.items()
    for dtype in (jnp.float32, jnp.bfloat16)
}
IDEAL |= {
    f"p = {p}, {name}": (lp_adam(1e-3, p, **storage),)
    for name, storage in STORAGES.items()
    for p in (2.0, 3.5)
}
# The thresholds of averages depend on the position along each axis.
IDEAL |= {
    f"Adam, {len(shape)} axes": (ADAMW, jnp.float32, [shape])
    for shape in [(2**27,), (2**9,) * 3, (2**6, 2**7, 2**7, 2**7)]
}
IDEAL["a model in bfloat16"] = master_weights(ADAMW), jnp.bfloat16
# Each too large for the chip of a TPU, to which others are copied in slices.
LEAVES = [(2**14, 2**13), (2**27,), (2**7, 2**10, 2**10)]
IDEAL["leaves"] = OPTIMIZERS["adamax int8/uint8"], jnp.float32, LEAVES


@every_device
@pytest.mark.parametrize("name", IDEAL)
def test_others_move_no_byte_more(name, device):
    assert_ideal(
        compile_step(device, *IDEAL[name]), len(LEAVES) if name == "leaves" else 1
    )


@every_device
@pytest.mark.parametrize(
    "name", ["adamax float32", "adamax int8/uint8", "adam int8/uint8"]
)
@pytest.mark.parametrize("divided", ["state", "parameters too"])
def test_what_four_devices_exchange(divided, name, device):
    """ZeRO-1 gathers the new parameters once, nothing of the state; FSDP nothing."""
    needs(device)
    optimizer = OPTIMIZERS[name]
    mesh = Mesh(
        np.array(compiled.devices(device)[:4]), "data", axis_types=(AxisType.Auto,)
    )

    def placed(tree, shardings):
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            tree,
            shardings,
        )

    spec = PartitionSpec("data" if divided == "parameters too" else None)
    sharding = NamedSharding(mesh, spec)
    params = jax.ShapeDtypeStruct(compiled.MATRIX, jnp.float32, sharding=sharding)
    shardings = zero_shardings(optimizer, params, mesh, "data")
    state = placed(jax.eval_shape(optimizer.init, params), shardings)
    executable = compiled.compile_step(optimizer, params, state)
    text, memory = executable.as_text(), executable.memory_analysis()
    gathers = re.findall(r"= (\S+) all-gather(?:-done)?\(", text)
    others = re.findall(
        r" (?:all-reduce|all-to-all|collective|reduce-scatter)\S*\(", text
    )
    assert others == []
    state_bytes = 2 if "int8" in name else 8
    if divided == "state":
        assert [shape.partition("{")[0] for shape in gathers] == ["f32[16384,8192]"]
        held = (4 + 4 + state_bytes / 4) * PARAMETERS
    else:
        assert gathers == []
        kernels = compiled.bytes_of_kernels(text)
        ideal = compiled.ideal_bytes(params, state)
        assert [4 * n for n in kernels] == [ideal]
        assert memory.temp_size_in_bytes < SCALARS
        held = (4 + 4 + state_bytes) / 4 * PARAMETERS
    assert 0 < memory.argument_size_in_bytes - held < SCALARS


def casts(text):
    """How many numbers a compiled program converts."""
    return len(re.findall(r"[})\]] convert\(", text))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("residual_dtype", ["int16", "int8"])
@pytest.mark.parametrize("storage", ["own", "two bytes"])
def test_no_rounding_is_taken_out(storage, residual_dtype, dtype):
    """XLA:GPU takes out pairs of casts, unless excess precision is forbidden.

    So a program has no such pair if it is the same with and without. (m and u in
    bfloat16 have pairs, around numbers that no cast changes:
    ``test_excess_precision.py`` runs them without.)
    """
    optimizer = master_weights(adamax(1e-3, **STORAGES[storage]), residual_dtype)
    needs("h100")
    params = jax.ShapeDtypeStruct((256, 256), dtype)
    full = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    state = jax.eval_shape(optimizer.init, params)
    params, full, state = compiled.on_device("h100", (params, full, state))

    def step(params, state, g):
        updates, state = optimizer.update(g, state, params)
        return optax.apply_updates(params, updates), state

    def there_and_back(params, state, full):
        params, state = set_full_params(params, state, full)
        return params, state, full_params(params, state)

    for program in (
        jax.jit(step).lower(params, state, params),
        jax.jit(set_full_params).lower(params, state, full),
        jax.jit(there_and_back).lower(params, state, full),
    ):
        strict = program.compile({"xla_allow_excess_precision": False}).as_text()
        assert casts(program.compile().as_text()) == casts(strict) > 0


def test_a_shared_u_takes_no_padding():
    """But for the last tile: a TPU lays a column out as a row."""
    optimizer = OPTIMIZERS["adamax int8 and shared u"]
    step = compile_step("v5e", optimizer, shapes=[(4000, 512)])
    parameters, u = 4000 * 512, 4096
    arguments = step.memory.argument_size_in_bytes
    assert arguments - 9 * parameters - 4 * u < SCALARS


def test_the_table(monkeypatch, tmp_path, capsys):
    """What does not compile is left out, but for what the others are compared to."""
    needs("v5e", "h100")
    contenders = {
        name: (OPTIMIZERS[name], jnp.float32)
        for name in (REFERENCE, "adamax int8/uint8")
    }

    def fail(params):
        raise ValueError("no room\nat all")

    contenders["broken"] = optax.GradientTransformation(fail, fail), jnp.float32
    monkeypatch.setattr(compiled, "contenders", lambda: contenders)
    path = tmp_path / "a.json"
    assert main(["bench", "--for", "v5e,h100", "--json", str(path)]) == 0
    printed, progress = map(squeezed, capsys.readouterr())
    for device in ("v5e", "h100"):
        row = f"| {device} | optax.adamax | 1 | 28.00 | 1.00 | 1.00 | 0.00 |"
        assert row in printed
        assert f"| {device} | adamax int8/uint8 | 1 | 16.00 | 0.57 | 1.00 |" in printed
        assert f"left out: {device}, broken: no room\n" in progress
    assert "Compiled, not run" in printed
    saved = json.loads(path.read_text())
    assert saved["versions"]["jax"] == jax.__version__
    assert saved["command"] == "python -m adamax_jax bench --for v5e,h100"
    assert [row["ratio"] for row in saved["rows"]] == [1, 16 / 28] * 2
    contenders[REFERENCE] = contenders["broken"]
    with pytest.raises(ValueError, match="no room"):
        list(compiled.measure(["v5e"]))


def test_what_a_contender_is_compared_to():
    """One of the same parameters, which comes before it."""
    names = list(compiled.contenders())
    for i, name in enumerate(names):
        reference = compiled.reference_of(name)
        assert reference in names[: i + 1]
        assert reference.startswith("bfloat16: ") == name.startswith("bfloat16: ")


@pytest.mark.parametrize(
    ("device", "module", "package"),
    [
        ("v5e", "libtpu", "libtpu"),
        ("h100", "jax_cuda13_plugin", "jax[cuda13-local]"),
        ("h100", "nvidia.cu13.bin", "nvidia-cuda-nvcc"),
    ],
)
def test_what_must_be_installed(device, module, package, monkeypatch, capsys):
    # As if it was not there, nor anything in its place.
    monkeypatch.setitem(sys.modules, module, None)
    assert module in compiled.missing([device])
    assert main(["bench", "--for", device]) == 1
    message = capsys.readouterr().err
    assert "The command bench needs " in message
    assert package in message


def test_what_the_user_has_set_stays(monkeypatch):
    needs("v5e")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "0")
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
    devices = compiled.devices("v5e")
    assert os.environ["TPU_SKIP_MDS_QUERY"] == "0"
    assert os.environ["TPU_WORKER_HOSTNAMES"] == "localhost"
    assert len(devices) >= 4
    assert {device.device_kind for device in devices} == {"TPU v5 lite"}
    assert jax.default_backend() == "cpu"


CHILD = """
import jax
from adamax_jax._lab import compiled
devices = [compiled.devices(name)[0].platform for name in ("v5e", "h100")]
print(devices, jax.default_backend())
"""


def test_a_process_that_was_not_told_where_to_run_stays_on_the_cpu():
    """The plugins would look for devices, and complain."""
    needs("v5e", "h100")
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['tpu', 'gpu'] cpu\n"
    assert "Traceback" not in done.stderr


PROGRAM = """HloModule test, is_scheduled=true

%fused (p: f32[]) -> f32[] {
  %a = f32[100]{0} parameter(0)
  ROOT %b = f32[100]{0} negate(%a)
}

ENTRY %main.2 (p: f32[]) -> f32[] {
  %p = f32[100]{0} parameter(0), sharding={replicated}
  %m = s8[100]{0:T(512)(4,1)} parameter(1)
  %count = s32[] parameter(2)
  %more = s32[] add(%count, %count)
  %f = (f32[100]{0}, s8[100]{0}) fusion(%p, %m, %p, /*index=3*/%more), calls=%fused
  %new_p = f32[100]{0} get-tuple-element(%f), index=0
  %new_m = s8[100]{0} get-tuple-element(%f), index=1
  %half = bf16[100]{0} copy(%new_m), control-predecessors={%p}
  ROOT %t = (f32[100]{0}, s8[100]{0}, s32[]) tuple(%new_p, %new_m, %more)
}
"""


def test_a_kernel_reads_its_operands_and_writes_its_results():
    """What it uses twice is read once; scalars are free."""
    assert compiled.bytes_of_kernels(PROGRAM) == [2 * (400 + 100), 100 + 200]


@pytest.mark.parametrize("opcode", ["dynamic-slice", "gather", "while", "custom-call"])
def test_a_kernel_that_may_read_a_part_has_no_known_bytes(opcode):
    with pytest.raises(ValueError, match=f"not known how many bytes a {opcode} moves"):
        compiled.bytes_of_kernels(PROGRAM.replace("negate", opcode))
