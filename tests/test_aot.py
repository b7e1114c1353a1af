"""What a step moves on TPUs and GPUs, from what JAX compiles for them: none is there.

How the compiled programs are read is tested on small ones, written by hand.
"""

import functools
import json
import math
import os
import re
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import SingleDeviceSharding
from sequences import STORAGES
from tables import squeezed

from adamax_jax import (
    adamax,
    adamw,
    full_params,
    lp_adam,
    master_weights,
    set_full_params,
)
from adamax_jax.__main__ import main
from adamax_jax._lab import compiled, scale, shapes
from adamax_jax._lab.contenders import OPTIMIZERS, REFERENCE

PARAMETERS = 2**27
# What the scalars of a step take on a GPU, and the vectors of a shared u.
SCALARS, VECTORS = 2**12, 2**20
# TPUs and GPUs, one kind of each.
DEVICES = ("v5e", "h100")

# Of contenders that are not as they should be, one kernel that moves the fewest bytes:
# the kernels, and how many bytes per parameter they move above that.
#
# u of a row is known only when all of it was read, so that the gradient is read once
# more; the other kernels are on the vectors of the rows.
NOT_IDEAL = {
    ("v5e", "adamax int8 and shared u"): (5, 4),
    ("h100", "adamax int8 and shared u"): (3, 4),
    ("v5e", "adamax int8 and shared u, bounded growth"): (5, 4),
    ("h100", "adamax int8 and shared u, bounded growth"): (3, 4),
}
# Of an update with an all-gather: XLA for TPUs copies parameters that are donated
# before it uses them, and once more what the all-gather brings.
KERNELS_BESIDE_A_GATHER = {"v5e": 3, "h100": 1}


@pytest.fixture(autouse=True)
def lenient():
    """Optax mixes integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def needs(device):
    """Skips where what compiles for a device is not installed."""
    if missing := compiled.missing([device]):
        command = 'pip install -e ".[aot]"'
        pytest.skip(f"{', '.join(missing)} is missing: {command}")


class Step(NamedTuple):
    """A compiled step, on one of the devices."""

    kernels: int
    moved_bytes: float
    # To read the gradient once, and to read and write parameters and state once.
    ideal_bytes: int
    temporary_bytes: int
    collectives: dict[str, int]
    # Of JAX, where it has some.
    cost: dict[str, float]


def compile_step(contender, device, arrays=compiled.MATRIX):
    needs(device)
    executable, ideal = compiled.compile_step(contender, device, arrays)
    program = compiled.read(executable.as_text())
    return Step(
        len(program.kernels),
        program.moved_bytes,
        ideal,
        executable.memory_analysis().temp_size_in_bytes,
        program.collectives,
        executable.cost_analysis(),
    )


@functools.cache
def step(device, name):
    with jax.numpy_dtype_promotion("standard"):
        return compile_step(compiled.contenders()[name], device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", compiled.contenders())
def test_one_kernel_moves_the_fewest_bytes(name, device):
    """Without temporary memory; what is not so yet is named above."""
    found = step(device, name)
    kernels, excess = NOT_IDEAL.get((device, name), (1, 0))
    assert found.kernels == kernels
    moved = found.moved_bytes - found.ideal_bytes
    assert moved - excess * PARAMETERS == (
        pytest.approx(0, abs=VECTORS) if "shared" in name else 0
    )
    assert found.temporary_bytes < (VECTORS if "shared" in name else SCALARS)
    assert found.collectives == {}
    if device == "v5e":
        # As JAX counts them; it counts nothing for a GPU.
        moved = pytest.approx(found.cost["bytes accessed"], rel=1e-3)
        assert found.moved_bytes == moved


@pytest.mark.parametrize("device", DEVICES)
def test_the_fewest_bytes(device):
    """Gradients read, parameters and state read and written."""
    for name, gradient, state in [
        ("adamax float32", 4, 8),
        ("adamax int8/uint8", 4, 2),
        ("bfloat16: adamax bfloat16/bfloat16", 2, 4),
        ("bfloat16: adamax int8/uint8 and int16", 2, 4),
        ("bfloat16: adamax int8/uint8 and int8", 2, 3),
    ]:
        ideal = step(device, name).ideal_bytes
        assert ideal == (3 * gradient + 2 * state) * PARAMETERS


@pytest.mark.parametrize("device", DEVICES)
def test_one_kernel_for_each_leaf(device):
    needs(device)
    # Each too large for the chip of a TPU, to which others are copied in slices.
    arrays = {"a": (2**14, 2**13), "b": (2**27,), "c": (2**7, 2**10, 2**10)}
    found = compile_step(
        compiled.Contender(OPTIMIZERS["adamax int8/uint8"]), device, arrays
    )
    assert found.kernels == len(arrays)
    assert found.moved_bytes == found.ideal_bytes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtypes", [None, ("bfloat16", "bfloat16"), ("int8", "uint8")])
def test_a_bounded_growth_moves_no_byte_more(dtypes, device):
    needs(device)
    m_dtype, u_dtype = dtypes or (None, None)
    optimizer = adamax(max_growth=1.1, m_dtype=m_dtype, u_dtype=u_dtype)
    for dtype in (jnp.float32, jnp.bfloat16):
        found = compile_step(compiled.Contender(optimizer, dtype), device)
        assert found.kernels == 1
        assert found.moved_bytes == found.ideal_bytes
        assert found.temporary_bytes < SCALARS


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("p", [2.0, 3.5])
@pytest.mark.parametrize(
    ("dtypes", "state"),
    [
        ((None, None), 8),
        (("bfloat16", "bfloat16"), 4),
        (("int8", "bfloat16"), 3),
        (("int8", "uint8"), 2),
    ],
)
def test_averages_move_no_byte_more(dtypes, state, p, device):
    """One kernel, 28 bytes of Adam in float32 to 20, 18 and 16."""
    needs(device)
    optimizer = lp_adam(1e-3, p, m_dtype=dtypes[0], u_dtype=dtypes[1])
    found = compile_step(compiled.Contender(optimizer), device)
    assert found.kernels == 1
    assert found.moved_bytes == found.ideal_bytes
    assert found.ideal_bytes == (12 + 2 * state) * PARAMETERS
    assert found.temporary_bytes < SCALARS


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "shape", [(2**27,), (2**9, 2**9, 2**9), (2**6, 2**7, 2**7, 2**7)]
)
def test_the_thresholds_of_averages_are_in_the_same_kernel(shape, device):
    """They depend on the position along each axis."""
    needs(device)
    optimizer = adamw(1e-3, m_dtype="int8", u_dtype="uint8")
    found = compile_step(compiled.Contender(optimizer), device, {"array": shape})
    assert found.kernels == 1
    assert found.moved_bytes == found.ideal_bytes


@pytest.mark.parametrize("device", DEVICES)
def test_adamw_of_a_model_in_bfloat16(device):
    """6 bytes of parameter, residual and state, read and written, and the gradient."""
    needs(device)
    optimizer = master_weights(adamw(1e-3, m_dtype="int8", u_dtype="uint8"))
    found = compile_step(compiled.Contender(optimizer, jnp.bfloat16), device)
    assert found.kernels == 1
    assert found.moved_bytes == found.ideal_bytes == 14 * PARAMETERS


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "name", ["optax.adamax", "adamax float32", "adamax int8/uint8"]
)
def test_zero_gathers_the_new_parameters_once(name, device):
    """And nothing of the state."""
    found = compile_step(compiled.Contender(OPTIMIZERS[name], devices=4), device)
    assert found.collectives == {"all-gather": 4 * PARAMETERS}
    assert found.kernels == KERNELS_BESIDE_A_GATHER[device]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [adamax, adamw])
def test_parameters_that_are_divided_bring_no_collectives(make, device):
    """FSDP: each device has all that its part of the update needs."""
    needs(device)
    optimizer = make(1e-3, m_dtype="int8", u_dtype="uint8")
    contender = compiled.Contender(optimizer, devices=4, divided="FSDP")
    found = compile_step(contender, device)
    assert found.collectives == {}
    assert found.kernels == 1
    assert found.moved_bytes == found.ideal_bytes
    assert found.temporary_bytes < SCALARS


@pytest.mark.parametrize("divided", ["FSDP", "ZeRO-1"])
def test_what_is_computed_for_many_devices_is_what_is_compiled(divided):
    """On four, and a model of one layer."""
    needs("h100")
    arrays, method = shapes.llama2(layers=1), "adamax int8/uint8"
    row = scale.row("one layer", arrays, 4, divided, method)
    optimizer, dtype = scale.METHODS[method]
    contender = compiled.Contender(optimizer, dtype, devices=4, divided=divided)
    executable, ideal = compiled.compile_step(contender, "h100", arrays)
    found = compiled.read(executable.as_text())
    assert len(found.kernels) == len(arrays)
    assert ideal == row.moved_bytes
    # Beside an all-gather kernels read a part of the parameters.
    assert found.moved_bytes == ideal or divided == "ZeRO-1"
    assert sum(found.collectives.values()) == row.gathered_bytes
    arguments = executable.memory_analysis().argument_size_in_bytes
    # The parameters, as many gradients, the state.
    held = 2 * row.parameter_bytes + row.state_bytes
    assert 0 < arguments - held < SCALARS


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
    (gpu, *_) = compiled.devices("h100")

    def placed(tree):
        on_gpu = SingleDeviceSharding(gpu)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_gpu), tree
        )

    params = jax.ShapeDtypeStruct((256, 256), dtype)
    full = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    state = placed(jax.eval_shape(optimizer.init, params))
    params, full = placed(params), placed(full)

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
    needs("v5e")
    contender = compiled.contenders()["adamax int8 and shared u"]
    executable, _ = compiled.compile_step(contender, "v5e", {"matrix": (4000, 512)})
    arguments = executable.memory_analysis().argument_size_in_bytes
    parameters, u = 4000 * 512, 4096
    assert arguments - 9 * parameters - 4 * u < SCALARS


def test_the_table(monkeypatch, tmp_path, capsys):
    """What does not compile is left out, but for what the others are compared to."""
    needs("v5e")
    needs("h100")
    contenders = {
        name: compiled.Contender(OPTIMIZERS[name])
        for name in (REFERENCE, "adamax int8/uint8")
    }
    contenders["broken"] = broken = compiled.Contender(None)
    compile_step = compiled.compile_step

    def compile_or_fail(contender, device):
        if contender is broken:
            raise ValueError("no room\nat all")
        return compile_step(contender, device)

    monkeypatch.setattr(compiled, "contenders", lambda: contenders)
    monkeypatch.setattr(compiled, "compile_step", compile_or_fail)
    path = tmp_path / "a.json"
    assert main(["bench", "--for", "v5e,h100", "--json", str(path)]) == 0
    printed, progress = map(squeezed, capsys.readouterr())
    for device in DEVICES:
        row = f"| {device} | optax.adamax | 1 | 28.00 | 1.00 | 1.00 | 0.00 |"
        assert row in printed
        assert f"| {device} | adamax int8/uint8 | 1 | 16.00 | 0.57 | 1.00 |" in printed
        assert f"left out: {device}, broken: no room\n" in progress
    assert "Compiled, not run" in printed
    assert " ms " not in printed
    saved = json.loads(path.read_text())
    assert saved["compiled_not_run"] is True
    assert saved["versions"]["jax"] == jax.__version__
    assert saved["command"] == "python -m adamax_jax bench --for v5e,h100"
    assert [row["ratio"] for row in saved["rows"]] == [1, 16 / 28] * 2
    contenders[REFERENCE] = broken
    with pytest.raises(ValueError, match="no room"):
        list(compiled.measure(["v5e"]))


def test_what_a_contender_is_compared_to():
    """One of the same parameters, which comes before it."""
    names = list(compiled.contenders())
    for i, name in enumerate(names):
        assert compiled.reference_of(name) in names[: i + 1]
    assert compiled.reference_of("bfloat16: adamax int8/uint8 and int8") == (
        "bfloat16: optax.adamax"
    )
    assert compiled.reference_of("optax.adam") == "optax.adamax"


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
    assert main(["bench", "--for", device]) == 1
    message = capsys.readouterr().err
    assert "The command bench needs " in message
    assert package in message
    assert '[aot]"' in message
    monkeypatch.setattr(compiled, "_is_there", lambda name: name != module)
    with pytest.raises(ImportError, match=r"pip install 'adamax_jax\[aot\]'") as error:
        compiled.devices(device)
    assert module in str(error.value)


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
    needs("v5e")
    needs("h100")
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


# The reader of compiled programs, on programs written by hand.
FUSED = """%fused (p: f32[]) -> f32[] {
  %a = f32[100]{0} parameter(0)
  ROOT %b = f32[100]{0} negate(%a)
}
"""


def program(entry, others=FUSED):
    head = "HloModule test, is_scheduled=true\n\n"
    return f"{head}{others}\nENTRY %main.2 (p: f32[]) -> f32[] {{{entry}}}\n"


def kernels(*args):
    return compiled.read(program(*args)).kernels


def test_a_kernel_reads_its_operands_and_writes_its_results():
    """What it uses twice, also under another shape, is read once; scalars are free."""
    entry = """
  %p = f32[100]{0} parameter(0), sharding={replicated}
  %q = f32[10,10]{1,0} bitcast(%p)
  %m = s8[100]{0} parameter(1)
  %count = s32[] parameter(2)
  %more = s32[] add(%count, %count)
  %f = (f32[100]{0}, s8[100]{0}) fusion(%p, %m, %q, /*index=3*/%more), calls=%fused
  %new_p = f32[100]{0} get-tuple-element(%f), index=0
  %new_m = s8[100]{0} get-tuple-element(%f), index=1
  %half = bf16[100]{0} copy(%new_m), control-predecessors={%p}
  ROOT %t = (f32[100]{0}, s8[100]{0}, s32[]) tuple(%new_p, %new_m, %more)
"""
    assert kernels(entry) == [("fusion", 500, 500), ("copy", 100, 200)]
    assert compiled.read(program(entry)).moved_bytes == 1300


def test_what_stays_on_the_chip_is_not_moved():
    """As on TPUs, in the vector memory S(1)."""
    entry = """
  %p = f32[1024]{0:T(1024)} parameter(0)
  %there = (f32[1024]{0:T(1024)S(1)}, f32[1024]{0:T(1024)}, u32[]{:S(2)}) copy-start(%p)
  %q = f32[1024]{0:T(1024)S(1)} copy-done(%there)
  ROOT %f = f32[1024]{0:T(1024)} fusion(%q), kind=kLoop, calls=%fused
"""
    found = compiled.read(program(entry))
    assert found.kernels == [("fusion", 0, 4096)]
    assert found.copies == [("copy-start", 4096, 0)]
    in_slices = entry.replace("copy-start", "slice-start")
    assert math.isnan(compiled.read(program(in_slices)).moved_bytes)


def test_a_kernel_that_may_read_a_part_has_no_known_bytes():
    """Also where the slice is in a fusion inside of the fusion."""
    entry = """
  %p = f32[100]{0} parameter(0)
  ROOT %f = f32[100]{0} fusion(%p), kind=kLoop, calls=%outer
"""
    outer = """%outer (p: f32[]) -> f32[] {
  %a = f32[100]{0} parameter(0)
  ROOT %b = f32[100]{0} fusion(%a), kind=kLoop, calls=%fused
}
"""
    for opcode in ("negate", "dynamic-slice", "gather", "while", "custom-call"):
        (kernel,) = kernels(entry, outer + FUSED.replace("negate", opcode))
        assert kernel.opcode == "fusion"
        assert math.isnan(kernel.read_bytes) == (opcode != "negate")


def test_calls_and_collectives():
    """A pair of start and done is one collective, and calls are followed."""
    called = """%called (p: f32[]) -> f32[] {
  %a = f32[100]{0} parameter(0)
  ROOT %b = f32[100]{0} fusion(%a), kind=kLoop, calls=%fused
}
"""
    entry = """
  %p = f32[25]{0} parameter(0)
  %s = (f32[25]{0}, f32[100]{0}) all-gather-start(%p), dimensions={0}
  %d = f32[100]{0} all-gather-done(%s)
  %r = f32[25]{0} reduce-scatter(%d), dimensions={0}, to_apply=%fused
  ROOT %q = f32[100]{0} call(%d), to_apply=%called
"""
    found = compiled.read(program(entry, FUSED + called))
    assert found.kernels == [("fusion", 400, 400)]
    assert found.collectives == {"all-gather": 400, "reduce-scatter": 100}


def test_a_text_that_cannot_be_read_is_an_error():
    with pytest.raises(ValueError, match="no computation begins with ENTRY"):
        compiled.read("HloModule nothing\n")
    with pytest.raises(ValueError, match="Not an instruction of HLO: something else"):
        compiled.read(program("\n  something else\n"))
