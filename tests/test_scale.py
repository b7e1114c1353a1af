"""What a step needs of each of many devices, on paper.

That compilers need as much, tests/test_aot.py shows.
"""

import dataclasses

import pytest

from adamax_jax._lab import scale, shapes

SMALL = shapes.llama2(layers=1, width=256, hidden=512, keys=256, vocabulary=1024)
PARAMETERS = 1_180_416
# Bytes per parameter: of itself and of its gradient, and of its state.
BYTES = {
    "optax.adam": (4, 8),
    "adamax float32": (4, 8),
    "adamax bfloat16/bfloat16": (4, 4),
    "adamax int8/uint8": (4, 2),
    "bfloat16: optax.adam and a float32 copy": (2, 12),
    "bfloat16: adamax int8/uint8 and int16": (2, 4),
    "bfloat16: adamax int8/uint8 and int8": (2, 3),
}


@pytest.mark.parametrize("devices", [1, 8, 256])
@pytest.mark.parametrize("method", BYTES)
def test_each_device_has_its_part(method, devices):
    parameter, state = BYTES[method]
    zero, fsdp = (
        scale.row("small", SMALL, devices, divided, method)
        for divided in ("ZeRO-1", "FSDP")
    )
    assert zero.parameters == fsdp.parameters == PARAMETERS
    assert zero.parameter_bytes == zero.gathered_bytes == parameter * PARAMETERS
    assert fsdp.parameter_bytes * devices == parameter * PARAMETERS
    assert fsdp.gathered_bytes == 0
    for row in (zero, fsdp):
        assert row.state_bytes * devices == state * PARAMETERS
        assert row.moved_bytes * devices == (3 * parameter + 2 * state) * PARAMETERS


def test_a_shared_u_is_divided_too():
    """One byte for m, 4 for each row of a matrix and for each number of a vector."""
    row = scale.row("small", SMALL, 8, "FSDP", "adamax int8 and shared u")
    rows = sum(shape[0] for shape in SMALL.values())
    assert row.state_bytes * 8 == PARAMETERS + 4 * rows


def test_all_methods_have_rows(monkeypatch):
    assert set(BYTES) | {"adamax int8 and shared u"} == set(scale.METHODS)
    monkeypatch.setattr(scale, "MODELS", {"small": SMALL})
    assert len(scale.rows()) == len(scale.METHODS) * len(scale.DEVICES) * 2


def test_a_row_has_no_lists():
    """It becomes a line of a file."""
    row = scale.row("small", SMALL, 8, "FSDP", "adamax float32")
    assert all(isinstance(value, int | str) for value in dataclasses.astuple(row))
