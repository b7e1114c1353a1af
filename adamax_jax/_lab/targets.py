"""Devices that JAX compiles for where they are not there: TPUs and GPUs."""

import importlib.util
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.experimental import topologies

# What libtpu needs where there is no TPU: not to ask the cloud which one it is on, not
# to wait for another process, and, so that it does not complain, a place to be.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
# The last is the folder of ptxas.
_CUDA = ("jax_plugins.xla_cuda13", "jax_cuda13_plugin", "nvidia.cu13.bin")
# NVIDIA's H100 SXM. As a driver would describe it, without which there is none.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472  threads_per_core_limit: 2048
  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800
  clock_rate_ghz: 1.98  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
"""


@dataclass(frozen=True)
class Target:
    """A kind of device."""

    platform: str
    # Four of them at least, on one host.
    topology: str
    # What must be there to import.
    modules: tuple[str, ...] = ("libtpu",)
    topology_options: Mapping[str, str] = field(default_factory=dict)
    compiler_options: Mapping[str, bool] = field(default_factory=dict)


TARGETS = {
    "v4": Target("tpu", "v4:2x2x1"),
    "v5e": Target("tpu", "v5e:2x2"),
    "v5p": Target("tpu", "v5p:2x2x1"),
    "v6e": Target("tpu", "v6e:2x2"),
    "tpu7x": Target(
        "tpu",
        "tpu7x:2x2x1",
        # Its SparseCores' instructions are not known to the jaxlib that prints them.
        compiler_options={
            "xla_tpu_enable_sparse_core_collective_offload_all_gather": False
        },
    ),
    "h100": Target(
        "cuda", "h100", _CUDA, {"topology": "1x1x4", "target_config": _H100}
    ),
}


def devices(name: str) -> list[Any]:
    """Some devices of a kind, four at least, to compile for.

    Unless JAX has been told where to run, it stays on the CPU from here on: it would
    try the plugins of devices that are not there.

    Raises:
      ImportError: If what compiles for the device is not installed.
    """
    target = TARGETS[name]
    if missing := [m for m in target.modules if not is_there(m)]:
        raise ImportError(
            f"To compile for {name}, {', '.join(missing)} must be there to import: "
            "pip install 'adamax_jax[aot]'"
        )
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    description = topologies.get_topology_desc(
        target.topology, target.platform, **target.topology_options
    )
    return list(description.devices)


def modules(names: Iterable[str]) -> list[str]:
    """What must be there to import to compile for some kinds."""
    return list(dict.fromkeys(m for name in names for m in TARGETS[name].modules))


def is_there(module: str) -> bool:
    """Whether a module can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        # Of the package that it is in.
        return False
