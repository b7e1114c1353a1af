"""What a step moves on TPUs and GPUs, from what JAX compiles for them: none is there.

How the compiled programs are read is tested on small ones, written by hand.
"""

import functools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import SingleDeviceSharding
from sequences import STORAGES

from adamax_jax import (
    adamax,
    adamw,
    full_params,
    lp_adam,
    master_weights,
    set_full_params,
)
from adamax_jax._lab import bench, compiled, hlo, scale, shapes, targets, traffic
from adamax_jax._lab.cli import main
from adamax_jax._lab.contenders import TWO_BYTES

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
# XLA for TPUs copies parameters that are donated before it uses them, and once more
# what the all-gather brings: two kernels and 16 bytes per float32 parameter, of
# Optax's as of ours.
COPIES_BESIDE_A_GATHER = {"v5e": (3, 16), "h100": (1, 0)}


@pytest.fixture(autouse=True)
def lenient():
    """Optax mixes integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def needs(device):
    """Skips where what compiles for a device is not installed."""
    missing = [m for m in targets.modules([device]) if not targets.is_there(m)]
    if missing:
        command = 'pip install -e ".[aot]"'
        pytest.skip(f"{', '.join(missing)} is missing: {command}")


@functools.cache
def step(device, name):
    needs(device)
    with jax.numpy_dtype_promotion("standard"):
        return compiled.compile_step(compiled.contenders()[name], device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "name", [n for n in compiled.contenders() if not n.startswith(compiled.FOUR)]
)
def test_one_kernel_moves_the_fewest_bytes(name, device):
    """Without temporary memory; what is not so yet is named above."""
    found = step(device, name)
    kernels, excess = NOT_IDEAL.get((device, name), (1, 0))
    assert found.traffic.kernels == kernels
    moved = found.traffic.moved_bytes - found.ideal_bytes
    assert moved - excess * PARAMETERS == (
        pytest.approx(0, abs=VECTORS) if "shared" in name else 0
    )
    assert found.temporary_bytes < (VECTORS if "shared" in name else SCALARS)
    assert found.traffic.collectives == {}


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
    arrays = {"a": (2**13, 2**13), "b": (2**26,), "c": (2**6, 2**10, 2**10)}
    found = compiled.compile_step(compiled.Contender(TWO_BYTES), device, arrays)
    assert found.traffic.kernels == len(arrays)
    assert found.traffic.moved_bytes == found.ideal_bytes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtypes", [None, ("bfloat16", "bfloat16"), ("int8", "uint8")])
def test_a_bounded_growth_moves_no_byte_more(dtypes, device):
    needs(device)
    m_dtype, u_dtype = dtypes or (None, None)
    optimizer = adamax(max_growth=1.1, m_dtype=m_dtype, u_dtype=u_dtype)
    for dtype in (jnp.float32, jnp.bfloat16):
        found = compiled.compile_step(compiled.Contender(optimizer, dtype), device)
        assert found.traffic.kernels == 1
        assert found.traffic.moved_bytes == found.ideal_bytes
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
    found = compiled.compile_step(compiled.Contender(optimizer), device)
    assert found.traffic.kernels == 1
    assert found.traffic.moved_bytes == found.ideal_bytes
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
    found = compiled.compile_step(
        compiled.Contender(optimizer), device, {"array": shape}
    )
    assert found.traffic.kernels == 1
    assert found.traffic.moved_bytes == found.ideal_bytes


@pytest.mark.parametrize("device", DEVICES)
def test_adamw_of_a_model_in_bfloat16(device):
    """6 bytes of parameter, residual and state, read and written, and the gradient."""
    needs(device)
    optimizer = master_weights(adamw(1e-3, m_dtype="int8", u_dtype="uint8"))
    found = compiled.compile_step(compiled.Contender(optimizer, jnp.bfloat16), device)
    assert found.traffic.kernels == 1
    assert found.traffic.moved_bytes == found.ideal_bytes == 14 * PARAMETERS


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "name", ["optax.adamax", "adamax float32", "adamax int8/uint8"]
)
def test_zero_gathers_the_new_parameters_once(name, device):
    """And nothing of the state."""
    found = step(device, compiled.FOUR + name)
    assert found.traffic.collectives == {"all-gather": 4 * PARAMETERS}
    kernels, excess = COPIES_BESIDE_A_GATHER[device]
    assert found.traffic.kernels == kernels
    assert found.traffic.moved_bytes == found.ideal_bytes + excess * PARAMETERS


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [adamax, adamw])
def test_parameters_that_are_divided_bring_no_collectives(make, device):
    """FSDP: each device has all that its part of the update needs."""
    needs(device)
    optimizer = make(1e-3, m_dtype="int8", u_dtype="uint8")
    contender = compiled.Contender(optimizer, devices=4, shared="everything")
    found = compiled.compile_step(contender, device)
    assert found.traffic.collectives == {}
    assert found.traffic.kernels == 1
    assert found.traffic.moved_bytes == found.ideal_bytes
    assert found.temporary_bytes < SCALARS


# Without ZeRO-1 on TPUs, where XLA copies beside it, as is tested above.
@pytest.mark.parametrize(
    ("device", "divided"), [("v5e", "FSDP"), ("h100", "FSDP"), ("h100", "ZeRO-1")]
)
def test_what_is_reckoned_for_many_devices_is_what_is_compiled(device, divided):
    """On four, and a model of one layer."""
    needs(device)
    arrays, method = shapes.llama2(layers=1), "adamax int8/uint8"
    reckoned = scale.row("one layer", arrays, 4, divided, method)
    contender = compiled.Contender(
        *scale.METHODS[method], devices=4, shared=scale.DIVIDED[divided]
    )
    executable, _ = compiled.compiled(contender, device, arrays)
    found = traffic.traffic(executable)
    assert found.kernels == len(arrays)
    assert found.moved_bytes == reckoned.moved_bytes
    assert sum(found.collectives.values()) == reckoned.gathered_bytes
    arguments = executable.memory_analysis().argument_size_in_bytes
    # The parameters, as many gradients, the state.
    reckoned_arguments = 2 * reckoned.parameter_bytes + reckoned.state_bytes
    assert 0 < arguments - reckoned_arguments < SCALARS


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
    (gpu, *_) = targets.devices("h100")

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
    executable, _ = compiled.compiled(contender, "v5e", {"matrix": (4000, 512)})
    _, entry = hlo.parse(executable.as_text())
    (u,) = (
        instruction.shape
        for instruction in entry.values()
        if instruction.opcode == "parameter" and instruction.shape.dims == (4000, 1)
    )
    assert (u.dtype, u.bytes) == ("f32", 16_384)


def test_the_table(monkeypatch, tmp_path, capsys):
    needs("v5e")
    needs("h100")
    few = ("optax.adamax", "adamax int8/uint8", compiled.FOUR + "optax.adamax")
    some = {name: compiled.contenders()[name] for name in few}
    monkeypatch.setattr(compiled, "contenders", lambda: some)

    def compile_step(contender, device):
        (name,) = (n for n, other in some.items() if other is contender)
        return step(device, name)

    monkeypatch.setattr(compiled, "compile_step", compile_step)

    path = tmp_path / "a.json"
    assert main(["bench", "--for", "v5e,h100", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    for device in DEVICES:
        assert (
            f"| {device} | optax.adamax | 1 | 28.00 | 1.00 | 1.00 | 0.00 |  |"
            in printed
        )
        assert f"| {device} | adamax int8/uint8 | 1 | 16.00 | 0.57 | 1.00 |" in printed
    assert printed.count("| all-gather 4.00 |") == len(DEVICES)
    assert "Compiled, not run" in printed
    assert " ms " not in printed
    saved = json.loads(path.read_text())
    assert saved["compiled_not_run"] is True
    assert saved["versions"]["jax"] == jax.__version__
    assert saved["command"] == "python -m adamax_jax bench --for v5e,h100"
    assert [row["ratio"] for row in saved["rows"]] == [1, 16 / 28, 1] * 2


def test_what_does_not_compile_is_left_out(monkeypatch, capsys):
    """But not what the others are compared to."""
    broken = compiled.Contender(TWO_BYTES)
    contenders = {bench.REFERENCE: compiled.Contender(adamax()), "broken": broken}

    def compile_step(contender, device):
        if contender is broken:
            raise ValueError("no room\nat all")
        return compiled.Step(traffic.Traffic(1, 8, 8, {}), 0, 16)

    monkeypatch.setattr(compiled, "contenders", lambda: contenders)
    monkeypatch.setattr(compiled, "compile_step", compile_step)
    ((row,),) = compiled.measure(["v5e"])
    assert (row.contender, row.ratio, row.ratio_to_ideal) == (bench.REFERENCE, 1, 1)
    assert capsys.readouterr().err == "left out: v5e, broken: no room\n"
    contenders[bench.REFERENCE] = broken
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


@pytest.mark.parametrize("text", ["h200", "v5e,h200", "v5e,", "", "v5e, h100"])
def test_devices_that_are_not_known(text, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["bench", "--for", text])
    assert exit.value.code == 2
    message = f"{text.split(',')[-1]!r} is none of {', '.join(targets.TARGETS)}"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [("--figure", "a.png"), ("--max-size", "10"), ("--repetitions", "2")],
)
def test_options_of_times_are_refused(option, value, capsys):
    assert main(["bench", "--for", "v5e", option, value]) == 2
    message = f"{option} is for times, and --for measures none: leave one out."
    assert message in capsys.readouterr().err


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
    monkeypatch.setattr(targets, "is_there", lambda name: name != module)
    with pytest.raises(ImportError, match=r"pip install 'adamax_jax\[aot\]'") as error:
        targets.devices(device)
    assert module in str(error.value)


def test_what_the_user_has_set_stays(monkeypatch):
    needs("v5e")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "0")
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
    devices = targets.devices("v5e")
    assert os.environ["TPU_SKIP_MDS_QUERY"] == "0"
    assert os.environ["TPU_WORKER_HOSTNAMES"] == "localhost"
    assert len(devices) >= 4
    assert {device.device_kind for device in devices} == {"TPU v5 lite"}
    assert jax.default_backend() == "cpu"


CHILD = """
import jax
from adamax_jax._lab import targets
devices = [targets.devices(name)[0].platform for name in ("v5e", "h100")]
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


def program(entry, *others):
    """A program in HLO from its instructions, those of its entry first."""
    text = 'HloModule test, is_scheduled=true\n\nFileNames\n1 "test.py"\n\n'
    for lines in others:
        name, _, body = lines.partition("\n")
        text += f"%{name} (p: f32[]) -> f32[] {{\n{body.rstrip()}\n}}\n\n"
    return f"{text}ENTRY %main (p: f32[]) -> f32[] {{\n{entry.strip(chr(10))}\n}}\n"


def counted(entry, *others):
    """Kernels, bytes read and written, and collectives."""
    found = traffic.traffic_of_text(program(entry, *others))
    return (
        found.kernels,
        found.read_bytes,
        found.written_bytes,
        dict(found.collectives),
    )


BODY = """body
  %a = f32[100]{0} parameter(0)
  ROOT %b = f32[100]{0} negate(%a)
"""


def test_a_kernel_reads_its_operands_and_writes_its_results():
    entry = """
  %p = f32[100]{0} parameter(0), sharding={replicated}
  %m = s8[100]{0} parameter(1)
  %count = s32[] parameter(2)
  %more = s32[] add(%count, %count)
  %f = (f32[100]{0}, s8[100]{0}) fusion(%p, %m, /*index=2*/%more), calls=%body
  %new_p = f32[100]{0} get-tuple-element(%f), index=0
  %new_m = s8[100]{0} get-tuple-element(%f), index=1
  ROOT %t = (f32[100]{0}, s8[100]{0}, s32[]) tuple(%new_p, %new_m, %more)
"""
    assert counted(entry, BODY) == (1, 500, 500, {})


def test_what_is_read_twice_by_one_kernel_is_read_once():
    """Also under another shape."""
    entry = """
  %p = f32[100]{0} parameter(0)
  %q = f32[10,10]{1,0} bitcast(%p)
  %r = f32[10,10]{1,0} bitcast(%q)
  ROOT %f = f32[100]{0} fusion(%p, %q, %r, %p), kind=kLoop, calls=%body
"""
    assert counted(entry, BODY) == (1, 400, 400, {})


def test_kernels_that_are_no_fusions():
    entry = """
  %p = bf16[100]{0} parameter(0)
  %zero = bf16[] constant(0)
  %copy.1 = bf16[100]{0} copy(%p)
  %full = f32[100]{0} convert(%copy.1)
  %sum = bf16[] reduce(%p, %zero), dimensions={0}, to_apply=%body
  %part = f32[10]{0} slice(%full), slice={[0:10]}
  ROOT %none = token[] after-all()
"""
    # The slice reads what it writes.
    assert counted(entry, BODY) == (4, 200 + 200 + 200 + 40, 200 + 400 + 40, {})


def test_what_stays_on_the_chip_is_not_moved():
    """As on TPUs: in the vector memory S(1), from where it is copied back."""
    entry = """
  %p = f32[1024]{0:T(1024)} parameter(0)
  %there = (f32[1024]{0:T(1024)S(1)}, f32[1024]{0:T(1024)}, u32[]{:S(2)}) copy-start(%p)
  %q = f32[1024]{0:T(1024)S(1)} copy-done(%there)
  %f = f32[1024]{0:T(1024)S(1)} fusion(%q), kind=kLoop, calls=%body
  %back = (f32[1024]{0:T(1024)}, f32[1024]{0:T(1024)S(1)}, u32[]{:S(2)}) copy-start(%f)
  ROOT %r = f32[1024]{0:T(1024)} copy-done(%back)
"""
    assert counted(entry, BODY) == (1, 4096, 4096, {})


def test_an_array_that_is_brought_to_the_chip_in_slices():
    entry = """
  %p = f32[2048]{0:T(1024)} parameter(0)
  %s = ((f32[2048]{0:T(1024)}), f32[1024]{0:T(1024)S(1)}, s32[]{:S(2)}) slice-start(%p)
  %t = ((f32[2048]{0:T(1024)}), f32[1024]{0:T(1024)S(1)}, s32[]{:S(2)}) slice-start(%p)
  %a = f32[1024]{0:T(1024)S(1)} slice-done(%s)
  %b = f32[1024]{0:T(1024)S(1)} slice-done(%t)
  %q = f32[2048]{0:T(1024)S(1)} custom-call(%a, %b), custom_call_target="ConcatBitcast"
  ROOT %f = f32[2048]{0:T(1024)} fusion(%q), kind=kLoop, calls=%body
"""
    assert counted(entry, BODY) == (1, 8192, 8192, {})


@pytest.mark.parametrize(
    ("array", "size"),
    [
        ("f32[4000]{0}", 16_000),
        ("f32[4000,1]{0,1:T(1,128)}", 16_384),
        ("f32[4000,1]{1,0:T(8,128)}", 4000 * 128 * 4),
        ("f32[20,200]{1,0:T(8,128)}", 24 * 256 * 4),
        ("f32[20,200]{0,1:T(8,128)}", 128 * 200 * 4),
        ("s8[100]{0:T(1024)(128)(4,1)}", 1024),
        ("bf16[3,20,200]{2,1,0:T(8,128)(2,1)}", 3 * 24 * 256 * 2),
        ("bf16[3,200]{1,0:T(4,128)(2,1)S(1)}", 4 * 256 * 2),
        ("pred[]", 1),
        ("f8e4m3fn[10]{0}", 10),
        ("c64[0,5]{1,0}", 0),
    ],
)
def test_bytes_of_an_array_are_those_of_its_tiles(array, size):
    _, entry = hlo.parse(program(f"  ROOT %a = {array} parameter(0)"))
    assert entry["a"].shape.bytes == size


def test_a_fusion_that_reads_a_slice():
    """As where the state is divided, and the parameters are not."""
    fused = """fused
  %whole = f32[100]{0} parameter(1)
  %start = s32[] parameter(0)
  %part = f32[25]{0} dynamic-slice(%whole, %start), dynamic_slice_sizes={25}
  %m = f32[25]{0} parameter(2)
  ROOT %sum = f32[25]{0} add(%part, %m)
"""
    entry = """
  %p = f32[100]{0} parameter(0)
  %i = s32[] parameter(1)
  %m = f32[25]{0} parameter(2)
  ROOT %f = f32[25]{0} fusion(%i, %p, %m), kind=kLoop, calls=%fused
"""
    assert counted(entry, fused) == (1, 200, 100, {})
    # Used in whole as well, it is read in whole.
    both = fused.replace("ROOT", "%n = f32[100]{0} negate(%whole)\n  ROOT")
    assert counted(entry, both) == (1, 500, 100, {})
    # A slice of what was computed does not tell what that has read.
    of_sum = fused.replace("dynamic-slice(%whole", "dynamic-slice(%m")
    of_sum = of_sum.replace("parameter(2)", "negate(%whole)")
    with pytest.raises(ValueError, match=r"dynamic-slice moves is not known.*%part"):
        counted(entry, of_sum)


def test_calls_are_followed():
    """Whether they run at once, as command buffers of GPUs, or beside the others."""
    called = """called
  %a = f32[100]{0} parameter(0)
  ROOT %b = f32[100]{0} fusion(%a), kind=kLoop, calls=%body
"""
    entry = """
  %p = f32[100]{0} parameter(0)
  %q = f32[100]{0} call(%p), to_apply=%called
  %s = ((f32[100]{0}), f32[100]{0}, s32[]) async-start(%q), calls=%called
  ROOT %d = f32[100]{0} async-done(%s)
"""
    assert counted(entry, BODY, called) == (2, 800, 800, {})


def test_collectives():
    """The larger of what goes in and out, once also where they have two ends."""
    entry = """
  %p = f32[25]{0} parameter(0)
  %q = f32[100]{0} all-gather(%p), dimensions={0}
  %s = (f32[25]{0}, f32[100]{0}) all-gather-start(%p), dimensions={0}
  %d = f32[100]{0} all-gather-done(%s)
  %r = f32[25]{0} reduce-scatter(%q), dimensions={0}, to_apply=%body
  %one = f32[] constant(1)
  %all = f32[100]{0} all-reduce-start(%d), to_apply=%body
  ROOT %end = f32[100]{0} all-reduce-done(%all)
"""
    collectives = {"all-gather": 800, "reduce-scatter": 400, "all-reduce": 400}
    assert counted(entry, BODY) == (0, 0, 0, collectives)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("%x = f32[100]{0} while(%p), body=%body", "while moves is not known"),
        (
            '%x = f32[100]{0} custom-call(%p), custom_call_target="Sort"',
            "custom-call moves is not known",
        ),
        ("%x = f32[100]{0} new-op(%p)", r"new-op moves is not known here: %x\."),
        ("%x = f32[100]{0} call-start(%p)", "call-start moves is not known"),
        ("%x = f32[100]{0:S(5)} copy(%p)", r"memory space S\(5\) is not known"),
        ("%x = f4e2m1fn[100]{0} copy(%p)", "dtype f4e2m1fn is not known"),
        ("%x = f32[100]{0:T(8,*)} copy(%p)", r"layout \{0:T\(8,\*\)\} is not known"),
        ("%x = f32[100]{0} copy(%p", "parenthesis is not closed"),
        ("%x = f32[<=100]{0} copy(%p)", "No shape of HLO"),
        ("%x = f32[100]{0} 17", "No instruction of HLO"),
        ("something else", "No instruction of HLO: something else"),
    ],
)
def test_what_is_not_known_is_an_error(line, message):
    with pytest.raises(ValueError, match=message):
        counted(f"  %p = f32[100]{{0}} parameter(0)\n  {line}")


def test_a_fusion_with_a_scatter_is_an_error():
    """Its operands do not tell what it moves; neither do those of one inside of it."""
    entry = """
  %p = f32[100]{0} parameter(0)
  ROOT %f = f32[100]{0} fusion(%p), kind=kLoop, calls=%outer
"""
    outer = """outer
  %a = f32[100]{0} parameter(0)
  ROOT %b = f32[100]{0} fusion(%a), kind=kLoop, calls=%body
"""
    assert counted(entry, outer, BODY) == (1, 400, 400, {})
    with pytest.raises(ValueError, match="scatter moves is not known here: %b"):
        counted(entry, outer, BODY.replace("negate", "scatter"))


def test_a_text_that_is_no_program():
    with pytest.raises(ValueError, match="no computation begins with ENTRY"):
        traffic.traffic_of_text("HloModule nothing\n")
